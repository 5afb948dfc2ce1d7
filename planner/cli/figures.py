"""An outcome's figures as JSON data: the same in the documents of all commands."""

from __future__ import annotations

from typing import Any

from planner.simulate.staleness import staleness
from planner.values.outcome import Outcome
from planner.values.plan import asynchronous

QUANTILES = (5, 25, 50, 75, 95)


def figures(outcome: Outcome) -> dict[str, Any]:
    """An outcome's figures, with units in the names."""
    from executor.abilities import able

    plan, (low, high) = outcome.plan, outcome.throughput_interval
    return {
        "plan": str(outcome.plan),
        "source": outcome.source,
        "throughput_samples_per_s": outcome.throughput,
        "throughput_tokens_per_s": outcome.throughput * plan.sequence if plan.sequence else None,
        "throughput_low_samples_per_s": low,
        "throughput_high_samples_per_s": high,
        "step_s": outcome.step_s,
        "step_low_s": outcome.interval_s[0],
        "step_high_s": outcome.interval_s[1],
        "step_samples_s": {f"p{q}": step for q, step in percentiles(outcome).items()},
        "runnable": able(outcome.plan),
        "stale_gradients": asynchronous(outcome.plan),
        "staleness_updates": staleness(outcome) if asynchronous(outcome.plan) else 0.0,
        "bubble_fraction": outcome.bubble,
        "synchronising_fraction": outcome.synchronising,
        "span_bubble_s": outcome.trace.span_bubble_s,
        "peak_bytes": outcome.peak_bytes,
        "peak_bytes_per_device": [point.total for point in outcome.peak],
        "peak_action_per_device": list(outcome.peak_actions),
        "capacity_bytes_per_device": list(outcome.capacity_bytes),
        "fits": outcome.fits,
    }


def percentiles(outcome: Outcome) -> dict[int, float]:
    """Percentiles of the steps that were drawn, in seconds."""
    drawn = outcome.samples_s
    return {q: drawn[len(drawn) * q // 100] for q in QUANTILES} if drawn else {}
