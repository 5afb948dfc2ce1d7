"""What the executor says it can run is what its ranks perform."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from executor.abilities import HALVES_OF_SHARDS, PERFORMS, missing
from planner.orders.operations import OPS
from planner.placement.pipeline import Question
from planner.placement.strategies import get
from planner.values.plan import Plan, Stage
from tests.factory import devices, profile


def spread(strategy: str, k: int = 2, m: int = 4, **question: object) -> Plan:
    return get(strategy).spread(Question(profile([1.0] * 4), devices(k), k, m, m, **question))


def test_every_ability_is_a_method_of_a_rank() -> None:
    from executor import rank

    assert set(PERFORMS) <= set(OPS)
    assert all(callable(getattr(rank.Rank, method)) for method in PERFORMS.values())


def test_a_plan_is_judged_without_torch() -> None:
    code = "import sys, executor.abilities; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "strategy",
    [
        "single",
        "naive",
        "balanced",
        "gpipe",
        "1f1b",
        "data-parallel",
        "zero-1",
        "interleaved",
        "chimera",
        "zb-h1",
        "zb-v",
        "pipedream",
        "pipedream-vertical",
        "pipedream-2bw",
    ],
)
def test_what_can_be_run(strategy: str) -> None:
    plan = spread(strategy)
    assert missing(plan) == ()
    assert missing(msgspec.structs.replace(plan, recompute=True)) == ()
    assert missing(msgspec.structs.replace(plan, recompute_layers=("layer0",))) == ()


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("parameter-server-async", ("steps that overlap at a server",)),
    ],
)
def test_what_cannot_be_run_yet(strategy: str, words: tuple[str, ...]) -> None:
    assert set(words) <= set(missing(spread(strategy)))


def test_replicas_without_a_flush_share_whole_steps_and_parameters() -> None:
    for strategy in ("pipedream", "pipedream-2bw"):
        plan = spread(strategy, 4, 8, replicas=2)
        assert missing(plan) == ()
        sharded = msgspec.structs.replace(plan, synchronisation="zero-1")
        assert "shards of parameters that have versions" in missing(sharded)
    stages = tuple(Stage(layers=(f"layer{s}",), devices=own) for s, own in enumerate((("d0",), ("d1", "d2"))))
    turns = Plan(strategy="pipedream", schedule="pipedream", stages=stages, microbatches=4, batch=12)
    assert missing(turns) == ()
    odd = msgspec.structs.replace(turns, microbatches=3)
    assert missing(odd) == ("replicas that take turns with micro-batches of which a step has no whole turns",)


def test_savings() -> None:
    plan = spread("gpipe", m=8)
    for change in ({"offload": True}, {"host_optimizer": True}, {"offload": True, "recompute": True}):
        assert missing(msgspec.structs.replace(plan, **change)) == ()
    sharded = msgspec.structs.replace(spread("gpipe", 4, 8, replicas=2), synchronisation="zero-3")
    (words,) = missing(msgspec.structs.replace(sharded, offload=True))
    assert words == "swapping activations beside sharded parameters"


def test_sharded_parameters_are_not_read_in_halves_of_a_backward() -> None:
    plan = spread("zb-h1", 4, 8, replicas=2)
    assert missing(plan) == ()
    assert missing(msgspec.structs.replace(plan, synchronisation="zero-3")) == (HALVES_OF_SHARDS,)
