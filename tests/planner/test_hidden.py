"""Reductions and gathers that computing hides: they load their links while they really run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.costs.placed import Placed
from planner.costs.priced import costs_of
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.simulate.contention import Run, simulated_step
from planner.simulate.longest_path import walk
from planner.values.plan import Plan, Stage
from tests.factory import hosts_of, profile


def test_hidden_reductions_share_the_network() -> None:
    """Two stages of two layers, two replicas on two hosts; a layer's gradients take a ring of two 2 s on the NICs.

    Forwards until 4 s, the backward of stage 1 until 6, of stage 0 until 8. Stage 1 reduces from 5 s on, when its last
    layer's gradients are ready, alone until 9; stage 0 from 7 on, alone until 11. Together they keep the NICs busy for
    8 s from 5 on, so the step takes 13 s; were what computing hides free, the step would be over after 12.
    """
    plan = Plan(
        strategy="gpipe",
        schedule="gpipe",
        stages=(
            Stage(layers=("layer0", "layer1"), devices=("d0", "d2")),
            Stage(layers=("layer2", "layer3"), devices=("d1", "d3")),
        ),
        microbatches=2,
        batch=2,
        bucket_bytes=1000,
    )
    costs, cluster = profile([1.0] * 4), hosts_of(2, 2, nic=500.0, inside=1e9)
    assert simulated_step(Placed(costs, plan, cluster)) == pytest.approx(13.0)
    own = hosts_of(2, 2, nic=500.0, inside=1e9, shared=False)
    assert simulated_step(Placed(costs, plan, own)) == pytest.approx(11.0)


@given(
    st.sampled_from(["all-reduce", "zero-1", "zero-2", "zero-3"]),
    st.sampled_from([100.0, 700.0, 1e4]),
    st.lists(st.integers(1, 4).map(float), min_size=4, max_size=4),
    st.integers(1, 3),
    st.sampled_from([0, 1000, 2000]),
)
def test_what_meets_nobody_is_as_in_the_fast_interpreter(
    synchronisation: str, nic: float, forward: list[float], share: int, bucket: int
) -> None:
    """Two devices on two hosts, all links shared: one transfer at a time, so both interpreters say the same."""
    plan = Plan(
        strategy="gpipe",
        schedule="gpipe",
        stages=(Stage(layers=tuple(f"layer{i}" for i in range(4)), devices=("d0", "d1")),),
        microbatches=2 * share,
        batch=2 * share,
        synchronisation=synchronisation,
        bucket_bytes=bucket,
    )
    placed = Placed(profile(forward, optimizer_s=0.25), plan, hosts_of(2, 1, nic=nic))
    costs = costs_of(placed, Linked(unroll(plan)))
    run = Run(costs, plan.devices)
    run.env.run()
    walked = walk(costs)
    assert run.end == pytest.approx(walked.end.tolist(), rel=1e-12)
    assert run.ready == pytest.approx(walked.ready.tolist(), rel=1e-12)
