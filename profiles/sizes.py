"""Count the bytes of every layer: what it holds, keeps for its backward, sends on, and needs at its worst."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from executor.allocator import AllocationRecorder
from executor.batch import tensors
from executor.compiling import unseen
from executor.devices import Backend
from executor.layers import unchanged_buffers
from executor.torch_adapter import storage_of
from planner.values.profile import LayerSizes
from profiles.chain import Chain, Flow, Pass, Tensors, update


@dataclass(frozen=True)
class Static:
    """Bytes that a layer holds whatever the batch."""

    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    optimizer_peak_bytes: int


class Recorder(Protocol):
    """What watches allocations while it is entered: the machine's allocator, or a count of tensors without data."""

    def __enter__(self) -> Recorder:
        """Begin to watch."""

    def __exit__(self, *error: Any) -> None:
        """End."""

    def marked(self, name: str) -> AbstractContextManager[Any]:
        """Delimit a range."""

    def span(self, name: str) -> tuple[int, int]:
        """Return (peak, kept) bytes of a range; raises `KeyError` when there was none."""


PEAKS = {
    "forward_peak_bytes": "forward1",
    "backward_first_peak_bytes": "backward0",
    "backward_peak_bytes": "backward1",
    "input_peak_bytes": "backward_input1",
    "weight_first_peak_bytes": "backward_weight0",
    "weight_peak_bytes": "backward_weight1",
}
"""The range in which each peak is recorded: pass 0 allocates the gradients, pass 1 adds to them."""


