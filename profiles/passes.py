"""What a profile is measured in: passes over a model that is in memory, or over its layers one by one.

In place, the whole model is run layer by layer as in training, and unsplit beside it. One by one, a layer gets data, is
run on what the layer before has returned, and loses its data again: no more than one is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from executor.devices import Backend
from executor.hollow import harmless, places, stored
from executor.layers import unchanged_buffers
from executor.norm import norm_of
from executor.user_code import explained
from planner.values.profile import LayerSizes
from profiles.chain import Chain, Flow, Tensors, update
from profiles.dataless import Counted, count, following
from profiles.sizes import PartCounter, Static, measure_sizes, measure_static, static_of
from profiles.watch import WHOLE, Setting, Stopwatch


class Passes(Protocol):
    """Runs a model for a stopwatch. `sizes` and `values` are what has been counted, by samples."""

    chain: Chain
    watch: Stopwatch
    sizes: dict[int, list[LayerSizes]]
    values: dict[int, dict[str, tuple[int, bool]]]

    def static(self) -> list[Static]:
        """Return every layer's static bytes."""

    def count(self, samples: int) -> None:
        """Count the bytes of every part at one micro-batch size."""

    def reckon(self, samples: int) -> bool:
        """Count them without data, in time that hardly grows with a model; return whether that is possible."""

    def timed(self, setting: Setting, *, extra: bool) -> None:
        """Run everything once under the stopwatch, with `extra` also what only some plans need."""


class _Counts:
    """What has been counted of a chain, with data or without."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.sizes: dict[int, list[LayerSizes]] = {}
        self.values: dict[int, dict[str, tuple[int, bool]]] = {}
        self.reckoned: set[int] = set()
        self.without: dict[int, Counted | None] = {}

    def reckon(self, samples: int) -> bool:
        """Count the bytes of every part without data; peaks as far as they can be told from what has been counted."""
        known = max(self.sizes.keys() - self.reckoned, default=samples)
        for n in {samples, known} - self.without.keys():
            self.without[n] = count(self.chain, n)
        found, less = self.without[samples], self.without[known]
        if found is None or less is None:
            return False
        self.reckoned.add(samples)
        self.sizes[samples], self.values[samples] = (
            found if known == samples else following(found, less, self.sizes[known])
        )
        return True


class InPlace(_Counts):
    """Passes over a model that is in memory; the `unsplit` model is run beside its layers."""

    def __init__(self, chain: Chain, backend: Backend, watch: Stopwatch, *, unsplit: bool = True) -> None:
        super().__init__(chain)
        self.backend, self.watch, self.unsplit = backend, watch, unsplit
        self.batches: dict[int, Any] = {}
        self.compiled: set[tuple[Setting, bool]] = set()

    def static(self) -> list[Static]:
        """Return every layer's static bytes."""
        return measure_static(self.chain, self.backend)

    def count(self, samples: int) -> None:
        """Count the bytes of every part at one micro-batch size."""
        if self.chain.file.compiled:
            self.chain.compile([samples], [torch.get_num_threads()])
        self.sizes[samples], self.values[samples] = measure_sizes(self.chain, self.backend, samples)

    def timed(self, setting: Setting, *, extra: bool) -> None:
        """Run the whole model, and then its layers: forward, backward and update; `extra` halves and recomputes."""
        if self.chain.file.compiled and (setting, extra) not in self.compiled:
            self.compiled.add((setting, extra))
            self._run(setting, Stopwatch(self.backend), extra=extra)  # in whose times compiling would be
        self._run(setting, self.watch, extra=extra)

    def _run(self, setting: Setting, watch: Stopwatch, *, extra: bool) -> None:
        threads, samples = setting
        chain, around = self.chain, watch.around
        watch.setting = setting
        torch.set_num_threads(threads)
        if samples not in self.batches:
            self.batches[samples] = chain.draw(samples)
        inputs, targets = self.batches[samples]
        with unchanged_buffers(chain.layered.model):
            if self.unsplit:
                self._run_whole(watch, inputs, targets)
            done = chain.forward(inputs, targets, around)
            chain.backward(done, around)
            for i, optimizer in enumerate(chain.optimizers):
                _update(chain, watch, i, optimizer, chain.layers[i].module)
            if extra:
                gradients = done.gradients
                done = chain.forward(inputs, targets, unwatched)
                done.gradients = gradients
                chain.halves(done, around)
                for i, stamps in enumerate(chain.repeats(done, watch.backend.stamp)):
                    watch.note_pair(i, "recompute", stamps)

    def _run_whole(self, watch: Stopwatch, inputs: Tensors, targets: Any) -> None:
        chain, around = self.chain, watch.around
        with explained(chain.file.path, "the model's forward"), around(WHOLE, "forward"):
            loss = chain.loss(chain.whole(*inputs), targets)
        with around(WHOLE, "backward"):
            loss.backward()
        del loss
        _update(chain, watch, WHOLE, chain.whole_optimizer, chain.whole)


