"""Time every layer at several micro-batch sizes and numbers of threads, interleaved so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from executor.devices import Backend
from executor.layers import unchanged_buffers
from executor.norm import norm_of
from executor.precision import SCALED
from executor.scaling import Scaling
from executor.user_code import explained
from planner.values.profile import LayerTimes, Timing, WholeStep
from profiles.chain import Chain, update

MAX_ROUNDS = 40
EXTRA_ROUNDS = 3
"""Rounds of the measurements that only some plans need: halves of the backward, recomputes."""
LEAST_SIZES = 3
"""Micro-batch sizes that are measured in any case, the smallest: time is not linear in the size."""
FIRST_SHARE = 0.5
"""Of the budget, for the first look at every size; the rest is for repeating it."""

Setting = tuple[int, int]
"""(threads, samples)"""


class Stopwatch:
    """Collects seconds by setting, part and kind."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.seconds: dict[tuple[Setting, int, str], list[float]] = defaultdict(list)
        self.setting: Setting = (1, 1)
        self.on = True

    @contextmanager
    def around(self, part: int, kind: str) -> Iterator[None]:
        """Time what is done inside."""
        self.backend.synchronize()
        begin = self.backend.stamp()
        yield
        end = self.backend.stamp()
        self.backend.synchronize()
        self.note(part, kind, begin, end)

    def note(self, part: int, kind: str, begin: Any, end: Any) -> None:
        """Add the seconds between two stamps."""
        if self.on:
            self.seconds[self.setting, part, kind].append(self.backend.seconds(end) - self.backend.seconds(begin))

    def timing(self, setting: Setting, part: int, kind: str) -> Timing:
        """The quantiles of what was collected; zero for what was never run."""
        return Timing.of(setting[1], self.seconds.get((setting, part, kind), []))


WHOLE = -1
"""The part that is the unsplit model, loss included."""


