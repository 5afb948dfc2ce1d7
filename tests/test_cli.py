"""The command line as a person meets it: bad input first. Commands run in this process; runs start real ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from executor.steps import joined
from planner.basis.errors import ARTEFACT, DEVICE, INTERRUPTED, NOTHING_FITS, RUN_FAILED, TOLERANCE, USAGE
from planner.cli import main
from planner.cli.main import invoke
from planner.search import ranking
from planner.search.choice import TIE
from planner.simulate.predict import simulate
from planner.store import Store
from planner.values.cluster import Cluster, Host
from planner.values.profile import Profile, decode
from tests import factory

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "tests" / "executor" / "small_models.py"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    return


def by_hand(**changes: Any) -> Profile:
    """A profile of four layers in the store, whose model file does not exist."""
    import importlib.metadata

    profile = factory.profile([1.0] * 4, machine=factory.devices(8), message_bytes=10)
    key = msgspec.structs.replace(profile.key, torch=importlib.metadata.version("torch"))
    profile = msgspec.structs.replace(profile, key=key, **changes)
    Store().save_profile(profile)
    return profile


def failing(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> dict[str, str]:
    """Run a command that must fail; check the four lines and the one JSON document; return its error."""
    assert invoke(list(arguments)) == code
    out, err = capsys.readouterr()
    assert out == ""
    starts = [line.partition(":")[0] for line in err.splitlines()]
    assert [s for s in starts if s in ("error", "where", "why", "fix")] == ["error", "where", "why", "fix"]
    assert invoke([*arguments, "--json"]) == code
    out, _ = capsys.readouterr()
    document = json.loads(out)
    assert document["schema"] == "foreplan.cli/1"
    assert document["status"] in ("error", "infeasible", "interrupted")
    error: dict[str, str] = document["error"]
    assert error["exit_code"] == code  # type: ignore[comparison-overlap]
    return error


def test_no_such_model_file(capsys: pytest.CaptureFixture[str]) -> None:
    error = failing(capsys, USAGE, "profile", "nowhere.py")
    assert "nowhere.py" in error["where"]
    assert error["fix"].startswith("plan init nowhere.py")


def test_no_model_function(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.py").write_text("def batch(n): ...\n")
    assert "model()" in failing(capsys, USAGE, "profile", "empty.py")["what"]


def test_syntax_error_in_the_model_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.py").write_text("def model(:\n")
    assert "SyntaxError" in failing(capsys, USAGE, "profile", "broken.py")["why"]


def test_forward_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    error = failing(capsys, USAGE, "profile", f"{MODELS}:failing")
    assert "small_models.py" in error["where"]
    assert "shapes" in error["why"]


def test_too_few_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "three" in failing(capsys, USAGE, "profile", str(MODELS), "--sizes", "1,2")["what"]
    assert "whole numbers" in failing(capsys, USAGE, "profile", str(MODELS), "--sizes", "1,x")["what"]


def test_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "cuda" in failing(capsys, DEVICE, "profile", str(MODELS), "--device", "cuda")["what"]


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (("--m", "3"), "do not divide", "--batch 9"),
        (
            ("--k", "5", "--m", "5", "--batch", "5", "--strategy", "gpipe"),
            "no plan is possible",
            "--k 4 makes it possible",
        ),
        (("--k", "0"), "--k must be positive", "--k 1"),
        (("--k", "1000000000"), "--k 1000000000 is too large", "--k 8"),
        (("--k", "2", "--m", "9" * 20, "--batch", "9" * 20), "is too large", "--m 8"),
        (("--k", "2", "--batch", "8" + "0" * 19), "is too large", "--batch 8"),
        (("--k", "2", "--seed", "-1"), "seed", "--help"),
        (("--m", "-4"), "--m must be positive", "--m 1"),
        (("--batch", "0"), "--batch must be positive", "--batch 1"),
        (("--strategy", "gpip"), "unknown strategy", "choose"),
        (("--profile", "resnet"), "unknown profile", "plan profile"),
        (("--cluster", "none.toml"), "cluster file cannot be read", "examples/"),
        (("--kk", "2"), "No such option", "--help"),
    ],
)
def test_questions_without_an_answer(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], what: str, fix: str
) -> None:
    by_hand()
    error = failing(capsys, ARTEFACT if "--profile" in arguments else USAGE, "simulate", *arguments)
    assert what in error["what"]
    assert fix in error["fix"]


def test_more_devices_than_layers_leave_the_strategies_that_need_no_stages(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    assert invoke(["simulate", "--k", "5", "--m", "5", "--batch", "10", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert {"data-parallel-k5-m5", "zero-1-k5-m5"} <= {plan["plan"] for plan in data["plans"]}
    left_out = {name: own["why"] for own in data["rejected"] for name in own["strategies"]}
    assert left_out["gpipe"] == "5 stages are more than the model's 4 layers: every stage needs at least one layer"


def test_unknown_names_get_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    assert invoke(["simulate", "--k", "2", "--m", "4"]) == 0
    capsys.readouterr()
    assert "did you mean 'gpipe-k2-m4'" in failing(capsys, USAGE, "run", "gpip-k2-m4")["why"]
    assert "did you mean 'gpipe'" in failing(capsys, USAGE, "simulate", "--strategy", "gpip")["why"]
    assert "did you mean 'simulate'" in failing(capsys, USAGE, "simulat")["why"]
    assert "did you mean '--steps'" in failing(capsys, USAGE, "run", "best", "--step", "3")["why"]


def test_steps_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps" in failing(capsys, USAGE, "run", "best", "--steps", "0")["what"]


def test_nothing_measured_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(capsys, ARTEFACT, "simulate")["fix"].startswith("plan profile")
    assert failing(capsys, ARTEFACT, "run", "best")["fix"].startswith("plan simulate")
    assert failing(capsys, ARTEFACT, "report")["fix"].startswith("plan run")


@pytest.mark.parametrize("damage", ["truncated", "rubbish", "wrong type", "negative", "no layers"])
def test_damaged_profile(capsys: pytest.CaptureFixture[str], damage: str) -> None:
    by_hand()
    path = Store().profile_path(None)
    text = path.read_text()
    path.write_text(
        {
            "truncated": text[: len(text) // 2],
            "rubbish": "\x00\x01 not JSON",
            "wrong type": text.replace('"batch": 8', '"batch": "eight"'),
            "negative": text.replace('"median_s": 1.0', '"median_s": -1.0', 1),
            "no layers": json.dumps(json.loads(text) | {"layers": []}),
        }[damage]
    )
    error = failing(capsys, ARTEFACT, "simulate", "--k", "2", "--m", "4")
    assert str(path) in error["where"]
    field = {"wrong type": "$.batch", "negative": "layers[0]", "no layers": "layers"}.get(damage, "")
    assert field in error["why"]


def test_stale_profile_says_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.py").write_text("# another model\n")
    by_hand()
    error = failing(capsys, ARTEFACT, "simulate", "--k", "2", "--m", "4")
    assert "source_sha256" in error["why"]
    assert error["fix"] == "plan profile model.py"


@pytest.mark.parametrize(
    ("package", "itself", "same"), [("2.15.0", "2.15.0+cu132", True), ("2.15.0+cpu", "2.15.0+cu132", False)]
)
def test_a_package_without_the_build_in_its_name(
    package: str, itself: str, same: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch 2.15.0+cu132 comes from a package that is called 2.15.0: what it measured is not stale."""
    profile = by_hand()
    Store().save_profile(msgspec.structs.replace(profile, key=msgspec.structs.replace(profile.key, torch=itself)))
    monkeypatch.setattr("importlib.metadata.version", lambda name: package)
    assert (invoke(["simulate", "--k", "2", "--m", "4"]) == 0) == same
    assert (f"torch: {itself} -> {package}" in capsys.readouterr().err) != same


