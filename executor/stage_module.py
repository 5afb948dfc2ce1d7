"""Any run of a model's layers as one module, of which parts may be repeated for their backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from executor.buffers import Written
from executor.layer import Layer, as_tuple
from executor.noise import Noise
from executor.precision import autocast
from executor.repeating import Forgotten
from executor.surroundings import Surroundings

Values = dict[str, Any]


@dataclass
class _Run:
    """Layers behind each other: from the values that they take to those that somebody needs behind them.

    Those that they change are copied first where the run is repeated: it then begins with the same again. `written`
    knows the buffers that a repetition must not write once more; None of a run that is not repeated.
    """

    layers: range
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ambient: tuple[str, ...]
    changed: frozenset[str]
    written: Written | None


class StageModule(nn.Module):
    """Layers run one after another; a value is dropped after its last use.

    Those of each of the `checkpoints` (by their place) run under `torch.utils.checkpoint`; `on_repeat` is then called
    before and after each repetition, so that it can be stamped, `on_layer` in front of each layer with its place. Where
    a list of what is `forgotten` is set, each of them is added there, to be repeated by whoever has the list. Where
    there is `noise`, layers draw from it; the `first` has that number in the model.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        *,
        checkpoints: Sequence[range] = (),
        surroundings: Surroundings | None = None,
        first: int = 0,
    ) -> None:
        super().__init__()
        self.body = nn.ModuleList(layer.module for layer in layers)
        self.written = Written(self.body)
        self.layers, self.inputs, self.outputs = tuple(layers), inputs, outputs
        self.on_repeat: Callable[[], None] | None = None
        self.on_layer: Callable[[int], None] | None = None
        self.noise: Noise | None = None
        self.forgotten: list[Forgotten] | None = None
        self.first, self.surroundings = first, surroundings
        self.precision = layers[0].precision if layers else ""
        self.ambient = tuple(dict.fromkeys(name for layer in layers for name in layer.ambient))
        self.changed = frozenset(name for layer in layers for name in layer.changes) & set(inputs)
        needed: set[str] = set(outputs)
        self._dropped: list[tuple[str, ...]] = []
        for layer in reversed(layers):
            self._dropped.append(tuple(name for name in layer.inputs if name not in needed))
            needed |= set(layer.inputs)
        self._dropped.reverse()
        self._runs = self._cut(sorted(checkpoints, key=lambda run: run.start))

    def _cut(self, checkpoints: Sequence[range]) -> list[_Run]:
        """Cut the layers into those that are repeated together, and what lies between them."""
        found, at = [], 0
        for own in checkpoints:
            found += [self._run_of(range(at, own.start), repeated=False)] if at < own.start else []
            found.append(self._run_of(own, repeated=True))
            at = own.stop
        if at < len(self.layers) or not self.layers:
            found.append(self._run_of(range(at, len(self.layers)), repeated=False))
        return found

    def _run_of(self, own: range, *, repeated: bool) -> _Run:
        layers = [self.layers[i] for i in own]
        made = {name for layer in layers for name in layer.outputs}
        later = {name for layer in self.layers[own.stop :] for name in layer.inputs} | set(self.outputs)
        inputs = tuple(dict.fromkeys(name for layer in layers for name in layer.inputs if name not in made))
        return _Run(
            layers=own,
            inputs=inputs,
            outputs=tuple(name for layer in layers for name in layer.outputs if name in later),
            ambient=tuple(dict.fromkeys(name for layer in layers for name in layer.ambient)),
            changed=frozenset(name for layer in layers for name in layer.changes) & set(inputs),
            written=Written(nn.ModuleList(layer.module for layer in layers)) if repeated else None,
        )

    @property
    def repeated(self) -> tuple[range, ...]:
        """The layers that are repeated together for their backward, by their place."""
        return tuple(run.layers for run in self._runs if run.written is not None)

    def surrounded(self, values: Values) -> Values:
        """Return what the layers take of nobody, for a micro-batch of which some values are."""
        if self.surroundings is None:
            return {}
        with autocast(self.precision, values):
            return self.surroundings.around(self.ambient, values)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Take the values named `inputs`, return those named `outputs`, or on the last stage the model's output."""
        noise = self.noise  # that of this micro-batch, also when it is repeated behind others
        live: Values = dict(zip(self.inputs, tensors, strict=True))
        result: Any = None
        with autocast(self.precision, tensors):
            around = self._around_all(live)
            for run in self._runs:
                if run.written is not None and torch.is_grad_enabled():
                    result = self._repeated(run, run.written, live, around, noise)
                else:
                    live.update({name: live[name].clone() for name in run.changed & self.changed})
                    result = self._walk(run.layers, live, self._around(run, live, around), noise)
        if not self.outputs:
            return result
        # Only whole blocks are sent, and what is sent is not written any more.
        outputs = tuple(self.written.apart(live[name].contiguous()) for name in self.outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def _around_all(self, live: Values) -> Values:
        """What runs take of nobody that cannot make it from what they take."""
        lost = [run for run in self._runs if run.ambient and not self._known(run.inputs)]
        names = tuple(dict.fromkeys(name for run in lost for name in run.ambient))
        return self.surroundings.around(names, live) if self.surroundings is not None else {}

    def _known(self, names: Iterable[str]) -> bool:
        """Whether the batch size is seen from these values."""
        return self.surroundings is not None and any(name in self.surroundings.batched for name in names)

    def _around(self, run: _Run, live: Values, around: Values) -> Values:
        """What the layers of a run take of nobody."""
        if self.surroundings is None or not run.ambient:
            return {}
        if not self._known(run.inputs):
            return around
        return self.surroundings.around(run.ambient, {name: live[name] for name in run.inputs})

    def _repeated(self, run: _Run, written: Written, live: Values, around: Values, noise: Noise | None) -> Any:
        """Run layers of which only what they take is kept, and what they make."""

        def work(*tensors: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
            if self.on_repeat is not None:
                self.on_repeat()
            try:
                own: Values = dict(zip(run.inputs, tensors, strict=True))
                own.update({name: own[name].clone() for name in run.changed})
                with autocast(self.precision, tensors):  # repeated, it is outside of the forward's
                    result = self._walk(run.layers, own, self._around(run, own, around), noise)
                return result, tuple(own[name] for name in run.outputs)
            finally:
                if self.on_repeat is not None:
                    self.on_repeat()

        given = tuple(live[name] for name in run.inputs)
        if self.forgotten is None:
            result, made = checkpoint(
                work,
                *given,
                use_reentrant=False,
                context_fn=written.contexts,
                preserve_rng_state=noise is None,
            )
        else:
            compiled = any(self.layers[i].compiled is not None for i in run.layers)
            self.forgotten.append(Forgotten(work, given, *written.contexts(), compiled=compiled))
            result, made = self.forgotten[-1].run()
        live.update(zip(run.outputs, made, strict=True))
        for i in run.layers:
            for name in self._dropped[i]:
                live.pop(name, None)
        return result

    def _walk(self, layers: range, live: Values, around: Values, noise: Noise | None) -> Any:
        """Run layers on the values that are there, put there what they make, and return the last one's result."""
        result: Any = None
        for i in layers:
            layer = self.layers[i]
            if self.on_layer is not None:
                self.on_layer(i)
            if noise is not None:
                noise.at(self.first + i)
            given = [live[name] for name in layer.inputs]
            result = layer.run(*given, *(around[name] for name in layer.ambient))
            del given
            for name in self._dropped[i]:
                live.pop(name, None)
            if layer.outputs:
                live.update(zip(layer.outputs, as_tuple(result), strict=True))
        return result