class LayerTimer:
    """Measures a chain. `progress` is told after every pass how much of the budget is spent, in per cent.

    `settings` are those that are to be measured, and after `run` those that were.
    """

    def __init__(
        self, chain: Chain, backend: Backend, settings: list[Setting], progress: Callable[[int, int], None]
    ) -> None:
        self.chain, self.settings, self.progress = chain, settings, progress
        self.watch = Stopwatch(backend)
        self.scaling = Scaling(backend.device) if chain.file.precision == SCALED else None
        if self.scaling is not None:
            self.scaling.scale.fill_(1.0)
        self.batches = {samples: chain.draw(samples) for _, samples in settings}
        self.cost: dict[tuple[Setting, bool], float] = {}
        """Seconds of the last pass of each setting, without and with what only some plans need."""
        self.begun = self.budget_s = 0.0

    def run(self, budget_s: float) -> None:
        """Look at every size once, the smallest first, then go round over all for `budget_s` seconds at most.

        A size whose first look would take more than its share of the budget is left out, with all larger ones; the
        smallest are measured whatever they take. What is measured is measured twice at least.
        """
        before = torch.get_num_threads()
        self.begun, self.budget_s = time.monotonic(), budget_s
        try:
            with unchanged_buffers(self.chain.layered.model):
                self._first_look()
                for setting in self.settings:  # a second time in any case: one alone has no spread
                    self._timed(setting, extra=False)
                for done in range(1, MAX_ROUNDS):
                    if not self._round(extra=done < EXTRA_ROUNDS):
                        break
        finally:
            torch.set_num_threads(before)
            for parameter in self.chain.whole.parameters():
                parameter.grad = None

    def _first_look(self) -> None:
        sizes = sorted({samples for _, samples in self.settings})
        took, kept = 0.0, list[int]()
        for samples in sizes:
            expected = took * samples / kept[-1] if kept else 0.0
            if len(kept) >= LEAST_SIZES and self.spent + expected > FIRST_SHARE * self.budget_s:
                break
            begin = time.monotonic()
            for setting in (own for own in self.settings if own[1] == samples):
                self.watch.on = False
                self._timed(setting, extra=False)
                self.watch.on = True
                self._timed(setting, extra=True)
            took = time.monotonic() - begin
            kept.append(samples)
        self.settings = [setting for setting in self.settings if setting[1] in kept]

    def _round(self, *, extra: bool) -> bool:
        """Measure every setting once more for which there is time; return whether there was for any."""
        fitting = False
        for setting in self.settings:
            if self.spent + self.cost[setting, extra] <= self.budget_s:
                self._timed(setting, extra=extra)
                fitting = True
        return fitting

    @property
    def spent(self) -> float:
        """Seconds since the measuring began."""
        return time.monotonic() - self.begun

    def _timed(self, setting: Setting, *, extra: bool) -> None:
        """Do a pass, and note what it costs."""
        begin = time.monotonic()
        self._pass(setting, extra=extra)
        self.watch.backend.synchronize()
        self.cost[setting, extra] = time.monotonic() - begin
        self.progress(min(100, int(100 * self.spent / max(self.budget_s, 1e-9))), 100)

    def _pass(self, setting: Setting, *, extra: bool = False) -> None:
        threads, samples = setting
        self.watch.setting = setting
        torch.set_num_threads(threads)
        chain, around = self.chain, self.watch.around
        inputs, targets = self.batches[samples]
        self._whole(inputs, targets)
        done = chain.forward(inputs, targets, around)
        chain.backward(done, around)
        for i, optimizer in enumerate(chain.optimizers):
            self._update(i, optimizer, chain.layers[i].module)
        if extra:
            gradients = done.gradients
            done = chain.forward(inputs, targets, _unwatched)
            done.gradients = gradients
            chain.halves(done, around)
            for i, stamps in enumerate(chain.repeats(done, self.watch.backend.stamp)):
                self.watch.backend.synchronize()
                if len(stamps) == 2:
                    self.watch.note(i, "recompute", *stamps)

    def _whole(self, inputs: tuple[torch.Tensor, ...], targets: Any) -> None:
        chain, around = self.chain, self.watch.around
        with explained(chain.file.path, "the model's forward"), around(WHOLE, "forward"):
            loss = chain.loss(chain.whole(*inputs), targets)
        with around(WHOLE, "backward"):
            loss.backward()
        self._update(WHOLE, chain.whole_optimizer, chain.whole)

    @property
    def joined(self) -> bool:
        """Whether an update needs to know of all gradients."""
        return self.scaling is not None or self.chain.file.clip > 0

    def _update(self, part: int, optimizer: torch.optim.Optimizer | None, module: nn.Module) -> None:
        """Do the end of a step for one part, all of it that a step does."""
        file, norm = self.chain.file, None
        if self.joined:
            with self.watch.around(part, "norm"):
                if self.scaling is not None:
                    self.scaling.unscale(module.parameters())
                if file.clip:
                    norm = norm_of(module.parameters())
        with self.watch.around(part, "optimizer"):
            update(optimizer, module.parameters(), norm)

    def evict(self) -> None:
        """Run the largest batch once, unwatched, to leave the caches as training does."""
        self.watch.on = False
        self._whole(*self.batches[max(samples for _, samples in self.settings)])
        self.watch.on = True

    def layer(self, part: int) -> tuple[LayerTimes, ...]:
        """The times of one part: a layer, or the loss."""
        by_threads: dict[int, list[Setting]] = defaultdict(list)
        for setting in self.settings:
            by_threads[setting[0]].append(setting)

        def timings(settings: list[Setting], kind: str) -> tuple[Timing, ...]:
            return tuple(self.watch.timing(s, part, kind) for s in settings)

        return tuple(
            LayerTimes(
                threads=threads,
                forward=timings(settings, "forward"),
                backward=timings(settings, "backward"),
                backward_input=timings(settings, "backward_input"),
                backward_weight=timings(settings, "backward_weight"),
                recompute=timings(settings, "recompute"),
                optimizer=self.watch.timing(settings[len(settings) // 2], part, "optimizer"),
                norm=self.watch.timing(settings[len(settings) // 2], part, "norm") if self.joined else None,
            )
            for threads, settings in by_threads.items()
        )

    def whole(self) -> tuple[WholeStep, ...]:
        """The unsplit model beside the sums over its layers, both as medians."""
        parts = range(len(self.chain.layers) + 1)

        def total(setting: Setting, kind: str) -> float:
            return sum(self.watch.timing(setting, part, kind).median_s for part in parts)

        return tuple(
            WholeStep(
                threads=setting[0],
                samples=setting[1],
                forward_s=self.watch.timing(setting, WHOLE, "forward").median_s,
                backward_s=self.watch.timing(setting, WHOLE, "backward").median_s,
                optimizer_s=self.watch.timing(setting, WHOLE, "optimizer").median_s,
                layers_forward_s=total(setting, "forward"),
                layers_backward_s=total(setting, "backward"),
                layers_optimizer_s=total(setting, "optimizer"),
                norm_s=self.watch.timing(setting, WHOLE, "norm").median_s,
                layers_norm_s=total(setting, "norm"),
            )
            for setting in self.settings
        )

    def noise(self) -> float:
        """Half the 10th-to-90th-percentile spread of the whole model's passes over their median; the median setting."""
        timings = [self.watch.timing(s, WHOLE, kind) for s in self.settings for kind in ("forward", "backward")]
        return statistics.median((t.high_s - t.low_s) / 2 / t.median_s for t in timings if t.median_s > 0)


@contextmanager
def _unwatched(part: int, kind: str) -> Iterator[None]:
    yield
