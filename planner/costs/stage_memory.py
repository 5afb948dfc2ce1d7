"""The bytes of one stage, added up layer by layer: held always, kept per micro-batch, needed in passing.

Layers may be recomputed: a *checkpoint* is a run of layers whose forward is repeated in one go before its backward
(torch.utils.checkpoint around that run). It keeps its inputs and its outputs, nothing from its inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.basis.memo import memoised
from planner.costs.placed import Placed
from planner.values.blocks import blocks
from planner.values.profile import LayerProfile, LayerSizes, Profile, interpolate, value_bytes


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of one stage at one micro-batch size.

    `received` and `sent_gradient` are what it gets from the stage before it and what it gives back, per micro-batch;
    `received_gradient` what it gets from the stage behind it, of which the first half of a backward keeps `returned`.
    `kept` lies between a micro-batch's forward and its backward, `saved` is the same with everything repeated that
    checkpoints forgot. Every `*_peak` is the most that is live inside the action above what was live when it began:
    `backward_peak` of a whole backward that repeats what it needs as it goes, `input_peak` and `weight_peak` of the two
    halves of one that finds everything there, `repeat_peak` of repeating all that checkpoints forgot; `between` are
    gradients that the first half keeps for the second. Where no input has a gradient the second half is the whole
    backward. `gathered` is the most that the parameters of blocks need that are whole at once, in a forward and in a
    backward, `posted` what of that is there before it begins, `reduced` what one block's gradients need: sharded ones
    are whole only for a moment.
    """

    parameters: float
    buffers: float
    gradients: float
    optimizer: float
    optimizer_peak: float
    received: float
    received_gradient: float
    sent_gradient: float
    returned: float
    saved: float
    kept: float
    forward_peak: float
    backward_first_peak: float
    backward_peak: float
    input_peak: float
    between: float
    weight_first_peak: float
    weight_peak: float
    repeat_peak: float
    gathered: tuple[float, float]
    posted: tuple[float, float]
    reduced: float


def of_stage(placed: Placed, stage: int, *, forgetful: bool = True) -> StageMemory:
    """Return a stage's bytes under its plan's savings, or with nothing forgotten; kept with the profile."""
    profile, layers, samples = placed.profile, placed.ranges[stage], placed.plan.samples
    checkpoints = placed.checkpoints[stage] if forgetful else ()
    return memoised(
        profile,
        ("memory", layers, samples, checkpoints),
        lambda: stage_memory(profile, layers, samples, checkpoints),
    )


def stage_memory(profile: Profile, layers: range, samples: int, checkpoints: Sequence[range] = ()) -> StageMemory:
    """Add up a stage's layers, of which `checkpoints` are runs that are recomputed, each in one go."""
    own = [profile.layers[i] for i in layers]
    plain, forgetful = _Walk(profile, layers, samples, ()), _Walk(profile, layers, samples, checkpoints)
    twice = profile.repeated(layers).values()
    sent_gradient = profile.crossing_bytes(layers.start, samples, gradients=True) if layers.start else 0.0
    input_peak, between = plain.input_half() if sent_gradient else (0.0, 0.0)
    weight = plain.weight_peak if sent_gradient else plain.backward_peak
    gathered, posted = _gathered(profile, layers, checkpoints)
    reduced = [sum(profile.layers[i].gradient_bytes for i in block) for block in blocks(profile, layers)]
    return StageMemory(
        parameters=float(sum(o.parameter_bytes for o in own) - sum(t.parameter_bytes for t in twice)),
        buffers=sum(layer.buffer_bytes for layer in own),
        gradients=sum(o.gradient_bytes for o in own) - sum(t.gradient_bytes for t in twice),
        optimizer=sum(o.optimizer_bytes for o in own) - sum(t.optimizer_bytes for t in twice),
        optimizer_peak=max(layer.optimizer_peak_bytes for layer in own),
        received=profile.crossing_bytes(layers.start, samples) if layers.start else 0.0,
        received_gradient=plain.received,
        sent_gradient=sent_gradient,
        returned=plain.received if plain.parts[-1].between_output or not sent_gradient else 0.0,
        saved=plain.kept,
        kept=forgetful.kept,
        forward_peak=forgetful.forward_peak(),
        backward_first_peak=forgetful.backward_peak(first=True),
        backward_peak=forgetful.backward_peak(first=False),
        input_peak=input_peak,
        between=between,
        weight_first_peak=weight(first=True),
        weight_peak=weight(first=False),
        repeat_peak=forgetful.repeats_peak(checkpoints),
        gathered=gathered,
        posted=posted,
        reduced=float(max(reduced)),
    )