def test_memory_that_no_plan_fits(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(machine=factory.devices(8, memory_bytes=5000))
    error = failing(capsys, NOTHING_FITS, "simulate", "--k", "2", "--m", "4")
    assert "-k2-m4" in error["why"]
    assert error["details"]
    assert failing(capsys, NOTHING_FITS, "run", "best")["what"] == "no plan fits into memory"


def test_more_devices_than_the_cluster_has(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(machine=factory.devices(1))
    error = failing(capsys, DEVICE, "simulate", "--k", "2", "--m", "4")
    assert error["fix"] == "plan simulate --k 1"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written" in failing(capsys, ARTEFACT, "profile", str(MODELS))["what"]
    finally:
        tmp_path.chmod(0o700)


def test_folder_that_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """As an unwritable folder, but for root too."""
    Path(".plan").write_text("in the way")
    assert "cannot be written" in failing(capsys, ARTEFACT, "profile", str(MODELS))["what"]
    Path("taken").write_text("")
    assert "cannot be written" in failing(capsys, ARTEFACT, "init", "taken/model.py")["what"]


def test_init_does_not_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["init"]) == 0
    capsys.readouterr()
    before = Path("model.py").read_text()
    assert "exists" in failing(capsys, USAGE, "init")["what"]
    assert Path("model.py").read_text() == before


def test_cluster_files(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    assert (
        invoke(["simulate", "--k", "4", "--m", "4", "--cluster", str(ROOT / "examples/eight_devices.toml"), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["data"]["cluster"] == "eight separate devices"
    text = (ROOT / "examples/eight_devices.toml").read_text()
    for wrong, field in (
        (text.replace("bandwidth_bytes_per_s = ", "bandwidth_bytes_per_s = -"), "bandwidth"),
        (text.replace("memory_bytes = ", "memory_bytes = -"), "memory_bytes"),
        (text.replace("[[links]]", "[[wires]]"), "wires"),
        (text[: text.index("[[links]]")], "no link leads"),
    ):
        Path("wrong.toml").write_text(wrong)
        error = failing(
            capsys, USAGE, "simulate", "--k", "2", "--m", "4", "--strategy", "gpipe", "--cluster", "wrong.toml"
        )
        assert field in error["why"] + error["what"]


def test_plan_files(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    assert invoke(["simulate", "--k", "2", "--m", "4"]) == 0
    capsys.readouterr()
    path = Path(".plan/plans/gpipe-k2-m4.toml")
    text = path.read_text()
    for wrong, field in (
        (text.replace("microbatches = 4", "microbatches = 3"), "microbatches"),
        (text.replace('schedule = "gpipe"', "schedule = 7"), "schedule"),
        (text + "\nunknown = 1\n", "unknown"),
    ):
        Path("mine.toml").write_text(wrong)
        assert field in failing(capsys, ARTEFACT, "run", "mine.toml")["why"]
    assert "cannot be read" in failing(capsys, ARTEFACT, "run", "./none.toml")["what"]


# With real processes, on a profile of a small model that is measured once.


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a measured profile of the template's model."""
    folder = tmp_path_factory.mktemp("measured")
    plan(folder, "init")
    done = plan(folder, "profile", "model.py", "--budget", "1", "--sizes", "4,8,16,32", "--json")
    assert json.loads(done.stdout)["status"] == "ok"
    return folder


def plan(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "planner.cli.start", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def children(of: int) -> set[int]:
    """Processes below `of` now."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == of:
                found |= {int(entry.name)} | children(int(entry.name))
    return found


def test_the_loop(measured: Path) -> None:
    """profile, simulate, run, report: what the README says, with its figures consistent everywhere."""
    import torch

    simulated = json.loads(plan(measured, "simulate", "--k", "2", "--m", "8", "--json").stdout)["data"]
    fitting = [p for p in simulated["plans"] if p["fits"]]
    assert {p["plan"] for p in fitting} > {"single-k1-m8", "gpipe-k2-m8", "1f1b-k2-m8", "zb-h1-k2-m8"}
    assert fitting == sorted(fitting, key=lambda p: -p["throughput_samples_per_s"])
    best = next(p for p in fitting if p["plan"] == simulated["best"])
    quickest = next(p for p in fitting if not p["stale_gradients"])
    assert not best["stale_gradients"]
    assert best["step_low_s"] <= quickest["step_high_s"] * (1 + TIE), "as good as the quickest"
    text = plan(measured, "simulate", "--k", "2", "--m", "8").stdout
    assert f"best: {simulated['best']}" in text
    data = json.loads(plan(measured, "run", "1f1b-k2-m8", "--steps", "5", "--json").stdout)["data"]
    assert data["steps"] == len(data["losses"]) == len(data["learning_rates"]) == 5
    assert data["recorded_steps"] == 3
    assert {"total", "replay", "costs", "memory"} <= set(data["errors"])
    assert {e["name"] for e in data["errors"]["costs"]} >= {"0F", "0B", "1F", "1B", "0OPTIMIZER", "0LOAD"}
    assert len(data["errors"]["memory"]) == 2
    page = (measured / data["report"]).read_text()
    assert "1f1b-k2-m8" in page
    weights = torch.load(measured / data["weights"], weights_only=True)
    from executor.model_file import load

    load(str(measured / "model.py")).build(0).load_state_dict(weights)
    out = json.loads(plan(measured, "report", "--out", "page.html", "--json").stdout)["data"]
    assert (measured / out["report"]).stat().st_size == out["bytes"]


def test_check_fails_beyond_the_tolerance(measured: Path) -> None:
    plan(measured, "simulate", "--k", "1", "--m", "2")
    done = plan(measured, "run", "single-k1-m2", "--steps", "2", "--check", "1e-9", "--json", code=TOLERANCE)
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == TOLERANCE
    assert error["details"]["measured"]["step_s"] > 0


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start commands in sessions of their own; whatever a failing test leaves behind is ended."""
    processes: list[subprocess.Popen[str]] = []

    def begin(folder: Path, *arguments: str) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "planner.cli.start", *arguments],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def runs(folder: Path) -> set[Path]:
    return set((folder / ".plan" / "runs").glob("*"))


def finished_steps(run: Path) -> int:
    """Steps that both ranks of a run have written."""
    return len(joined(run, 2))


@pytest.mark.parametrize("how", ["interrupted", "interrupted twice", "killed"])
def test_a_run_that_is_broken_off(measured: Path, how: str, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Ctrl-C, and a rank killed in mid-run: the right exit code, finished steps kept, no process left.

    The first Ctrl-C also saves the weights; where a rank does not come to its next step, the second one ends the run.
    """
    plan(measured, "simulate", "--k", "2", "--m", "8")
    already = runs(measured)
    process = start(measured, "run", "gpipe-k2-m8", "--steps", "100000", "--json")
    wait_for(lambda: runs(measured) - already)
    (run,) = runs(measured) - already
    wait_for(lambda: finished_steps(run) > 0)
    below = children(process.pid)
    ranks = [p for p in below if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]
    if how == "interrupted":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "interrupted twice":
        os.kill(ranks[-1], signal.SIGSTOP)
        process.terminate()
        time.sleep(2)
        assert process.poll() is None, "it waits for its ranks"
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(ranks[-1], signal.SIGKILL)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - began
    expected = RUN_FAILED if how == "killed" else INTERRUPTED
    assert process.returncode == expected, out + err
    error = json.loads(out)["error"]
    assert error["exit_code"] == expected
    if how == "interrupted":
        kept = error["details"]
        assert kept["steps"] == len(kept["losses"]) < 100000
        assert error["what"] == f"interrupted after {kept['steps']} of 100000 steps"
        assert kept["stopped"]
        assert kept["asked_steps"] == 100000
        assert_trained(measured / "model.py", kept["losses"], measured / kept["weights"])
    elif how == "killed":
        assert "rank" in error["what"]
    assert took < 10 or how == "interrupted", "the issue's limit for an aborted run"
    assert "kept" in err
    wait_for(lambda: not any(Path(f"/proc/{p}").exists() for p in below), 10)
    assert json.loads((run / "outcome.json").read_text())["partial"] is True
    plan(measured, "report", "--out", "partial.html")
    assert re.search(r"The run was stopped after \d+ of 100000 steps", (measured / "partial.html").read_text())


def assert_trained(model: Path, losses: list[float], weights: Path) -> None:
    """Losses and weights are those of a plain loop of as many steps."""
    import torch

    from executor.feed import open_feed
    from executor.model_file import load

    file, threads = load(str(model)), torch.get_num_threads()
    whole, feed, found = file.build(0), open_feed(file, 64), []
    optimizer = file.optimizer(whole.parameters())
    torch.set_num_threads(1)
    for _ in losses:
        parts = [file.loss(whole(part.given), part.targets) / 8 for part in feed.take().split(8)]
        for part in parts:
            part.backward()
        found.append(sum(float(part.detach()) for part in parts))
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    assert losses == found
    for name, tensor in torch.load(weights, weights_only=True).items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_a_rank_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback and no other noise, exit code 6."""
    plan(tmp_path, "profile", f"{MODELS}:bomb", "--budget", "1", "--sizes", "2,4,8", code=0)
    plan(tmp_path, "simulate", "--k", "2", "--m", "4")
    monkeypatch.setenv("FOREPLAN_TEST_BOMB", "1")
    began = time.monotonic()
    done = plan(tmp_path, "run", "gpipe-k2-m4", "--steps", "50", code=RUN_FAILED)
    assert time.monotonic() - began < 60
    assert "the bomb went off" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "rank 1" in done.stderr
    assert "small_models.py" in done.stderr


def test_ctrl_c_while_profiling(measured: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Interrupted before the end: exit 130; the profile is as it was, or as far as it had come, which is said."""
    before = {p: p.read_bytes() for p in (measured / ".plan" / "profiles").glob("*")}
    process = start(measured, "profile", "model.py", "--budget", "60")
    time.sleep(8)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, out + err
    assert "interrupted" in err
    for path, data in before.items():
        found = decode(path.read_bytes(), str(path))
        saved = found.measuring is not None and found.measuring.interrupted
        assert saved is ("the profile is saved" in err)
        assert saved or path.read_bytes() == data
        path.write_bytes(data)


def test_ctrl_c_while_python_imports_and_behind_the_end(tmp_path: Path) -> None:
    """Nobody else answers yet, or any more: the first import is interrupted, and the end is, behind an answer.

    The import is interrupted in text that it compiles, as those of dataclasses are: `python -m` had an end of its own.
    """
    (tmp_path / "early.py").write_text(
        "import builtins, planner.basis.errors\nown = builtins.__import__\n"
        "def at(name, *rest):\n"
        "    if name == 'planner.cli.main': exec('import signal; signal.raise_signal(signal.SIGINT)')\n"
        "    return own(name, *rest)\n"
        "builtins.__import__ = at\nfrom planner.cli.start import main\nmain()\n"
    )
    (tmp_path / "late.py").write_text(
        "import atexit, signal\natexit.register(signal.raise_signal, signal.SIGINT)\n"
        "from planner.cli.start import main\nmain()\n"
    )
    for name, code, said in (("early", INTERRUPTED, ["error: interrupted"]), ("late", 0, [])):
        done = subprocess.run(
            [sys.executable, "-m", name, "--version"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr.splitlines()[:1]) == (code, said)


def test_ctrl_c_while_simulating(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes with the second plan: nothing is half written."""
    by_hand()
    simulated: list[Any] = []

    def interrupted(*question: Any, **options: Any) -> Any:
        simulated.append(question)
        if len(simulated) == 2:
            signal.raise_signal(signal.SIGINT)
        return simulate(*question, **options)

    monkeypatch.setattr(ranking, "simulate", interrupted)
    assert invoke(["simulate", "--k", "2", "--m", "4"]) == INTERRUPTED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: interrupted")
    assert not (Store().root / "simulation.json").exists()


def test_ctrl_c_outside_of_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the command line is still being parsed, typer swallows it; the person is told all the same."""
    monkeypatch.setattr(main, "app", lambda **_: INTERRUPTED)
    assert invoke(["simulate"]) == INTERRUPTED
    assert capsys.readouterr().err.startswith("error: interrupted")


def test_this_machine_counts_its_cores() -> None:
    host = Host(name="h", cores=2, memory_bytes=8)
    taken = Cluster(name="c", hosts=(host,), elastic=True).take(4)
    assert [d.threads for d in taken.devices] == [1] * 4
    assert [d.memory_bytes for d in taken.devices] == [2] * 4
