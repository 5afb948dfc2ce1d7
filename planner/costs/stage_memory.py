"""The bytes of one stage, added up layer by layer: held always, kept per micro-batch, needed in passing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.basis.memo import memoised
from planner.values.plan import Plan
from planner.values.profile import LayerProfile, LayerSizes, Profile, interpolate, value_bytes


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of one stage at one micro-batch size.

    `received` and `sent_gradient` are what it gets from the stage before it and what it gives back, per micro-batch;
    `received_gradient` what it gets from the stage behind it. Every `*_peak` is the most that is live inside the action
    above what was live when it began. `gathered` is the most that two neighbouring layers' parameters need, `reduced`
    what one layer's gradients need: sharded ones are whole only for a moment.
    """

    parameters: float
    buffers: float
    gradients: float
    optimizer: float
    optimizer_peak: float
    received: float
    received_gradient: float
    sent_gradient: float
    saved: float
    kept: float
    forward_peak: float
    recompute_peak: float
    backward_first_peak: float
    backward_peak: float
    gathered: float
    reduced: float


def of_plan(profile: Profile, plan: Plan, layers: range) -> StageMemory:
    """Return a stage's bytes under a plan's savings, kept with the profile."""
    names = {profile.layers[i].name: i for i in layers} if plan.recompute_layers else {}
    forgotten = (
        frozenset(layers) if plan.recompute else frozenset(names[n] for n in plan.recompute_layers if n in names)
    )
    key = "memory", layers, plan.samples, plan.recompute, forgotten
    chosen = frozenset() if plan.recompute else forgotten
    return memoised(
        profile,
        key,
        lambda: stage_memory(profile, layers, plan.samples, recompute=plan.recompute, forgotten=chosen),
    )


def stage_memory(
    profile: Profile, layers: range, samples: int, *, recompute: bool, forgotten: frozenset[int] = frozenset()
) -> StageMemory:
    """Add up a stage's layers.

    `saved` is what is live of a micro-batch when its backward starts, `kept` what lies between forward and backward:
    with `recompute` only what the stage sends on (and the loss), besides the input it received; `forgotten` layers keep
    their inputs and outputs, and what they save is repeated one layer after the other.
    """
    own = [profile.layers[i] for i in layers]
    parts = [_Sizes.of(layer, samples) for layer in own]
    gradients = [profile.crossing_bytes(i, samples, gradients=True) for i in layers]
    repeated = [parts[i - layers.start].saved for i in sorted(forgotten)]
    if layers.stop == len(profile.layers):
        ends = parts[-1].output
        gradients.append(parts[-1].output)
        parts.append(_Sizes.of(profile.loss, samples))
        ends += parts[-1].saved
    else:
        ends = sum(
            value_bytes(value, samples)
            for value in profile.crossing(layers.stop)
            if value.source == layers[-1] or (value.source in layers and not profile.layers[value.source].output_saved)
        )
    received = profile.crossing_bytes(layers.stop, samples, gradients=True)
    inside = sum(part.saved + (part.output if part.output_saved else 0.0) for part in parts[: len(own) - 1])
    inside += parts[len(own) - 1].saved
    weights = [float(layer.parameter_bytes) for layer in own]
    return StageMemory(
        parameters=sum(weights),
        buffers=sum(layer.buffer_bytes for layer in own),
        gradients=sum(layer.gradient_bytes for layer in own),
        optimizer=sum(layer.optimizer_bytes for layer in own),
        optimizer_peak=max(layer.optimizer_peak_bytes for layer in own),
        received=profile.crossing_bytes(layers.start, samples) if layers.start else 0.0,
        received_gradient=received,
        sent_gradient=profile.crossing_bytes(layers.start, samples, gradients=True) if layers.start else 0.0,
        saved=inside + ends - sum(repeated) + max(repeated, default=0.0),
        kept=ends if recompute else inside + ends - sum(repeated),
        forward_peak=_forward_peak(parts, keep=not recompute),
        recompute_peak=0.0 if forgotten else _forward_peak(parts[: len(own)], keep=True),
        backward_first_peak=_backward_peak(parts, own, gradients, received, first=True),
        backward_peak=_backward_peak(parts, own, gradients, received, first=False),
        gathered=max((a + b for a, b in zip(weights, [*weights[1:], 0.0], strict=True)), default=0.0),
        reduced=max(float(layer.gradient_bytes) for layer in own),
    )


@dataclass(frozen=True)
class _Sizes:
    saved: float
    output: float
    output_saved: bool
    forward_peak: float
    backward_first_peak: float
    backward_peak: float

    @classmethod
    def of(cls, layer: LayerProfile, samples: int) -> _Sizes:
        def at(get: Callable[[LayerSizes], int]) -> float:
            return interpolate([(float(s.samples), float(get(s))) for s in layer.sizes], samples)

        return cls(
            at(lambda s: s.saved_bytes),
            at(lambda s: s.output_bytes),
            layer.sizes[-1].output_saved,
            at(lambda s: s.forward_peak_bytes),
            at(lambda s: s.backward_first_peak_bytes),
            at(lambda s: s.backward_peak_bytes),
        )


def _forward_peak(parts: list[_Sizes], *, keep: bool) -> float:
    live = peak = loose = 0.0
    for part in parts:
        peak = max(peak, live + loose + part.forward_peak)
        live += part.saved + (part.output if part.output_saved else 0.0) if keep else 0.0
        loose = part.output if not keep or not part.output_saved else 0.0
    return peak


def _backward_peak(
    parts: list[_Sizes], own: list[LayerProfile], gradients: list[float], received: float, *, first: bool
) -> float:
    """Walk the layers backwards: each frees what it saved, its output and its output's gradient."""
    live = peak = arriving = 0.0
    for index in reversed(range(len(parts))):
        part = parts[index]
        # A received gradient stays in its buffer; one from the next layer is let go of where it has been used.
        held = received if index == len(parts) - 1 else 0.0
        peak = max(peak, live + held + (part.backward_first_peak if first else part.backward_peak))
        live -= part.saved + (part.output if index < len(own) - 1 and part.output_saved else 0.0)
        live += gradients[index] - arriving
        arriving = gradients[index]
        if first and index < len(own):
            live += own[index].gradient_bytes
    return peak