class OneByOne(_Counts):
    """Passes over a model without data, of which one layer at a time is given some."""

    def __init__(self, chain: Chain, backend: Backend, watch: Stopwatch) -> None:
        super().__init__(chain)
        self.backend, self.watch = backend, watch
        self.make = harmless(backend.device)

    @contextmanager
    def _in_memory(self, part: int) -> Iterator[dict[int, str]]:
        """Give a layer data while inside; yields the names of its parameters in the whole model."""
        module = self.chain.layers[part].module
        before = places([module])
        with stored([module], self.make):
            yield {
                id(getattr(holder, attribute)): self.chain.names.get(id(tensor), "")
                for holder, attribute, tensor in before
            }
            for parameter in module.parameters():
                parameter.grad = None

    def _visit(self, samples: int, work: Callable[[int, dict[int, str], Flow], None]) -> None:
        flow = Flow(self.chain, samples)
        for part in range(len(self.chain.layers)):
            with self._in_memory(part) as names, unchanged_buffers(self.chain.layers[part].module):
                work(part, names, flow)
                flow.go_on(part)

    def static(self) -> list[Static]:
        """Return every layer's static bytes."""
        found = []
        for part, layer in enumerate(self.chain.layers):
            with self._in_memory(part) as names:
                found.append(static_of(layer.module, self.chain.optimizer(part, names), self.backend))
        return found

    def count(self, samples: int) -> None:
        """Count the bytes of every part at one micro-batch size."""
        counter: PartCounter | None = None

        def work(part: int, names: dict[int, str], flow: Flow) -> None:
            nonlocal counter
            counter = counter or PartCounter(self.chain, self.backend, flow)
            counter.count(part)

        with torch.random.fork_rng(devices=[]):
            self._visit(samples, work)
        assert counter is not None
        self.sizes[samples], self.values[samples] = counter.sizes(), counter.values

    def timed(self, setting: Setting, *, extra: bool) -> None:
        """Run every layer forward, backward and its update, the last with the loss; `extra` halves and recomputes."""
        threads, samples = setting
        self.watch.setting = setting
        torch.set_num_threads(threads)

        def work(part: int, names: dict[int, str], flow: Flow) -> None:
            module, around = self.chain.layers[part].module, self.watch.around
            optimizer = self.chain.optimizer(part, names)
            with_gradients(module)
            update(optimizer, module.parameters())  # the first makes the optimizer's state
            ran = flow.forward(part, around)
            gradients = flow.backward(part, ran, around, keep=True)
            taken = ran[0][1]
            del ran
            _update(self.chain, self.watch, part, optimizer, module)
            del optimizer
            if extra:
                for (at, read, made), used in zip(flow.forward(part, unwatched), gradients, strict=False):
                    self.chain.halves_part(at, read, made, used, around)
                stamps = self.chain.repeats_part(part, taken, gradients[0], self.watch.backend.stamp)
                self.watch.note_pair(part, "recompute", stamps)

        self._visit(samples, work)


def with_gradients(module: nn.Module) -> None:
    """Give a module's parameters gradients of zeros: what is timed adds to them, as all but a step's first do."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _update(
    chain: Chain, watch: Stopwatch, part: int, optimizer: torch.optim.Optimizer | None, module: nn.Module
) -> None:
    """Do the end of a step for one part, all of it that a step does."""
    norm = None
    if chain.joined:
        with watch.around(part, "norm"):
            if chain.scaling is not None:
                chain.scaling.unscale(module.parameters())
            if chain.file.clip:
                norm = norm_of(module.parameters())
    with watch.around(part, "optimizer"):
        update(optimizer, module.parameters(), norm)


@contextmanager
def unwatched(part: int, kind: str) -> Iterator[None]:
    """Watch nothing."""
    yield
