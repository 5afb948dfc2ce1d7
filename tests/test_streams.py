"""What becomes of an answer where the terminal is not UTF-8, the disk is full, or the reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planner.basis import files
from planner.basis.errors import ARTEFACT, OK, USAGE, PlanError
from planner.cli import progress
from planner.cli.main import invoke
from planner.store import Store
from planner.values import cluster_file

ROOT = Path(__file__).parent.parent
PLAN = "from planner.cli.main import main; main()"
PRINTS = (
    "import atexit, os, sys; from planner.cli import init;"
    "own = init.files.write;"
    "init.files.write = lambda *a: (own(*a), os.write(1, b'library'), atexit.register(print, 'farewell'));" + PLAN
)


def plan(*arguments: str, program: str = PLAN, **more: object) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **{"env": env, **more})  # type: ignore[call-overload,no-any-return]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_stdout_is_one_error(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        started = plan("init", "--json", cwd=tmp_path, stdout=full)
        _, err = started.communicate()
    assert started.returncode == ARTEFACT
    assert err.decode().splitlines()[:3] == [
        "error: the answer cannot be printed",
        "where: stdout",
        "why:   No space left on device",
    ]


def test_a_reader_who_has_gone_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    started = plan("init", cwd=tmp_path, stdout=writing)
    os.close(writing)
    assert started.communicate()[1] == b""
    assert started.returncode == OK


def test_any_encoding_will_do_and_stdout_has_the_answer_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    started = plan("init", "µ…☃.py", cwd=tmp_path, stdout=subprocess.PIPE, env=environment, program=PRINTS)
    out, err = started.communicate()
    assert out.decode("ascii").startswith("wrote u...\\u2603.py")
    assert (b"library" in err, b"farewell" in err) == (True, True)
    assert (b"library" in out, b"farewell" in out) == (False, False)
    assert (tmp_path / "µ…☃.py").exists()


def test_a_name_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["init", "\udcff.py"]) == USAGE
    assert "where: '\\udcff.py'" in capsys.readouterr().err


def test_only_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("link", "a link to kept"), ("folder", "a folder"), ("pipe", "a pipe")):
        with pytest.raises(PlanError, match="no file that could be replaced") as raised:
            files.write(tmp_path / name, b"page")
        assert raised.value.why == f"it is {why}"
    with pytest.raises(PlanError) as raised:
        files.write(Path("/dev/null"), b"page")
    assert (raised.value.why, raised.value.code) == ("it is a device", ARTEFACT)
    files.write(tmp_path / "kept", b"page")
    assert (tmp_path / "kept").read_bytes() == b"page"


def test_the_old_file_stays_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanError) as raised:
        files.write(tmp_path / "page.html", b"new")
    assert raised.value.why == "No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    with progress.shown() as bar:
        bar.update(bar.add_task("simulating gpipe", total=8), completed=3)
        time.sleep(0.1)
    assert "simulating gpipe: 3 of 8, " in capsys.readouterr().err


HARDWARE = (ROOT / "examples" / "eight_devices.toml").read_text()


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        ("count = 8", "count = 1000000000", "<= "),
        ('name = "d"', 'name = "d\\nx"', r"'d\nx"),
        ('name = "box"', 'name = " "', "no name"),
    ],
)
def test_clusters_that_nobody_could_read(tmp_path: Path, was: str, now: str, why: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(HARDWARE.replace(was, now).replace('"box"', '" "' if now.endswith('" "') else '"box"'))
    with pytest.raises(PlanError) as raised:
        cluster_file.read(path)
    assert why in raised.value.why


def test_the_mark_that_editors_put_before_a_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("\ufeff" + HARDWARE.replace("\n", "\r\n"))
    assert len(cluster_file.read(path).devices) == 8


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("show", "--csv", "--json"), "--csv and --json exclude each other"),
        (("report", "0001-run", "--simulated"), "a page shows a run or a simulation"),
        (("simulate", "--k", "2", "--sort", "size"), "unknown column 'size'"),
        (("search", "--sort", "size"), "unknown column 'size'"),
    ],
)
def test_options_that_contradict_each_other_or_do_not_exist_are_refused_at_once(
    arguments: tuple[str, ...],
    what: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # nothing was measured here: that would be the next error
    assert invoke(list(arguments)) == USAGE
    told = capsys.readouterr()
    assert what in told.err + told.out


def test_two_runs_at_once_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    first = store.new_run("gpipe-k2-m8")
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # the second looks before the first has made its own
    assert [first.name, store.new_run("gpipe-k2-m8").name] == ["0001-gpipe-k2-m8", "0002-gpipe-k2-m8"]
