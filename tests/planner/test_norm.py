"""The norm of all gradients: who joins, what it costs, and which plans cannot have one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from planner.basis.errors import PlanError
from planner.costs.placed import Placed
from planner.costs.priced import costs_of
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.programs.lowering import lower
from planner.programs.program import Program
from planner.programs.proof import prove
from planner.programs.waits import Linked
from planner.search.ranking import rank
from planner.search.search import Search
from planner.search.space import space
from planner.simulate.evaluate import evaluate
from planner.simulate.longest_path import walk
from planner.simulate.predict import simulate
from planner.values.plan import Plan
from planner.values.plan_file import read, to_toml
from planner.values.profile import Profile, Timing
from tests.factory import devices, profile

NORM_S = 0.25


def clipping(layers: int = 4, clip: float = 1.0) -> Profile:
    """A model whose layers take a quarter of a second each for the norm of their gradients."""
    plain = profile([1.0] * layers)
    norm = Timing.of(1, [NORM_S])
    own = tuple(
        msgspec.structs.replace(layer, times=tuple(msgspec.structs.replace(t, norm=norm) for t in layer.times))
        for layer in plain.layers
    )
    return msgspec.structs.replace(plain, layers=own, clip=clip)


def spread(strategy: str, k: int, m: int = 4, replicas: int = 1, model: Profile | None = None) -> Plan:
    return get(strategy).spread(Question(model or clipping(), devices(k), k, m, m, replicas=replicas))


def around(program: Program, row: int) -> list[str]:
    return [str(a) for a in program.rows[row] if a.op in ("NORM_GRAD", "REDUCE_NORM", "OPTIMIZER", "REDUCE_GRAD")]


def test_stages_agree_before_they_update() -> None:
    program = lower(spread("1f1b", 2))
    assert around(program, 0) == ["0NORM_GRAD", "0REDUCE_NORM", "0OPTIMIZER"]
    assert around(program, 1) == ["1NORM_GRAD", "0REDUCE_NORM", "1OPTIMIZER"]


def test_gradients_are_reduced_first() -> None:
    program = lower(spread("1f1b", 4, replicas=2))
    assert around(program, 3) == ["1REDUCE_GRAD", "1NORM_GRAD", "0REDUCE_NORM", "1OPTIMIZER"]


def test_a_device_with_all_gradients_asks_nobody() -> None:
    """One device, and replicas that reduce the whole model; not those that have a shard of the gradients each."""
    for strategy, k in (("single", 1), ("data-parallel", 2)):
        assert "0REDUCE_NORM" not in around(lower(spread(strategy, k)), 0)
    assert "0REDUCE_NORM" in around(lower(spread("zero-1", 2)), 0)


def test_a_device_with_several_stages_takes_the_norm_of_each() -> None:
    assert around(lower(spread("interleaved", 2)), 1)[:3] == ["1NORM_GRAD", "3NORM_GRAD", "0REDUCE_NORM"]


@pytest.mark.parametrize("strategy", ["1f1b", "interleaved", "zb-v", "chimera", "gpipe", "zero-1"])
def test_both_interpreters_add_what_it_takes(strategy: str) -> None:
    """Two of four layers per device, or the half of all: half a second more, and an all-reduce without latency."""
    clips = spread(strategy, 2)
    plain = msgspec.structs.replace(clips, norm=False)
    placed, other = (Placed(clipping(), plan, devices(2)) for plan in (clips, plain))
    assert evaluate(placed).step_s == pytest.approx(
        evaluate(other).step_s + 2 * NORM_S * (2 if strategy == "chimera" else 1)
    )
    assert simulate(clipping(), clips, devices(2)).step_s == pytest.approx(evaluate(placed).step_s)
    assert walk(costs_of(placed, Linked(lower(clips)))).step_s == pytest.approx(evaluate(placed).step_s)


def test_agreeing_takes_latencies() -> None:
    """A ring of two: two rounds of an all-reduce of one number."""
    clips = spread("1f1b", 2)
    found = [
        evaluate(Placed(clipping(), clips, devices(2, latency_s=latency))).step_s
        - evaluate(Placed(clipping(), msgspec.structs.replace(clips, norm=False), devices(2, latency_s=latency))).step_s
        for latency in (0.0, 0.5)
    ]
    assert found[1] - found[0] == pytest.approx(1.0)


def test_who_does_not_join_is_found() -> None:
    program = lower(spread("1f1b", 2))
    rows = [[a for a in row if d == 0 or a.op != "REDUCE_NORM"] for d, row in enumerate(program.rows)]
    with pytest.raises(PlanError, match="not a valid step") as raised:
        prove(Program.of(rows), 4, backward=True, in_turn="per pair")
    assert "not every device joins" in raised.value.why


@pytest.mark.parametrize("strategy", ["pipedream", "pipedream-2bw", "pipedream-replicated", "parameter-server"])
def test_stages_that_update_apart_have_no_common_norm(strategy: str) -> None:
    """Without a flush, or with servers; the same strategies give plans of a model that does not clip."""
    with pytest.raises(PlanError, match="not for a model that clips") as raised:
        spread(strategy, 2)
    assert "all gradients are clipped together" in raised.value.why
    assert not spread(strategy, 2, model=clipping(clip=0.0)).norm


def test_a_comparison_says_why_they_are_left_out() -> None:
    ranking = rank(clipping(), devices(2), k=2, m=4, batch=4, name="p")
    why = next(one for one in ranking.rejected if "pipedream" in one.strategies).why
    assert "looked through for what overflows, and without a flush" in why
    assert sum("pipedream" in name for one in ranking.rejected for name in one.strategies) > 2, "one reason for all"
    assert sum("clipped" in one.why for one in ranking.rejected) <= 2
    assert all(outcome.plan.norm for outcome in ranking.outcomes)


def test_a_search_finds_what_clips() -> None:
    model = clipping()
    leaders = Search(model, devices(2), space(model, devices(2), 4, savings=((),))).run().leaders
    assert leaders
    assert not any(one.label.startswith("pipedream") for one in leaders)


def test_a_plan_file_says_it(tmp_path: Path) -> None:
    plan = spread("1f1b", 2)
    path = tmp_path / "plan.toml"
    path.write_text(to_toml(plan))
    assert read(path) == plan
    path.write_text(to_toml(spread("pipedream", 2, model=clipping(clip=0.0))).replace("norm = false", "norm = true"))
    with pytest.raises(PlanError, match="not valid") as raised:
        read(path)
    assert raised.value.why.startswith("norm: ")
