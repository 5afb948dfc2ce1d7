"""Recomputing blocks, and recomputing that frees nothing."""

from __future__ import annotations

import msgspec
import pytest

from planner.basis.errors import PlanError
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.placement.freeing import worth_a_checkpoint
from planner.placement.question import Question
from planner.placement.savings import COMBINATIONS
from planner.placement.strategies import get
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.simulate.predict import simulate
from planner.values.plan import Plan, Stage
from planner.values.profile import Profile
from profiles import shipped
from tests.factory import devices, profile


def keeping(costs: Profile, *saved: int) -> Profile:
    """The profile with so many bytes saved per sample inside its layers; each has 100 bytes of output."""
    layers = tuple(
        msgspec.structs.replace(
            layer,
            sizes=tuple(
                msgspec.structs.replace(
                    size,
                    saved_bytes=own * size.samples,
                    output_bytes=100 * size.samples,
                    forward_peak_bytes=(own + 100) * size.samples,
                    backward_first_peak_bytes=100 * size.samples,
                    backward_peak_bytes=100 * size.samples,
                )
                for size in layer.sizes
            ),
        )
        for layer, own in zip(costs.layers, saved, strict=True)
    )
    return msgspec.structs.replace(costs, layers=layers)


def question(costs: Profile, k: int, m: int, *savings: str, replicas: int = 1) -> Question:
    return Question(costs, devices(k), k, m, m, replicas, savings=savings)


def peak(q: Question, plan: Plan) -> float:
    return float(max(MemoryModel(Placed(q.profile, plan, q.cluster), Linked(unroll(plan))).peaks()))


def test_a_search_offers_blocks() -> None:
    assert ("recompute-blocks",) in COMBINATIONS


def test_blocks_that_keep_more_than_they_free_stay_as_they_are() -> None:
    """A norm frees a few bytes and would keep its output; a block frees ten times its output."""
    costs = keeping(profile([1.0] * 4, message_bytes=100), 0, 1000, 1000, 10)
    assert worth_a_checkpoint(costs, 1) == (range(1, 2), range(2, 3))


def test_a_residual_block_is_one_checkpoint() -> None:
    """ResNet-50 has 16 residual blocks of about ten layers; nothing but their ends crosses their borders."""
    costs = shipped.read(shipped.profiles()["resnet50"])
    blocks = [block for block in worth_a_checkpoint(costs, 16) if len(block) > 1]
    assert len(blocks) == 16
    assert {len(costs.crossing(block.stop)) for block in blocks} == {1}


def test_blocks_are_repeated_one_at_a_time() -> None:
    """Four blocks of 1000 bytes inside and 100 of output, one micro-batch in flight, on one device.

    Without: 4 x 1000 + 4 x 100. As one checkpoint: all is there again when the backward begins. As four: the outputs,
    one block's inside and what its backward needs.
    """
    costs = keeping(profile([1.0] * 4, message_bytes=100, bytes_=[0] * 4), 1000, 1000, 1000, 1000)
    q = question(costs, 1, 1, "recompute-blocks")
    plan = get("single").spread(q)
    assert plan.recompute_blocks == tuple((f"layer{i}", f"layer{i}") for i in range(4))
    bare = peak(q, plan.without_recompute())
    assert bare - peak(q, plan) == pytest.approx(3 * 1000)
    outcome = simulate(costs, plan, q.cluster)
    assert [e.work for e in outcome.trace.events if e.op == "R"] == [4.0], "every block's forward once more"


def test_a_block_that_is_cut_is_two_checkpoints() -> None:
    plan = Plan(
        strategy="gpipe",
        schedule="gpipe",
        stages=(Stage(layers=("a", "b"), devices=("d0",)), Stage(layers=("c", "d"), devices=("d1",))),
        microbatches=2,
        batch=2,
        recompute_blocks=(("b", "c"),),
    )
    assert plan.checkpoints(0) == (range(1, 2),)
    assert plan.checkpoints(1) == (range(1),)


@pytest.mark.parametrize(
    ("saving", "saved", "m"),
    [
        ("recompute", (0, 0), 4),
        ("recompute-blocks", (0, 0), 4),
        ("recompute", (1000, 1000), 1),
        ("recompute-blocks", (10, 10), 4),
    ],
    ids=["nothing inside", "no block", "one micro-batch, all repeated at once", "less than is kept"],
)
def test_what_frees_nothing_is_not_offered(saving: str, saved: tuple[int, ...], m: int) -> None:
    costs = keeping(profile([1.0] * 2, message_bytes=100), *saved)
    with pytest.raises(PlanError, match=r"frees nothing|changes nothing"):
        get("single").spread(question(costs, 1, m, saving))
