"""What a stage's operations cost on one device: sums over its layers, at every measured quantile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.memo import memoised
from planner.orders.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    NORM_GRAD,
    OPTIMIZER,
    RECOMPUTE,
)
from planner.values.profile import LayerProfile, LayerTimes, Profile, Timing, interpolate

Quantile = Literal["low", "lower", "median", "upper", "high"]
QUANTILES: dict[Quantile, float] = {"low": 0.1, "lower": 0.25, "median": 0.5, "upper": 0.75, "high": 0.9}
"""The percentiles that a profile's `Timing` holds, by the first part of the field's name."""
MEDIAN = list(QUANTILES).index("median")
Spread = npt.NDArray[np.float64]
"""Seconds at each of `QUANTILES`."""


class LayerTable:
    """Seconds of every layer (and, last, the loss) at one micro-batch size and number of threads.

    Each field is an array (quantiles, layers + 1) of sums up to a layer, so that a stage is a difference.
    """

    def __init__(self, profile: Profile, samples: int, threads: int) -> None:
        def sums(kind: str) -> Spread:
            seconds = _at(_measured(profile, threads, kind), samples)
            return np.concatenate([np.zeros((len(QUANTILES), 1)), np.cumsum(seconds, axis=1)], axis=1)

        self.forward, self.backward = sums("forward"), sums("backward")
        self.backward_input, self.backward_weight = sums("backward_input"), sums("backward_weight")
        self.recompute = sums("recompute")
        of = [times(layer, threads) for layer in profile.layers]
        self.optimizer = _once([own.optimizer for own in of])
        self.norm = _once([own.norm for own in of])


def _once(timings: Sequence[Timing | None]) -> Spread:
    """Sums of what every layer does once per step, 0 where it does nothing."""
    each = [[float(getattr(timing, f"{q}_s")) if timing else 0.0 for timing in timings] for q in QUANTILES]
    return np.concatenate([np.zeros((len(QUANTILES), 1)), np.cumsum(np.array(each), axis=1)], axis=1)


class _Measured(NamedTuple):
    """What was measured of a pass over every layer, and last the loss: `sizes` (layers, most of them) and `seconds`
    (quantiles, layers, sizes) at each. Rows that are shorter begin behind their `first`."""

    sizes: Spread
    seconds: Spread
    first: npt.NDArray[np.int64]


def _measured(profile: Profile, threads: int, kind: str) -> _Measured:
    """Return it, kept with the profile. One point alone scales in proportion: with it goes no time for no samples."""

    def make() -> _Measured:
        of = [getattr(times(part, threads), kind) for part in (*profile.layers, profile.loss)]
        most = max(2, *map(len, of))
        sizes, seconds = np.zeros((len(of), most)), np.zeros((len(QUANTILES), len(of), most))
        for row, timings in enumerate(of):
            sizes[row, most - len(timings) :] = [t.samples for t in timings]
            for q, quantile in enumerate(QUANTILES):
                seconds[q, row, most - len(timings) :] = [getattr(t, f"{quantile}_s") for t in timings]
        return _Measured(sizes, seconds, np.array([most - max(2, len(timings)) for timings in of]))

    return memoised(profile, ("measured", kind, _nearest([t.threads for t in profile.layers[0].times], threads)), make)


def _at(known: _Measured, samples: int) -> Spread:
    """Interpolate as `planner.values.profile.interpolate`, all layers and quantiles at once."""
    last = known.sizes.shape[1] - 1
    right = np.clip((known.sizes[:, 1:] < samples).sum(axis=1) + 1, known.first + 1, last)
    rows = np.arange(len(right))
    x0, x1 = known.sizes[rows, right - 1], known.sizes[rows, right]
    y0, y1 = known.seconds[:, rows, right - 1], known.seconds[:, rows, right]
    found: Spread = np.maximum(0.0, y0 + (y1 - y0) * (samples - x0) / (x1 - x0))
    return found


def layer_table(profile: Profile, samples: int, threads: int) -> LayerTable:
    """Return the table, kept with the profile."""
    key = samples, _nearest([t.threads for t in profile.layers[0].times], threads)
    return memoised(profile, ("layers", *key), lambda: LayerTable(profile, samples, threads))


class StageCosts:
    """Seconds of one stage's operations at one micro-batch size, of which `checkpoints` are what a recompute repeats.

    A stage runs its layers without the seams that the profiler had to cut between them. The whole model, measured
    beside its layers, says what a seam costs: (sum of the layers - whole) / (number of seams).
    """

    def __init__(self, profile: Profile, layers: range, samples: int, checkpoints: Sequence[range] = ()) -> None:
        self.profile, self.layers, self.samples = profile, layers, samples
        self.checkpoints = checkpoints
        self.is_last = layers.stop == len(profile.layers)

    def spread(self, op: str, threads: int) -> Spread:
        """Seconds of an operation on a device of speed 1, at every quantile; none of one that does not compute."""
        price = {
            FORWARD: self.forward,
            BACKWARD: self.backward,
            BACKWARD_INPUT: self.backward_input,
            BACKWARD_WEIGHT: self.backward_weight,
            RECOMPUTE: self.recompute,
            NORM_GRAD: self.norm,
            OPTIMIZER: self.optimizer,
        }.get(op)
        return price(threads) if price else np.zeros(len(QUANTILES))

    def forward(self, threads: int) -> Spread:
        """Seconds of one micro-batch's forward, with the loss on the last stage."""
        return self._run("forward", threads, "forward")

    def backward(self, threads: int) -> Spread:
        """Seconds of one micro-batch's whole backward."""
        return self._run("backward", threads, "backward")

    def backward_input(self, threads: int) -> Spread:
        """Seconds of the gradient of one micro-batch's input: none where nobody asks (`torch_adapter.halves`)."""
        if not self._passes_gradients:
            return np.full(len(QUANTILES), self.profile.action_s)
        if not self._trains:
            return self.backward(threads)
        return self._run("backward_input", threads, "backward", share=0.5)

    def backward_weight(self, threads: int) -> Spread:
        """Seconds of the gradient of the parameters from one micro-batch: of all where the input has none."""
        if not self._trains:
            return np.full(len(QUANTILES), self.profile.action_s)
        if not self._passes_gradients:
            return self.backward(threads)
        return self._run("backward_weight", threads, "backward", share=0.5)

    @property
    def _passes_gradients(self) -> bool:
        """Whether the stage before is given any gradient."""
        return any(value.gradient for value in self.profile.crossing(self.layers.start))

    @property
    def _trains(self) -> bool:
        """Whether any of its parameters has a gradient."""
        return any(self.profile.layers[i].gradient_bytes for i in self.layers)

    def recompute(self, threads: int) -> Spread:
        """Seconds of repeating the forward of every checkpoint, without the loss: its last layer as far as needed.

        torch's checkpoint stops at the last tensor that the backward needs, in each checkpoint for itself.
        """
        table = layer_table(self.profile, self.samples, threads)
        seconds = np.zeros(len(QUANTILES))
        for run in self.checkpoints:
            last = run[-1]
            repeated = table.forward[:, last] - table.forward[:, run.start]
            repeated = repeated + table.recompute[:, last + 1] - table.recompute[:, last]
            seconds = seconds + np.maximum(0.0, repeated - self._seams("forward", threads, len(run) - 1))
        return seconds

    def optimizer(self, threads: int) -> Spread:
        """Seconds of updating the stage's parameters, and of setting the next step's rate where there are such."""
        seconds = self._once("optimizer", threads)
        return seconds + self.profile.rate_s * (seconds > 0)

    def norm(self, threads: int) -> Spread:
        """Seconds of taking the norm of the stage's gradients."""
        return self._once("norm", threads)

    def _once(self, kind: Literal["optimizer", "norm"], threads: int) -> Spread:
        """What is done once per step: all layers together take as much less than one by one as the whole model does."""
        table = layer_table(self.profile, self.samples, threads)
        sums: Spread = getattr(table, kind)
        alone = sums[:, self.layers.stop] - sums[:, self.layers.start]
        known = [(getattr(w, f"{kind}_s"), getattr(w, f"layers_{kind}_s")) for w in self.profile.whole]
        share = next((whole / layers for whole, layers in known if layers > 0), 1.0)
        scaled: Spread = alone * share
        return scaled

    def _run(self, kind: str, threads: int, seams: str, share: float = 1.0) -> Spread:
        """A pass over all layers, and the loss on the last stage, plus the executor's own time."""
        sums: Spread = getattr(layer_table(self.profile, self.samples, threads), kind)
        stop = self.layers.stop + self.is_last
        seconds = sums[:, stop] - sums[:, self.layers.start]
        joints = len(self.layers) + self.is_last - 1
        return np.maximum(0.0, seconds - share * self._seams(seams, threads, joints)) + self.profile.action_s

    def _seams(self, kind: str, threads: int, joints: int) -> float:
        if not self.profile.whole:
            return 0.0
        near = _nearest([w.threads for w in self.profile.whole], threads)
        whole = [w for w in self.profile.whole if w.threads == near]
        nearest = min(whole, key=lambda w: abs(math.log(w.samples / self.samples)))
        all_seams = float(getattr(nearest, f"layers_{kind}_s") - getattr(nearest, f"{kind}_s"))
        return all_seams * joints / len(self.profile.layers)


def times(layer: LayerProfile, threads: int) -> LayerTimes:
    """Return the layer's times at the measured number of threads nearest to `threads`."""
    return next(t for t in layer.times if t.threads == _nearest([t.threads for t in layer.times], threads))


def _nearest(known: Sequence[int], threads: int) -> int:
    return min(known, key=lambda t: (abs(math.log(t / threads)), t), default=threads)


def at(timings: Sequence[Timing], samples: int, quantile: Quantile = "median") -> float:
    """Interpolate measured seconds to a micro-batch of `samples`."""
    return interpolate([(float(t.samples), getattr(t, f"{quantile}_s")) for t in timings], samples)
