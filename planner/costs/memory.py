"""The memory of every device over a step: a curve by kind of bytes, from the order of its actions.

Static bytes (parameters, their versions, buffers, optimizer state after its first step) plus what each action
allocates, keeps and frees. Inside a forward or backward the layers are walked one by one, so the peak is that of the
worst layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.costs import host_memory
from planner.costs.placed import Placed
from planner.costs.stage_memory import of_stage
from planner.costs.static_memory import keeps_gradients, static_bytes
from planner.orders import codes
from planner.orders.codes import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FETCH,
    FORWARD,
    LOAD,
    OP,
    OPS,
    OPTIMIZER,
    PUSH,
    RECV_BACKWARD,
    RECV_FORWARD,
    RELEASE,
    SEND_BACKWARD,
    STAGE,
    STAGES,
)
from planner.programs.waits import Linked
from planner.values.profile import Profile, interpolate
from planner.values.trace import KINDS, MemoryPoint

Floats = npt.NDArray[np.float64]
_INDEX = {kind: number for number, kind in enumerate(KINDS)}


class MemoryModel:
    """What every action of a program does to its device's bytes.

    `static` are the bytes (devices, kinds) before the first action. `change` (stage x op, kinds) is what an action
    leaves behind, `inside` (stage x op) what it needs on top while it runs, `inside_first` the same for a backward
    that has to allocate its gradients. `gradients` (stages) are those bytes.
    """

    def __init__(self, placed: Placed, linked: Linked) -> None:
        self.placed, self.linked, self.plan = placed, linked, placed.plan
        self.of = [of_stage(placed, stage) for stage in range(len(placed.ranges))]
        self.shards = placed.synchronisation.shards
        self.holders = [len(rows) for rows in placed.holders]
        self.keeps_gradients = keeps_gradients(placed)
        self.gradients = np.array(
            [0.0 if keeps else of.gradients for of, keeps in zip(self.of, self.keeps_gradients, strict=True)]
        )
        self.static = static_bytes(placed, self.of, linked.devices)
        width = len(self.of) * len(OPS)
        self.change = np.zeros((width, len(KINDS)))
        self.inside, self.inside_first = np.zeros(width), np.zeros(width)
        self.inputs, self.output_gradients = self._received(RECV_FORWARD), self._received(RECV_BACKWARD)
        for stage in range(len(self.of)):
            self._describe(stage)

    @cached_property
    def host_bytes(self) -> Floats:
        """Most bytes that each row keeps in its host's memory at once."""
        return host_memory.by_row(self.placed, self.linked, self.of)

    @property
    def hosts(self) -> dict[str, float]:
        """Most bytes that the plan keeps in each host's memory, by the host's name."""
        return host_memory.by_host(self.placed, self.host_bytes)

    def _describe(self, stage: int) -> None:
        of = self.of[stage]
        has_input, has_gradient = self._receives(stage)
        received = of.received if has_input else 0.0
        received_gradient = of.received_gradient if has_gradient else 0.0
        sent = of.sent_gradient if stage and self._receives(stage - 1)[1] else 0.0
        gathered = of.gathered if "parameters" in self.shards else 0.0
        whole = of.reduced if "gradients" in self.shards else 0.0
        repeated = of.saved - of.kept
        trains = self.placed.schedule.trains
        inputs, targets = _batch_bytes(self.placed.profile, self.plan.loaded(stage))
        first, last = stage == 0, stage == len(self.of) - 1
        self._set(stage, LOAD, inside=inputs + targets, input=inputs * first + targets * last)
        self._set(stage, RECV_FORWARD, communication=received)
        self._set(stage, RECV_BACKWARD, communication=received_gradient)
        if trains:
            self._set(stage, FORWARD, inside=of.forward_peak + gathered, activations=of.kept)
        else:
            self._set(stage, FORWARD, inside=of.forward_peak, communication=-received)
        # What is recomputed lives inside the backward, as torch's checkpoint has it: RECOMPUTE itself holds nothing.
        self._set(
            stage,
            BACKWARD,
            inside=of.backward_peak + gathered + whole,
            inside_first=of.backward_first_peak + gathered + whole,
            activations=-of.kept,
            communication=sent - received - received_gradient,
        )
        self._set(
            stage,
            BACKWARD_INPUT,
            inside=repeated + of.input_peak + gathered,
            activations=repeated,
            communication=sent,
        )
        self._set(
            stage,
            BACKWARD_WEIGHT,
            inside=whole,
            inside_first=whole + of.reduced,
            activations=-of.saved,
            communication=-received - received_gradient,
        )
        self._set(stage, RELEASE, activations=-of.kept)
        self._set(stage, FETCH, activations=of.kept)
        freed = 0.0 if self.keeps_gradients[stage] else -of.gradients
        peak = of.optimizer_peak / (self.holders[stage] if "optimizer" in self.shards else 1)
        self._set(stage, OPTIMIZER, inside=0.0 if self.plan.host_optimizer else peak, gradients=freed)
        self._set(stage, PUSH, gradients=freed)

    def _set(
        self, stage: int, op: str, *, inside: float = 0.0, inside_first: float | None = None, **change: float
    ) -> None:
        at = stage * len(OPS) + codes.NUMBER[op]
        self.inside[at] = inside
        self.inside_first[at] = inside if inside_first is None else inside_first
        for kind, amount in change.items():
            self.change[at, _INDEX[kind]] += amount

    def _receives(self, stage: int) -> tuple[bool, bool]:
        """Whether a stage's input and its output's gradient come from another device."""
        return bool(self.inputs[stage]), bool(self.output_gradients[stage])

    def _received(self, op: str) -> npt.NDArray[np.bool_]:
        """Which stages receive such messages."""
        base = int(self.linked.base[codes.NUMBER[op]])
        if base < 0:
            return np.zeros(len(self.of), bool)
        parties = self.linked.parties[base : base + self.linked.slots].reshape(self.linked.stages, -1)
        found: npt.NDArray[np.bool_] = parties.max(axis=1) > 0
        return found

    @property
    def freed(self) -> Floats:
        """Bytes of gradients' messages that are known to be sent when each action begins, and let go of there."""
        linked = self.linked
        freed = np.zeros(len(linked.flat))
        base = int(linked.base[codes.NUMBER[RECV_BACKWARD]])
        if base >= 0:
            known = linked.completions[base : base + linked.slots]
            sent = np.array([0.0, *(of.sent_gradient for of in self.of)])[: len(self.of) + 1]
            size = np.repeat(sent[np.minimum(np.arange(len(self.of)) + 2, len(self.of))], linked.microbatches)
            np.add.at(freed, known[known >= 0], size[known >= 0])
        return freed

    def peaks(self) -> Floats:
        """Most bytes that are live on every device, all kinds together."""
        return self._walk(np.zeros(0))

    def levels(self) -> Floats:
        """Most bytes that are live on its device during each action."""
        levels = np.zeros(len(self.linked.flat))
        self._walk(levels)
        return levels

    def _walk(self, levels: Floats) -> Floats:
        linked = self.linked
        peaks = np.zeros(linked.devices)
        base = int(linked.base[codes.NUMBER[RECV_BACKWARD]])
        released = np.zeros(linked.messages if base >= 0 else 0)
        _peaks(
            len(linked.flat),
            *(linked.flat, linked.offsets, len(OPS), self.static.sum(axis=1), self.change.sum(axis=1)),
            *(self.inside, self.inside_first, self.gradients, np.array([of.sent_gradient for of in self.of])),
            *(linked.posts, linked.waits, linked.answers if base >= 0 else linked.posts[:0]),
            *(released, np.zeros(linked.stages, np.int64), peaks, levels),
        )
        return peaks

    def curve(self, ready: Sequence[float], end: Sequence[float]) -> tuple[MemoryPoint, ...]:
        """Return the bytes live on every device over the step, by kind, from when each action was ready and done.

        Of a peak inside an action, everything that the action adds is `transient`; the other kinds are those when it
        began. When a row ends, its batch is let go of, and the messages of which nobody has said yet that they came.
        """
        linked = self.linked
        kind = codes.stages(linked.flat) * len(OPS) + codes.ops(linked.flat)
        fresh = np.zeros(len(linked.flat), np.int8)
        _fresh(
            len(linked.flat), linked.flat, linked.offsets, self.gradients, np.zeros(linked.stages, np.int64), fresh
        )  # fmt: skip
        change = self.change[kind]
        change[:, _INDEX["gradients"]] += np.where(fresh, self.gradients[codes.stages(linked.flat)], 0.0)
        inside = np.where(fresh, self.inside_first[kind], self.inside[kind])
        freed = self.freed
        points: list[MemoryPoint] = []
        for row in range(linked.devices):
            a, b = int(linked.offsets[row]), int(linked.offsets[row + 1])
            live = self.static[row].copy()
            points.append(MemoryPoint(row, 0.0, tuple(live.tolist())))
            sending = codes.stages(linked.flat[a:b][codes.has(linked.flat[a:b], SEND_BACKWARD)])
            under_way = sum(self.of[stage].sent_gradient for stage in sending.tolist()) - float(freed[a:b].sum())
            for i in range(a, b):
                live[_INDEX["communication"]] -= freed[i]
                if inside[i]:
                    now = live.tolist()
                    points.append(MemoryPoint(row, ready[i], tuple(now)))
                    now[_INDEX["transient"]] = float(inside[i])
                    points.append(MemoryPoint(row, (ready[i] + end[i]) / 2, tuple(now)))
                if inside[i] or change[i].any():
                    live += change[i]
                    points.append(MemoryPoint(row, end[i], tuple(live.tolist())))
            loaded = float(change[a:b, _INDEX["input"]].sum())
            if loaded or under_way:
                live[_INDEX["input"]] -= loaded
                live[_INDEX["communication"]] -= under_way
                points.append(MemoryPoint(row, max(end[a:b], default=0.0), tuple(live.tolist())))
        return tuple(points)


