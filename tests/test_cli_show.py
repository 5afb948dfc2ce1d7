"""`plan show`, and the table that several commands print."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from planner.basis.errors import ARTEFACT, USAGE
from planner.cli import complete
from planner.cli.main import invoke
from planner.cli.show import slots
from planner.orders import schedules
from planner.orders.edges import chain
from planner.orders.schedules import Shape
from tests import factory
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
    drawn = slots(order, chain(shape.stages))
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


def test_a_plan_file_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    every = data(capsys, "simulate", "--k", "2", "--m", "4")
    Path("mine.toml").write_text(Path(".plan/plans/gpipe-k2-m4.toml").read_text())
    one = data(capsys, "simulate", "mine.toml")
    assert [plan["plan"] for plan in one["plans"]] == ["gpipe-k2-m4"]
    assert one["plans"][0] == next(plan for plan in every["plans"] if plan["plan"] == "gpipe-k2-m4")
    assert data(capsys, "show")["plan"] == "gpipe-k2-m4"
    assert "a plan says everything" in failing(capsys, USAGE, "simulate", "mine.toml", "--k", "2")["what"]
    there = data(capsys, "simulate", "mine.toml", "--cluster", "dgx-a100")
    assert there["cluster"] == "dgx-a100", "its devices have other names there"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--replicas", "2", "--strategy", "1f1b"), "1f1b-k4-m4-r2"),
        (("--chunks", "2", "--replicas", "1", "--strategy", "interleaved", "--k", "2"), "interleaved-k2-m4-v2"),
        (("--replicas", "2", "--synchronisation", "zero-1", "--strategy", "gpipe"), "gpipe-k4-m4-r2-zero-1"),
        (("--recompute", "--replicas", "1", "--strategy", "1f1b"), "1f1b-k4-m4-recompute"),
        (("--no-recompute", "--strategy", "1f1b", "--saving", "none"), "1f1b-k4-m4"),
        (("--saving", "host-optimizer", "--strategy", "1f1b", "--cluster", "dgx-a100"), "1f1b-k4-m4-host"),
    ],
)
def test_everything_a_plan_has_can_be_asked_for(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], name: str
) -> None:
    by_hand()
    k = () if "--k" in options else ("--k", "4")
    ranked = data(capsys, "simulate", *k, "--m", "4", *options)
    assert name in {plan["plan"] for plan in ranked["plans"]}
    assert ("--recompute" in options) <= all("recompute" in plan["plan"] for plan in ranked["plans"])
    found = data(capsys, "search", *k, "--m", "4", *options)
    assert name in {plan["plan"] for plan in found["plans"]}


def test_one_line_per_reason_with_what_makes_it_possible(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    rejected = data(capsys, "simulate", "--k", "2", "--m", "1")["rejected"]
    reasons = [entry["why"] for entry in rejected]
    assert len(reasons) == len(set(reasons))
    data_parallel = next(entry for entry in rejected if "data-parallel" in entry["strategies"])
    assert len(data_parallel["strategies"]) > 3, "all that share the reason"
    assert data_parallel["fix"] == "--m 2 makes it possible"
    assert "data-parallel" in {
        plan["plan"].partition("-k")[0] for plan in data(capsys, "simulate", "--k", "2", "--m", "2")["plans"]
    }
    out = text(capsys, "simulate", "--k", "2", "--m", "1")
    assert len([line for line in out.splitlines() if line.startswith("not possible")]) == len(reasons)


def test_strategies_that_decide_themselves_are_not_asked(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    rejected = data(capsys, "simulate", "--k", "4", "--m", "4", "--replicas", "2")["rejected"]
    own = next(entry for entry in rejected if "decide about replicas" in entry["why"])
    assert "data-parallel" in own["strategies"]
    assert "makes it possible" not in own["fix"]


def test_prices_give_a_front_of_time_against_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Hosts are rented whole: on one host the quickest plan is the cheapest."""
    by_hand()
    asked = ("search", "--strategy", "data-parallel", "--strategy", "single", "--saving", "none")
    assert data(capsys, *asked)["time_against_cost"] == []
    found = data(capsys, *asked, "--host-price", "3.6", "--epoch", "1000")
    (front,) = found["time_against_cost"]
    assert front["plan"] == found["best"]
    assert front["cost"] == pytest.approx(front["seconds"] * 3.6 / 3600)
    assert "time against cost:" in text(capsys, *asked, "--price", "1")
    assert "--epoch" in failing(capsys, USAGE, *asked, "--deadline", "1")["fix"]
    cheap = data(capsys, *asked, "--price", "1", "--epoch", "1000", "--deadline", "1", "--objective", "cost")
    assert cheap["time_against_cost"][0]["seconds"] <= 3600


