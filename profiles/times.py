"""Time every layer at several micro-batch sizes and numbers of threads, for as long as a budget says.

First a look at the smallest size, then at the next one, at the largest for which there is time, and between them where
times bend: where a line between two sizes misses what lies in the middle. Then round over all of them, interleaved so
that drift hits all alike, until the budget is spent. What is never run is never guessed from other layers: it is
interpolated between sizes by who reads the profile, or follows from other times as `derived` says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import torch

from planner.values.profile import LayerTimes, Timing, WholeStep, interpolate
from profiles.passes import Passes
from profiles.watch import WHOLE, Budget, Setting

MAX_ROUNDS = 40
EXTRA_ROUNDS = 3
"""Rounds of the measurements that only some plans need: halves of the backward, recomputes."""
WANTED_ROUNDS = 5
"""Rounds that one wants of every size, before more sizes are measured than curves need."""
COUNT_SHARE, COUNTING = 0.25, 3.0
"""Of the budget, for counting the bytes of one size with data; and how many passes that is about."""
FIRST_SHARE = 0.5
"""Of the budget, for the first looks at sizes; the rest is for repeating them."""
BEND = 0.05
"""A curve bends where a line misses it by more than this share; that much is noise on most machines."""
EXTRA_COST = 3.0
"""How much longer a pass takes with its extras, before that has been seen: two backwards, two forwards more."""
APART = 1.6
"""Both halves of a backward over the whole one, of a transformer's blocks (DESIGN.md); used where neither was run."""


