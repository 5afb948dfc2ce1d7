"""`plan search`, `plan explain` and what belongs to them, as a person meets them; all in this process."""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from executor import abilities
from executor.abilities import able
from planner.basis.errors import ARTEFACT, DEVICE, INTERRUPTED, NOTHING_FITS, USAGE, PlanError
from planner.cli.line import LINE
from planner.cli.main import invoke
from planner.cli.opened import on_devices_of
from planner.cli.run import _asked as commands
from planner.orders.operations import BACKWARD_INPUT, BACKWARD_WEIGHT
from planner.search.search import Search
from planner.search.space import Candidate
from planner.store import Store
from planner.values import plan_file
from tests import factory
from tests.test_cli import by_hand, failing

QUICK = ("--strategy", "gpipe", "--strategy", "1f1b", "--strategy", "data-parallel", "--saving", "none")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    return


def data(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON document of a command that goes well."""
    capsys.readouterr()
    assert invoke([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "foreplan.cli/1"
    assert document["command"] == arguments[0] or arguments[0] == "simulate"
    assert document["status"] == "ok"
    found: dict[str, Any] = document["data"]
    return found


def text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert invoke(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_search_prints_and_saves(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    out = text(capsys, "search", *QUICK)
    assert "samples/s" in out
    assert "nothing that was left out" in out
    assert "next: plan explain best" in out
    ranking = Store().load_ranking()
    assert str(ranking.best.plan) in out
    assert "is the best for throughput" in out
    searched = Store().load_search()
    assert searched.answer.complete
    assert searched.done[searched.answer.leaders[0].key] == searched.answer.leaders[0]
    assert Path(f".plan/plans/{ranking.best.plan}.toml").is_file()


def test_several_batches_are_one_search(capsys: pytest.CaptureFixture[str]) -> None:
    """Names say the batch, and the plan that is saved under the best one's has it."""
    by_hand()
    found = data(capsys, "search", *QUICK, "--batch", "8", "--batch", "16")
    assert found["batches_samples"] == [8, 16]
    assert all(re.search("-b(8|16)$", plan["plan"]) for plan in found["plans"])
    assert found["best"].endswith(f"-b{found['batch_samples']}")
    assert Store().load_ranking().best.plan.batch == found["batch_samples"]
    assert Path(f".plan/plans/{found['best']}.toml").is_file()


def test_a_search_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    found = data(capsys, "search", *QUICK)
    assert {
        *(
            "tokens_per_sample",
            "objective",
            "cluster",
            "batch_samples",
            "batches_samples",
            "hires",
            "tokens_per_sample",
            "complete",
            "left_out_better_by_at_most",
            "candidates",
            "evaluated",
            "best",
        ),
        *("plans", "pareto", "hires"),
        *("simulated_with_contention", "search_s", "plans_per_s", "explanation", "families", "estimated"),
        *("run_best", "run_best_why_not_best", "time_against_cost", "time_against_cost_complete"),
    } == set(found)
    assert found["complete"] is True
    assert found["best"] == found["plans"][0]["plan"]
    assert found["evaluated"] <= found["candidates"]
    assert {"plan", "batch_samples", "step_s", "peak_bytes", "contention_simulated"} == set(found["pareto"][0])
    assert sum(family["points"] for family in found["families"]) == found["candidates"]
    again = data(capsys, "search", *QUICK)
    assert again["best"] == found["best"]


def test_simulate_without_k_searches(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    searched = data(capsys, "search", *QUICK[:-2])
    assert data(capsys, "simulate", *QUICK[:-2])["best"] == searched["best"]
    assert Store().load_search().answer.complete
    only = data(capsys, "simulate", "--m", "4", "--strategy", "gpipe")
    assert all("-m4" in plan["plan"] for plan in only["plans"])


@pytest.mark.parametrize("fault", [("--slow-device", "d0=2"), ("--slow-link", "h:h=2"), ("--fail", "d0@1+1")])
def test_faults_are_not_searched_with(capsys: pytest.CaptureFixture[str], fault: tuple[str, str]) -> None:
    by_hand()
    assert "--k" in failing(capsys, USAGE, "simulate", *fault)["fix"]


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    assert failing(capsys, ARTEFACT, "explain", "best")["fix"] == "plan search"
    best = data(capsys, "search", *QUICK)["best"]
    out = text(capsys, "explain", "best")
    assert out.startswith(f"{best} is the best for throughput")
    assert "It is bound by" in out
    found = data(capsys, "explain", "best")
    assert found["plan"] == best
    assert len(found["sentences"]) >= 3
    other = next(f.label for f in Store().load_search().done.values() if f.label and f.label != best)
    assert data(capsys, "explain", other)["plan"] == other
    assert f"did you mean '{best}'" in failing(capsys, USAGE, "explain", best[:-1])["why"]


def test_explain_reads_the_profile_that_was_searched_with(capsys: pytest.CaptureFixture[str]) -> None:
    """Given by its path, outside of the store."""
    by_hand()
    path = Store().profile_path(None)
    Path("elsewhere.json").write_bytes(path.read_bytes())
    path.unlink()
    best = data(capsys, "search", "--profile", "elsewhere.json", *QUICK)["best"]
    assert data(capsys, "explain", "best")["plan"] == best


def test_explain_after_profiling_again(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    data(capsys, "search", *QUICK)
    by_hand(created="2026-02-02T00:00:00+00:00")
    error = failing(capsys, ARTEFACT, "explain", "best")
    assert error["what"] == "the search is stale"
    assert error["fix"] == "plan search"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("search", "--strategy", "gpip"), "did you mean 'gpipe'"),
        (("search", "--saving", "recomputes"), "did you mean 'recompute'"),
        (("search", "--saving", "recompute+ofload"), "did you mean 'offload'"),
        (("search", "--objective", "throughputs"), "did you mean 'throughput'"),
        (("search", "--cluster", "dgx-a10"), "did you mean 'dgx-a100'"),
        (("search", "--synchronisation", "zero1"), "did you mean 'zero-1'"),
        (("simulate", "--strategy", "1f1bb"), "did you mean '1f1b'"),
        (("simulate", "--k", "2", "--slow-device", "d00=2"), "did you mean 'd0'"),
        (("simulate", "--k", "2", "--fail", "e1@1+1"), "did you mean 'd1'"),
        (("simulate", "--k", "2", "--slow-link", "h:hh=2"), "did you mean 'h:h'"),
        (("search", "--objectiv", "cost"), "did you mean '--objective'"),
        (("serch",), "did you mean 'search'"),
        (("explian",), "did you mean 'explain'"),
    ],
)
def test_unknown_names_get_the_nearest(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], why: str
) -> None:
    by_hand()
    assert why in failing(capsys, USAGE, *arguments)["why"]


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (("--k", "0"), USAGE, "--k must be positive"),
        (("--k", "9"), DEVICE, "9 devices are asked for"),
        (("--m", "3"), USAGE, "do not divide"),
        (("--m", "0"), USAGE, "--m must be positive"),
        (("--batch", "0"), USAGE, "--batch must be positive"),
        (("--objective", "cost"), USAGE, "no price"),
        (("--strategy", "tensor-parallel", "--k", "2"), USAGE, "no plan is possible"),
        (("--saving", "offload", "--strategy", "gpipe", "--k", "2", "--m", "8"), USAGE, "no plan is possible"),
        (("--saving", "offload", "--strategy", "1f1b", "--k", "2"), USAGE, "no plan is possible"),
        (("--strategy", "1f1b", "--k", "8", "--synchronisation", "all-reduce", "--m", "1"), USAGE, "no plan is"),
        (("--seconds", "0"), USAGE, "seconds"),
    ],
)
def test_impossible_searches(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, what: str
) -> None:
    by_hand()
    error = failing(capsys, code, "search", *arguments)
    assert what in error["what"]
    assert error["fix"]