class _Between:
    """Bytes of the gradients that the first half of each part's backward keeps for the second."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self.output: dict[int, bool] = {}

    def keep(self, part: int, kept: list[torch.Tensor], given: list[torch.Tensor]) -> None:
        """Note what a part keeps; the gradients of its outputs were given."""
        storages = {storage_of(t): t.untyped_storage().nbytes() for t in kept}
        outputs = {storage_of(t) for t in given}
        self.bytes[part] = sum(size for storage, size in storages.items() if storage not in outputs)
        self.output[part] = bool(outputs & storages.keys())


class _Saved:
    """Storages that autograd keeps, by the part that made them; parameters, buffers and inputs are nobody's."""

    def __init__(self, chain: Chain) -> None:
        self.maker: dict[int, int] = {}
        self.inside: dict[int, dict[int, int]] = {}
        self.outputs: set[int] = set()
        self.by_maker: set[int] = set()
        self.once: set[int] = set()
        self.alive: list[torch.Tensor] = []
        self.nobody = {storage_of(t) for t in (*chain.whole.parameters(), *chain.whole.buffers())}

    @contextmanager
    def held(self, module: torch.nn.Module, stay: set[int]) -> Iterator[None]:
        """While inside, a module has tensors that are nobody's; then only what is to `stay` is remembered as kept."""
        own = {storage_of(t) for t in (*module.parameters(), *module.buffers())} - self.nobody
        self.nobody |= own
        yield
        self.nobody -= own
        self.alive = [t for t in self.alive if storage_of(t) in stay]
        self.once &= stay

    def keep(self, part: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            pointer = storage_of(tensor)
            if pointer in self.maker:
                self.outputs.add(pointer)
            elif pointer not in self.nobody and pointer not in self.once:
                self.once.add(pointer)  # a mask that many layers keep is there once
                self.inside.setdefault(part, {})[pointer] = tensor.untyped_storage().nbytes()
                self.alive.append(tensor)
            return tensor

        return pack

    def made(self, part: int, outputs: tuple[torch.Tensor, ...]) -> None:
        """Note a part's outputs: one that it saved itself counts as a kept output, not as something inside."""
        inside = self.inside.setdefault(part, {})
        for output in outputs:
            pointer = storage_of(output)
            if pointer in self.nobody or pointer in self.maker:
                continue  # a view of what exists already
            self.maker[pointer] = part
            if inside.pop(pointer, None) is not None:
                self.outputs.add(pointer)
                self.by_maker.add(pointer)

    def output_saved(self, part: int) -> bool:
        return any(self.maker[pointer] == part for pointer in self.outputs)

    def saves_output(self, part: int) -> bool:
        return any(self.maker[pointer] == part for pointer in self.by_maker)

    def bytes(self, part: int) -> int:
        return sum(self.inside.get(part, {}).values())


def measure_sizes(chain: Chain, backend: Backend, samples: int) -> tuple[list[LayerSizes], dict[str, tuple[int, bool]]]:
    """Return every part's bytes (the loss last) at one micro-batch size, and each value's (bytes, has a gradient)."""
    return recorded_sizes(chain, AllocationRecorder(backend), samples)


def recorded_sizes(
    chain: Chain, watching: Recorder, samples: int
) -> tuple[list[LayerSizes], dict[str, tuple[int, bool]]]:
    """Return the same with peaks from any recorder.

    It sees ranges named like "forward1.3" and "backward0.3" (`PEAKS`).
    """
    inputs, targets = chain.draw(samples)
    saved = _Saved(chain)
    saved.nobody |= {storage_of(t) for t in inputs}
    saved.nobody |= {storage_of(t) for t in tensors(targets)}
    _forget(chain.whole)
    flop: dict[int, int] = {}
    values: dict[str, tuple[int, bool]] = {}
    count = len(chain.layers)
    with unchanged_buffers(chain.layered.model), torch.random.fork_rng(devices=[]):
        done = _saved_pass(chain, inputs, targets, saved, flop)
        for layer, made in zip(chain.layers, done.outputs, strict=False):
            values |= {name: (t.nbytes, t.requires_grad) for name, t in zip(layer.outputs, made, strict=False)}
        values |= {name: (t.nbytes, t.requires_grad) for name, t in zip(chain.layered.inputs, inputs, strict=True)}
        output_bytes = [sum(t.nbytes for t in made) for made in done.outputs]
        chain.backward(done, _plain)
        gradients = done.gradients
        del done
        _forget(chain.whole)
        between = _Between()
        with watching as recorder:
            for number in range(2):  # the first allocates the gradients, the second adds to them

                def around(part: int, kind: str, number: int = number) -> AbstractContextManager[Any]:
                    return recorder.marked(f"{kind}{number}.{part}")

                again = chain.forward(inputs, targets, around)
                chain.backward(again, around, keep=False)
                del again
                if number == 0:
                    _forget(chain.whole)
                again = chain.forward(inputs, targets, _plain)
                again.gradients = gradients
                chain.halves(again, around, between.keep)
                del again
    peaks = [_peaks(recorder, part) for part in range(count + 1)]
    return _joined(samples, saved, between, output_bytes, peaks, flop), values


def _forget(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def _joined(
    samples: int,
    saved: _Saved,
    between: _Between,
    output_bytes: list[int],
    peaks: list[dict[str, int]],
    flop: dict[int, int],
) -> list[LayerSizes]:
    return [
        LayerSizes(
            samples=samples,
            saved_bytes=saved.bytes(part),
            output_bytes=output_bytes[part],
            output_saved=saved.output_saved(part),
            saves_output=saved.saves_output(part),
            between_bytes=between.bytes.get(part, 0),
            between_output=between.output.get(part, False),
            flop=flop.get(part, 0),
            **peaks[part],
        )
        for part in range(len(output_bytes))
    ]


def _peaks(recorder: Recorder, part: int) -> dict[str, int]:
    """Every peak of a part."""
    return {field: _peak(recorder, f"{kind}.{part}") for field, kind in PEAKS.items()}


def _peak(recorder: Recorder, name: str) -> int:
    try:
        return recorder.span(name)[0]
    except KeyError:  # a layer without a backward
        return 0


def _saved_pass(
    chain: Chain, inputs: tuple[torch.Tensor, ...], targets: Any, saved: _Saved, flop: dict[int, int]
) -> Pass:
    """One forward that looks at every tensor autograd saves. A part's outputs are noted when the next part begins.

    What counts FLOP sees single operations, which compiled layers do not have: it looks at a forward of its own.
    """
    compiled = chain.file.compiled
    if compiled:
        with chain.eager(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            chain.forward(inputs, targets, lambda part, kind: _counted(part, flop))

    @contextmanager
    def around(part: int, kind: str) -> Iterator[None]:
        if part > 0:
            saved.made(part - 1, done.outputs[part - 1])
        with _kept_compiled(part, saved) if compiled else _kept(part, saved, flop):
            yield

    done = Pass()
    chain.forward(inputs, targets, around, done)
    return done


@contextmanager
def _kept(part: int, saved: _Saved, flop: dict[int, int]) -> Iterator[None]:
    """Note what autograd keeps of a part's forward, and its FLOP."""
    with saved_tensors_hooks(saved.keep(part), lambda tensor: tensor), _counted(part, flop):
        yield


@contextmanager
def _kept_compiled(part: int, saved: _Saved) -> Iterator[None]:
    """Note what autograd keeps of a forward that runs compiled code; what notes it is none of that."""
    with saved_tensors_hooks(unseen(saved.keep(part)), unseen(lambda tensor: tensor)):
        yield


@contextmanager
def _counted(part: int, flop: dict[int, int]) -> Iterator[None]:
    """Note the FLOP of a part's forward."""
    counter = FlopCounterMode(display=False)
    with counter:
        yield
    flop[part] = counter.get_total_flops()


class PartCounter:
    """Counts the bytes of one micro-batch size part by part, where only one layer at a time has data.

    It finds what `measure_sizes` finds, for layers of whose outputs every one that has a gradient gets one.
    """

    def __init__(self, chain: Chain, backend: Backend, flow: Flow) -> None:
        self.chain, self.backend, self.flow = chain, backend, flow
        self.saved = _Saved(chain)
        self.saved.nobody = {storage_of(t) for t in (*flow.inputs, *tensors(flow.targets))}
        self.values = {name: (t.nbytes, t.requires_grad) for name, t in flow.values.items()}
        self.flop: dict[int, int] = {}
        self.output_bytes: list[int] = []
        self.peaks: list[dict[str, int]] = []
        self.between = _Between()
        self.outputs: list[Tensors] = []

    def count(self, part: int) -> None:
        """Count one layer, the last with the loss; its inputs are in the flow, and it has data and no gradients."""
        chain, flow = self.chain, self.flow
        layer = chain.layers[part]
        ambient = {storage_of(t) for t in flow.surroundings.values() if isinstance(t, torch.Tensor)}
        with self.saved.held(layer.module, ambient):
            ran = flow.forward(part, lambda at, kind: _kept(at, self.saved, self.flop), self.saved.made)
            passed = flow.next
            for _, _, made in ran:
                self.output_bytes.append(sum(t.nbytes for t in made))
            self.values |= {n: (t.nbytes, t.requires_grad) for n, t in zip(layer.outputs, ran[0][2], strict=False)}
            # so that nothing else gets the identity of one of these
            self.outputs += [tuple(t.detach() for t in made) for _, _, made in ran]
            del ran, made
            with AllocationRecorder(self.backend) as recorder:
                for number in range(2):  # the first allocates the gradients, the second adds to them

                    def around(at: int, kind: str, number: int = number) -> AbstractContextManager[Any]:
                        return recorder.marked(f"{kind}{number}.{at}")

                    again = flow.forward(part, around, own=True)
                    flow.backward(part, again, around, keep=False)
                    del again
                    if number == 0:
                        gradients = flow.backward(part, flow.forward(part, _plain), _plain, keep=True)
                        _forget(layer.module)
                    for (at, read, made), given in zip(flow.forward(part, _plain), gradients, strict=False):
                        chain.halves_part(at, read, made, given, around, self.between.keep)
                        del read, made
            flow.next = passed
            last = part == len(chain.layers) - 1
            self.peaks += [_peaks(recorder, at) for at in range(part, part + 1 + last)]

    def sizes(self) -> list[LayerSizes]:
        """Return every part's bytes, the loss last, when all have been counted."""
        return _joined(self.flow.samples, self.saved, self.between, self.output_bytes, self.peaks, self.flop)


@contextmanager
def _plain(part: int, kind: str) -> Iterator[None]:
    yield


def measure_static(chain: Chain, backend: Backend) -> list[Static]:
    """Return every layer's static bytes. Runs the optimizer (with learning rate 0)."""
    pairs = zip(chain.layers, chain.optimizers, strict=True)
    return [static_of(layer.module, optimizer, backend) for layer, optimizer in pairs]


def static_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, backend: Backend) -> Static:
    """Return one layer's static bytes, after a step of its optimizer, and leave it without gradients."""
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    update(optimizer, trained)
    with AllocationRecorder(backend) as recorder, recorder.marked("optimizer"):
        update(optimizer, trained)
    state = optimizer.state.values() if optimizer else ()
    for parameter in trained:
        parameter.grad = None
    return Static(
        parameter_bytes=sum(p.nbytes for p in parameters),
        buffer_bytes=sum(b.nbytes for b in module.buffers()),
        gradient_bytes=sum(p.nbytes for p in trained),
        optimizer_bytes=sum(t.nbytes for e in state for t in e.values() if isinstance(t, torch.Tensor)),
        optimizer_peak_bytes=recorder.span("optimizer")[0],
    )