class LayerTimer:
    """Measures what some passes run. `progress` is told after every pass how much of the budget is spent, in per cent.

    `sizes` are candidates, all of them to be measured if `every`; `measured` says how often each setting was. What is
    `left_out` is larger than all that were measured, `between` lies between them. A pass takes some `sample_s` seconds
    per sample, if that is known, and what layers keep for their backward has to fit into `room_bytes`.
    """

    def __init__(
        self,
        passes: Passes,
        threads: Sequence[int],
        sizes: Sequence[int],
        progress: Callable[[int, int], None],
        *,
        every: bool = False,
        sample_s: float = 0.0,
        room_bytes: float = math.inf,
    ) -> None:
        self.passes, self.watch, self.progress, self.sample_s = passes, passes.watch, progress, sample_s
        self.room_bytes = room_bytes
        self.threads, self.sizes, self.every = sorted(threads, reverse=True), sorted(sizes), every
        self.measured: dict[Setting, int] = {}
        self.extras: set[Setting] = set()
        self.cost: dict[tuple[Setting, bool], float] = {}
        """Seconds of the last pass of each setting, without and with extras."""
        self.looks: dict[int, float] = {}
        """Seconds of the first look at each size."""
        self.counts: dict[int, float] = {}
        """Seconds of counting the bytes of each size."""
        self.reckoned: list[int] = []
        """Sizes whose bytes were counted without data."""
        self.interrupted = False
        self.budget, self.limit_s = Budget(0.0), 0.0

    def run(self, budget: Budget, limit_s: float) -> None:
        """Measure until so many seconds of a budget are spent; one pass of the smallest size whatever it takes.

        The bytes of a second size are counted whatever it takes, too: not all that a layer holds grows with the batch
        (what autocast copies of its weights does not), so one size says nothing about others. Where counting would take
        long it is done without data, if the model can do without. A Ctrl-C behind the first
        pass ends the measuring, as the end of the budget does.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads[0])  # counting warms up, and starts them
        self.budget, self.limit_s = budget, limit_s
        try:
            self._look_around()
            self._count_on()
            self._go_round()
        except KeyboardInterrupt:
            if not self.measured:
                raise
            self.interrupted = True
        finally:
            torch.set_num_threads(before)
            for parameter in self.passes.chain.whole.parameters():
                parameter.grad = None

    @property
    def looked_at(self) -> list[int]:
        """The sizes of which there are times."""
        return sorted({samples for _, samples in self.measured})

    @property
    def left_out(self) -> tuple[int, ...]:
        """Sizes beyond those that were measured."""
        return tuple(n for n in self.sizes if n > self.looked_at[-1])

    @property
    def between(self) -> tuple[int, ...]:
        """Sizes that were left out among those that were measured."""
        return tuple(n for n in self.sizes if n < self.looked_at[-1] and n not in self.looked_at)

    @property
    def rounds(self) -> int:
        """How often everything was measured at least."""
        return min(self.measured.values())

    def step_s(self, samples: int) -> float:
        """Seconds of one micro-batch's forward and backward with one thread, or the fewest."""
        return self._seconds(min(setting for setting in self.measured if setting[1] == samples))

    # Which sizes

    def _look_around(self) -> None:
        self._look(self.sizes[0])
        second = self.sizes[1] if len(self.sizes) > 1 else 2 * self.sizes[0]
        if second not in self.counts and (second not in self.sizes or not self._affordable(second)):
            self._count(second)
        if self.every:
            for samples in self.sizes[1:]:
                if not self._affordable(samples):
                    return
                self._look(samples)
            return
        if len(self.sizes) > 1 and self._affordable(self.sizes[1]):
            self._look(self.sizes[1])
            largest = max(n for n in self.sizes if n in self.looks or self._affordable(n))
            if largest not in self.looks:
                self._look(largest)
            self._bisect(self.sizes[1], largest)
            for samples in self.between:
                if self._affordable(samples, rounds=WANTED_ROUNDS):
                    self._look(samples)

    def _bisect(self, low: int, high: int) -> None:
        """Look at the size in the middle of two, and further on both sides of it where a line misses it."""
        inside = [n for n in self.sizes if low < n < high]
        if not inside:
            return
        middle = inside[len(inside) // 2]
        if middle not in self.looks:
            if not self._affordable(middle):
                return
            self._look(middle)
        if self._misses(low, middle, high):
            self._bisect(low, middle)
            self._bisect(middle, high)

    def _misses(self, low: int, middle: int, high: int) -> bool:
        """Whether a line between two sizes misses a third one, with any number of threads."""
        for threads in self.threads:
            seconds = {n: self._seconds((threads, n)) for n in (low, middle, high) if (threads, n) in self.measured}
            if len(seconds) == 3:
                line = interpolate([(low, seconds[low]), (high, seconds[high])], middle)
                if abs(line - seconds[middle]) > BEND * seconds[middle]:
                    return True
        return False

    def _seconds(self, setting: Setting) -> float:
        """The whole step's forward and backward, as the sum of its parts."""
        return self._total(setting, "forward") + self._total(setting, "backward")

    def _affordable(self, samples: int, rounds: int = 0) -> bool:
        """Whether a look at a size would end in its share of the budget, with so many rounds over all behind it."""
        if not self._roomy(samples):
            return False
        near = max((n for n in self.looks if n < samples), default=self.sizes[0])
        expected = self.looks[near] * self._growth(near, samples)
        if not rounds:
            return self.budget.spent + expected <= FIRST_SHARE * self.limit_s
        again = sum(self._expected(setting, extra=False) for setting in [*self.measured, (self.threads[-1], samples)])
        return self._fits(expected + rounds * again)

    def _roomy(self, samples: int) -> bool:
        """Whether a size would fit into memory, by what the largest that was counted keeps."""
        last = max(n for n in self.counts if n in self.passes.sizes)
        kept = sum(size.saved_bytes + size.output_bytes for size in self.passes.sizes[last])
        return kept * samples / last <= self.room_bytes

    def _growth(self, near: int, samples: int) -> float:
        """How much longer a pass takes than at a size that was looked at: on the line through those that were."""
        threads = self.threads[0]
        costs = [
            (float(n), self.cost[(threads, n), False]) for n in sorted(self.looks) if (threads, n) in self.measured
        ]
        at = interpolate(costs, near)
        return min(samples / near, max(1.0, interpolate(costs, samples) / at)) if at > 0 else samples / near

    def _look(self, samples: int) -> None:
        begun = self.budget.spent
        if samples not in self.counts:
            self._count(samples)  # also warms up
            if samples in self.reckoned and not self.measured:
                self._reckon_on()
        for extra in (False, True):
            for threads in self.threads:
                setting = threads, samples
                least = not self.measured
                if least or (
                    (setting in self.measured or not extra) and self._fits(self._expected(setting, extra=extra))
                ):
                    self._timed(setting, extra=extra)
        self.looks[samples] = self.budget.spent - begun

    def _count(self, samples: int, *, quickly: bool = False) -> bool:
        """Count the bytes of a size, without data where it takes long with it; return whether, if only `quickly`."""
        begun, long = self.budget.spent, self._long(self._counting(samples))
        if long and self.passes.reckon(samples):
            self.reckoned.append(samples)
        elif long and quickly:
            return False
        else:
            self.passes.count(samples)
        self.counts[samples] = self.budget.spent - begun
        return True

    def _reckon_on(self) -> None:
        """Count the bytes of all sizes before a pass takes the time for it."""
        for last, samples in pairwise(self.sizes):
            if self.budget.spent + self.counts[last] > FIRST_SHARE * self.limit_s:
                return
            self._count(samples, quickly=True)

    def _counting(self, samples: int) -> float:
        """Seconds that counting the bytes of a size with data would take."""
        known = [n for n in self.counts if n not in self.reckoned]
        return self.counts[known[-1]] * samples / known[-1] if known else COUNTING * self.sample_s * samples

    def _long(self, seconds: float) -> bool:
        """Whether counting for so long would take too much of the budget."""
        return seconds > COUNT_SHARE * self.limit_s or self.budget.spent + seconds > FIRST_SHARE * self.limit_s

    def _count_on(self) -> None:
        """Count the bytes of larger sizes than there is time to look at, as far as that is quick enough.

        What a layer needs at its worst is the largest of several lines: the slope of small sizes is too low for others.
        """
        for samples in self.left_out:
            reckoning = self.counts[self.reckoned[-1]] if self.reckoned else 0.0
            if samples in self.counts:
                continue
            if not (self._roomy(samples) and self._fits(reckoning) and self._count(samples, quickly=True)):
                return

    # Round and round

    def _go_round(self) -> None:
        for done in range(1, MAX_ROUNDS):
            fitting = False
            for setting in self.measured:
                extra = done < EXTRA_ROUNDS and self._fits(self._expected(setting, extra=True))
                if self._fits(self._expected(setting, extra=extra)):
                    self._timed(setting, extra=extra)
                    fitting = True
            if not fitting:
                return

    def _fits(self, seconds: float) -> bool:
        return self.budget.spent + seconds <= self.limit_s

    def _expected(self, setting: Setting, *, extra: bool) -> float:
        """Seconds of a pass: as it took, or in proportion to the nearest that was run."""
        if (setting, extra) in self.cost:
            return self.cost[setting, extra]
        if extra:
            return EXTRA_COST * self._expected(setting, extra=False)
        threads, samples = setting
        plain = [known for known, more in self.cost if not more]
        near = min(plain, key=lambda known: (known[0] != threads, abs(known[1] - samples)))
        # Threads that wait for each other on busy cores take many times as long as one that has to wait for nobody.
        fewer = self.watch.cores(near) / threads if near[0] != threads else 1.0
        return self.cost[near, False] * samples / near[1] * fewer

    def _timed(self, setting: Setting, *, extra: bool) -> None:
        """Do a pass, and note what it costs."""
        begun = self.budget.spent
        self.passes.timed(setting, extra=extra)
        self.watch.backend.synchronize()
        self.cost[setting, extra] = self.budget.spent - begun
        self.measured[setting] = self.measured.get(setting, 0) + 1
        if extra:
            self.extras.add(setting)
        self.progress(min(100, int(100 * self.budget.spent / max(self.limit_s, 1e-9))), 100)

    # What was found

    def _total(self, setting: Setting, kind: str) -> float:
        parts = range(len(self.passes.chain.layers) + 1)
        return sum(self.watch.timing(setting, part, kind).median_s for part in parts)

    @property
    def derived(self) -> tuple[str, ...]:
        """What was not run, for want of time, in words."""
        known = {threads for threads, _ in self.measured}
        missing = [str(threads) for threads in self.threads if threads not in known]
        found = []
        if missing:
            found.append(f"times with {', '.join(missing)} threads follow from those with {min(known)}, in proportion")
        if not self.extras:
            found.append("halves of a backward and recomputes were not run: they follow from the whole passes")
        tight = [str(n) for n in self.left_out if not self._roomy(n)]
        if tight:
            found.append(f"{', '.join(tight)} samples would take more memory than there is")
        if self.reckoned:
            sizes = ", ".join(map(str, sorted(self.reckoned)))
            counted = [n for n in self.counts if n not in self.reckoned]
            peaks = f"peaks follow those of {max(counted)}" if counted else "peaks are those of tensors alone"
            found.append(f"bytes of {sizes} samples were counted without computing: {peaks}")
        return tuple(found)

    def layer(self, part: int) -> tuple[LayerTimes, ...]:
        """The times of one part: a layer, or the loss."""
        known = {threads for threads, _ in self.measured}
        found = {threads: self._times(part, threads) for threads in known}
        for threads in self.threads:
            if threads not in known:
                near = min(known, key=lambda own: abs(own - threads))
                found[threads] = _slower(found[near], threads, near / threads)
        return tuple(found[threads] for threads in self.threads)

    def _times(self, part: int, threads: int) -> LayerTimes:
        settings = sorted(setting for setting in self.measured if setting[0] == threads)
        middle = settings[len(settings) // 2]

        def timings(kind: str) -> tuple[Timing, ...]:
            return tuple(self.watch.timing(s, part, kind) for s in settings)

        def extras(kind: str, of: str, share: float) -> tuple[Timing, ...]:
            """As they were run with these threads, else in the proportion with others, else with a share of a pass."""
            own = [s for s in settings if s in self.extras]
            if own:
                return tuple(self.watch.timing(s, part, kind) for s in own)
            for other in sorted(self.extras):
                whole = self.watch.timing(other, part, of).median_s
                share = self.watch.timing(other, part, kind).median_s / whole if whole > 0 else 0.0
                break
            return tuple(timing.scaled(share) for timing in timings(of))

        return LayerTimes(
            threads=threads,
            forward=timings("forward"),
            backward=timings("backward"),
            backward_input=extras("backward_input", "backward", APART / 2),
            backward_weight=extras("backward_weight", "backward", APART / 2),
            recompute=extras("recompute", "forward", 1.0),
            optimizer=self.watch.timing(middle, part, "optimizer"),
            norm=self.watch.timing(middle, part, "norm") if self.passes.chain.joined else None,
        )

    def whole(self, standing: Sequence[int]) -> tuple[WholeStep, ...]:
        """The unsplit model beside the sums over its layers, both as medians; nothing where it was never run whole.

        Of a model with one layer of each kind both are said of all layers that these are `standing` for: what differs
        is what seams between layers cost, and there are as many more of them.
        """
        parts, kinds = (*standing, len(self.passes.chain.layers)), len(self.passes.chain.layers)
        found = []
        for setting in self.measured:
            if not self.watch.seconds.get((setting, WHOLE, "forward")):
                continue
            seconds: dict[str, float] = {}
            for kind in ("forward", "backward", "optimizer", "norm"):
                whole, few = self.watch.timing(setting, WHOLE, kind).median_s, self._total(setting, kind)
                every = sum(self.watch.timing(setting, part, kind).median_s for part in parts)
                seconds[f"layers_{kind}_s"] = every
                seams = (few - whole) * len(standing) / kinds
                per_parameter = kind in ("optimizer", "norm") and few > 0
                seconds[f"{kind}_s"] = every * whole / few if per_parameter else max(0.0, every - seams)
            found.append(WholeStep(threads=setting[0], samples=setting[1], **seconds))
        return tuple(found)

    def unlike(self, groups: Sequence[Sequence[int]]) -> float:
        """How much layers of one kind differ: the largest share by which one is above the median of its group."""
        worst = 0.0
        for setting in self.measured:
            for group in groups:
                seconds = [
                    sum(self.watch.timing(setting, part, kind).median_s for kind in ("forward", "backward"))
                    for part in group
                ]
                middle = statistics.median(seconds)
                if middle > 0:
                    worst = max(worst, *(abs(own - middle) / middle for own in seconds))
        return worst

    def noise(self) -> float:
        """Half the 10th-to-90th-percentile spread of passes over their median; of the median setting.

        Of the whole model's passes, or of the sums over its layers where it was never run whole.
        """
        spreads = []
        for setting in self.measured:
            for kind in ("forward", "backward"):
                timings = [self.watch.timing(setting, WHOLE, kind)]
                if timings[0].median_s <= 0:
                    timings = [self.watch.timing(setting, i, kind) for i in range(len(self.passes.chain.layers) + 1)]
                median = sum(t.median_s for t in timings)
                if median > 0:
                    spreads.append(sum(t.high_s - t.low_s for t in timings) / 2 / median)
        return statistics.median(spreads) if spreads else 0.0


def _slower(times: LayerTimes, threads: int, factor: float) -> LayerTimes:
    """The times of fewer threads, so many times longer."""
    rows = ("forward", "backward", "backward_input", "backward_weight", "recompute")
    changed = {row: tuple(timing.scaled(factor) for timing in getattr(times, row)) for row in rows}
    return msgspec.structs.replace(
        times,
        threads=threads,
        optimizer=times.optimizer.scaled(factor),
        norm=times.norm.scaled(factor) if times.norm else None,
        **changed,
    )
