"""`plan show`, and the table that several commands print."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.basis.errors import ARTEFACT, USAGE
from planner.cli.main import invoke
from planner.cli.show import slots
from planner.orders import schedules
from planner.orders.schedules import Shape
from tests.test_cli import by_hand, failing


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    return


def data(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert invoke([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["data"]
    return found


def text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert invoke(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [n for n in schedules.names() if n != "forward-only"])
def test_every_schedule_is_drawn_whole(name: str) -> None:
    """Each device computes everything it is asked for, in its order, and nothing before what it needs."""
    chosen = schedules.get(name)
    shape = Shape(4, 8, max(chosen.chunks[0], 2 if chosen.placement == "looped" else 1))
    order = schedules.arrange(name, shape)
    drawn = slots(order)
    assert [[cell for cell in row if cell] for row in drawn] == [
        list(row) for row in (schedules_row(order, d) for d in range(len(order)))
    ]
    when = {cell: column for row in drawn for column, cell in enumerate(row) if cell}
    for (stage, op, microbatch, _), column in when.items():
        if op == "F" and stage > 0:
            assert any(a[:3] == (stage - 1, "F", microbatch) and c < column for a, c in when.items())


def schedules_row(order: Any, device: int) -> tuple[Any, ...]:
    from planner.orders.action import actions

    return actions(order[device])


def test_a_plan_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    data(capsys, "simulate", "--k", "2", "--m", "4", "--strategy", "gpipe")
    out = text(capsys, "show", "gpipe-k2-m4")
    assert "0F0 0F1 0F2 0F3 .   .   0B0 0B1 0B2 0B3" in out
    assert ".   1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3" in out
    assert "layer0 … layer1 (2)" in out
    found = data(capsys, "show", "gpipe-k2-m4")
    assert [stage["layers"] for stage in found["stages"]] == [["layer0", "layer1"], ["layer2", "layer3"]]
    assert found["stages"][0]["seconds"] == {"F": 4.0, "B": 4.0}, "two layers of 1 s a sample, two samples"
    assert found["stages"][0]["parameter_bytes"] == 2000
    assert found["grid"][1][0] is None
    assert data(capsys, "show")["plan"].startswith("gpipe-k2-m4")
    assert data(capsys, "show", ".plan/plans/gpipe-k2-m4.toml")["stages"] == found["stages"]


def test_a_plans_actions_are_csv(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    data(capsys, "simulate", "--k", "2", "--m", "2", "--strategy", "gpipe")
    rows = list(csv.reader(text(capsys, "show", "gpipe-k2-m2", "--csv").splitlines()))
    assert [row[0] for row in rows] == ["d0", "d1"]
    assert rows[0][1:5] == ["0LOAD", "0F0", "0SEND_F0", "0F1"]


def test_large_plans_are_cut_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(batch=256)
    data(capsys, "simulate", "--k", "4", "--m", "64", "--strategy", "gpipe")
    out = text(capsys, "show", "gpipe-k4-m64")
    assert "of 134 slots" in out
    assert max(map(len, out.splitlines())) < 200


def test_no_such_plan(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    assert "plan simulate" in failing(capsys, ARTEFACT, "show")["fix"]
    data(capsys, "simulate", "--k", "2", "--m", "4", "--strategy", "gpipe")
    assert "did you mean 'gpipe-k2-m4'" in failing(capsys, USAGE, "show", "gpip-k2-m4")["why"]


def test_tables_are_sorted_and_filtered(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    asked = ("simulate", "--k", "2", "--m", "4")
    peaks = [plan["peak_bytes"] for plan in data(capsys, *asked, "--sort", "memory")["plans"]]
    assert peaks == sorted(peaks)
    plans = [plan["plan"] for plan in data(capsys, *asked, "--filter", "zb", "--filter", "recompute")["plans"]]
    assert plans
    assert all("zb" in plan and "recompute" in plan for plan in plans)
    out = text(capsys, *asked, "--sort", "plan", "--filter", "gpipe").splitlines()
    names = [line.split()[0] for line in out if line.startswith("gpipe-")]
    assert names == sorted(names)
    assert len(names) >= 1
    assert "did you mean 'memory'" in failing(capsys, USAGE, *asked, "--sort", "memor")["why"]
    assert "no plan's name has" in failing(capsys, USAGE, *asked, "--filter", "nothing")["what"]


def test_after_other_hardware_best_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    asked = ("simulate", "--k", "2", "--m", "4", "--strategy", "gpipe")
    here = data(capsys, *asked)
    assert here["run_best"] == here["best"]
    assert here["run_best_why_not_best"] is None
    assert text(capsys, *asked).rstrip().endswith("next: plan run best")
    there = data(capsys, *asked, "--cluster", "dgx-a100")
    assert there["run_best"] is None
    assert "dgx-a100" in there["run_best_why_not_best"]
    assert "plan run best" not in text(capsys, *asked, "--cluster", "dgx-a100").splitlines()[-1]
    assert "other hardware" in failing(capsys, ARTEFACT, "run", "best")["what"]


def test_best_of_a_shipped_profile_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = data(capsys, "simulate", "--profile", "vgg16", "--k", "2", "--m", "8", "--strategy", "gpipe")
    assert found["run_best"] is None
    assert "no model file" in found["run_best_why_not_best"]
    assert data(capsys, "show")["plan"] == found["best"], "the shipped profile is found again"
