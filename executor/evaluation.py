"""Evaluation of a model while it trains: its loss and metrics over all validation data, by the stages that train it.

Micro-batches pass the stages in the order of the schedule `forward-only`; nothing is kept for a backward. In every
round each replica takes as many of them as in a training step, in the last round fewer, and the last micro-batch has
the samples that are left: none is dropped, and none counts twice.

    round 0            round 1
    0F0 0F1 0F2 0F3    0F0 0F1
        1F0 1F1 1F2 1F3    1F0 1F1

The first stage says at the beginning of a round what passes; who receives learns the sizes of a micro-batch when one of
its shape comes first, from one that passes for that alone.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from executor.batch import Drawn
from executor.evaluated import Evaluated, cut_evaluated, dealt
from executor.hollow import places
from executor.layers import LayeredModel, as_tuple, on
from executor.messages import Messages
from executor.model_file import ModelFile
from executor.modes import evaluating
from executor.rank import Rank
from executor.seeding import seeded
from executor.torch_adapter import post
from executor.validation import Validation
from planner.basis.errors import RUN_FAILED, PlanError
from planner.orders.operations import FORWARD, RECV_FORWARD, SEND_FORWARD
from planner.programs.lowering import lower
from planner.values.evaluation import Evaluation, forward_only
from planner.values.plan import Plan

SEED = 0
"""What a model draws while it is evaluated is the same every time."""

SENT_AHEAD = 2
"""Messages that a stage sends before the first of them has arrived, at most: they take memory."""

SAMPLES, WEIGHT, LOSS = " samples", " weight", " loss"  # no metric is called so

Key = tuple[tuple[int, ...], ...]
"""The shapes of a micro-batch's inputs. Of two with the same, all values have the same."""


def prepare(file: ModelFile, layered: LayeredModel, plan: Plan) -> Callable[[Rank], Evaluator]:
    """Cut a model as it is evaluated, before a rank takes its stage of it; return what makes the rank's evaluator.

    Raises `PlanError` when its forward cannot be followed in evaluation mode, or needs other stages.
    """
    evaluated = cut_evaluated(file, layered)
    layers = dealt(plan, layered, evaluated.layered)
    return lambda me: Evaluator(me, evaluated, layers[me.stage_index])


