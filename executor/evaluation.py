"""Evaluation of a model while it trains: its loss and metrics over all validation data, by the stages that train it.

Micro-batches pass the stages in the order of the training's forwards; nothing is kept for a backward. In every
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from executor.batch import Drawn
from executor.boundaries import Described
from executor.course import Course
from executor.evaluated import Evaluated, cut_evaluated, dealt
from executor.hollow import places
from executor.layer import as_tuple
from executor.layers import LayeredModel
from executor.mailbox import Mailbox, Tensors
from executor.model_file import ModelFile
from executor.modes import evaluating
from executor.rank import Rank
from executor.seeding import seeded
from executor.surroundings import on
from executor.validation import Validation
from planner.basis.errors import RUN_FAILED, PlanError
from planner.orders import codes
from planner.orders.action import Action
from planner.orders.operations import FORWARD, RECV_FORWARD, SEND_FORWARD
from planner.programs.lowering import unroll
from planner.programs.program import Program
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
    """Cut a model as it is evaluated, before a rank takes its stages of it; return what makes the rank's evaluator.

    Raises `PlanError` when its forward cannot be followed in evaluation mode, or needs other stages.
    """
    evaluated = cut_evaluated(file, layered)
    layers = dealt(plan, layered, evaluated.layered)
    return lambda me: Evaluator(me, evaluated, layers)


class Evaluator:
    """What one rank does whenever the model is evaluated: the forwards of its row of the training's program.

    All ranks must be made, and evaluate, at the same time. `evaluated` was cut before `me` was made (`prepare`), and
    `layers` are every stage's of it.
    """

    def __init__(self, me: Rank, evaluated: Evaluated, layers: Sequence[range]) -> None:
        self.me, self.evaluated = me, evaluated
        plan, self.device = me.plan, me.backend.device
        self.modules = {index: evaluated.layered.stage(layers[index]) for index in me.stages}
        self._share()
        self.last = len(plan.stages) - 1
        loss: Any = evaluated.layered.loss
        judging = [loss] if self.last in me.stages else []
        if me.weights is not None:  # what only the evaluation reads
            me.weights.load(evaluated.layered, [*self.modules.values(), *judging], self.device)
        for module in self.modules.values():
            on(module, self.device)
        self.loss = on(loss, self.device) if isinstance(loss, nn.Module) and judging else loss
        self.program = _forwards(plan, me.course)
        self.rank = dist.get_rank()
        self.row = self.program.rows[self.rank]
        self.mailbox = Mailbox(self.program, me.groups.evaluating, self.device)
        self.first, self.share = me.replica * me.microbatches, me.microbatches
        self.origin = self._holder(0, 0)
        self.validation = None
        if me.loading:
            self.validation = Validation(me.file, plan.samples, replicas=plan.pipelines, replica=me.replica)
        self.sizes: dict[Key, list[tuple[Described, ...]]] = {}

    def _holder(self, stage: int, m: int) -> int:
        """The rank that computes a stage of the m-th micro-batch of this pipeline."""
        return self.program.where[Action(stage, FORWARD, self.first + m)]

    def _share(self) -> None:
        """Let the stage in evaluation mode have the tensors of the one that trains, wherever these are by now."""
        for index, module in self.modules.items():
            trained = self.me.stages[index].places
            for part, name, tensor in places([module]):
                if id(tensor) in trained:
                    setattr(part, name, getattr(*trained[id(tensor)]))

    def run(self, step: int) -> Evaluation:
        """Evaluate the model as it is after `step` steps; the same on all ranks.

        What training draws and counts is as it was. Raises `PlanError` (exit 6) when there is nothing to evaluate with.
        """
        begin = time.perf_counter()
        sums: dict[str, float] = defaultdict(float)
        devices = [self.device] if self.device.type == "cuda" else []
        quiet: tuple[AbstractContextManager[Any], ...]
        quiet = torch.random.fork_rng(devices=devices), seeded(SEED), torch.no_grad()
        with ExitStack() as stack:
            for one in quiet:
                stack.enter_context(one)
            for module in self.modules.values():
                stack.enter_context(evaluating(module))
            stack.enter_context(self._statistics())
            stack.enter_context(self.me.whole())
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
        copied = [(i, module) for i, module in self.modules.items() if self.me.groups.holding[i] is not None]
        buffers = [(i, buffer) for i, module in copied for buffer in module.buffers()]
        before = [buffer.clone() for _, buffer in buffers]
        for i, buffer in buffers:
            dist.broadcast(buffer, self.me.plan.holders[i][0], group=self.me.groups.holding[i])
        yield
        for (_, buffer), value in zip(buffers, before, strict=True):
            buffer.copy_(value)

    def _rounds(self) -> Iterator[tuple[list[Key], list[Drawn]]]:
        """Yield what passes in every round: the shapes on all ranks of a replica, the micro-batches at its ends."""
        parts = iter(self.validation or ())
        while True:
            mine = list(islice(parts, self.share))
            keys: list[Any] = [[tuple(tuple(t.shape) for t in part.inputs) for part in mine]]
            if self.me.groups.pipeline is not None:
                dist.broadcast_object_list(keys, src=self.origin, group=self.me.groups.pipeline, device=self.device)
            if self.last in self.modules and len(mine) != len(keys[0]):
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
            if key not in self.sizes and self.me.groups.pipeline is not None:
                self._learn(m, key, parts)
        arrived: dict[tuple[int, int], Tensors] = {}
        made: dict[tuple[int, int], Tensors] = {}
        for action in self.row:
            s, m = action.stage, (action.microbatch or 0) - self.first
            if m >= len(keys):
                continue
            if action.op == RECV_FORWARD:
                self.mailbox.receive(action, self.sizes[keys[m]][s])
            elif action.op == SEND_FORWARD:
                self.mailbox.send(action, made.pop((s, m)))
                self.mailbox.finish(but=SENT_AHEAD)
            else:
                result = self.modules[s](*self._taken(action, m, parts, arrived))
                if s == self.last:
                    yield from self._judged(result, parts[m])
                elif self._holder(s + 1, m) == self.rank:
                    arrived[s + 1, m] = as_tuple(result)
                else:
                    made[s, m] = as_tuple(result)
        self.mailbox.finish()

    def _taken(
        self, action: Action, m: int, parts: list[Drawn], arrived: dict[tuple[int, int], Tensors]
    ) -> tuple[torch.Tensor, ...]:
        """What a stage takes of a micro-batch: from the data, from the stage before it here, or from another rank."""
        if action.stage == 0:
            return self._inputs(parts[m])
        if (action.stage, m) in arrived:
            return arrived.pop((action.stage, m))
        self.mailbox.arrive(action)
        return self.mailbox.take(Action(action.stage, RECV_FORWARD, action.microbatch))

    def _learn(self, m: int, key: Key, parts: list[Drawn]) -> None:
        """Learn what passes between stages of a micro-batch: it goes through all of them, with its sizes."""
        path = [self._holder(s, m) for s in range(self.last + 1)]
        said: list[Any] = [[]]
        values: Tensors = self._inputs(parts[m]) if path[0] == self.rank else ()
        for s, (here, there) in enumerate(pairwise(path)):
            if here == self.rank:
                values = as_tuple(self.modules[s](*values))
                said[0].append(tuple(Described(t.shape, t.dtype, gradient=False) for t in values))
            if here == there:
                continue
            if here == self.rank:
                dist.send_object_list(said, there, device=self.device)
                for value in values:
                    dist.send(value.contiguous(), there)
            elif there == self.rank:
                dist.recv_object_list(said, here, device=self.device)
                values = tuple(one.empty(self.device) for one in said[0][-1])
                for value in values:
                    dist.recv(value, here)
        dist.broadcast_object_list(said, src=path[-1], group=self.me.groups.pipeline, device=self.device)
        self.sizes[key] = [(), *said[0]]

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


def _forwards(plan: Plan, course: Course) -> Program:
    """Return the forwards of one step of a plan, with their messages, in the order of its training's.

    Where steps overlap, a step's forwards are those of a pipeline that does nothing else.
    """
    alone = forward_only(plan)
    if course.rolling is not None and alone is not None:
        return _kept(unroll(alone), plan.microbatches)
    return _kept(course.program, plan.microbatches)


def _kept(program: Program, microbatches: int) -> Program:
    kept = (
        row[codes.has(row, FORWARD, SEND_FORWARD, RECV_FORWARD) & (codes.microbatches(row) < microbatches)]
        for row in program.order
    )
    return Program(tuple(kept), program.edges, program.roles)
