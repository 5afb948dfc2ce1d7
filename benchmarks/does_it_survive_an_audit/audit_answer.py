"""The answer, as far as a person meets it: the words and figures beside a plan."""

from __future__ import annotations

from figure import Found, figure
from hardware import FOUR_BY_FOUR

from planner.placement import strategies
from planner.placement.pipeline import Question
from planner.simulate.limits import ideal_bubble
from planner.simulate.predict import simulate
from planner.values.plan import Plan, Stage
from profiles import shipped


@figure("ideal bubble, K=4 M=8 R=2", section="answer", unit="share", before="0.273")
def bubble_of_a_replica() -> Found:
    """Each of two pipelines of four stages has 8 / 2 = 4 micro-batches: (4 - 1) / (4 + 4 - 1) = 0.429."""
    stages = tuple(Stage(layers=(f"l{s}",), devices=(f"d{s}", f"d{s + 4}")) for s in range(4))
    plan = Plan(strategy="1f1b", schedule="1f1b", stages=stages, microbatches=8, batch=8)
    return Found(ideal_bubble(plan) or 0.0, 3 / 7)


@figure("VGG-16 data parallel over 4 x 4: share of the step not computing", section="answer", unit="share", before="0")
def waiting_for_reductions() -> Found:
    """A device computes 64 samples' forward and backward and its update; all else of the step is the all-reduce."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    plan = strategies.get("data-parallel").spread(Question(profile, FOUR_BY_FOUR, 16, 16, 1024))
    outcome = simulate(profile, plan, FOUR_BY_FOUR)
    share = 64 / profile.layers[0].times[0].forward[0].samples
    computed = sum(
        (layer.times[0].forward[0].median_s + layer.times[0].backward[0].median_s) * share
        + layer.times[0].optimizer.median_s
        for layer in profile.layers
    )
    return Found(outcome.synchronising, 1 - computed / outcome.step_s)