class Evaluator:
    """What one rank does whenever the model is evaluated.

    All ranks must be made, and evaluate, at the same time. `evaluated` was cut before `me` was made (`prepare`), and
    `layers` are the stage's of it.
    """

    def __init__(self, me: Rank, evaluated: Evaluated, layers: range) -> None:
        self.me, self.evaluated = me, evaluated
        plan, stage, replica = me.plan, me.stage_index, me.replica
        self.device = me.backend.device
        self.module = evaluated.layered.stage(layers)
        self._share()
        loss: Any = evaluated.layered.loss
        if me.weights is not None:  # what only the evaluation reads
            me.weights.load(evaluated.layered, [self.module, *([loss] if me.is_last else [])], self.device)
        on(self.module, self.device)
        self.loss = on(loss, self.device) if isinstance(loss, nn.Module) and me.is_last else loss
        self.program = lower(forward_only(plan), in_turn=me.backend.in_turn)
        self.row = self.program.rows[dist.get_rank()]
        self.messages = Messages(self.program)
        line = [holders[replica] for holders in plan.holders]
        self.origin, self.before, self.behind = line[0], line[stage - 1], line[(stage + 1) % len(line)]
        self.alone, self.share = len(line) == 1, plan.microbatches // plan.replicas
        self.validation = None
        if me.is_first or me.is_last:
            self.validation = Validation(me.file, plan.samples, replicas=plan.replicas, replica=replica)
        self.sizes: dict[Key, list[tuple[tuple[int, ...], torch.dtype]]] = {}

    def _share(self) -> None:
        """Let the stage in evaluation mode have the tensors of the one that trains, wherever these are by now."""
        for part, name, tensor in places([self.module]):
            place = self.me.places.get(id(tensor))
            if place is not None:
                setattr(part, name, getattr(*place))

    def run(self, step: int) -> Evaluation:
        """Evaluate the model as it is after `step` steps; the same on all ranks.

        What training draws and counts is as it was. Raises `PlanError` (exit 6) when there is nothing to evaluate with.
        """
        begin = time.perf_counter()
        sums: dict[str, float] = defaultdict(float)
        devices = [self.device] if self.device.type == "cuda" else []
        quiet = torch.random.fork_rng(devices=devices), seeded(SEED), evaluating(self.module), torch.no_grad()
        with ExitStack() as stack:
            for one in (*quiet, self._statistics()):
                stack.enter_context(one)
            for keys, parts in self._rounds():
                for name, value in self._round(keys, parts):
                    sums[name] += value
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, dict(sums))
        total: dict[str, float] = defaultdict(float)
        for found in every:
            for name, value in found.items():
                total[name] += value
        samples, weight = round(total[SAMPLES]), total[WEIGHT]
        if not weight:
            raise self._refused("there is nothing to evaluate with", f"it has {samples} samples, and none counts")
        return Evaluation(
            step=step,
            loss=total[LOSS] / weight,
            metrics={name: value / weight for name, value in total.items() if name not in (SAMPLES, WEIGHT, LOSS)},
            samples=samples,
            seconds=time.perf_counter() - begin,
        )

    @contextmanager
    def _statistics(self) -> Iterator[None]:
        """Take the first replica's buffers while inside: each counts its own, and those are what is saved."""
        if self.me.group is None:
            yield
            return
        buffers = list(self.module.buffers())
        before = [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            dist.broadcast(buffer, self.me.held_by[0], group=self.me.group)
        yield
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

    def _rounds(self) -> Iterator[tuple[list[Key], list[Drawn]]]:
        """Yield what passes in every round: the shapes on all ranks of a replica, the micro-batches at its ends."""
        parts = iter(self.validation or ())
        while True:
            mine = list(islice(parts, self.share))
            keys: list[Any] = [[tuple(tuple(t.shape) for t in part.inputs) for part in mine]]
            if not self.alone:
                dist.broadcast_object_list(keys, src=self.origin, group=self.me.pipeline, device=self.device)
            if self.me.is_last and len(mine) != len(keys[0]):
                raise self._refused(
                    "evaluate() gives other samples in every process",
                    "inputs are used in one process and targets in another",
                )
            if not keys[0]:
                return
            yield keys[0], mine

    def _round(self, keys: list[Key], parts: list[Drawn]) -> Iterator[tuple[str, float]]:
        """Perform the row, as far as there are micro-batches; yield what the last stage's results add to the sums."""
        for m, key in enumerate(keys):
            if key not in self.sizes and not self.alone:
                self._learn(key, parts[m] if self.me.is_first else None)
        held: dict[int, tuple[torch.Tensor, ...]] = {}
        for action in self.row:
            m = (action.microbatch or 0) - self.me.replica * self.share
            if action.op not in (FORWARD, SEND_FORWARD, RECV_FORWARD) or m >= len(keys):
                continue
            if action.op == RECV_FORWARD:
                held[m] = self._empty(self.sizes[keys[m]])
                self.messages.receiving[action] = self._post(dist.irecv, held[m], self.before)
            elif action.op == SEND_FORWARD:
                sent = held.pop(m)
                self.messages.sending[action] = self._post(dist.isend, sent, self.behind), list(sent)
                self.messages.finish(but=SENT_AHEAD)
            else:
                self.messages.arrive(action)
                result = self.module(*(self._inputs(parts[m]) if self.me.is_first else held.pop(m)))
                if self.me.is_last:
                    yield from self._judged(result, parts[m])
                else:
                    held[m] = as_tuple(result)
        self.messages.finish()

    def _learn(self, key: Key, part: Drawn | None) -> None:
        """Learn the sizes of what this stage is sent of a micro-batch: one passes all stages, with its sizes."""
        if part is None:
            said: list[Any] = [None]
            dist.recv_object_list(said, self.before, device=self.device)
            self.sizes[key] = said[0]
            values = self._empty(said[0])
            for value in values:
                dist.recv(value, self.before)
        else:
            self.sizes[key], values = [], self._inputs(part)
        if not self.me.is_last:
            made = as_tuple(self.module(*values))
            dist.send_object_list([[(tuple(t.shape), t.dtype) for t in made]], self.behind, device=self.device)
            for value in made:
                dist.send(value.contiguous(), self.behind)

    def _empty(self, sizes: list[tuple[tuple[int, ...], torch.dtype]]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in sizes)

    def _post(self, how: Callable[..., Any], values: tuple[torch.Tensor, ...], peer: int) -> list[dist.Work]:
        return post([dist.P2POp(how, value, peer, self.me.pipeline) for value in values])

    def _inputs(self, part: Drawn) -> tuple[torch.Tensor, ...]:
        inputs, _ = self.evaluated.layered.parted(part.inputs, None)
        return tuple(value.to(self.device) for value in inputs)

    def _judged(self, result: Any, part: Drawn) -> Iterator[tuple[str, float]]:
        """Yield a micro-batch's samples, its weight, and by that weight its loss and metrics."""
        yield SAMPLES, float(part.samples)
        weight = self.me.averaging.weight(
            part, lambda other: self.evaluated.loss_of(self.loss, result, other, self.device)
        )
        if weight:
            loss, metrics = self.evaluated.judged(self.loss, result, part, self.device)
            yield WEIGHT, weight
            yield LOSS, weight * loss
            for name, value in metrics.items():
                yield name, weight * value

    def _refused(self, what: str, why: str) -> PlanError:
        return PlanError(
            what=what,
            where=f"{self.me.file.path}, evaluate()",
            why=why,
            fix="return a Dataset or a DataLoader with validation data, the same in every process",
            code=RUN_FAILED,
        )
