"""One rank of a run: its stages, its row of the program, its stamps. The loop over the actions is `Rank.step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function

from executor.abilities import PERFORMS
from executor.allocator import AllocationRecorder
from executor.averaging import Averaging, zero
from executor.batch import Drawn, tensors, to
from executor.boundaries import Described, boundaries
from executor.compiling import compile_now
from executor.course import Course
from executor.devices import Backend
from executor.elementwise import check_elementwise
from executor.feed import open_feed
from executor.groups import Groups, among
from executor.initial import Weights, extra_states
from executor.layers import LayeredModel
from executor.mailbox import Arrived, Mailbox
from executor.model_file import ModelFile
from executor.noise import UPDATE, Noise
from executor.norm import AllGradients
from executor.precision import SCALED
from executor.reduction import Shared
from executor.saving import SavedAs
from executor.scaling import Scaling
from executor.sharding import SERVED, Sharding
from executor.stage import Sources, Stage, Tensors
from executor.swapping import Swapped, open_tier
from executor.torch_adapter import pytree
from planner.orders import schedules, synchronisation
from planner.orders.action import Action
from planner.orders.operations import (
    BACKWARD,
    FORWARD,
    OFFLOAD,
    OPERATIONS,
    OPTIMIZER,
    PUSH,
    RECV_BACKWARD,
    RECV_FORWARD,
    REDUCE_GRAD,
    SEND_BACKWARD,
    SEND_FORWARD,
)
from planner.programs.program import RECEIVES
from planner.values.plan import Plan


@dataclass
class Stamped:
    """An action with the device's stamps: begun, its wait over, done.

    `repeats` bracket recomputes inside it, `waits` what it waits for other ranks. `arrived` are the messages that it
    has waited for; `reduced` is when what it has waited for was handed over.
    """

    action: Action
    start: Any
    ready: Any
    end: Any
    repeats: tuple[Any, ...] = ()
    waits: tuple[Any, ...] = ()
    arrived: tuple[Arrived, ...] = ()
    reduced: Any = None


class Rank:
    """What one process holds and does.

    `weights` are the values of a model that was made without storage. All ranks must be made at the same time: making
    one creates process groups.
    """

    all_gradients: AllGradients | None

    def __init__(
        self,
        file: ModelFile,
        layered: LayeredModel,
        plan: Plan,
        backend: Backend,
        rank: int,
        *,
        seed: int,
        workers: int | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._take_part(plan, backend, rank, seed)
        self.file = file
        self.saved_as = SavedAs(shared=layered.shared_names(), pretrained=hasattr(layered.model, "save_pretrained"))
        self.unheld, self.weights, self.parted = layered.unheld() if rank == 0 else {}, weights, layered.parted
        self.stages = self._stages(layered, rank)
        for stage in self.stages.values():
            stage.watch_waits(lambda: self.waited.append(self._stamp()))
        self.extra = _extra(layered, [stage.module for stage in self.stages.values()], weights, first=rank == 0)
        self.shared = _shared(plan, layered, self.groups, self.stages, self.replica)
        self.scaling = Scaling(backend.device) if plan.norm and file.precision == SCALED else None
        self.all_gradients = self._all_gradients()
        self.feed = open_feed(
            file,
            plan.batch // plan.pipelines,
            replicas=plan.pipelines,
            replica=self.replica,
            seed=seed,
            workers=workers if self.loading else 0,
            device=backend.device,
        )
        self.averaging = Averaging(file, self.groups.judging, plan.microbatches, backend.device)

    def _take_part(self, plan: Plan, backend: Backend, rank: int, seed: int) -> None:
        """Take a row of the plan's program and a place in its groups: all that a rank is before it holds stages."""
        self.plan, self.backend = plan, backend
        self.all_gradients = None
        self.course = Course(plan, rank, backend.in_turn)
        self.groups = Groups(plan)
        self.replica = self.groups.replicas[rank]
        self.mailbox = Mailbox(self.course.program, self.groups.all, backend.device, self.course.named)
        self.microbatches = plan.microbatches // plan.pipelines
        self.drawn: Drawn | None = None
        self.inputs: dict[int, Tensors] = {}
        self.targets: dict[int, Any] = {}
        self.unsent: dict[tuple[int, int], Tensors] = {}
        self.losses: dict[int, torch.Tensor] = {}
        """Every micro-batch's part of the last step's mean loss, where the last stage is."""
        self.seed = seed
        self.handed: list[Any] = []
        self.stamped: list[Stamped] = []
        self.stamping = True
        self.updating: Callable[[int], object] = nothing
        """Called before every update with the step that it belongs to."""
        self.updated: Callable[[int], object] = nothing
        """Called behind a stage's last update of a step: a run sets the next step's learning rate there."""
        self.repeats: list[Any] = []
        self.waited: list[Any] = []
        self.swapped = {(a.stage, a.microbatch) for a in self.course.row if a.op == OFFLOAD}
        self.tier = open_tier(backend.device) if self.swapped else None
        self.leaving: list[tuple[int, int]] = []

    def _stages(self, layered: LayeredModel, rank: int) -> dict[int, Stage]:
        """Make the stages that the rank holds, and give them their values."""
        plan, device = self.plan, self.backend.device
        ranges = plan.layer_ranges([layer.name for layer in layered.layers])
        passing = boundaries(self.file, layered, ranges, plan.samples, device)
        found, schedule = {}, schedules.get(plan.schedule)
        each = schedule.updates == "microbatch"
        for index in plan.stages_of[rank]:
            module = layered.stage(ranges[index], plan.checkpoints(index))
            loss, group = layered.loss if not module.outputs else None, self.groups.holding[index]
            versions = plan.versions(index) if schedule.asynchronous else 0
            found[index] = stage = Stage(
                *(index, module, passing[index], loss, group),
                splits=schedule.splits,
                versions=versions,
                beside=each and group is not None,
            )
            stage.scale = float(plan.microbatches) if each else None
        sources = Sources(self.file, layered)
        if self.weights is not None:
            self.unheld = {name: self.weights.real(tensor) for name, tensor in self.unheld.items()}
            parts = [part for stage in found.values() for part in (stage.module, stage.loss)]
            self.weights.load(layered, parts, device)
        agreed = synchronisation.get(plan.synchronisation)
        if agreed.shards or agreed.server:
            check_elementwise(self.file, layered.model, plan.synchronisation)
        taken = set[int]()
        for index, stage in found.items():
            sharding = self._sharding(layered, index, ranges[index]) if stage.group is not None else None
            stage.settle(sources, taken, device, plan.bucket_bytes, sharding, on_host=plan.host_optimizer)
            if stage.versions is not None:
                stage.versions.following = partial(self.course.following, index)
        return found

    def _sharding(self, layered: LayeredModel, stage: int, layers: range) -> Sharding | None:
        """How a stage is sharded; None where it is not."""
        agreed = synchronisation.get(self.plan.synchronisation)
        shards = ("optimizer", SERVED) if agreed.server else agreed.shards
        if not shards:
            return None
        whole = range(len(layers))
        blocks = layered.blocks(layers) if "gradients" in shards else (layers,)
        places = tuple(whole[block.start - layers.start : block.stop - layers.start] for block in blocks)
        tied = {name for group in self.plan.tied for name in _tied(self.plan, layered, group)}
        reductions = sum(action.op in (REDUCE_GRAD, PUSH) and action.stage == stage for action in self.course.row)
        gathering = self.groups.gathering[stage] if self.groups.gathering else None
        return Sharding(shards, places, frozenset(tied), reductions, gathering)

    def _all_gradients(self) -> AllGradients | None:
        """What the update has to know of the gradients of all stages, where it has to know anything."""
        if not self.plan.norm:
            return None
        found = AllGradients(self.file.clip, self.scaling, self.backend.device)
        for index, stage in self.stages.items():
            before = (p for first, own in self.shared.items() if first != index for p in own.parameters)
            found.add(index, stage.shares, before)
        if self.scaling is not None:
            for stage in self.stages.values():
                stage.scale = self.scaling.scale
        return found

    @property
    def optimizers(self) -> dict[int, torch.optim.Optimizer]:
        """The optimizers of its stages, of those that train anything."""
        return {index: own.optimizer for index, own in self.stages.items() if own.optimizer is not None}

    @property
    def loading(self) -> bool:
        """Whether it takes batches from the data: inputs for the first stage, or targets for the last."""
        return any(stage.is_first or stage.is_last for stage in self.stages.values())

    def begin(self, steps: int) -> None:
        """Begin a run of so many steps. Where steps overlap, the last of them leaves nothing under way."""
        self.course.begin(steps)
        self.mailbox.walk(self.course.program)
        for stage in self.stages.values():
            stage.begin()
            if stage.versions is not None:
                stage.versions.reads = self.course.reads(stage.index)

    def step(
        self,
        recorder: AllocationRecorder | None = None,
        watch: Callable[[Action, str], None] | None = None,
        *,
        stamping: bool = True,
    ) -> None:
        """Perform one step: every action of the row, in order, stamped unless nobody wants to know.

        Of steps that overlap it is what the rank does from the end of one to the end of the next. `recorder` marks each
        action's range; `watch` is called with the action before and after it.
        """
        self.stamped, self.stamping, self.drawn = [], stamping, None
        self.losses = {}
        for action in self.course.next():
            if watch:
                watch(action, "before")
            with recorder.marked(str(self.course.named(action))) if recorder else self._named(action):
                self._perform(action)
            if watch:
                watch(action, "after")
        for stage in self.stages.values():
            self.losses |= stage.losses
            stage.losses = {}
        if self.course.over:
            self.mailbox.finish()
            for stage in self.stages.values():
                stage.forget()
            self.inputs, self.targets = {}, {}
        self.course.done += 1

    def _perform(self, action: Action) -> None:
        start = self._stamp()
        arrived = tuple(self.mailbox.arrive(action))
        reduced = self._reduced(action)
        if OPERATIONS[action.op].needs and (action.stage, action.microbatch) in self.swapped:
            self.stages[action.stage].swapped(self.microbatch(action)).wait()
        ready = self._stamp()
        self.mailbox.let_go(action)
        if self.leaving:
            self._leave()
        self.repeats, self.waited = [], []
        ended = getattr(self, PERFORMS[action.op])(action)
        end = self._stamp() if ended is None else ended
        if self.stamping:
            if action.op in RECEIVES:
                self.mailbox.posted(action, end)
            self.stamped.append(
                Stamped(action, start, ready, end, tuple(self.repeats), tuple(self.waited), arrived, reduced)
            )

    def _reduced(self, action: Action) -> Any:
        """Wait for the reduction that an update needs; return when it was begun."""
        beside = self.stages[action.stage].beside if action.op == OPTIMIZER else None
        if beside is None:
            return None
        beside.arrive()
        return self.handed.pop(0)

    def microbatch(self, action: Action) -> int:
        """Return an action's micro-batch, which it has, with the number that nothing else under way has."""
        found = self.course.named(action).microbatch
        assert found is not None, action
        return found

    def _stamp(self) -> Any:
        return self.backend.stamp() if self.stamping else None

    def _named(self, action: Action) -> AbstractContextManager[object]:
        """What puts an action's name into a profiler's timeline."""
        return record_function(f"PP:{action}") if self.stamping else nullcontext()

    def compile(self) -> None:
        """Compile the stages' layers, which takes seconds each; the rank's own state stays as it is."""
        for stage in self.stages.values():
            compile_now(stage.module, stage.boundary.taken, self.backend.device)

    # The actions. Each returns the stamp of its end where that is not simply now.

    def load(self, action: Action) -> None:
        """Take this replica's share of the step's batch and keep a stage's part of it, cut into micro-batches.

        A rank that holds the first stage and the last takes one share for both.
        """
        stage, first = self.stages[action.stage], self.replica * self.microbatches
        if action.microbatch is None:
            every = (a for a in self.course.row if (a.op, a.stage) == (FORWARD, stage.index))
            held = {_number(action): _number(action) - first for action in every}
        else:
            own = self.course.taken(stage.index, self.microbatch(action))
            held, self.drawn = {m: self.course.place(m)[1] - first for m in own}, None
        self.drawn = drawn = self.drawn or self.feed.take()
        inputs, targets = self.parted(drawn.inputs, drawn.targets)
        if stage.is_first:
            chunks = list(zip(*(tensor.chunk(self.microbatches) for tensor in inputs), strict=True))
            self.inputs |= {m: tuple(to(part, self.backend.device) for part in chunks[i]) for m, i in held.items()}
        if stage.is_last:
            parts = split(targets, self.microbatches)
            self.targets |= {m: self._moved(parts[i]) for m, i in held.items()}
            whole = drawn.split(self.microbatches)
            self.averaging.begin({m: whole[i] for m, i in held.items()})

    def _moved(self, tree: Any) -> Any:
        return pytree.tree_map(lambda value: to(value, self.backend.device), tree)

    def forward(self, action: Action) -> None:
        """One micro-batch through a stage's layers; on the last stage also its loss, as its share of the step's."""
        stage, m = self.stages[action.stage], self.microbatch(action)
        noise = Noise(self.seed, *self.course.place(m), self.backend.device)
        inputs = self._arrived(stage, m)
        staying: Tensors = ()
        if self.tier is not None:
            staying = (*stage.staying, *inputs, *tensors(self.targets[m] if stage.is_last else ()))
        swapped = self._swapped(stage, m, staying, compiled=self.file.compiled)
        judged = (lambda result: self._judged(stage, m, result)) if stage.is_last else None
        stage.forward(m, inputs, noise, judged, swapped)
        if self.course.rolling is not None:  # elsewhere they are let go of with the step
            self.inputs.pop(m, None)
            self.targets.pop(m, None)

    def _swapped(self, stage: Stage, m: int, staying: Tensors = (), *, compiled: bool = False) -> Swapped | None:
        """Return what a micro-batch keeps on its way to the host, where it is swapped; `staying` does not go there."""
        if self.tier is None or (stage.index, m) not in self.swapped:
            return None
        return Swapped(self.tier, staying, compiled=compiled)

    def offload(self, action: Action) -> None:
        """Begin to copy to the host what a micro-batch keeps for its backward."""
        self.stages[action.stage].swapped(self.microbatch(action)).offload()

    def release(self, action: Action) -> None:
        """Let go of it; of what was sent, as soon as that is known to have been received."""
        self.stages[action.stage].swapped(self.microbatch(action)).release()
        if action.stage + 1 not in self.stages:  # the next stage here reads it
            self.leaving.append((action.stage, self.microbatch(action)))
            self._leave()

    def fetch(self, action: Action) -> None:
        """Begin to copy it back."""
        self.stages[action.stage].swapped(self.microbatch(action)).fetch()

    def _leave(self) -> None:
        """Let go of what micro-batches have sent that are on the host."""
        sending = {(a.stage, a.microbatch) for a in self.mailbox.sending if a.op == SEND_FORWARD}
        for stage, m in [one for one in self.leaving if one not in sending]:
            self.leaving.remove((stage, m))
            if m in self.stages[stage].passing:
                self.stages[stage].let_go(m)

    def _judged(self, stage: Stage, m: int, result: Any) -> torch.Tensor:
        """The loss of a micro-batch as its part of the step's."""

        def loss_of(part: Drawn) -> torch.Tensor:
            _, targets = self.parted(part.inputs, part.targets)
            found: torch.Tensor = stage.loss(result, self._moved(targets))
            return found

        found = self.averaging.shared(m, loss_of, lambda: stage.loss(result, self.targets[m]))
        return zero(result) if found is None else found

    def _arrived(self, stage: Stage, m: int) -> Tensors:
        """What goes into a stage: from the batch, from another rank, or from the stage before it on this one."""
        if stage.is_first:
            return self.inputs[m]
        receive = Action(stage.index, RECV_FORWARD, m)
        if receive in self.mailbox.arriving:
            return self.mailbox.take(receive)
        return tuple(value.detach() for value in self.stages[stage.index - 1].passing[m].outputs)

    def _returned(self, stage: Stage, m: int) -> Tensors:
        """The gradients of what came out of a stage: from another rank, or from the stage behind it on this one."""
        if stage.is_last:
            return ()
        receive = Action(stage.index, RECV_BACKWARD, m)
        if receive in self.mailbox.arriving:
            return self.mailbox.take(receive)
        return self.unsent.pop((stage.index + 1, m))

    def recompute(self, action: Action) -> Any:
        """Repeat a micro-batch's forward for the halves of its backward.

        For a whole one torch's checkpoint asks for it, inside the backward that follows; it is stamped there.
        """
        stage = self.stages[action.stage]
        if not stage.splits:
            return self._stamp()
        stage.repeat(self.microbatch(action))
        return None

    def backward(self, action: Action) -> None:
        """The whole backward of a micro-batch."""
        stage, m = self.stages[action.stage], self.microbatch(action)
        gradients = self._returned(stage, m)
        self._keep(stage, m, stage.backward(m, gradients, self._on_repeat()))

    def backward_input(self, action: Action) -> None:
        """The half of a micro-batch's backward that the stage before is waiting for."""
        stage, m = self.stages[action.stage], self.microbatch(action)
        gradients = self._returned(stage, m)
        self._keep(stage, m, stage.backward_input(m, gradients))

    def backward_weight(self, action: Action) -> None:
        """The other half, for the stage's parameters."""
        self.stages[action.stage].backward_weight(self.microbatch(action))

    def _on_repeat(self) -> Callable[[], None] | None:
        return (lambda: self.repeats.append(self._stamp())) if self.plan.recomputes else None

    def _keep(self, stage: Stage, m: int, gradients: Tensors) -> None:
        """Keep the gradients of what went into a stage until they are sent or taken."""
        if not stage.is_first:
            self.unsent[stage.index, m] = gradients

    def send_forward(self, action: Action) -> None:
        """Post the send of a stage's outputs."""
        self.mailbox.send(action, self.stages[action.stage].passing[self.microbatch(action)].outputs)

    def send_backward(self, action: Action) -> None:
        """Post the send of the gradients of a stage's inputs."""
        self.mailbox.send(action, self.unsent.pop((action.stage, self.microbatch(action))))

    def receive(self, action: Action) -> None:
        """Post a receive."""
        self.mailbox.receive(action, self.passed(action))

    def passed(self, action: Action) -> tuple[Described, ...]:
        """Return what is received by an action: a stage's inputs, or the gradients of its outputs."""
        boundary = self.stages[action.stage].boundary
        if action.op == RECV_FORWARD:
            return boundary.taken
        return tuple(one for one in boundary.made if one.gradient)

    def reduce_gradients(self, action: Action) -> None:
        """Add up a stage's gradients over the ranks that hold it."""
        self.stages[action.stage].reduce()

    def gather(self, action: Action) -> None:
        """Give all ranks that hold a stage the parameters that each has updated; or begin to, for a forward."""
        stage = self.stages[action.stage]
        assert stage.shards is not None, action
        if stage.gathering is None:
            stage.shards.gather()
        else:
            stage.gathering.post(FORWARD, action.microbatch, backwards=False)

    def gather_backward(self, action: Action) -> None:
        """Begin to gather the parameters for a backward."""
        gathering = self.stages[action.stage].gathering
        assert gathering is not None, action
        gathering.post(BACKWARD, action.microbatch, backwards=True)

    def pull(self, action: Action) -> None:
        """Take the parameters of a stage as its servers have them."""
        stage = self.stages[action.stage]
        assert stage.shards is not None, action
        stage.shards.gather()

    def push(self, action: Action) -> None:
        """Give a stage's gradients to its servers, and update what this rank serves of it when all have come."""
        self.stages[action.stage].reduce()
        self.optimize(action)

    def let_go(self, action: Action) -> None:
        """Let go of all parameters but this rank's shards."""
        gathering = self.stages[action.stage].gathering
        assert gathering is not None, action
        gathering.leave()

    def reduce_beside(self, action: Action) -> None:
        """Begin to average a stage's gradients over the ranks that hold it; the update behind waits for that."""
        beside = self.stages[action.stage].beside
        assert beside is not None, action
        beside.hand_over()
        self.handed.append(self._stamp())

    def add_up_gradients(self, action: Action) -> None:
        """Add up the gradients of parameters that stages share, `action` naming the first of these stages."""
        self.shared[action.stage].add_up()

    def measure_norm(self, action: Action) -> None:
        """Take the norm of a stage's gradients, and look whether they overflow."""
        assert self.all_gradients is not None, action
        self.all_gradients.measure(action.stage)

    def agree_on_norm(self, action: Action) -> None:
        """Make the norms of all ranks' gradients into one."""
        assert self.all_gradients is not None, action
        self.all_gradients.agree()

    def optimize(self, action: Action) -> None:
        """Clip a stage's gradients where the model does, update its parameters and clear the gradients.

        What overflows is left out.
        """
        stage = self.stages[action.stage]
        usable = self.all_gradients is None or self.all_gradients.ready(action.stage)
        step, place, last = self._updates(action)
        Noise(self.seed, step, UPDATE + place, self.backend.device).at(action.stage)
        self.updating(step - self.course.first)
        stage.update(usable=usable)
        if last:
            self.updated(action.stage)

    def _updates(self, action: Action) -> tuple[int, int, bool]:
        """Return the step that an update belongs to, its place in it, and whether it is the stage's last one there."""
        if action.microbatch is None:
            return self.course.done, 0, True
        m = self.microbatch(action)
        return *self.course.place(m), len(self.course.taken(action.stage, m)) == 1

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes that are known by name between two actions."""
        modules = [stage.module for stage in self.stages.values()]
        optimizers = () if self.plan.host_optimizer else self.optimizers.values()  # on the host there is their state
        state = [entry for optimizer in optimizers for entry in optimizer.state.values()]
        sending = [sent for action, (_, sent) in self.mailbox.sending.items() if action.op == SEND_BACKWARD]
        arrived = [
            passing.inputs
            for stage in self.stages.values()
            if not stage.is_first and stage.index - 1 not in self.stages
            for passing in stage.passing.values()
        ]
        begun = [p.inputs for stage in self.stages.values() if stage.is_first for p in stage.passing.values()]
        return {
            "parameters": sum(stage.parameter_bytes for stage in self.stages.values()),
            "versions": sum(own.versions.nbytes for own in self.stages.values() if own.versions is not None),
            "buffers": sum(b.nbytes for module in modules for b in module.buffers()),
            "gradients": sum(stage.gradient_bytes for stage in self.stages.values()),
            "optimizer": sum(t.nbytes for entry in state for t in entry.values() if isinstance(t, torch.Tensor)),
            "communication": sum(stage.gathering.bytes for stage in self.stages.values() if stage.gathering is not None)
            + _stored((self.mailbox.held(), arrived, sending, list(self.unsent.values()))),
            "input": _stored((self.inputs, self.targets, begun)),
        }

    def state(self) -> dict[str, Any]:
        """The stages' part of the whole model's `state_dict`; the first rank's with what no stage holds."""
        found = {name: tensor.detach().cpu() for name, tensor in self.unheld.items()}
        with self.whole():
            for stage in self.stages.values():
                found |= {name: getattr(*place).detach().cpu() for name, place in stage.saved.items()}
        return {**found, **{name: state() for name, state in self.extra.items()}}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all parameters of its stages whole for a while: on all ranks at the same time."""
        with ExitStack() as stack:
            for stage in self.stages.values():
                stack.enter_context(stage.whole())
            yield

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients under the same names."""
        return {name: value for stage in self.stages.values() for name, value in stage.gradients().items()}