def test_prices_make_cost_an_objective(capsys: pytest.CaptureFixture[str]) -> None:
    machine = factory.devices(4)
    priced = tuple(msgspec.structs.replace(d, price_per_hour=3.6) for d in machine.devices)
    by_hand(machine=msgspec.structs.replace(machine, devices=priced))
    found = data(capsys, "search", *QUICK, "--strategy", "single", "--objective", "cost")
    assert "-k4-" in found["best"], "the host is rented whole: all its devices for the same price"
    assert "per million samples" in found["explanation"][0]
    epoch = data(capsys, "search", *QUICK, "--objective", "epoch", "--epoch", "80")
    assert "per epoch" in epoch["explanation"][0]
    memory = data(capsys, "search", *QUICK, "--objective", "memory")
    assert memory["plans"][0]["peak_bytes"] == min(plan["peak_bytes"] for plan in memory["plans"])


def test_a_vee_at_k_4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as an executor would answer that does not know one of its operations."""
    profile = factory.profile([1.0] * 8, machine=factory.devices(8))
    by_hand(layers=profile.layers, values=profile.values)
    found = data(capsys, "simulate", "--k", "4", "--m", "8", "--strategy", "zb-v")
    assert found["best"] in ("zb-v-k4-m8", "zb-v-k4-m8-recompute")
    assert found["plans"][0]["runnable"] is True
    monkeypatch.delitem(abilities.PERFORMS, BACKWARD_INPUT)
    found = data(capsys, "simulate", "--k", "4", "--m", "8", "--strategy", "zb-v")
    assert found["plans"][0]["runnable"] is False
    error = failing(capsys, USAGE, "run", "best")
    assert "cannot be run yet" in error["what"]
    assert "backward of the input (I)" in error["why"]


def edited(tmp_path: Path, name: str, *changes: tuple[str, str]) -> str:
    """The path of a plan file of the last simulation with other text."""
    plan = Path(f".plan/plans/{name}.toml").read_text()
    for old, new in changes:
        assert old in plan
        plan = plan.replace(old, new)
    path = tmp_path / "edited.toml"
    path.write_text(plan)
    return str(path)


@pytest.mark.parametrize(
    ("name", "changes", "code", "why"),
    [
        ("zb-v-k2-m4", (("chunks = 2", "chunks = 3"),), ARTEFACT, "4 stages cannot be dealt 3 to each device"),
        ("zb-v-k2-m4", (("chunks = 2", "chunks = 4"),), ARTEFACT, "the schedule zb-v places stage 1 with"),
        ("zb-v-k2-m4", (('schedule = "zb-v"', 'schedule = "1f1b"'),), ARTEFACT, "it needs v=1"),
        ("gpipe-k2-m4", (("chunks = 1", "chunks = 2"),), ARTEFACT, "it needs v=1"),
        ("gpipe-k2-m4", (('schedule = "gpipe"', 'schedule = "gpip"'),), ARTEFACT, "did you mean 'gpipe'"),
        ("gpipe-k2-m4", (('"all-reduce"', '"all-reduced"'),), ARTEFACT, "did you mean 'all-reduce'"),
        ("gpipe-k2-m4", (("microbatches = 4", "microbatches = 0"),), ARTEFACT, "must be positive"),
        ("gpipe-k2-m4", (("bucket_bytes = 0", "bucket_bytes = -5"),), ARTEFACT, "-5 is below 0"),
        ("gpipe-k2-m4", (('"d1"', '"d0"'),), ARTEFACT, "a device holds more than its share"),
        ("zb-h1-k2-m4", (), USAGE, "backward of the weights (W)"),
    ],
)
def test_plans_that_cannot_be_run(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    changes: tuple[tuple[str, str], ...],
    code: int,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong plan files, and what an executor would not know."""
    monkeypatch.delitem(abilities.PERFORMS, BACKWARD_WEIGHT)
    by_hand()
    strategy = name.partition("-k2")[0]
    data(capsys, "simulate", "--k", "2", "--m", "4", "--strategy", strategy)
    assert why in failing(capsys, code, "run", edited(tmp_path, name, *changes))["why"]
    assert not Path(".plan/runs").exists(), "nothing has been started"


