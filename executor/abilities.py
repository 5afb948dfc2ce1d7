"""What the executor can run, asked of its own table of operations; no torch, so that a plan is judged in no time."""

from __future__ import annotations

from planner.orders import codes, schedules, synchronisation
from planner.orders.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FETCH,
    FORWARD,
    LOAD,
    NORM_GRAD,
    OFFLOAD,
    OPERATIONS,
    OPS,
    OPTIMIZER,
    PULL,
    PUSH,
    RECOMPUTE,
    RECV_BACKWARD,
    RECV_FORWARD,
    REDUCE_ASYNC,
    REDUCE_GRAD,
    REDUCE_NORM,
    REDUCE_TIED,
    RELEASE,
    RESHARD_BACKWARD,
    RESHARD_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    UNSHARD_BACKWARD,
    UNSHARD_FORWARD,
)
from planner.programs.lowering import unroll
from planner.values.plan import Plan

PERFORMS = {
    LOAD: "load",
    FORWARD: "forward",
    RECOMPUTE: "recompute",
    OFFLOAD: "offload",
    RELEASE: "release",
    FETCH: "fetch",
    BACKWARD: "backward",
    BACKWARD_INPUT: "backward_input",
    BACKWARD_WEIGHT: "backward_weight",
    SEND_FORWARD: "send_forward",
    RECV_FORWARD: "receive",
    SEND_BACKWARD: "send_backward",
    RECV_BACKWARD: "receive",
    REDUCE_GRAD: "reduce_gradients",
    REDUCE_ASYNC: "reduce_beside",
    REDUCE_TIED: "add_up_gradients",
    NORM_GRAD: "measure_norm",
    REDUCE_NORM: "agree_on_norm",
    OPTIMIZER: "optimize",
    PULL: "pull",
    PUSH: "push",
    UNSHARD_FORWARD: "gather",
    UNSHARD_BACKWARD: "gather_backward",
    RESHARD_FORWARD: "let_go",
    RESHARD_BACKWARD: "let_go",
}
"""The operations that a rank performs, each with the method of `executor.rank.Rank` that does it."""


SERVERS_APART = "servers that are not just the devices that hold a stage"
HALVES_OF_SHARDS = "sharded parameters in a backward of two halves"


def missing(plan: Plan) -> tuple[str, ...]:
    """Return what the executor cannot do yet of what a plan asks, in words; nothing when it can run the plan.

    Operations of the plan's program that no rank performs, and what a rank's own structure rules out.
    """
    overlap, agreed = schedules.get(plan.schedule).asynchronous, synchronisation.get(plan.synchronisation)
    limits = {
        "steps without a backward": not schedules.get(plan.schedule).trains,
        "steps that overlap at a server": agreed.asynchronous,
        "shards of parameters that have versions": overlap and bool(agreed.shards or agreed.server),
        "replicas that take turns with micro-batches of which a step has no whole turns": overlap
        and any(plan.microbatches % turns for turns in plan.turns),
        "tensors split over devices": plan.tensor > 1,
        "updates on the host of parameters that have versions": plan.host_optimizer and overlap,
        "swapping activations beside sharded parameters": plan.offload and "parameters" in agreed.shards,
        "swapping activations while parameters change": plan.offload and overlap,
        SERVERS_APART: bool(agreed.server) and not _all_alike(plan),
        "clipping gradients, or scaling a loss, on servers": bool(agreed.server) and plan.norm,
        HALVES_OF_SHARDS: "parameters" in agreed.shards and schedules.get(plan.schedule).splits,
    }
    flat, _ = codes.flatten(unroll(plan, replicas=1).order)
    present = codes.extent(flat).present
    asked = [op for op, count in zip(OPS, present.tolist(), strict=True) if count]
    return (
        *(words for words, found in limits.items() if found),
        *(f"{OPERATIONS[op].words} ({op})" for op in asked if op not in PERFORMS),
    )


def _all_alike(plan: Plan) -> bool:
    """Whether every device holds all stages and serves its part of them."""
    every = range(len(plan.groups))
    return set(plan.servers) == set(plan.device_names) and all(set(own) == set(every) for own in plan.holders)


def able(plan: Plan) -> bool:
    """Whether the executor can run a plan."""
    return not missing(plan)
