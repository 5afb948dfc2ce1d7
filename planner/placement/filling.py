"""How much memory every run of layers would take as a stage of a plan: additive tables, an upper bound for cutting.

`planner.costs.memory` has the last word on the finished plan: it walks every stage's layers, which is exact and takes
too long for every run of layers there is. Here a stage's bytes are sums over its layers and its two cuts, and the
largest transient of any of its layers on top. All that the plan's savings change is counted: checkpoints keep what they
exchange and repeat one micro-batch's rest, shards are divided, asynchronous schedules keep versions, an optimizer on
the host takes nothing. The bound is tested: never below the model's peak, and by how much above
(`tests/planner/test_tables.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from planner.basis.memo import memoised
from planner.costs.stage_memory import stage_memory
from planner.orders import schedules, synchronisation
from planner.placement import partition
from planner.placement.flight import Flight
from planner.values.blocks import LARGE, WORTH_A_COLLECTIVE, unjoined
from planner.values.plan import Plan
from planner.values.profile import LayerProfile, LayerSizes, Profile, interpolate, value_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from planner.placement.partition import Table


class LayerBytes(NamedTuple):
    """A layer's bytes: kept per micro-batch, its output in that if a backward needs it, its output, and in passing.

    `between` are those that the first half of a backward keeps for the second, with the gradients of what it puts out.
    """

    saved: float
    output: float
    sent: float
    peak: float
    between: float


class Holding(NamedTuple):
    """What of a stage does not depend on its layers: how many devices hold it, and how many versions of its parameters.

    `flight` are its micro-batches (`Flight.of`), `messages` those on their way (`Flight.messages`), `loaded` how many
    samples each holder loads per step.
    """

    holders: int
    versions: int
    loaded: int
    flight: tuple[int, int, int]
    messages: tuple[int, int, int]


def holding(plan: Plan, stage: int, flight: Flight) -> Holding:
    """Return what a stage of a plan holds."""
    holders = len(plan.stages[stage].devices) // plan.tensor
    return Holding(holders, plan.versions(stage), plan.loaded(stage), flight.of(stage), flight.messages(stage))


def stage_bytes(profile: Profile, plan: Plan, own: Holding) -> Table:
    """Return the bytes of every run of layers as a stage with a plan's schedule, synchronisation and savings."""
    import numpy as np

    _, resident, repeated = own.flight
    schedule, agreed = schedules.get(plan.schedule), synchronisation.get(plan.synchronisation)
    holders = own.holders
    served, trains = bool(agreed.server), schedule.trains
    keeps = holders > 1 and not served and not schedule.asynchronous

    def part(kind: synchronisation.Sharded) -> int:
        return holders if kind in agreed.shards else 1

    layers, sizes = layers_bytes(profile), sizes_of(profile, plan.samples)
    checkpoints = _checkpoints(profile, plan)
    static = layers.parameters * (1 / part("parameters") + own.versions - 1) + layers.buffers
    if trains:
        # What is reduced beside computing stays while the next backward makes its own.
        times = 2 if holders > 1 and schedule.updates == "microbatch" and not served else 1
        static = static + times * layers.gradients / (part("gradients") if keeps else 1)
        if not (served or plan.host_optimizer):
            static = static + layers.optimizer / part("optimizer")
    if plan.recompute:
        kept, again = np.zeros(len(sizes.saved)), repeated * sizes.saved
    else:
        output = np.where(checkpoints.read, sizes.sent, sizes.output)
        kept = np.where(
            checkpoints.within, 0.0, np.where(checkpoints.inside, output, sizes.saved - sizes.output + output)
        )
        # A backward in halves repeats all of its stage's blocks at once, and keeps them for its second half.
        times = repeated if schedule.splits else repeated - 1
        again = np.where(checkpoints.inside, times * sizes.saved, 0.0)
    weights = static + resident * kept + again
    if schedule.splits:
        weights = weights + repeated * sizes.between
    last = len(profile.layers)
    inputs, targets = (
        interpolate([(float(row[0]), float(row[kind])) for row in profile.batch_bytes], own.loaded) for kind in (1, 2)
    )
    entering, returning, leaving = own.messages
    enters = entering * sizes.forward + leaving * sizes.backward
    leaves = resident * sizes.forward + returning * sizes.backward
    enters[0] += inputs + targets
    leaves[last] += inputs + targets + resident * (sizes.sent[-1] + _loss(profile, plan.samples).saved)
    table: Table = partition.spans(weights, enters, leaves) + _passing(profile, plan, part("optimizer"))
    if "parameters" in agreed.shards:
        # What is used, what has been gathered for the next pass, and what blocks share; checkpoints are whole together.
        used = partition.spans(layers.parameters) if plan.recomputes else _whole_blocks(profile, "parameter_bytes", 2)
        shared = float(sum(size.parameter_bytes for size in profile.tied_bytes))
        table = table + used + _whole_blocks(profile, "parameter_bytes", 1) + shared
    if "gradients" in agreed.shards:
        times = 2 if schedule.splits else 1
        table = table + times * _whole_blocks(profile, "gradient_bytes", 1)
    if agreed.server == "devices" and trains:
        table = table + float((layers.parameters + layers.optimizer).sum()) / len(plan.servers)
    return np.where(np.tri(last + 1, dtype=bool), np.inf, table)


