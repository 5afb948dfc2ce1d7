"""One rank of a run: its stage, its row of the program, its stamps. The loop over the actions is `Rank.step`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from executor.abilities import PERFORMS
from executor.allocator import AllocationRecorder
from executor.averaging import Averaging, zero
from executor.batch import Drawn, tensors
from executor.compiling import compile_now, compiled_layers
from executor.devices import Backend
from executor.feed import open_feed
from executor.hollow import places
from executor.initial import Weights, extra_states
from executor.layers import LayeredModel, StageModule, aim, as_tuple, on, unchanged_buffers
from executor.messages import Messages
from executor.model_file import ModelFile
from executor.norm import AllGradients
from executor.precision import SCALED
from executor.reduction import Buckets, Shared, start_alike
from executor.saving import SavedAs
from executor.scaling import Scaling
from executor.torch_adapter import PipeStage, pytree, tensors_without_data
from executor.updating import own_optimizer
from planner.orders.action import Action, Row
from planner.programs.lowering import lower
from planner.values.plan import Plan


@dataclass
class Stamped:
    """An action with the device's stamps: begun, its wait over, done; `repeats` bracket recomputes inside it."""

    action: Action
    start: Any
    ready: Any
    end: Any
    repeats: tuple[Any, ...] = ()


class Rank:
    """What one process holds and does.

    `weights` are the values of a model that was made without storage. All ranks must be made at the same time: making
    one creates process groups.
    """

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
        self.file, self.plan, self.backend = file, plan, backend
        self.program = lower(plan, in_turn=backend.in_turn)
        self.row: Row = self.program.rows[rank]
        self.messages = Messages(self.program)
        (self.stage_index,) = plan.stages_of[rank]
        mine, count = plan.holders[self.stage_index], len(plan.stages)
        self.replica = mine.index(rank)
        layers = plan.layer_ranges([layer.name for layer in layered.layers])[self.stage_index]
        self.is_first, self.is_last = self.stage_index == 0, self.stage_index == count - 1
        pipelines = [dist.new_group([rows[r] for rows in plan.holders]) for r in range(plan.replicas)]
        self.pipeline = pipelines[self.replica]
        holding = [dist.new_group(list(rows)) if len(rows) > 1 else None for rows in plan.holders]
        inputs, outputs = _boundaries(file, layered, layers, plan.samples, backend.device)
        running = compiled_layers(layered) if file.compiled else layered
        self.module, self.taken = running.stage(layers, recompute=plan.recompute), inputs
        self.places = {id(tensor): (part, name) for part, name, tensor in places([self.module])}
        self.saved = _places(self.module, layered.saved_names())
        self.unheld, self.weights = layered.unheld() if rank == 0 else {}, weights
        self.extra = _extra(layered, self.module, weights, first=rank == 0)
        self.saved_as = SavedAs(shared=layered.shared_names(), pretrained=hasattr(layered.model, "save_pretrained"))
        if weights is not None:
            self.unheld = {name: weights.real(tensor) for name, tensor in self.unheld.items()}
            weights.load(layered, [self.module, *([layered.loss] if self.is_last else [])], backend.device)
        on(self.module, backend.device)
        self.names, self.parted = layered.parameter_names(), layered.parted
        own = layered.loss if self.is_last else None
        self.loss = on(own, backend.device) if isinstance(own, torch.nn.Module) else layered.loss
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.held_by, group = mine, holding[self.stage_index]
        self.group = group
        self.buckets = None
        if group is not None:
            start_alike(self.module, group)
            self.buckets = Buckets(trained, group, plan.bucket_bytes)
        self.shared = _shared(plan, layered, self.stage_index, self.replica, self.module)
        before = (p for first, own in self.shared.items() if first != self.stage_index for p in own.parameters)
        self.scaling = Scaling(backend.device) if plan.norm and file.precision == SCALED else None
        self.all_gradients = None
        if plan.norm:
            self.all_gradients = AllGradients(file.clip, self.scaling, trained, before, len(mine), backend.device)
        self.stage = PipeStage(
            self.module,
            self.stage_index,
            count,
            backend.device,
            input_args=inputs,
            output_args=outputs,
            group=self.pipeline,
        )
        self.stage.prepare(plan.microbatches)
        self.optimizer = own_optimizer(file, layered.model, self.names, trained)
        self.share = plan.microbatches // plan.replicas
        self.feed = open_feed(
            file,
            plan.loaded(self.stage_index),
            replicas=plan.replicas,
            replica=self.replica,
            seed=seed,
            workers=workers if self.is_first or self.is_last else 0,
            device=backend.device,
        )
        self.averaging = Averaging(file, holding[-1], plan.replicas, backend.device)
        self.inputs: dict[int, tuple[torch.Tensor, ...]] = {}
        self.targets: dict[int, Any] = {}
        self.losses: dict[int, torch.Tensor] = {}
        self.stamped: list[Stamped] = []
        self.stamping = True
        self.updated = nothing
        """Called behind every update: a run sets the next step's learning rate there."""
        self.repeats: list[Any] = []
        self.backwards = 0

    def step(
        self,
        recorder: AllocationRecorder | None = None,
        watch: Callable[[Action, str], None] | None = None,
        *,
        stamping: bool = True,
    ) -> None:
        """Perform one step: every action of the row, in order, stamped unless nobody wants to know.

        `recorder` marks each action's range; `watch` is called with the action before and after it.
        """
        self.stamped, self.backwards, self.stamping = [], 0, stamping
        self.losses.clear()
        for action in self.row:
            if watch:
                watch(action, "before")
            with recorder.marked(str(action)) if recorder else self._named(action):
                self._perform(action)
            if watch:
                watch(action, "after")
        self.messages.finish()
        self.stage.clear_runtime_states()
        self.inputs, self.targets = {}, {}

    def _perform(self, action: Action) -> None:
        start = self._stamp()
        self.messages.arrive(action)
        ready = self._stamp()
        self.messages.let_go(action)
        self.repeats = []
        ended = OPS[action.op](self, action)
        end = self._stamp() if ended is None else ended
        if self.stamping:
            self.stamped.append(Stamped(action, start, ready, end, tuple(self.repeats)))

    def _stamp(self) -> Any:
        return self.backend.stamp() if self.stamping else None

    def _named(self, action: Action) -> AbstractContextManager[object]:
        """What puts an action's name into a profiler's timeline."""
        return record_function(f"PP:{action}") if self.stamping else nullcontext()

    def compile(self) -> None:
        """Compile the stage's layers, which takes seconds each; the rank's own state stays as it is."""
        compile_now(self.module, self.taken, self.backend.device)

    # The actions. Each returns the stamp of its end where that is not simply now.

    def load(self, action: Action) -> None:
        """Take this replica's share of the step's batch and keep this stage's part of it, cut into micro-batches."""
        drawn = self.feed.take()
        inputs, targets = self.parted(drawn.inputs, drawn.targets)
        mine = range(self.replica * self.share, (self.replica + 1) * self.share)
        if self.is_first:
            chunks = [_to(tensor, self.backend.device).chunk(self.share) for tensor in inputs]
            self.inputs = dict(zip(mine, zip(*chunks, strict=True), strict=True))
        if self.is_last:
            parts = split(pytree.tree_map(lambda t: _to(t, self.backend.device), targets), self.share)
            self.targets = dict(zip(mine, parts, strict=True))
            self.averaging.begin(drawn.split(self.share))

    def forward(self, action: Action) -> None:
        """One micro-batch through the stage's layers; on the last stage also its loss, as its share of the step's."""
        m = _microbatch(action)
        inputs = self.inputs[m] if self.is_first else ()
        try:
            output = self.stage.forward_one_chunk(m, inputs, {}, save_forward_output=False)
        except RuntimeError as error:  # torch wraps what the user's layer raised
            raise error.__cause__ or error from None
        if self.is_last:
            place = m - self.replica * self.share
            found = self.averaging.shared(
                place, lambda part: self._loss(output, part), lambda: self.loss(output, self.targets[m])
            )
            self.losses[m] = zero(output) if found is None else found

    def _loss(self, output: Any, part: Drawn) -> torch.Tensor:
        """The loss of some outputs with the targets of a batch."""
        _, targets = self.parted(part.inputs, part.targets)
        return self.loss(output, pytree.tree_map(lambda t: _to(t, self.backend.device), targets))

    def recompute(self, action: Action) -> Any:
        """Happens inside the backward that follows, where torch's checkpoint asks for it; stamped from there."""
        return self._stamp()

    def backward(self, action: Action) -> None:
        """The whole backward of a micro-batch."""
        m = _microbatch(action)
        self.backwards += 1
        last = self.backwards == self.share
        if self.plan.recompute:
            self.module.on_repeat = lambda: self.repeats.append(self._stamp())
        loss = self.losses[m] if self.is_last else None
        if loss is not None and self.scaling is not None:
            loss = loss * self.scaling.scale
        self.stage.backward_one_chunk(m, loss=loss, full_backward=True, last_backward=last)
        self.module.on_repeat = None
        self.stage.release(m)
        if self.is_last:
            self.losses[m] = self.losses[m].detach()

    def send_forward(self, action: Action) -> None:
        """Post the send of the stage's output."""
        self.messages.sending[action] = self.stage.post_send(_microbatch(action), forward=True)

    def receive_forward(self, action: Action) -> None:
        """Post the receive of the stage's input."""
        self.messages.receiving[action] = self.stage.post_receive(_microbatch(action), forward=True)

    def send_backward(self, action: Action) -> None:
        """Post the send of the input's gradient."""
        self.messages.sending[action] = self.stage.post_send(_microbatch(action), forward=False)

    def receive_backward(self, action: Action) -> None:
        """Post the receive of the output's gradient."""
        self.messages.receiving[action] = self.stage.post_receive(_microbatch(action), forward=False)

    def reduce_gradients(self, action: Action) -> None:
        """Replace the stage's gradients by their means over the ranks that hold it."""
        assert self.buckets is not None, action
        self.buckets.reduce()

    def add_up_gradients(self, action: Action) -> None:
        """Add up the gradients of parameters that stages share, `action` naming the first of these stages."""
        self.shared[action.stage].add_up()

    def measure_norm(self, action: Action) -> None:
        """Take the norm of the stage's gradients, and look whether they overflow."""
        assert self.all_gradients is not None, action
        self.all_gradients.measure()

    def agree_on_norm(self, action: Action) -> None:
        """Make the norms of all ranks' gradients into one."""
        assert self.all_gradients is not None, action
        self.all_gradients.agree()

    def optimize(self, action: Action) -> None:
        """Clip the gradients where the model does, update the parameters and clear the gradients.

        What overflows is left out. Gradients that are reduced stay in their buckets, as zeros. All are cleared, also
        those of parameters that the user's optimizer leaves out: they would count in the next step's norm.
        """
        usable = self.all_gradients is None or self.all_gradients.ready()
        if self.optimizer is not None:
            if usable:
                self.optimizer.step()
            self.updated()
        if self.buckets is None:
            self.module.zero_grad()
        else:
            self.buckets.clear()

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes that are known by name between two actions."""
        parameters = {id(p): p for p in self.module.parameters()}.values()
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        held = [t for _, tensors in self.messages.sending.items() if _.op == "SEND_B" for t in tensors[1]]
        batch = tensors((self.inputs, self.targets))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in batch}
        return {
            "parameters": sum(p.nbytes for p in parameters),
            "buffers": sum(b.nbytes for b in self.module.buffers()),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer": sum(t.nbytes for entry in state for t in entry.values() if isinstance(t, torch.Tensor)),
            "communication": self.stage.communication_bytes() + sum(t.nbytes for t in held),
            "input": sum(storages.values()),
        }

    def state(self) -> dict[str, Any]:
        """The stage's part of the whole model's `state_dict`; the first rank's with what no stage holds."""
        own = {name: getattr(*place) for name, place in self.saved.items()}
        tensors = {name: tensor.detach().cpu() for name, tensor in {**self.unheld, **own}.items()}
        return {**tensors, **{name: state() for name, state in self.extra.items()}}

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients under the same names."""
        return {self.names[id(p)]: p.grad.cpu() for p in self.module.parameters() if p.grad is not None}


def nothing() -> None:
    """Do nothing."""


OPS: dict[str, Callable[[Rank, Action], Any]] = {op: getattr(Rank, method) for op, method in PERFORMS.items()}


def split(tree: Any, parts: int) -> list[Any]:
    """Cut every tensor of a structure into equal parts along its first dimension."""
    leaves, shape = pytree.tree_flatten(tree)
    chunks = [leaf.chunk(parts) if isinstance(leaf, torch.Tensor) else [leaf] * parts for leaf in leaves]
    return [pytree.tree_unflatten([c[i] for c in chunks], shape) for i in range(parts)]


def _shared(plan: Plan, layered: LayeredModel, stage: int, replica: int, module: torch.nn.Module) -> dict[int, Shared]:
    """Return what a rank shares with other stages of its replica, by the first of them. Makes process groups."""
    stage_of = {name: s for s, own in enumerate(plan.stages) for name in own.layers}
    names, found = layered.parameter_names(), dict[int, Shared]()
    for group in plan.tied:
        between = {first for first, *layers in layered.tied() if {stage_of[name] for name in layers} == set(group)}
        for r in range(plan.replicas):
            ranks = dist.new_group([plan.holders[s][r] for s in group])
            if stage in group and r == replica:
                held = {names[id(p)]: p for p in module.parameters()}
                found[group[0]] = Shared({name: held[name] for name in between}, ranks)
    return found


def _places(module: torch.nn.Module, names: dict[int, tuple[str, ...]]) -> dict[str, tuple[torch.nn.Module, str]]:
    """Return where what is saved under each name is held: a module and its attribute, as tensors may be moved."""
    return {
        name: (part, attribute)
        for part in module.modules()
        for attribute, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        for name in names.get(id(tensor), ())
    }


def _extra(
    layered: LayeredModel, stage: torch.nn.Module, weights: Weights | None, *, first: bool
) -> dict[str, Callable[[], Any]]:
    """Return what gives the extra state of a stage's modules, by name; of the first rank also of those in no stage."""
    held = set(stage.modules())
    every = extra_states(layered.model)
    own = {name: part.get_extra_state for name, part in every.items() if part in held}
    if not first:
        return own
    made = weights.extra if weights is not None else {name: part.get_extra_state() for name, part in every.items()}
    return {name: lambda name=name: made[name] for name in every} | own


