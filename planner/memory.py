"""The memory of every device over a step: a curve by kind of bytes, computed from a trace's actions.

Static bytes (parameters, buffers, optimizer state after its first step) plus what each action allocates, keeps and
frees. Inside a forward or backward the layers are walked one by one, so the peak is that of the worst layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from planner.plan import Plan
from planner.profile import LayerProfile, LayerSizes, Profile, interpolate, value_bytes
from planner.program import (
    BACKWARD,
    FORWARD,
    LOAD,
    OPTIMIZER,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    Program,
    parse,
)
from planner.trace import COMPUTE, MemoryPoint, Trace

KINDS = ("parameters", "buffers", "gradients", "optimizer", "activations", "communication", "input", "transient")


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of one stage at one micro-batch size.

    `received` and `sent` are its boundary tensors per micro-batch, `received_gradient` and `sent_gradient` those of
    the way back. Every `*_peak` is the most that is live inside the action above what was live when it began.
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


def stage_memory(profile: Profile, layers: range, samples: int, *, recompute: bool) -> StageMemory:
    """Add up a stage's layers.

    `saved` is what is live of a micro-batch when its backward starts, `kept` what lies between forward and backward:
    with `recompute` only what the stage sends on (and the loss), besides the input it received.
    """
    own = [profile.layers[i] for i in layers]
    parts = [_Sizes.of(layer, samples) for layer in own]
    gradients = [profile.crossing_bytes(i, samples, gradients=True) for i in layers]
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
    return StageMemory(
        parameters=sum(layer.parameter_bytes for layer in own),
        buffers=sum(layer.buffer_bytes for layer in own),
        gradients=sum(layer.gradient_bytes for layer in own),
        optimizer=sum(layer.optimizer_bytes for layer in own),
        optimizer_peak=max(layer.optimizer_peak_bytes for layer in own),
        received=profile.crossing_bytes(layers.start, samples) if layers.start else 0.0,
        received_gradient=received,
        sent_gradient=profile.crossing_bytes(layers.start, samples, gradients=True) if layers.start else 0.0,
        saved=inside + ends,
        kept=ends if recompute else inside + ends,
        forward_peak=_forward_peak(parts, keep=not recompute),
        recompute_peak=_forward_peak(parts[: len(own)], keep=True),
        backward_first_peak=_backward_peak(parts, own, gradients, received, first=True),
        backward_peak=_backward_peak(parts, own, gradients, received, first=False),
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


@dataclass
class _Live:
    """The bytes of one device while its actions are walked."""

    stage: StageMemory
    kinds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    first: bool = True

    def point(self, device: int, time: float, transient: float = 0.0) -> MemoryPoint:
        kinds = self.kinds | {"transient": transient}
        return MemoryPoint(device, time, tuple(kinds[k] for k in KINDS))

    def add(self, **bytes_: float) -> None:
        for kind, amount in bytes_.items():
            self.kinds[kind] += amount


def memory_curve(trace: Trace, program: Program, plan: Plan, profile: Profile) -> tuple[MemoryPoint, ...]:
    """Return the bytes live on every device over the step, by kind.

    `trace` may be simulated or measured: only its order and times are used. Of a peak inside an action, everything
    that the action adds is `transient`; the other kinds are those when it began.
    """
    ranges = plan.layer_ranges([layer.name for layer in profile.layers])
    stages = [stage_memory(profile, r, plan.samples, recompute=plan.recompute) for r in ranges]
    points: list[MemoryPoint] = []
    for device in range(len(trace.devices)):
        stage = plan.stage_of(device)
        live = _Live(stages[stage])
        of = live.stage
        live.add(parameters=of.parameters, buffers=of.buffers, optimizer=of.optimizer)
        if plan.replicas > 1:  # DDP's buckets are the gradients, and stay
            live.add(gradients=of.gradients)
            live.first = False
        points.append(live.point(device, 0.0))
        events = [e for e in trace.events if e.device == device and e.lane == COMPUTE]
        for event in events:
            action = parse(event.action)
            sent = sum(send.op == SEND_BACKWARD for send in program.completions.get(action, ()))
            live.add(communication=-sent * of.sent_gradient)
            inside = _inside(action.op, live, plan, profile)
            if inside:
                points.append(live.point(device, event.ready))
                points.append(live.point(device, (event.ready + event.end) / 2, inside))
            _apply(action.op, live, plan, profile, stage)
            if inside or action.op in (RECV_FORWARD, RECV_BACKWARD):
                points.append(live.point(device, event.end))
    return tuple(points)


def _inside(op: str, live: _Live, plan: Plan, profile: Profile) -> float:
    """Bytes live inside the action on top of those when it began, at its worst."""
    of = live.stage
    match op:
        case "LOAD":
            return sum(_batch_bytes(profile, plan.batch))
        case "F":
            return of.forward_peak
        case "R":
            return of.recompute_peak
        case "B":  # the recomputed activations live inside it, as torch's checkpoint has it
            return of.saved - of.kept + (of.backward_first_peak if live.first else of.backward_peak)
        case "OPTIMIZER":
            return of.optimizer_peak
        case _:
            return 0.0


def _apply(op: str, live: _Live, plan: Plan, profile: Profile, stage: int) -> None:
    """Change the live bytes to those after the action."""
    of = live.stage
    if op == LOAD:
        inputs, targets = _batch_bytes(profile, plan.batch)
        first, last = stage == 0, stage == len(plan.stages) - 1
        live.add(input=(inputs if first else 0.0) + (targets if last else 0.0))
    elif op == RECV_FORWARD:
        live.add(communication=of.received)
    elif op == RECV_BACKWARD:
        live.add(communication=of.received_gradient)
    elif op == FORWARD:
        live.add(activations=of.kept)
    elif op == BACKWARD:
        live.add(
            activations=-of.kept,
            communication=of.sent_gradient - of.received - of.received_gradient,
            gradients=of.gradients if live.first else 0.0,
        )
        live.first = False
    elif op == OPTIMIZER and plan.replicas == 1:
        live.add(gradients=-of.gradients)


def _batch_bytes(profile: Profile, batch: int) -> tuple[float, float]:
    inputs = interpolate([(float(n), float(i)) for n, i, _ in profile.batch_bytes], batch)
    targets = interpolate([(float(n), float(t)) for n, _, t in profile.batch_bytes], batch)
    return inputs, targets
