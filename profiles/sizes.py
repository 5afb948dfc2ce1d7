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
from executor.devices import Backend
from executor.layers import unchanged_buffers
from executor.torch_adapter import storage_of
from planner.values.profile import LayerSizes, Value
from profiles.chain import Chain, Pass, update


@dataclass(frozen=True, kw_only=True)
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

    It sees ranges named like "forward1.3" and "backward0.3": pass 0 allocates the gradients, pass 1 adds to them.
    """
    inputs, targets = chain.draw(samples)
    saved = _Saved(chain)
    saved.nobody |= {storage_of(t) for t in inputs}
    saved.nobody |= {storage_of(t) for t in tensors(targets)}
    for parameter in chain.whole.parameters():
        parameter.grad = None
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
        del done
        for parameter in chain.whole.parameters():
            parameter.grad = None
        with watching as recorder:
            for number in range(2):  # the first allocates the gradients, the second adds to them

                def around(part: int, kind: str, number: int = number) -> AbstractContextManager[Any]:
                    return recorder.marked(f"{kind}{number}.{part}")

                again = chain.forward(inputs, targets, around)
                chain.backward(again, around, keep=False)
                del again
    sizes = [
        LayerSizes(
            samples=samples,
            saved_bytes=saved.bytes(part),
            output_bytes=output_bytes[part],
            output_saved=saved.output_saved(part),
            saves_output=saved.saves_output(part),
            forward_peak_bytes=recorder.span(f"forward1.{part}")[0],
            backward_first_peak_bytes=_peak(recorder, f"backward0.{part}"),
            backward_peak_bytes=_peak(recorder, f"backward1.{part}"),
            flop=flop.get(part, 0),
        )
        for part in range(count + 1)
    ]
    return sizes, values


def _peak(recorder: Recorder, name: str) -> int:
    try:
        return recorder.span(name)[0]
    except KeyError:  # a layer without a backward
        return 0


def _saved_pass(
    chain: Chain, inputs: tuple[torch.Tensor, ...], targets: Any, saved: _Saved, flop: dict[int, int]
) -> Pass:
    """One forward that looks at every tensor autograd saves. A part's outputs are noted when the next part begins."""

    @contextmanager
    def around(part: int, kind: str) -> Iterator[None]:
        if part > 0:
            saved.made(part - 1, done.outputs[part - 1])
        counter = FlopCounterMode(display=False)
        with saved_tensors_hooks(saved.keep(part), lambda tensor: tensor), counter:
            yield
        flop[part] = counter.get_total_flops()

    done = Pass()
    chain.forward(inputs, targets, around, done)
    return done


@contextmanager
def _plain(part: int, kind: str) -> Iterator[None]:
    yield


def measure_static(chain: Chain, backend: Backend) -> list[Static]:
    """Return every layer's static bytes. Needs gradients in place; runs the optimizer (with learning rate 0)."""
    found = []
    for layer, optimizer in zip(chain.layers, chain.optimizers, strict=True):
        parameters = list(layer.module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        update(optimizer, trained)
        with AllocationRecorder(backend) as recorder, recorder.marked("optimizer"):
            update(optimizer, trained)
        state = optimizer.state.values() if optimizer else ()
        found.append(
            Static(
                parameter_bytes=sum(p.nbytes for p in parameters),
                buffer_bytes=sum(b.nbytes for b in layer.module.buffers()),
                gradient_bytes=sum(p.nbytes for p in trained),
                optimizer_bytes=sum(t.nbytes for e in state for t in e.values() if isinstance(t, torch.Tensor)),
                optimizer_peak_bytes=recorder.span("optimizer")[0],
            )
        )
        for parameter in trained:
            parameter.grad = None
    return found


def values_of(chain: Chain, by_size: dict[int, dict[str, tuple[int, bool]]]) -> tuple[Value, ...]:
    """Join what every size says of the values between the layers."""
    return tuple(
        Value(
            name=wire.name,
            source=wire.source,
            targets=wire.targets,
            bytes_at=tuple((n, values[wire.name][0]) for n, values in sorted(by_size.items())),
            gradient=next(iter(by_size.values()))[wire.name][1],
        )
        for wire in chain.layered.wires
        if wire.targets
    )