def _microbatch(action: Action) -> int:
    assert action.microbatch is not None, action
    return action.microbatch


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def _boundaries(
    file: ModelFile, layered: LayeredModel, layers: range, samples: int, device: torch.device
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return empty tensors with the shapes, dtypes and gradient flags of a stage's inputs and outputs.

    One micro-batch goes through the whole model as far as the stage's end, without data unless the model needs some. In
    a lower precision each kind of device chooses dtypes of its own: there it goes through copies of the layers on it.
    """
    values, _ = layered.parted(*file.draw(samples, seed=0))
    there = bool(file.precision) and device.type != "cpu"
    runs = [own for own in (range(layers.start), layers) if own]

    def passed() -> list[list[_Described]]:
        modules = [_copied(layered, own, device) if there else layered.stage(own) for own in runs]
        return _passed(modules, tuple(_to(value, device) for value in values) if there else values)

    try:
        with unchanged_buffers(layered.model), tensors_without_data(layered.model.parameters()):
            found = passed()
    except Exception:  # a layer looks at values: those that there are will do, as they did when it was cut
        with unchanged_buffers(layered.model):
            found = passed()
    finally:
        if layered.surroundings is not None:
            layered.surroundings.made.clear()  # what they hold may be without data, too
    taken, made = (
        tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device="meta", requires_grad=gradient)
            for shape, stride, dtype, gradient in side
        )
        for side in found
    )
    return taken, made


_Described = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]
"""A tensor's shape, strides and dtype, and whether it has a gradient."""


def _passed(modules: list[StageModule], values: tuple[torch.Tensor, ...]) -> list[list[_Described]]:
    """Say what goes into the last of some modules that are run one after another, and what comes out of it."""
    passing = [values]
    with torch.random.fork_rng(devices=[]):
        for module in modules:
            inputs = [v.detach().requires_grad_(v.requires_grad) for v in passing[-1]]
            passing.append(as_tuple(module(*inputs)))
    return [
        [(v.shape, v.stride(), v.dtype, v.requires_grad) for v in side if isinstance(v, torch.Tensor)]
        for side in passing[-2:]
    ]


def _copied(layered: LayeredModel, run: range, device: torch.device) -> StageModule:
    """Return a run of layers as a module on a device, of copies; without data where tensors are made without."""
    layers = list(layered.layers)
    for i in run:
        module = copy.deepcopy(layers[i].module)
        aim(module, device)
        for part, name, tensor in places([module]):
            there = tensor.detach().to(device)
            whole = isinstance(tensor, torch.nn.Parameter)
            setattr(part, name, torch.nn.Parameter(there, requires_grad=tensor.requires_grad) if whole else there)
        layers[i] = replace(layers[i], module=module)
    return replace(layered, layers=tuple(layers)).stage(run)