class LayersBytes(NamedTuple):
    """Bytes of all layers that do not depend on the micro-batch."""

    parameters: Table
    buffers: Table
    gradients: Table
    optimizer: Table
    optimizer_peak: Table


class _Sizes(NamedTuple):
    """All layers' bytes at a micro-batch size (`LayerBytes`), and those that cross every cut, forward and backward."""

    saved: Table
    output: Table
    sent: Table
    peak: Table
    between: Table
    forward: Table
    backward: Table


class _Checkpoints(NamedTuple):
    """Which layers are in a checkpoint; of these, which are not its last; and which outputs a checkpoint reads."""

    inside: NDArray[np.bool_]
    within: NDArray[np.bool_]
    read: NDArray[np.bool_]


def layers_bytes(profile: Profile) -> LayersBytes:
    """Return what layers need whatever the micro-batch, as arrays, kept with the profile."""
    import numpy as np

    fields = ("parameter_bytes", "buffer_bytes", "gradient_bytes", "optimizer_bytes", "optimizer_peak_bytes")
    return memoised(
        profile,
        "layers' bytes",
        lambda: LayersBytes(*(np.array([float(getattr(one, field)) for one in profile.layers]) for field in fields)),
    )


def sizes_of(profile: Profile, samples: int) -> _Sizes:
    """Return `layer_bytes` and `crossing` as arrays, kept with the profile."""
    import numpy as np

    def make() -> _Sizes:
        columns = zip(*layer_bytes(profile, samples), strict=True)
        cuts = zip(*crossing(profile, samples), strict=True)
        return _Sizes(*(np.array(column, float) for column in (*columns, *cuts)))

    return memoised(profile, ("sizes", samples), make)


def _checkpoints(profile: Profile, plan: Plan) -> _Checkpoints:
    import numpy as np

    def make() -> _Checkpoints:
        blocks_of, count = repeated_blocks(profile, plan), len(profile.layers)
        read = {value.source for value in profile.values if any(t in blocks_of for t in value.targets)}
        inside = np.array([i in blocks_of for i in range(count)])
        within = np.array([i in blocks_of and i != blocks_of[i][-1] for i in range(count)])
        return _Checkpoints(inside, within, np.array([i in read for i in range(count)]))

    return memoised(profile, ("checkpoints", plan.recompute_layers, plan.recompute_blocks), make)


def _passing(profile: Profile, plan: Plan, shards: int) -> Table:
    """The most that any layer of every run needs in passing, repeated or not, the optimizer's state cut into shards."""
    import numpy as np

    samples = plan.samples

    def make() -> Table:
        sizes = sizes_of(profile, samples)
        peaks = sizes.peak.copy()
        if not plan.recompute:
            blocks_of = repeated_blocks(profile, plan)
            found = {block: _repeated_peak(profile, samples, block) for block in set(blocks_of.values())}
            for i, block in blocks_of.items():
                peaks[i] = max(found[block], sizes.peak[i])
        passing = np.maximum(peaks, layers_bytes(profile).optimizer_peak / shards)
        passing[-1] = max(passing[-1], _loss(profile, samples).peak + sizes.sent[-1])
        return largest(passing)

    repeated = () if plan.recompute else (plan.recompute_layers, plan.recompute_blocks)
    return memoised(profile, ("passing", samples, shards, repeated), make)


def _repeated_peak(profile: Profile, samples: int, block: range) -> float:
    """The most that a checkpoint needs in passing, its forward repeated, with what is in front of it and behind it."""
    of, cuts = stage_memory(profile, block, samples, (block,)), crossing(profile, samples)
    return max(of.forward_peak + cuts[block.start][0], of.backward_first_peak + cuts[block.stop][1])


def _whole_blocks(profile: Profile, field: str, count: int) -> Table:
    """The most that so many neighbouring blocks of shards (one or two) need to be whole, and no more than the run has.

    Where a run begins decides how single layers are joined: less than what is worth a collective stands before a
    block's last module, and as much may be left over behind the run's last block.
    """
    import numpy as np

    def make() -> Table:
        found: Table = np.minimum(_spans(profile, field), largest(_blocks_at(profile, field, count)))
        return found

    return memoised(profile, ("whole blocks", field, count), make)


def _spans(profile: Profile, field: str) -> Table:
    return partition.spans([float(getattr(layer, field)) for layer in profile.layers])


