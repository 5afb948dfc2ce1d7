"""Seconds that no plan at a point of the space can beat, known before any is made."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs import tensor
from planner.costs.stage_costs import MEDIAN, LayerTable, layer_table
from planner.orders import schedules, synchronisation
from planner.orders.schedules import Schedule
from planner.placement import savings
from planner.placement.devices import choose
from planner.placement.filling import crossing, layers_bytes, sizes_of
from planner.placement.flight import ARRANGED
from planner.search import any_cut
from planner.search.best_case import copying, fastest, hosts_memory, roomiest, seams_of
from planner.search.room import Need, held, homes, need, swapped
from planner.search.space import Block, Candidate
from planner.search.weighing import Rows, Work, least_seconds
from planner.values.cluster import Cluster
from planner.values.profile import Profile

Floats = npt.NDArray[np.float64]


class Bounds:
    """Bounds for all points of a space: what many points share is made once."""

    def __init__(self, profile: Profile, cluster: Cluster) -> None:
        self.profile, self.cluster = profile, cluster
        self.seams = seams_of(profile)
        self.known: dict[tuple[object, ...], _Passes] = {}
        self.seconds: dict[tuple[object, ...], float] = {}
        self.needs: dict[tuple[object, ...], Need] = {}

    def need(self, point: Candidate) -> Need:
        """Return what plans at a point need of the roomiest device's memory (`planner.search.room`)."""
        key = "need", *self._sort(point), point.agreed, frozenset(point.savings)
        if key not in self.needs:
            profile, _ = self._seen(point)
            room = roomiest(self.cluster, point.devices)
            self.needs[key] = need(point, profile, point.batch // point.m, room)
        return self.needs[key]

    def takes(self, point: Candidate) -> float:
        """Return seconds that no plan at a point can beat that fits and saves what the point says, infinite if none.

        Computing, what is repeated, updates and copies to the host are weighed against memory
        (`planner.search.weighing`). A layer's repetition takes at least the less of its forward and of what its own
        checkpoint repeats.
        """
        if point.how.devices == "chosen":
            return 0.0
        key = "takes", *self._sort(point), point.agreed, frozenset(point.savings)
        if key not in self.seconds:
            self.seconds[key] = self._takes(point)
        return self.seconds[key]

    def _takes(self, point: Candidate) -> float:
        profile, _ = self._seen(point)
        schedule, chunks = point.arranged
        n = point.m / point.replica_count
        passes = self._passes(point, (point.m,))
        steady = point.asynchronous or not schedule.trains
        work = self._work(point, profile, updates=not steady)
        begin = n * float(passes.both[0]) / point.depth
        chosen = bool(savings.behind_cut(point.savings))
        shape = schedules.Shape(point.depth, point.m // point.replica_count, chunks)
        fills = not steady and shape.stages <= len(profile.layers) and shape.stages * shape.microbatches <= ARRANGED
        if not fills or schedules.why_not(schedule, shape) is not None:  # steps without a flush fill once
            seconds = work.seconds if chosen else work.seconds + work.again
            return max(begin, (float((seconds * work.number).sum()) - work.quicker) / point.depth)
        here, many = homes(schedule.name, shape)
        swaps = np.zeros(here.shape)
        if point.swaps and not schedule.measured and not point.repeats:
            swaps = swapped(schedule.name, shape)
        chained = schedule.placement == "straight"
        rows = Rows(here / schedule.copies, here, many, swaps, chained, self.led(profile, point))
        work = work if chosen else work._replace(seconds=work.seconds + work.again)
        return least_seconds(work, rows, chosen=chosen, begin=begin)

    def sends(self, point: Candidate) -> float:
        """Return seconds that no plan at a point can beat, whatever it saves, by what it sends between hosts.

        Each stage's computing is heeded, too: what is sent depends on where a plan is cut (`planner.search.any_cut`).
        """
        schedule, chunks = point.arranged
        if point.asynchronous or point.how.devices == "chosen" or point.depth * chunks > len(self.profile.layers):
            return 0.0
        sort = schedule.placement, schedule.splits, schedule.trains, chunks, point.depth, point.replica_count
        key = "sends", *sort, point.tensor_count, point.devices, point.mapping, point.agreed, point.m, point.batch
        if key not in self.seconds:
            homes, share = any_cut.homes_of(point, self.cluster), point.m / point.replica_count
            self.seconds[key] = any_cut.least_seconds(homes, self._passing(point), schedule, share)
        return self.seconds[key]

    def _passing(self, point: Candidate) -> any_cut.Passing:
        """What the layers take and send of each micro-batch, and of each step, at a point."""
        profile, threads = self._seen(point)
        speed, _ = fastest(self.cluster, point.devices)
        schedule, samples = point.arranged[0], point.batch // point.m
        share, agreed = point.m / point.replica_count, synchronisation.get(point.agreed)

        def computing() -> tuple[Floats, Floats]:
            table = layer_table(profile, samples, threads)
            forward, back = table.forward[MEDIAN], np.diff(table.backward[MEDIAN])
            if schedule.splits:
                halves = np.diff(table.backward_input[MEDIAN]) + np.diff(table.backward_weight[MEDIAN])
                back = np.minimum(back, halves)
            both = np.concatenate(([0.0], np.cumsum(np.diff(forward) + back)))
            return forward / speed, both / speed

        def sizes() -> tuple[Floats, Floats]:
            found = np.array(crossing(profile, samples), float).reshape(-1, 2)
            return found[:, 0], found[:, 1]

        forward, both = memoised(profile, ("computing", samples, threads, schedule.splits, speed), computing)
        there, back = memoised(profile, ("crossings", samples), sizes)
        work = np.append(both[:-2], both[-1])  # the loss is the last stage's
        of, quicker = layers_bytes(profile.counted_once()), self.seams / speed
        served = agreed.server == "devices" and schedule.trains
        reduced, gathered = any_cut.agreeing(agreed, share / schedule.copies)
        if not schedule.trains:
            reduced, gathered = 0.0, 0.0
        begin = 0.0
        if reduced and (
            agreed.gathers or not gathered
        ):  # no gradient is there before a micro-batch has been forwards everywhere
            begin = max(0.0, float(forward[-1]) - quicker)
            if "gradients" not in agreed.shards:
                least = float(work[-1]) if point.depth == 1 else float(np.diff(work).min())
                rest = (share / schedule.copies - 1) * max(0.0, least - quicker)
                begin = rest + (begin if point.depth == 1 else max(0.0, begin - rest))
        return any_cut.Passing(
            work.tolist(),
            (forward[:-1] if schedule.splits else both[:-1]).tolist(),
            *(quicker, there, back if schedule.trains else np.zeros(len(back))),
            reduced * of.gradients + gathered * of.parameters,
            served * (of.parameters + of.gradients),
            begin,
        )

    def led(self, profile: Profile, point: Candidate) -> Floats:
        """Return seconds of the forwards before each row's first: a stage has a layer at least."""
        speed, threads = fastest(self.cluster, point.devices)
        forward = layer_table(profile, point.batch // point.m, threads).forward[MEDIAN]
        first = np.arange(point.depth)
        if point.arranged[0].copies > 1:
            first = np.minimum(first, first[::-1])
        found: Floats = np.maximum(0.0, forward[first] - self.seams) / speed
        return found

    def _work(self, point: Candidate, profile: Profile, *, updates: bool) -> Work:
        """What the layers of a model take and need at a point, layers that are alike together."""
        speed, threads = fastest(self.cluster, point.devices)
        schedule, agreed = point.arranged[0], synchronisation.get(point.agreed)
        samples, n = point.batch // point.m, point.m / point.replica_count
        holders = point.replica_count * schedule.copies
        table = layer_table(profile, samples, threads)
        forward, back = (np.diff(one[MEDIAN]) for one in (table.forward, table.backward))
        if schedule.splits:
            halves = np.diff(table.backward_input[MEDIAN]) + np.diff(table.backward_weight[MEDIAN])
            back = np.minimum(back, halves)
        both = forward + back
        both[-2] += both[-1]  # the loss is the last stage's
        again = np.minimum(forward, np.diff(table.recompute[MEDIAN]))[:-1]
        repeats = np.zeros(len(again), bool)
        for run in savings.repeated(point.savings, self.profile, samples):
            repeats[run.start : run.stop] = True
        again = np.where(repeats, again, 0.0)
        update = np.zeros(len(again))
        if updates and not agreed.server:
            shards = holders if "optimizer" in agreed.shards else 1
            update = schedule.copies * self._updating(point, profile, threads, speed) / shards
        of, sizes = layers_bytes(profile.counted_once()), sizes_of(profile, samples)
        keeps = not point.repeats or savings.behind_cut(point.savings)
        saved = sizes.saved - sizes.output if keeps else np.zeros(len(again))
        swaps = point.swaps
        rate = copying(self.cluster, point.devices) if swaps else 1.0
        leading = forward[:-1]
        if (
            schedule.placement == "straight"
            and not schedule.splits
            and both[:-1].sum() - forward.sum() > 2 * update.sum() / point.depth
        ):
            # Behind a row's last backward come those of the stages before it; its own update may be meanwhile.
            leading, update = both[:-1], np.zeros(len(again))
        static = held(of, point.agreed, holders, on_host=savings.states_on_host(point.savings))
        room = roomiest(self.cluster, point.devices)
        seconds, repeating = n * both[:-1] / speed + update, n * again / speed
        kept = np.zeros(len(again)) if swaps else saved / room
        copied = saved / rate if swaps else np.zeros(len(again))
        # What all replicas, and all that split tensors, bring through their hosts' memories.
        crowd = point.replica_count * point.tensor_count / hosts_memory(self.cluster, point.devices)
        through = 2 * saved * crowd if swaps else np.zeros(len(again))
        hosted = np.zeros(len(again))
        if updates and not agreed.server and savings.states_on_host(point.savings):
            each = 3 * of.parameters + 2 * of.gradients + 2 * of.optimizer
            hosted = crowd * schedule.copies * each / (holders if "optimizer" in agreed.shards else 1)
        columns = np.array([seconds, repeating, leading / speed, static / room, kept, copied, through, hosted])
        unique, count = np.unique(columns, axis=1, return_counts=True)
        return Work(count.astype(float), *unique, quicker=n * self.seams / speed)  # type: ignore[misc]

    def _updating(self, point: Candidate, profile: Profile, threads: int, speed: float) -> Floats:
        """Seconds of updating each layer, on its device or where its host's memory is the quickest."""
        if not savings.states_on_host(point.savings):
            table = layer_table(profile, 1, threads)
            whole = [w for w in profile.whole if w.layers_optimizer_s > 0]
            scale = whole[0].optimizer_s / whole[0].layers_optimizer_s if whole else 1.0
            found: Floats = scale * np.diff(table.optimizer[MEDIAN])[: len(profile.layers)] / speed
            return found
        of = layers_bytes(profile.counted_once())
        moved = 2 * of.parameters + of.gradients + 2 * of.optimizer
        copied = (of.gradients + of.parameters) / copying(self.cluster, point.devices)
        return moved / max(host.memory_bytes_per_s for host in self.cluster.hosts) + copied

    def _sort(self, point: Candidate) -> tuple[object, ...]:
        """What decides about a point's work and needs."""
        return point.strategy, point.k, point.m, point.replicas, point.chunks, point.tensor, point.batch

    def _seen(self, point: Candidate) -> tuple[Profile, int]:
        """The model as a point's devices see it, and their threads."""
        tensor_count = point.tensor_count
        profile = _split(self.profile, self.cluster, point.devices, tensor_count) if tensor_count > 1 else self.profile
        return profile, fastest(self.cluster, point.devices)[1]

    def of(self, block: Block) -> Floats:
        """Return seconds that no plan of a block can beat, one for each of its M, whatever it saves.

        All devices together must compute every layer for every micro-batch; where steps do not overlap, one micro-batch
        must pass through all layers one after the other (of split backwards only the gradients of inputs), and a
        pipeline is filled and drained. Devices that split tensors count as one, with its collectives. The fastest
        device's speed counts for all.
        """
        point, ms = block.point, np.array(block.ms)
        schedule, _ = point.arranged
        passes = self._passes(point, block.ms)
        both, n = passes.both, ms / point.replica_count
        shared = ms * both * point.tensor_count / point.devices
        if point.asynchronous:
            return shared  # micro-batches of several steps are on their way at once
        if point.how.devices == "chosen" or point.depth < 2:
            return np.maximum(shared, both)
        filled = n * both / point.depth + passes.leading(point.depth, schedule)
        bounds = np.maximum(shared, np.maximum(passes.through, filled))
        if schedule.placement != "straight":
            return bounds
        return np.maximum(bounds, _filled(passes.forward if schedule.splits else both, both, point.depth, n))

    def lack(self, block: Block, agreed: str, *, on_host: bool) -> float:
        """Return the least share of its memory that the fullest device of a plan is filled with, whatever M is.

        Parameters, gradients and the optimizer's state, which may be `on_host`, of the whole model are there at the end
        of the last backward, spread over a pipeline and over those that split tensors or shard the states.
        """
        point = block.point
        shards = synchronisation.get(point._replace(synchronisation=agreed).agreed).shards
        held = self._held(point)
        parts = {"parameters": held[0], "gradients": held[1], "optimizer": 0.0 if on_host else held[2]}
        kept = sum(size / (point.replica_count if part in shards else 1) for part, size in parts.items())
        return kept / point.depth / roomiest(self.cluster, point.devices)

    def _held(self, point: Candidate) -> tuple[float, float, float]:
        """Bytes of parameters, gradients and optimizer state of the model that a device sees; gradients at least."""
        tensor_count = point.tensor_count
        profile = _split(self.profile, self.cluster, point.devices, tensor_count) if tensor_count > 1 else self.profile

        def make() -> tuple[float, float, float]:
            layers = profile.counted_once().layers
            fields = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
            one, two, three = (float(sum(getattr(layer, field) for layer in layers)) for field in fields)
            return one, two, three

        return memoised(profile, "held", make)

    def _passes(self, point: Candidate, ms: tuple[int, ...]) -> _Passes:
        """Seconds of passes over the whole model, for each number of micro-batches."""
        speed, threads = fastest(self.cluster, point.devices)
        (schedule, _), tensor_count = point.arranged, point.tensor_count
        key = tensor_count, point.devices if tensor_count > 1 else 0, speed, threads, schedule.splits, point.batch, ms
        if key not in self.known:
            profile = (
                _split(self.profile, self.cluster, point.devices, tensor_count) if tensor_count > 1 else self.profile
            )
            tables = [layer_table(profile, point.batch // m, threads) for m in ms]
            self.known[key] = _Passes.of(tables, schedule.splits, self.seams, speed)
        return self.known[key]


class _Passes(NamedTuple):
    """Least seconds of passes over all layers: a forward, both ways as far as they follow each other, all computing.

    Of each number of micro-batches; `before` those of what leads to each layer and back from it.
    """

    forward: Floats
    through: Floats
    both: Floats
    before: Floats
    means: dict[tuple[int, bool], Floats]

    @classmethod
    def of(cls, tables: list[LayerTable], splits: bool, seams: float, speed: float) -> _Passes:
        forward = np.array([table.forward[MEDIAN] for table in tables])
        back = np.array([table.backward[MEDIAN] for table in tables])
        chain = back
        if splits:
            first = np.array([table.backward_input[MEDIAN] for table in tables])
            second = np.array([table.backward_weight[MEDIAN] for table in tables])
            whole, chain = np.diff(back), np.diff(first)
            back = _sums(np.minimum(whole, chain + np.diff(second)))
            chain = _sums(np.minimum(whole, chain))
        before = forward if splits else forward + back

        def quick(seconds: Floats) -> Floats:
            return np.maximum(0.0, seconds - seams) / speed

        return cls(
            quick(forward[:, -1]), quick((forward + chain)[:, -1]), quick((forward + back)[:, -1]), quick(before), {}
        )

    def leading(self, depth: int, schedule: Schedule) -> Floats:
        """Mean over a pipeline's devices of what leads to the first compute of each and back from its last.

        A stage has a layer at least, so as many layers as devices come before a device's first stage; where two copies
        run against each other, before the nearer of its two. All devices being done by the same time, and together
        having all the work, the step takes at least the mean of both.
        """
        key = depth, schedule.copies > 1
        if key not in self.means:
            first = np.arange(depth)
            nearest = np.minimum(first, depth - 1 - first) if schedule.copies > 1 else first
            self.means[key] = self.before[:, nearest].mean(axis=1)
        return self.means[key]


def _sums(seconds: Floats) -> Floats:
    return np.concatenate([np.zeros((len(seconds), 1)), np.cumsum(seconds, axis=1)], axis=1)


def bound(point: Candidate, profile: Profile, cluster: Cluster) -> float:
    """Return seconds that no plan at this point can beat, whatever it saves."""
    block = Block(point._replace(synchronisation="", savings=(), m=0), (point.m,), (), ())
    return float(Bounds(profile, point.offered(cluster)).of(block)[0])


def _split(profile: Profile, cluster: Cluster, count: int, tensor_count: int) -> Profile:
    """The profile that devices see which split tensors; unsplit where that is not possible, which its plan will say."""

    def make() -> Profile:
        names = tuple(device.name for device in choose(cluster, count))
        try:
            return tensor.split(profile, (names[:tensor_count],), cluster.only(names))
        except PlanError:
            return profile

    return memoised(profile, ("split for bounds", cluster.identity, count, tensor_count), make)


def _filled(passing: Floats, both: Floats, depth: int, share: Floats) -> Floats:
    """Return a bound on a pipeline's step from what fills and drains its last stage.

    If a micro-batch costs the last stage d seconds, it is busy for `share x d`, and what comes before its first and
    behind its last micro-batch passes all other stages: at least `passing - d` (of split backwards only the forward, as
    the rest may be done meanwhile). The other stages share `both - d`, so the slowest of them is busy for at least
    `share x (both - d) / (depth - 1)`. The least of the larger of the two is where they are equal.
    """
    equal = (share * both / (depth - 1) - passing) / ((share - 1) + share / (depth - 1))
    found = np.maximum(passing, passing + (share - 1) * np.maximum(0.0, equal))
    return np.where(equal <= both, found, share * both / depth)
