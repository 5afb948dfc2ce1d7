"""What was found of a machine is measured once, kept for its user, and measured again when it cannot be read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from executor import devices
from planner.values.cluster import Cluster, Host
from profiles import kept, machine
from profiles.machine import Machine

FOUND = Machine(
    cluster=Cluster(name="this machine", hosts=(Host(name="local", cores=2, memory_bytes=1),), elastic=True),
    action_s=1e-5,
    launch_s=2.0,
    created="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """How often a quiet machine is measured, in an empty cache."""
    kinds: list[str] = []
    monkeypatch.setenv("FOREPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(machine, "measure", lambda kind: (kinds.append(kind), FOUND)[1])
    return kinds


def test_a_machine_is_measured_once(measured: list[str]) -> None:
    first, second = machine.machine("cpu"), machine.machine("cpu")
    assert first == second
    assert (first.action_s, first.created) == (FOUND.action_s, FOUND.created)
    assert first.cluster.hosts[0].memory_bytes > 1, "as much as there is now, not then"
    assert measured == ["cpu"]
    machine.machine("cpu", again=True)
    assert measured == ["cpu", "cpu"]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"key": 1, "found": 2}', b"[]" * 1000])
def test_rubbish_is_measured_again(measured: list[str], damage: bytes) -> None:
    machine.machine("cpu")
    path = kept.path_of(kept.key_of("cpu"))
    path.write_bytes(damage)
    assert machine.machine("cpu").action_s == FOUND.action_s
    assert len(measured) == 2
    assert kept.read(kept.key_of("cpu"), Machine) == FOUND, "and replaced"


@pytest.mark.parametrize(
    ("was", "now"), [(b'"action_s":0.00001', b'"action_s":-5.0'), (b"2026-01-01T00:00:00+00:00", b"yesterday")]
)
def test_what_no_machine_can_be_is_measured_again(measured: list[str], was: bytes, now: bytes) -> None:
    machine.machine("cpu")
    path = kept.path_of(kept.key_of("cpu"))
    text = path.read_bytes().replace(b"1e-5", b"0.00001").replace(b"1e-05", b"0.00001")
    assert was in text
    path.write_bytes(text.replace(was, now))
    assert machine.machine("cpu").action_s == FOUND.action_s
    assert len(measured) == 2


def test_another_machine_is_another_file(measured: list[str]) -> None:
    machine.machine("cpu")
    key = kept.key_of("cpu")
    for change in ({"cores": key.cores + 1}, {"torch": "3.0"}, {"device": "another"}, {"version": 0}):
        assert kept.read(msgspec.structs.replace(key, **change), Machine) is None
    assert [p.name for p in kept.folder().iterdir()] == [kept.path_of(key).name], "and no half-written file is left"


def test_a_folder_that_cannot_be_written_keeps_nothing(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOREPLAN_CACHE", str(tmp_path / "file" / "below"))
    assert machine.machine("cpu").action_s == machine.machine("cpu").action_s
    assert len(measured) == 2


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOREPLAN_CACHE", "/own")
    assert kept.folder() == Path("/own")
    monkeypatch.delenv("FOREPLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert kept.folder() == Path("/xdg/foreplan")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept.folder() == tmp_path / ".cache" / "foreplan"


def test_a_busy_machine_is_measured_again_when_it_is_quieter(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers found among other programs are no property of the machine; found in quiet they are kept."""
    cores = devices.cores()
    for load, count in (
        (10.0 * cores, 1),
        (6.0 * cores, 1),
        (4.0 * cores, 2),
        (3.0 * cores, 2),
        (0.5 * cores, 3),
        (0.0, 3),
    ):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, load, load))
        machine.machine("cpu")
        assert len(measured) == count, load


def test_a_disturbed_probe_makes_no_endless_bandwidth() -> None:
    """A thousandth of the bytes took as long: the bandwidth is of the order of what the largest message shows."""
    assert machine.link_of(((4, 1e-5), (2**22, 1e-3))).bandwidth_bytes_per_s == pytest.approx(2**22 / 0.99e-3, rel=1e-5)
    assert machine.link_of(((4, 2e-3), (2**22, 2e-3))).bandwidth_bytes_per_s == pytest.approx(2**22 / 1e-3, rel=1e-5)