def _blocks_at(profile: Profile, field: str, count: int) -> list[float]:
    """The most that the block of every layer needs, with the next one where two count, wherever a run begins."""
    sizes = [float(getattr(layer, field)) for layer in profile.layers]
    more = max(
        (size / layer.parameter_bytes for layer, size in zip(profile.layers, sizes, strict=True) if size),
        default=1.0,
    )
    worth, large = more * WORTH_A_COLLECTIVE, more * LARGE
    parts = [(sum(sizes[i] for i in run), run, cut) for run, cut in unjoined(profile)]
    most_of = [max(size, large) if cut else size for size, _, cut in parts]
    most: list[float] = []
    for b, (_, run, _) in enumerate(parts):
        next_one = before = 0.0
        for (size, *_), whole in zip(parts[b + 1 :], most_of[b + 1 :], strict=True) if count > 1 else ():
            next_one, before = max(next_one, before + whole), before + size
            if before >= worth:
                break
        most += [most_of[b] + next_one + 2 * worth] * len(run)
    return most


def repeated_blocks(profile: Profile, plan: Plan) -> dict[int, range]:
    """Return, for every layer that a plan repeats in a checkpoint of its own or of its block, that checkpoint."""
    if not (plan.recompute_layers or plan.recompute_blocks):
        return {}
    places = {layer.name: i for i, layer in enumerate(profile.layers)}
    runs = [range(places[name], places[name] + 1) for name in plan.recompute_layers]
    runs += [range(places[first], places[last] + 1) for first, last in plan.recompute_blocks]
    return {i: run for run in runs for i in run}


def freeable_bytes(profile: Profile, plan: Plan, resident: int) -> tuple[Table, Table]:
    """Return what recomputing every layer of a run frees of its micro-batches, and what it needs for a moment."""

    def make() -> tuple[Table, Table]:
        sizes = layer_bytes(profile, plan.samples)
        return partition.spans([max(0.0, own.saved - own.sent) for own in sizes]), largest([own.saved for own in sizes])

    free, moment = memoised(profile, ("freeable", plan.samples), make)
    return resident * free, moment


def largest(values: Sequence[float] | Table) -> Table:
    """Tabulate the largest value of every run of layers.

    >>> largest([3, 1, 4])[1, 2], largest([3, 1, 4])[0, 3]
    (np.float64(1.0), np.float64(4.0))
    """
    import numpy as np

    found = np.zeros((len(values) + 1, len(values) + 1))
    runs = np.where(np.tri(len(values), k=-1, dtype=bool), -np.inf, np.asarray(values, dtype=float))
    np.maximum.accumulate(runs, axis=1, out=runs)
    found[:-1, 1:] = np.where(runs > -np.inf, runs, 0.0)
    return found


def layer_bytes(profile: Profile, samples: int) -> list[LayerBytes]:
    """Return every layer's bytes at a micro-batch size, kept with the profile."""

    def make() -> list[LayerBytes]:
        own = [_own(layer, samples) for layer in profile.layers]
        cuts = crossing(profile, samples)
        found = []
        for i, layer in enumerate(own):
            # A forward has the output in front of it besides, a backward the gradients behind it.
            before = own[i - 1].sent if i else 0.0
            behind = cuts[i + 1][1] if i + 1 < len(own) else layer.sent
            between = layer.between + (behind if profile.layers[i].sizes[-1].between_output else 0.0)
            found.append(layer._replace(peak=layer.peak + max(before, behind), between=between))
        return found

    return memoised(profile, ("bytes", samples), make)


def _own(layer: LayerProfile, samples: int) -> LayerBytes:
    def at(field: str) -> float:
        return interpolate([(float(s.samples), float(getattr(s, field))) for s in layer.sizes], samples)

    sent = at("output_bytes")
    output = sent if layer.output_saved else 0.0
    peak = max(map(at, (field for field in LayerSizes.__struct_fields__ if field.endswith("_peak_bytes"))))
    return LayerBytes(at("saved_bytes") + output, output, sent, peak, at("between_bytes"))


def _loss(profile: Profile, samples: int) -> LayerBytes:
    return memoised(profile, ("loss bytes", samples), lambda: _own(profile.loss, samples))


def crossing(profile: Profile, samples: int) -> list[tuple[float, float]]:
    """Bytes that cross every cut position per micro-batch, forward and backward; nothing crosses the two ends."""

    def make() -> list[tuple[float, float]]:
        ends = [[0.0, 0.0] for _ in range(len(profile.layers) + 1)]
        for value in profile.values:
            size = value_bytes(value, samples)
            for cut in range(max(1, value.source + 1), max(value.targets, default=0) + 1):
                ends[cut][0] += size
                ends[cut][1] += size if value.gradient else 0.0
        return [(forward, backward) for forward, backward in ends]

    return memoised(profile, ("crossing", samples), make)