def nothing(_: int) -> None:
    """Do nothing."""


def split(tree: Any, parts: int) -> list[Any]:
    """Cut every tensor of a structure into equal parts along its first dimension."""
    leaves, shape = pytree.tree_flatten(tree)
    chunks = [leaf.chunk(parts) if isinstance(leaf, torch.Tensor) else [leaf] * parts for leaf in leaves]
    return [pytree.tree_unflatten([c[i] for c in chunks], shape) for i in range(parts)]


def _stored(tree: Any) -> int:
    """Bytes of the memory behind some tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(tree)}
    return sum(storages.values())


def _shared(
    plan: Plan, layered: LayeredModel, groups: Groups, stages: dict[int, Stage], replica: int
) -> dict[int, Shared]:
    """Return what a rank shares with other stages of its replica, by the first of them. Makes process groups."""
    found = dict[int, Shared]()
    for tied in plan.tied:
        names = _tied(plan, layered, tied)
        for r in range(plan.pipelines):
            rows = {s: [row for row in plan.holders[s] if groups.replicas[row] == r] for s in tied}
            group = among({row for own in rows.values() for row in own})
            held = {s: stages[s].named for s in tied if s in stages}
            if held and r == replica:
                named = [{name: own[name] for name in names} for own in held.values()]
                found[tied[0]] = Shared(named, group, [len(rows[s]) for s in held])
    return found


def _tied(plan: Plan, layered: LayeredModel, tied: tuple[int, ...]) -> set[str]:
    """Names of the parameters that just these stages share."""
    stage_of = {name: s for s, own in enumerate(plan.stages) for name in own.layers}
    return {first for first, *layers in layered.tied() if {stage_of[name] for name in layers} == set(tied)}


def _extra(
    layered: LayeredModel, stages: list[torch.nn.Module], weights: Weights | None, *, first: bool
) -> dict[str, Callable[[], Any]]:
    """Return what gives the extra state of the stages' modules, by name; of the first rank also of all others."""
    held = {module for stage in stages for module in stage.modules()}
    every = extra_states(layered.model)
    own = {name: part.get_extra_state for name, part in every.items() if part in held}
    if not first:
        return own
    made = weights.extra if weights is not None else {name: part.get_extra_state() for name, part in every.items()}
    return {name: lambda name=name: made[name] for name in every} | own


def _number(action: Action) -> int:
    assert action.microbatch is not None, action
    return action.microbatch