def estimated(kind: str, name: str = "estimated") -> str:
    """The path of a profile of four layers on a device of a kind."""
    profile = factory.profile([1.0] * 4, message_bytes=10)
    machine = msgspec.structs.replace(
        profile.machine, devices=tuple(msgspec.structs.replace(d, kind=kind) for d in profile.machine.devices)
    )
    path = Path(f"{name}.json")
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(profile, machine=machine)))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "cluster", "speed"),
    [
        ("h100", "dgx-h100", 1.0),
        ("v100", "dgx1-v100", 1.0),
        ("v100-16", "dgx-h100", 3.7),
        ("v100", "dgx-h100", 3.7),
        ("h100", "dgx1-v100", 15.7 / 67),  # FP32 peaks; memory would say 900 / 3350
        ("h100", "h200x8", 1.0),  # the same units; memory alone would say 1.4
        ("h100", "laptop-gpu", 0.5 * 15.7 / 67),
    ],
)
def test_speeds_are_relative_to_what_was_profiled(
    capsys: pytest.CaptureFixture[str], kind: str, cluster: str, speed: float
) -> None:
    asked = ("simulate", "--k", "1", "--m", "4", "--strategy", "single", "--no-recompute", "--saving", "none")
    there = data(capsys, *asked, "--profile", estimated(kind), "--cluster", cluster)
    here = data(capsys, *asked, "--profile", estimated(kind))
    assert here["plans"][0]["step_s"] / there["plans"][0]["step_s"] == pytest.approx(speed)


def test_speeds_that_nobody_knows_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A measured CPU is no V100: the cluster's 1.7 is taken, and said."""
    by_hand()
    assert invoke(["simulate", "--k", "2", "--m", "4", "--cluster", "dgx-a100", "--strategy", "gpipe"]) == 0
    assert "relative to a v100" in " ".join(capsys.readouterr().err.split())
    data(
        capsys, "simulate", "--profile", "vgg16", "--k", "2", "--m", "4", "--cluster", "dgx-a100", "--strategy", "gpipe"
    )
    assert invoke(["simulate", "--profile", "vgg16", "--k", "2", "--m", "4", "--cluster", "dgx-h100"]) == 0
    assert "relative to" not in capsys.readouterr().err


def test_the_page_is_of_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """It says for which model and hardware it is, what makes it again, and its plan is in its own table."""
    found = data(capsys, "simulate", "--profile", "vgg16", "--cluster", "dgx-a100", "--k", "2", "--m", "8")
    other = next(plan for plan in found["plans"] if plan["plan"] != found["best"])
    data(capsys, "report", "--plan", other["plan"], "--out", "a page.html")
    page = Path("a page.html").read_text()
    assert f"plan report --simulated --plan {other['plan']} --out &#x27;a page.html&#x27;" in page
    assert "model vgg16: 38" in page
    assert "on dgx-a100: a100-80 of 80.00" in page
    assert page.count("this page</span>") == 1
    assert f'data-value="{other["step_s"]!r}"' in page, "the figure of the simulation, not one drawn again"
    text = Path(".plan/plans/gpipe-k2-m8.toml").read_text().replace("microbatches = 8", "microbatches = 16")
    Path("mine.toml").write_text(text)
    data(capsys, "report", "--plan", "mine.toml", "--out", "page.html")
    page = Path("page.html").read_text()
    assert "--plan mine.toml" in page
    assert page.count("this page</span>") == 1


def test_help_has_a_glossary_of_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in ("gpipe-k2-m8", "-r4", "0B1", "sync", "bubble"):
        assert name in out


def test_names_are_completed(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    data(capsys, "simulate", "--k", "2", "--m", "4", "--strategy", "gpipe")
    assert complete.plans("gp") == ["gpipe-k2-m4", "gpipe-k2-m4-recompute"]
    assert complete.plans("b") == ["best"]
    assert complete.strategies("zb-h") == ["zb-h1", "zb-h2"]
    assert complete.clusters("dgx1") == ["dgx1-v100"]
    assert complete.profiles("vgg") == ["vgg16"]
    assert complete.synchronisations("zero-1") == ["zero-1"]
    assert complete.objectives("c") == ["cost"]
    assert complete.columns("sy") == ["sync"]


@pytest.mark.parametrize("command", ["simulate", "show", "run"])
@pytest.mark.parametrize(
    ("field", "known", "wrong"), [("schedule", "gpipe", "gpip"), ("synchronisation", "all-reduce", "all")]
)
def test_a_plan_file_with_an_unknown_name_is_named(
    capsys: pytest.CaptureFixture[str], command: str, field: str, known: str, wrong: str
) -> None:
    by_hand()
    text(capsys, "simulate", "--k", "2", "--m", "8", "--strategy", "gpipe")
    file = Path(".plan/plans/gpipe-k2-m8.toml")
    file.write_text(file.read_text().replace(f'{field} = "{known}"', f'{field} = "{wrong}"'))
    error = failing(capsys, ARTEFACT, command, str(file))
    assert error["where"] == f"{file}, {field}"
    assert error["what"] == f"unknown {field} '{wrong}'"
    assert f"did you mean '{known}'" in error["why"]
