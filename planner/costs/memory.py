"""The memory of every device over a step: a curve by kind of bytes, from the order of its actions.

Static bytes (parameters, their versions, buffers, optimizer state after its first step) plus what each action
allocates, keeps and frees. Inside a forward or backward the layers are walked one by one, so the peak is that of the
worst layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.costs import host_memory
from planner.costs.placed import Placed
from planner.costs.stage_memory import of_stage
from planner.costs.static_memory import keeps_gradients, static_bytes
from planner.orders import codes
from planner.orders.codes import OP, STAGE, STAGES
from planner.orders.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FETCH,
    FORWARD,
    LOAD,
    NUMBER,
    OPERATIONS,
    OPS,
    OPTIMIZER,
    PUSH,
    RECOMPUTE,
    RECV_BACKWARD,
    RECV_FORWARD,
    RELEASE,
    SEND_BACKWARD,
    TABLE,
    UNSHARD_BACKWARD,
    UNSHARD_FORWARD,
)
from planner.programs.waits import MESSAGES, Linked
from planner.values.plan import asynchronous
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
        self.sizes = self._message_bytes()
        self.inputs = self._moved(RECV_FORWARD, leaving=False)
        self.output_gradients = self._moved(RECV_BACKWARD, leaving=True)
        self.input_gradients = self._moved(RECV_BACKWARD, leaving=False)
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
        received, received_gradient = float(self.inputs[stage]), float(self.output_gradients[stage])
        sent = float(self.input_gradients[stage])
        sharded, splits = "parameters" in self.shards and self.holders[stage] > 1, self.placed.schedule.splits
        # A gather is posted before its forward or backward, which then needs so much more.
        ahead = [posted * (sharded and not splits) for posted in of.posted]
        before, behind = (sharded * whole - first for whole, first in zip(of.gathered, ahead, strict=True))
        self._set(stage, UNSHARD_FORWARD, communication=ahead[0])
        self._set(stage, UNSHARD_BACKWARD, communication=ahead[1])
        whole = of.reduced if "gradients" in self.shards else 0.0
        repeated = of.saved - of.kept
        # A gradient that comes from a stage of the same device is no message; it is kept like those of the layers.
        between = of.between + max(0.0, of.returned - received_gradient)
        trains = self.placed.schedule.trains
        inputs, targets = self.placed.profile.drawn_bytes(self.plan.loaded(stage))
        first, last = self.linked.edges.ends(stage)
        kept = inputs * first + targets * last
        rolling = asynchronous(self.plan)  # what is kept is there all the time, then
        self._set(stage, LOAD, inside=inputs + targets - kept * rolling, input=0.0 if rolling else kept)
        if trains:
            inside = of.forward_peak + before
            self._set(stage, FORWARD, inside=inside, activations=of.kept, communication=-ahead[0])
        else:
            self._set(stage, FORWARD, inside=of.forward_peak, communication=-received)
        # What is recomputed lives inside the backward, as torch's checkpoint has it: RECOMPUTE itself holds nothing.
        # Where backwards are halved it repeats for both halves, also where one is whole.
        back = of
        if splits:
            back = of_stage(self.placed, stage, forgetful=False)
            self._set(stage, RECOMPUTE, inside=of.repeat_peak + behind, activations=repeated)
        self._set(
            stage,
            BACKWARD,
            inside=back.backward_peak + behind + whole,
            inside_first=back.backward_first_peak + behind + whole,
            activations=-back.kept,
            communication=sent - received - received_gradient - ahead[1],
        )
        self._set(
            stage,
            BACKWARD_INPUT,
            inside=of.input_peak + behind,
            activations=between,
            communication=sent,
        )
        self._set(
            stage,
            BACKWARD_WEIGHT,
            inside=whole + of.weight_peak,
            inside_first=whole + max(of.reduced, of.weight_first_peak),
            activations=-of.saved - between,
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
        at = stage * len(OPS) + NUMBER[op]
        self.inside[at] = inside
        self.inside_first[at] = inside if inside_first is None else inside_first
        for kind, amount in change.items():
            self.change[at, _INDEX[kind]] += amount

    def _message_bytes(self) -> Floats:
        """Bytes of a message of every edge, plane by plane; 0 where its two stages are on one device."""
        sizes: list[float] = []
        for op, base in self.linked.planes:
            if op in MESSAGES:
                parties = self.linked.parties[base : base + self.linked.slots(op)].reshape(len(self.linked.edges), -1)
                gradients = OPERATIONS[op].side == "leaving"
                sizes += [
                    self.placed.edge_bytes(edge, gradients=gradients) if used else 0.0
                    for edge, used in zip(self.linked.edges, (parties.max(axis=1) > 0).tolist(), strict=True)
                ]
        return np.array(sizes)

    def _moved(self, op: str, *, leaving: bool) -> Floats:
        """Bytes per micro-batch that every stage exchanges along the edges that leave it, or those that reach it."""
        found = np.zeros(self.linked.stages)
        base = int(self.linked.base[NUMBER[op]])
        if base >= 0:
            table, first = self.linked.edges.table, base // self.linked.microbatches
            sizes = self.sizes[first : first + len(self.linked.edges)]
            np.add.at(found, table.producer if leaving else table.consumer, sizes)
        return found

    @property
    def freed(self) -> Floats:
        """Bytes of gradients' messages that are known to be sent when each action begins, and let go of there."""
        linked = self.linked
        freed = np.zeros(len(linked.flat))
        base = int(linked.base[NUMBER[RECV_BACKWARD]])
        if base >= 0:
            known = linked.completions[base : base + linked.slots(RECV_BACKWARD)]
            size = np.repeat(self.sizes[base // linked.microbatches :][: len(linked.edges)], linked.microbatches)
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
        base = int(linked.base[NUMBER[RECV_BACKWARD]])
        released = np.zeros(linked.messages if base >= 0 else 0)
        answers = linked.answers if base >= 0 else linked.party[:0]
        _peaks(
            len(linked.flat),
            _Actions(linked.flat, linked.offsets, linked.party, linked.waits, linked.also, answers),
            _Bytes(self.change.sum(axis=1), self.inside, self.inside_first, self.gradients, self.sizes),
            *(self.static.sum(axis=1), TABLE, linked.microbatches, base if base >= 0 else linked.transfers),
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
        held = np.zeros(linked.stages, np.int64)
        _fresh(len(linked.flat), linked.flat, linked.offsets, TABLE, self.gradients, held, fresh)
        change = self.change[kind]
        receives = np.flatnonzero(codes.has(linked.flat, *MESSAGES))
        change[receives, _INDEX["communication"]] += self.sizes[linked.party[receives] // linked.microbatches]
        change[:, _INDEX["gradients"]] += np.where(fresh, self.gradients[codes.stages(linked.flat)], 0.0)
        inside = np.where(fresh, self.inside_first[kind], self.inside[kind])
        freed = self.freed
        points: list[MemoryPoint] = []
        for row in range(linked.devices):
            a, b = int(linked.offsets[row]), int(linked.offsets[row + 1])
            live = self.static[row].copy()
            points.append(MemoryPoint(row, 0.0, tuple(live.tolist())))
            sent = linked.party[a:b][codes.has(linked.flat[a:b], SEND_BACKWARD)]
            under_way = float(self.sizes[sent // linked.microbatches].sum()) - float(freed[a:b].sum())
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


@kernel
def _fresh(flat, offsets, ops, gradients, held, fresh):  # type: ignore[no-untyped-def]
    """Mark the backwards that allocate their stage's gradients: a device's first, and after what renews them."""
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            op = flat[i] >> OP
            stage = flat[i] >> STAGE & STAGES
            if ops.adds[op]:
                if held[stage] != d + 1 and gradients[stage] > 0:
                    fresh[i] = 1
                held[stage] = d + 1
            elif ops.renews[op]:
                held[stage] = 0
    return 0


class _Actions(NamedTuple):
    """A linked program's actions and messages (`Linked`), as the walk needs them."""

    flat: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    party: npt.NDArray[np.int32]
    waits: npt.NDArray[np.int32]
    also: npt.NDArray[np.int32]
    answers: npt.NDArray[np.int32]


class _Bytes(NamedTuple):
    """A `MemoryModel`'s bytes, all kinds together; `sizes` are those of each edge's messages."""

    change: Floats
    inside: Floats
    inside_first: Floats
    gradients: Floats
    sizes: Floats


@kernel
def _peaks(actions, size_of, static, ops, last, back, released, held, peaks, levels):  # type: ignore[no-untyped-def]
    """Walk every row; as `MemoryModel.curve`, totals only.

    `released` are the bytes of gradients' messages (numbers from `back` on; `sizes` of each edge's) that the arrival of
    a message lets go: those that it answers. It is written and read by the same row.
    """
    flat, offsets, party, waits, also, answers = actions
    change, inside, inside_first, gradients, sizes = size_of
    width = len(ops.posts)
    for d in range(len(offsets) - 1):
        live = peak = static[d]
        for i in range(offsets[d], offsets[d + 1]):
            op = flat[i] >> OP
            stage = flat[i] >> STAGE & STAGES
            kind = stage * width + op
            if len(levels) > 0:
                levels[i] = live
            if ops.source[op]:
                if party[i] >= back and answers[party[i]] >= 0:
                    released[answers[party[i]]] += sizes[party[i] // last]
                continue
            if ops.target[op]:
                live += sizes[party[i] // last]
            t = waits[i]
            while 0 <= t < len(released):
                live -= released[t]
                released[t] = 0.0
                t = also[t] if len(also) > 0 else -1
            most = live + inside[kind]
            if ops.adds[op]:
                if held[stage] != d + 1 and gradients[stage] > 0:
                    most = live + inside_first[kind]
                    live += gradients[stage]
                held[stage] = d + 1
            elif ops.renews[op]:
                held[stage] = 0
            live += change[kind]
            most = max(most, live)
            peak = max(peak, most)
            if len(levels) > 0:
                levels[i] = most
        peaks[d] = peak
    return 0