def test_the_best_that_can_be_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan run best` takes the best plan that the executor knows, and says so where there is none."""
    monkeypatch.delitem(abilities.PERFORMS, BACKWARD_INPUT)
    by_hand(machine=factory.devices(2))
    found = data(
        capsys, "search", "--k", "2", "--replicas", "1", "--strategy", "zb-h2", "--strategy", "1f1b", "--saving", "none"
    )
    assert found["best"].startswith("zb-h2")
    assert any(plan["runnable"] for plan in found["plans"])
    ranking = Store().load_ranking()
    assert str(ranking.best.plan) == found["best"]
    assert ranking.runnable(able).plan.strategy == "1f1b"
    assert Store().plan("best", able) == ranking.runnable(able).plan
    data(capsys, "search", "--k", "2", "--replicas", "1", "--strategy", "zb-h2", "--saving", "none")
    error = failing(capsys, USAGE, "run", "best")
    assert "cannot be run yet" in error["what"]
    assert "plan simulate --k 2" in error["fix"]


def test_ctrl_c_keeps_what_was_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand()
    asked = (*QUICK, "--objective", "memory")
    wanted = data(capsys, "search", *asked)["best"]
    Path(".plan/search.json").unlink()
    evaluate = Search._evaluate
    seen: list[str] = []
    interrupting = [True]

    def interrupted(self: Search, candidate: Candidate) -> Any:
        seen.append(candidate.key)
        if len(seen) == 2 and interrupting[0]:
            signal.raise_signal(signal.SIGINT)
        return evaluate(self, candidate)

    monkeypatch.setattr(Search, "_evaluate", interrupted)
    assert invoke(["search", *asked]) == INTERRUPTED
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: interrupted" in err
    kept = Store().load_search()
    assert not kept.answer.complete
    assert len(kept.done) == 1
    interrupting[0] = False
    seen.clear()
    found = data(capsys, "search", *asked)
    assert found["complete"]
    assert found["best"] == wanted
    assert not set(kept.done) & set(seen), "the same command goes on where it was"
    seen.clear()
    data(capsys, "search", *asked, "--restart")
    assert set(kept.done) & set(seen)


def test_a_budget_is_no_answer_yet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand()
    run = Search.run
    monkeypatch.setattr(Search, "run", lambda self, tell, *, seconds: run(self, tell, seconds=-1.0))
    error = failing(capsys, NOTHING_FITS, "search", *QUICK)
    assert "in that time" in error["what"]
    assert "goes on" in error["fix"]
    failing(capsys, NOTHING_FITS, "explain", "best")


@pytest.mark.parametrize("damage", ["", "\x00 not JSON", '{"question": 1}', "truncated"])
def test_a_damaged_search_is_replaced(capsys: pytest.CaptureFixture[str], damage: str) -> None:
    by_hand()
    wanted = data(capsys, "search", *QUICK)["best"]
    path = Path(".plan/search.json")
    path.write_text(path.read_text()[:300] if damage == "truncated" else damage)
    assert "cannot be read" in failing(capsys, ARTEFACT, "explain", "best")["what"]
    assert data(capsys, "search", *QUICK)["best"] == wanted
    assert data(capsys, "explain", "best")["plan"] == wanted


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found out before the search, not after it."""
    by_hand()
    Store().profile_path(None).rename("profile.json")
    Path(".plan/profiles").rmdir()
    Path(".plan").rmdir()
    Path(".plan").write_text("in the way")
    monkeypatch.setattr(Search, "run", lambda *_, **__: pytest.fail("searched in vain"))
    error = failing(capsys, ARTEFACT, "search", "--profile", "profile.json", *QUICK)
    assert "cannot be written" in error["what"]


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand(machine=factory.devices(4, memory_bytes=4000))
    error: dict[str, Any] = failing(capsys, NOTHING_FITS, "search", *QUICK)
    assert "too much" in error["why"]
    nearest = error["details"]
    lacks = [plan["lack_fraction"] for plan in nearest]
    assert lacks == sorted(lacks)
    assert lacks[0] > 0
    assert nearest[0]["plan"] in error["fix"]
    assert "more memory per device would do" in error["fix"]
    assert failing(capsys, NOTHING_FITS, "explain", "best")["why"] == error["why"]


def test_draws_are_reproducible(capsys: pytest.CaptureFixture[str]) -> None:
    spread = factory.profile([1.0] * 4, spread=0.2)
    by_hand(layers=spread.layers)
    asked = ("simulate", "--k", "2", "--m", "4", "--strategy", "gpipe")
    one, again, other = (data(capsys, *asked, "--samples", "5", "--seed", seed) for seed in ("1", "1", "2"))
    assert one == again
    assert one["plans"] != other["plans"]
    drawn = one["plans"][0]["step_samples_s"]
    assert list(drawn) == ["p25", "p5", "p50", "p75", "p95"]
    assert drawn["p5"] <= drawn["p25"] <= drawn["p50"] <= drawn["p75"] <= drawn["p95"]
    assert drawn["p5"] < drawn["p95"]
    assert drawn["p50"] == one["plans"][0]["step_s"]
    searched = [data(capsys, *asked[:1], *asked[3:], "--samples", "5", "--seed", seed) for seed in ("1", "1", "2")]
    assert searched[0]["plans"] == searched[1]["plans"]
    assert searched[0]["plans"] != searched[2]["plans"]


@pytest.mark.parametrize(
    "fault", [("--slow-device", "d1=3"), ("--slow-link", "h:h=1e17"), ("--fail", "d1@5+30"), ("--fail", "d0@0.5+30")]
)
def test_faults_change_the_result(capsys: pytest.CaptureFixture[str], fault: tuple[str, str]) -> None:
    by_hand(machine=factory.devices(2))  # of more devices the slow one would not be taken
    asked = ("simulate", "--k", "2", "--m", "4", "--strategy", "naive")
    plain, faulty = data(capsys, *asked), data(capsys, *asked, *fault)
    assert faulty["plans"][0]["step_s"] > plain["plans"][0]["step_s"]
    if fault[0] == "--fail":
        assert faulty["plans"][0]["step_s"] >= plain["plans"][0]["step_s"] + 30
    else:
        assert "slower" in faulty["cluster"]


def test_elastic_machines_fail_too(capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that makes its devices when asked has d0 and d1 once K is known."""
    machine = factory.shared_cores(cores=2)
    by_hand(machine=machine)
    asked = ("simulate", "--k", "2", "--m", "4", "--strategy", "gpipe")
    plain, faulty = data(capsys, *asked), data(capsys, *asked, "--fail", "d1@1+50")
    assert faulty["plans"][0]["step_s"] >= plain["plans"][0]["step_s"] + 40
    assert "d0" in failing(capsys, USAGE, *asked, "--fail", "d7@1+50")["why"]


def test_terms_that_no_plan_meets(capsys: pytest.CaptureFixture[str]) -> None:
    """What is asked for is told apart from memory: what would do is named, and does."""
    by_hand()
    asked = ("search", *QUICK, "--epoch", "80", "--price", "3.6")
    late = failing(capsys, NOTHING_FITS, *asked, "--deadline", "0.000001")
    assert late["what"] == "no plan meets the deadline"
    assert "the deadline is 1e-06 hours" in late["why"]
    enough = late["fix"].partition("--deadline ")[2].partition(",")[0]
    assert data(capsys, *asked, "--deadline", enough)["plans"]
    dear = failing(capsys, NOTHING_FITS, *asked, "--budget", "0.000001")
    assert dear["what"] == "no plan is within the budget"
    enough = dear["fix"].partition("--budget ")[2].partition(",")[0]
    assert data(capsys, *asked, "--budget", enough)["plans"]
    assert failing(capsys, USAGE, *asked, "--deadline", "-3")["why"] == "a deadline is more than 0 hours"
    assert failing(capsys, USAGE, *asked, "--budget", "-3")["why"] == "a budget is not below 0"


@pytest.mark.parametrize(
    ("option", "fix"), [("--replicas", "--replicas 2 makes it possible"), ("--tensor", "--tensor 1 makes it possible")]
)
def test_what_cannot_be_is_not_said_to_be_too_large(capsys: pytest.CaptureFixture[str], option: str, fix: str) -> None:
    by_hand()
    asked = ("simulate", "--k", "4", "--m", "4", "--batch", "4", "--strategy", "gpipe", option, "3")
    error = failing(capsys, USAGE, *asked)
    assert error["what"] == "no plan is possible"
    assert error["fix"] == fix


def test_the_page_has_the_command_that_asked_the_question(capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands, run again elsewhere in the store, write the same page but for its time."""
    profile = by_hand()
    named = Store().name_of(Store().profile_path(None))
    text(capsys, "simulate", "--k", "2", "--m", "4", "--strategy", "gpipe", "--sort", "memory")
    text(capsys, "report", "--simulated", "--out", "page.html")
    command = f"plan simulate --k 2 --m 4 --strategy gpipe --profile {named} &amp;&amp; plan report --simulated"
    page = Path("page.html").read_text()
    assert command in page
    assert str(profile.key.cores) in page


def test_a_shipped_profile_says_which_device_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("simulate", "--profile", "alexnet", "--k", "2", "--m", "2", "--strategy", "gpipe")
    text(capsys, *asked)
    text(capsys, "report", "--simulated", "--out", "page.html")
    page = Path("page.html").read_text()
    assert "v100-16 (assumed: see profiles/data/README.md)" in page
    assert ">Cores<" not in page


def test_a_plan_for_other_hardware_is_mapped_and_said_to_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    by_hand()
    text(capsys, "simulate", "--k", "2", "--m", "4", "--strategy", "gpipe")
    path = edited(tmp_path, "gpipe-k2-m4", ('"d0"', '"gpu0"'), ('"d1"', '"gpu1"'))
    assert invoke(["simulate", path]) == 0
    assert "devices mapped, gpu0 to d0, gpu1 to d1" in capsys.readouterr().err
    ranking = Store().load_ranking()
    wanted = plan_file.read(Path(path))
    with pytest.raises(PlanError, match="unknown device 'gpu0'") as raised:  # as a run asks
        on_devices_of(wanted, ranking.cluster, mapped=False)
    assert raised.value.code == DEVICE


@pytest.mark.parametrize(
    ("change", "why"),
    [(("servers = []", 'servers = ["d9"]'), "known: h, d0, d1"), (('"d1"', '"dd1"'), "did you mean 'd1'")],
)
def test_unknown_devices_of_a_plan_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: tuple[str, str], why: str
) -> None:
    by_hand()
    text(capsys, "simulate", "--k", "2", "--m", "4", "--strategy", "gpipe")
    assert why in failing(capsys, USAGE, "simulate", edited(tmp_path, "gpipe-k2-m4", change))["why"]


def test_more_devices_than_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    profile = factory.profile([1.0] * 9, machine=factory.devices(8))
    by_hand(layers=profile.layers, values=profile.values)
    assert "9 devices are asked for" in failing(capsys, DEVICE, "simulate", "--k", "9", "--m", "4")["what"]


def test_a_search_says_what_would_make_a_strategy_possible(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand()
    found = text(capsys, "search", "--k", "2", "--m", "1", "--strategy", "gpipe", "--strategy", "tensor-parallel")
    assert "not possible where it might be better: tensor-parallel: no layer says how its tensors split" in found
    assert "define splits(model) in the model file" in " ".join(found.split())
    error = failing(capsys, USAGE, "search", "--k", "2", "--tensor", "2", "--strategy", "gpipe")
    assert error["fix"] == "--tensor 1 makes it possible"


def test_every_plan_that_a_sentence_names_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that memory rules out, and those that a search evaluated and did not rank."""
    machine = factory.devices(4, memory_bytes=12_000, bandwidth=100.0)
    profile = factory.profile([1.0] * 4, machine=machine, message_bytes=10)
    Store().save_profile(profile)
    asked = ("search", "--profile", Store().name_of(Store().profile_path(None)))
    data(capsys, *asked, "--batch", "8", "--batch", "16")
    sentences = " ".join(data(capsys, "explain")["sentences"])
    named = set(re.findall(r"[a-z0-9-]+-k\d+-m\d+[a-z0-9.-]*(?<![.-])", sentences))
    done = Store().load_search().done.values()
    assert any(found.label in named and found.lack > 1 for found in done), "of those that do not fit"
    assert not named <= {found.label for found in Store().load_search().answer.leaders}
    for name in sorted(named):
        own = data(capsys, "explain", name)
        assert own["plan"] == name
        lacks = any(found.label == name and found.lack > 1 for found in done)
        assert ("too large, as it lacks" in own["sentences"][0]) == lacks


def test_a_plan_has_one_figure_in_the_table_and_in_time_against_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Shared links make a step longer than its bound: what the table has simulated is no "at least" below it."""
    machine = factory.hosts_of(2, 2, nic=1e3)
    Store().save_profile(factory.profile([1.0] * 4, machine=machine, message_bytes=300))
    found = data(capsys, "search", "--profile", Store().name_of(Store().profile_path(None)), "--batch", "8")
    table = {plan["plan"]: plan for plan in found["plans"]}
    both = [point for point in found["pareto"] if point["plan"] in table]
    assert both
    for point in both:
        assert point["contention_simulated"]
        assert point["step_s"] == table[point["plan"]]["step_s"]
    points = found["pareto"]
    assert all(a["peak_bytes"] < b["peak_bytes"] and a["step_s"] > b["step_s"] for a, b in itertools.pairwise(points))


def test_the_commands_of_a_run_begin_with_its_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever has the page can ask, run and report the same again; a file is run as it is."""
    by_hand()
    data(capsys, "simulate", "--k", "2", "--m", "8", "--strategy", "gpipe")
    store = Store()
    path = store.profile_path(None)
    ranking, name = store.load_ranking(), store.name_of(path)
    LINE.set(("run", "--steps", "5", "--json"))
    simulated = f"plan simulate --k 2 --m 8 --strategy gpipe --profile {name}"
    run = f"plan run gpipe-k2-m8 --steps 5 --profile {name}"
    assert commands(store, "best", ranking.best.plan, path) == f"{simulated} && {run}"
    LINE.set(("run", ".plan/plans/gpipe-k2-m8.toml"))
    file = commands(store, ".plan/plans/gpipe-k2-m8.toml", ranking.best.plan, path)
    assert file == f"plan run gpipe-k2-m8.toml --profile {name}"


def test_simulate_says_and_takes_the_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    """Two hosts of 8: a name that ends in -stages has a stage's replicas side by side, as in a search."""
    asked = ("simulate", "--profile", "gnmt", "--cluster", "a100x64", "--k", "16", "--m", "16", "--batch", "1024")
    asked = (*asked, "--replicas", "8", "--strategy", "gpipe", "--saving", "none")
    names = {}
    for mapping in ("", "stages", "pipelines"):
        (plan,) = data(capsys, *asked, *(("--mapping", mapping) if mapping else ()))["plans"]
        names[mapping] = plan["plan"]
        stage = Store().plan(plan["plan"], able).stages[0]
        side_by_side = stage.devices == tuple(f"gpu{i}" for i in range(8))
        assert side_by_side == plan["plan"].endswith("-stages")
    assert names["stages"] == f"{names['pipelines']}-stages"
    assert names[""] in (names["stages"], names["pipelines"])
    assert "did you mean 'stages'" in failing(capsys, USAGE, *asked, "--mapping", "stage")["why"]


def test_every_line_of_a_search_is_another_decision(capsys: pytest.CaptureFixture[str]) -> None:
    """The best of each family, whatever its M; --all and --filter show more of one, and two names of a plan are one."""
    by_hand()
    names = (word for name in ("data-parallel", "zero-1", "zero-3") for word in ("--strategy", name))
    asked = ("search", *names, "--saving", "none", "--batch", "64")
    found = data(capsys, *asked)
    kinds = [plan["plan"].partition("-k")[0] for plan in found["plans"]]
    assert sorted(kinds) == ["data-parallel", "zero-1", "zero-3"]
    assert found["best"] in {plan["plan"] for plan in found["plans"]}
    every = [plan["plan"] for plan in data(capsys, *asked, "--all")["plans"]]
    assert len(set(every)) == len(every) >= 3
    filtered = [plan["plan"] for plan in data(capsys, *asked, "--filter", "zero-3")["plans"]]
    assert filtered
    assert all("zero-3" in name for name in filtered)
    others = {plan["plan"].partition("-k")[0] for plan in data(capsys, "search", "--saving", "none", "--all")["plans"]}
    assert {"data-parallel", "zero-1", "gpipe", "1f1b", "zb-h1", "chimera"} < others, "every strategy's best"
    assert "gpipe" in data(capsys, "search", "--saving", "none", "--filter", "gpipe")["plans"][0]["plan"]
    error = failing(capsys, USAGE, *asked, "--filter", "gpipe")
    assert "no plan's name has gpipe" in error["what"]
