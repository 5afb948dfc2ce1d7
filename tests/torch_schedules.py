"""torch's own schedules, with which ours are compared: how they run, how they are lowered, how they are arranged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage, schedules

from planner.orders.action import actions
from planner.orders.codes import Order


def oracle(stages: list[PipelineStage], order: Order, microbatches: int, loss: Callable[..., torch.Tensor]) -> Any:
    """Return torch's own schedule runtime, fed with the same order of computes: the reference of the tests."""
    runtime = schedules._PipelineScheduleRuntime(stages, microbatches, loss_fn=loss, scale_grads=False)
    table = {d: [schedules._Action.from_str(str(action)) for action in actions(row)] for d, row in enumerate(order)}
    runtime._prepare_schedule_with_comms(table)
    return runtime


def torch_lowering(order: Order, stages: int) -> list[list[str]]:
    """Return what torch's lowering makes of an order, as text."""
    rows = [actions(row) for row in order]
    table = {d: [schedules._Action.from_str(str(action)) for action in row] for d, row in enumerate(rows)}
    where = {action.stage: d for d, row in enumerate(rows) for action in row}
    lowered = schedules._add_send_recv(table, stage_to_rank=lambda s: where[s], num_stages=stages)
    return [[str(action) for action in lowered[d]] for d in sorted(lowered)]


_TORCH_SCHEDULES = {
    "gpipe": "ScheduleGPipe",
    "interleaved": "ScheduleInterleaved1F1B",
    "looped-bfs": "ScheduleLoopedBFS",
    "zb-interleaved": "ScheduleInterleavedZeroBubble",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}


class _Unbuilt:
    """A stage without a module and without processes: all that torch's schedules ask for when they are arranged."""

    def __init__(self, rank: int, ranks: int, chunks: int) -> None:
        self.group_size, self.group_rank = ranks, rank
        self.stage_index, self.num_stages = rank, ranks * chunks
        self.device, self.group, self.submod = torch.device("cpu"), None, torch.nn.Identity()
        self.has_backward = True


def torch_orders(name: str, devices: int, chunks: int, microbatches: int) -> list[list[str]]:
    """Return the computes of every device as torch arranges the schedule that we call `name`, as text.

    An overlapped forward and backward stand one behind the other.
    """
    unbuilt: Any = [_Unbuilt(0, devices, chunks) for _ in range(chunks)]
    kind = getattr(schedules, _TORCH_SCHEDULES[name])
    single = issubclass(kind, schedules.PipelineScheduleSingle)
    made = kind(unbuilt[0] if single else unbuilt, microbatches, loss_fn=torch.nn.functional.mse_loss)
    rows = [made.pipeline_order[d] for d in range(devices)]
    flat = [[part for action in row if action is not None for part in action.sub_actions or (action,)] for row in rows]
    computes = (schedules.FORWARD, schedules.FULL_BACKWARD, schedules.BACKWARD_INPUT, schedules.BACKWARD_WEIGHT)
    return [[str(part) for part in row if part.computation_type in computes] for row in flat]