def _gathered(
    profile: Profile, layers: range, checkpoints: Sequence[range]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The most that is gathered at once in a forward and in a backward, and what of it is posted before each.

    While one block is used the next one is on its way; what blocks share is whole all the time, and the blocks of
    layers that are repeated together stay until all of these have had their backward.
    """
    own = blocks(profile, layers)
    block_of = {i: number for number, block in enumerate(own) for i in block}
    name = {profile.layers[i].name: i for i in layers}
    sizes, common = [float(sum(profile.layers[i].parameter_bytes for i in block)) for block in own], 0.0
    for (_, *names), size in zip(profile.tied, profile.tied_bytes, strict=False):
        holders = [block_of[name[n]] for n in names if n in name]
        several = len(set(holders)) > 1
        common += size.parameter_bytes * several
        for number in holders if several else holders[1:]:
            sizes[number] -= size.parameter_bytes
    until = list(range(len(own)))
    for run in checkpoints:
        for number in range(block_of[run[0]], block_of[run[-1]] + 1):
            until[number] = min(until[number], until[block_of[run[0]]])
    forward = max(a + b for a, b in zip(sizes, [*sizes[1:], 0.0], strict=True))
    backward = max(
        sum(sizes[n] for n in range(at, len(own)) if until[n] <= at) + (sizes[at - 1] if at else 0.0)
        for at in range(len(own))
    )
    return (common + forward, common + backward), (common + sizes[0], common + sizes[-1])


class _Walk:
    """A micro-batch's way through a stage's layers (and, at the end of the model, its loss), forwards and backwards.

    `saved` is what each part keeps inside; of its output `used` stays for a backward, `sent` until it has been sent,
    `outputs` for either. Backwards let go of what is used: `freed` has, for every layer, whose outputs with its own.
    """

    def __init__(self, profile: Profile, layers: range, samples: int, checkpoints: Sequence[range]) -> None:
        self.own = [profile.layers[i] for i in layers]
        self.parts = [_Sizes.of(layer, samples) for layer in self.own]
        self.gradients = [profile.crossing_bytes(i, samples, gradients=True) for i in layers]
        self.received = profile.crossing_bytes(layers.stop, samples, gradients=True)
        self.run_of = {i - layers.start: run for run in checkpoints for i in run}
        self.first = layers.start
        twice = profile.repeated(layers)  # the last of a stage that holds a parameter is the first to have a gradient
        self.allocated = [
            layer.gradient_bytes - (twice[i].gradient_bytes if i in twice else 0)
            for i, layer in zip(layers, self.own, strict=True)
        ]
        self.whole = [part.output if part.output_saved else 0.0 for part in self.parts]
        self.used, self.sent = self._staying(profile, layers, samples)
        self.outputs = [max(used, sent) for used, sent in zip(self.used, self.sent, strict=True)]
        self.freed: list[list[int]] = [[] for _ in self.own]
        for j, i in enumerate(layers):
            inside = [t - layers.start for t in _readers(profile)[i] if t in layers]
            self.freed[j if self.parts[j].saves_output or not inside else min(inside)].append(j)
        if layers.stop == len(profile.layers):
            self.gradients.append(self.parts[-1].output)
            self.parts.append(_Sizes.of(profile.loss, samples))
        self._trained = [j < len(self.own) and self.own[j].gradient_bytes > 0 for j in range(len(self.parts))]
        self.saved = [0.0 if j in self.run_of else part.saved for j, part in enumerate(self.parts)]
        self.kept = sum(self.saved) + sum(self.outputs)

    def _staying(self, profile: Profile, layers: range, samples: int) -> tuple[list[float], list[float]]:
        """What stays of every layer's output because a backward uses it, and because it is sent on or is the model's.

        A checkpoint keeps its inputs, whoever makes them; what of this stage only its own layers read is forgotten.
        """
        used, sent = [0.0] * len(layers), [0.0] * len(layers)
        readers, crossing = _readers(profile), profile.crossing(layers.stop)
        for j, i in enumerate(layers):
            run = self.run_of.get(j)
            sent[j] = sum(value_bytes(value, samples) for value in crossing if value.source == i)
            if i == layers[-1]:
                sent[j] = sent[j] if crossing else self.parts[j].output
                continue
            saved = self.parts[j].output_saved and not (run and all(t in run for t in readers[i] if t in layers))
            repeated_from = any(self.run_of.get(t - layers.start, run) is not run for t in readers[i])
            used[j] = self.parts[j].output if saved or repeated_from else 0.0
        return used, sent

    def forward_peak(self) -> float:
        """Return the most that is live inside a forward.

        A recomputed layer needs at most what it needs without: what it then keeps it would have dropped earlier.
        """
        live = peak = loose = 0.0
        for j, part in enumerate(self.parts):
            peak = max(peak, live + loose + part.forward_peak)
            stays = self.outputs[j] if j < len(self.outputs) else 0.0
            live += self.saved[j] + stays
            loose = max(0.0, part.output - stays)
        return peak

    def repeat_peak(self, run: range) -> float:
        """Return the most that is live while a checkpoint's forward is repeated, everything kept this time."""
        live = peak = loose = 0.0
        for j in (i - self.first for i in run):
            part = self.parts[j]
            peak = max(peak, live + loose + part.forward_peak)
            live += part.saved + self.whole[j]
            loose = 0.0 if part.output_saved else part.output
        return peak

    def repeats_peak(self, checkpoints: Sequence[range]) -> float:
        """Return the most that is live while all checkpoints' forwards are repeated, one after the other."""
        live = peak = 0.0
        for run in checkpoints:
            peak = max(peak, live + self.repeat_peak(run))
            live += sum(self.parts[i - self.first].saved for i in run)
            live += sum(self.whole[i - self.first] for i in run[:-1])
        return peak

    def backward_peak(self, *, first: bool) -> float:
        """Walk the layers backwards: each frees what it saved, its output and its output's gradient.

        In front of the last layer of a checkpoint its forward is repeated. With `first` gradients are allocated.
        """
        live = peak = arriving = 0.0
        for j in reversed(range(len(self.parts))):
            part, run = self.parts[j], self.run_of.get(j)
            # A received gradient stays in its buffer; one from the next layer is let go of where it has been used.
            held = self.received if j == len(self.parts) - 1 else 0.0
            if run and j + self.first == run[-1]:
                peak = max(peak, live + held + self.repeat_peak(run))
                live += sum(self.parts[i - self.first].saved for i in run)
                live += sum(self.whole[i - self.first] for i in run[:-1])
            peak = max(peak, live + held + (part.backward_first_peak if first else part.backward_peak))
            live -= part.saved
            if j < len(self.own):
                live -= sum(self.used[i] for i in self.freed[j])
                live -= self.whole[j] if run and j + self.first != run[-1] else 0.0
            live += self.gradients[j] - arriving
            arriving = self.gradients[j]
            if first and j < len(self.own):
                live += self.allocated[j]
        return peak

    def input_half(self) -> tuple[float, float]:
        """Walk the layers backwards for the gradients of their inputs: return the peak, and what is kept behind it.

        Each keeps the gradients that its parameters' half will need. At the end torch lets go of what nobody needs any
        more, which is what was saved behind the last parameter. What the stage has received is in its buffer.
        """
        live = peak = arriving = saved = 0.0
        for j in reversed(range(len(self.parts))):
            part = self.parts[j]
            peak = max(peak, live + part.input_peak)
            live += self._staying_between(j) + self.gradients[j] - arriving
            arriving = self.gradients[j]
        for part, trained in zip(reversed(self.parts), reversed(self._trained), strict=True):
            if trained:
                break
            saved += part.saved
        return max(peak, live), max(0.0, live - arriving - saved)

    def weight_peak(self, *, first: bool) -> float:
        """Walk the layers forwards, as torch does for the gradients of their parameters; each lets go of what it kept.

        What the forward has saved goes with the last of them. With `first` gradients are allocated.
        """
        live = peak = 0.0
        for j, part in enumerate(self.parts):
            peak = max(peak, live + (part.weight_first_peak if first else part.weight_peak))
            live -= self._staying_between(j)
            if first and j < len(self.own):
                live += self.allocated[j]
        return peak

    def _staying_between(self, j: int) -> float:
        """Bytes that the first half of a layer's backward keeps for the second, but for what the stage has received."""
        part, behind = self.parts[j], self.gradients[j + 1] if j + 1 < len(self.parts) else 0.0
        return part.between + (behind if part.between_output else 0.0)


def _readers(profile: Profile) -> list[set[int]]:
    """Which layers read what each layer makes, kept with the profile."""

    def make() -> list[set[int]]:
        found: list[set[int]] = [set() for _ in profile.layers]
        for value in profile.values:
            if value.source >= 0:
                found[value.source] |= set(value.targets)
        return found

    return memoised(profile, "readers", make)


@dataclass(frozen=True)
class _Sizes:
    saved: float
    output: float
    output_saved: bool
    saves_output: bool
    forward_peak: float
    backward_first_peak: float
    backward_peak: float
    between: float
    between_output: bool
    input_peak: float
    weight_first_peak: float
    weight_peak: float

    @classmethod
    def of(cls, layer: LayerProfile, samples: int) -> _Sizes:
        def at(get: Callable[[LayerSizes], int]) -> float:
            return interpolate([(float(s.samples), float(get(s))) for s in layer.sizes], samples)

        return cls(
            at(lambda s: s.saved_bytes),
            at(lambda s: s.output_bytes),
            layer.sizes[-1].output_saved,
            layer.sizes[-1].saves_output,
            at(lambda s: s.forward_peak_bytes),
            at(lambda s: s.backward_first_peak_bytes),
            at(lambda s: s.backward_peak_bytes),
            at(lambda s: s.between_bytes),
            layer.sizes[-1].between_output,
            at(lambda s: s.input_peak_bytes or s.backward_peak_bytes),
            at(lambda s: s.weight_first_peak_bytes),
            at(lambda s: s.weight_peak_bytes),
        )