_B, _W = codes.NUMBER[BACKWARD], codes.NUMBER[BACKWARD_WEIGHT]
_OPTIMIZER, _PUSH = codes.NUMBER[OPTIMIZER], codes.NUMBER[PUSH]
_SEND_B = codes.NUMBER[SEND_BACKWARD]


@kernel
def _fresh(flat, offsets, gradients, held, fresh):  # type: ignore[no-untyped-def]
    """Mark the backwards that allocate their stage's gradients: the first of a device, and after each update."""
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            op = flat[i] >> OP
            stage = flat[i] >> STAGE & STAGES
            if op == _B or op == _W:
                if held[stage] != d + 1 and gradients[stage] > 0:
                    fresh[i] = 1
                held[stage] = d + 1
            elif op == _OPTIMIZER or op == _PUSH:
                held[stage] = 0
    return 0


@kernel
def _peaks(  # type: ignore[no-untyped-def]
    flat, offsets, width, static, change, inside, inside_first, gradients, sent,
    posts, waits, answers, released, held, peaks, levels,
):  # fmt: skip
    """Walk every row; as `MemoryModel.curve`, totals only.

    `released` are the bytes of gradients' messages (`sent`, by the sending stage) that the arrival of a message lets
    go: those that it answers. It is written and read by the same row.
    """
    for d in range(len(offsets) - 1):
        live = peak = static[d]
        for i in range(offsets[d], offsets[d + 1]):
            op = flat[i] >> OP
            stage = flat[i] >> STAGE & STAGES
            kind = stage * width + op
            if len(levels) > 0:
                levels[i] = live
            if op == _SEND_B:
                if answers[posts[i]] >= 0:
                    released[answers[posts[i]]] += sent[stage]
                continue
            if 0 <= waits[i] < len(released):
                live -= released[waits[i]]
                released[waits[i]] = 0.0
            most = live + inside[kind]
            if op == _B or op == _W:
                if held[stage] != d + 1 and gradients[stage] > 0:
                    most = live + inside_first[kind]
                    live += gradients[stage]
                held[stage] = d + 1
            elif op == _OPTIMIZER or op == _PUSH:
                held[stage] = 0
            live += change[kind]
            most = max(most, live)
            peak = max(peak, most)
            if len(levels) > 0:
                levels[i] = most
        peaks[d] = peak
    return 0


def _batch_bytes(profile: Profile, batch: int) -> tuple[float, float]:
    inputs = interpolate([(float(n), float(i)) for n, i, _ in profile.batch_bytes], batch)
    targets = interpolate([(float(n), float(t)) for n, _, t in profile.batch_bytes], batch)
    return inputs, targets
