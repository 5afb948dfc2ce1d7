"""What any plan at a point must compute on one row and send between hosts, wherever it is cut: known before it is.

Which devices hold which stage is known, where the model is cut is not. But a plan that takes `T` seconds has no row
that computes longer, so each of its cuts lies within a window: the layers before it are not too many for the stages
before it, nor those behind it for the stages behind. Within the windows every cut sends at least the least value, and
every layer's gradients pass between as many hosts as the fewest that hold a stage which it can be in. If a host's or a
device's links take longer than `T` for that, no plan takes `T`. The longer `T`, the wider the windows and the less is
sent; so the bound is where both meet.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.memo import memoised
from planner.orders.schedules import Schedule
from planner.orders.synchronisation import Synchronisation
from planner.placement.devices import choose
from planner.search.best_case import from_devices, outward
from planner.search.space import Candidate
from planner.values.cluster import Cluster

Floats = npt.NDArray[np.float64]

HALVINGS = 6
"""Times that the range in which the bound lies is halved."""


class Homes(NamedTuple):
    """Where a pipeline's stages are: what follows from the devices of a point, its schedule and mapping.

    Of every edge and host, how many devices there send to another host (`leaving`), or take from one (`entering`);
    of every stage between how many hosts its gradients pass, over all that split its tensors (`spans`), how many
    other hosts' parts of the parameters its workers fetch from servers (`served`, in copies of them); and how many
    rows the stages up to each have (`before`), and those from each on (`behind`). Behind the `hosts` stand the rows of
    one replica, whose devices' own links carry what they send. `able` are the bytes/s that leave each, infinite where
    that is not known.
    """

    leaving: Floats
    entering: Floats
    spans: Floats
    served: Floats
    before: list[int]
    behind: list[int]
    able: Floats
    hosts: int


class Passing(NamedTuple):
    """What the layers of a model take and send at a point: of every cut, or of every layer.

    `work` are the seconds of all layers before each cut, for one micro-batch, and `leading` those that pass before
    the first compute of a stage that begins there and behind its last one; each row is as much as `quicker` seconds
    quicker than its layers. `forward` and `backward` are the bytes of one micro-batch that pass each cut. A layer's
    replicas agree on `agreed` bytes, each of which leaves all hosts but one; none before `begin`. Servers send and get
    `served` bytes.
    """

    work: Sequence[float]
    leading: Sequence[float]
    quicker: float
    forward: Floats
    backward: Floats
    agreed: Floats
    served: Floats
    begin: float


def homes_of(point: Candidate, cluster: Cluster) -> Homes:
    """Return where a point's stages are."""
    schedule, chunks = point.arranged
    key = schedule.name, chunks, point.devices, point.tensor_count, point.replica_count, point.depth, point.mapping
    return memoised(cluster, ("homes", *key), lambda: _homes(point, cluster, schedule, chunks))


def _homes(point: Candidate, cluster: Cluster, schedule: Schedule, chunks: int) -> Homes:
    devices = choose(cluster, point.devices)
    hosts = list(dict.fromkeys(device.host for device in devices))
    places = {host: number for number, host in enumerate(hosts)}
    depth, replicas, stages = point.depth, point.replica_count, point.depth * chunks
    rows = [schedule.homes(stage, depth) for stage in range(stages)]
    numbers = np.arange(len(devices)).reshape(-1, point.tensor_count)
    if point.mapping == "stages":
        dealt = numbers.reshape(depth, replicas, -1)
    else:
        dealt = numbers.reshape(replicas, depth, -1).swapaxes(0, 1)
    at = np.array([places[device.host] for device in devices])[dealt]
    sizes = np.bincount(at.ravel(), minlength=len(hosts)) / len(devices)

    def spanned(stage: int) -> float:
        held = at[list(rows[stage])].reshape(-1, point.tensor_count)
        return float(sum(len(np.unique(held[:, rank])) - 1 for rank in range(point.tensor_count)))

    spans = np.array([spanned(stage) for stage in range(stages)])
    served = np.array([float((1 - sizes[at[list(rows[stage])][..., 0]]).sum()) for stage in range(stages)])
    leaving, entering = (np.zeros((stages - 1, len(hosts) + depth)) for _ in range(2))
    if len({(device.speed, device.threads, device.memory_bytes) for device in devices}) == 1:
        for edge, row in itertools.product(range(stages - 1), range(schedule.copies)):
            one, other = rows[edge][row], rows[edge + 1][row]
            apart = at[one] != at[other]
            leaving[edge, : len(hosts)] += np.bincount(at[one][apart], minlength=len(hosts))
            entering[edge, : len(hosts)] += np.bincount(at[other][apart], minlength=len(hosts))
            leaving[edge, len(hosts) + one] += one != other
            entering[edge, len(hosts) + other] += one != other
    else:  # the order of unequal devices is not known
        spans[:], served[:] = spans.min(), served.min()
    between, each = outward(cluster), from_devices(cluster)
    able = [between[host] for host in hosts]
    able += [max(each.get(devices[number].name, 0.0) for number in place.flat) for place in dealt]
    return Homes(
        *(leaving, entering, spans, served),
        [len({row for own in rows[: s + 1] for row in own}) for s in range(stages)],
        [len({row for own in rows[s:] for row in own}) for s in range(stages)],
        np.array([rate if rate > 0 else np.inf for rate in able]),
        len(hosts),
    )


def least_seconds(homes: Homes, passing: Passing, schedule: Schedule, share: float) -> float:
    """Return seconds that no plan can beat with `share` micro-batches per replica."""
    low = share * max(0.0, passing.work[-1] / homes.before[-1] - passing.quicker)
    high = _carrying(homes, passing, schedule, share, low)
    for _ in range(HALVINGS):
        if high <= low:
            return low
        middle = (low + min(high, 2 * low)) / 2 if low > 0 else high / 2
        needed = _carrying(homes, passing, schedule, share, middle)
        low, high = max(low, min(middle, needed)), min(high, max(middle, needed))
    if low < high < float("inf"):  # who takes less than `high` carries at least what those do who take as long
        low = max(low, min(high, _carrying(homes, passing, schedule, share, high)))
    return low


def _carrying(homes: Homes, passing: Passing, schedule: Schedule, share: float, limit: float) -> float:
    """Return seconds for which hosts' links are busy in any plan of at most `limit` seconds; infinite if none."""
    found = _windows(homes, passing, schedule, share, limit)
    if found is None:
        return float("inf")
    first, last = found
    each = share / schedule.copies
    stages = len(homes.spans)
    forward = each * np.array([passing.forward[first[s] : last[s] + 1].min() for s in range(1, stages)])
    backward = each * np.array([passing.backward[first[s] : last[s] + 1].min() for s in range(1, stages)])
    sent = forward @ homes.leaving + backward @ homes.entering
    received = forward @ homes.entering + backward @ homes.leaving
    agreed = _least(homes.spans, passing.agreed, first, last) + _least(homes.served, passing.served, first, last)
    every = float(homes.able[: homes.hosts].sum())
    busiest = float((np.maximum(sent, received) / homes.able).max(initial=0.0))
    return max(
        busiest,
        (float(sent[: homes.hosts].sum()) + agreed) / every,
        passing.begin + agreed / every if agreed > 0 else 0.0,
    )


def _least(weights: Floats, sizes: Floats, first: list[int], last: list[int]) -> float:
    """Return what all layers weigh at least, each in the cheapest of the stages that it can be in."""
    if not sizes.any():
        return 0.0
    if weights.min() == weights.max():
        return float(weights[0] * sizes.sum())
    layers = np.arange(len(sizes))
    can = (layers >= np.array(first[:-1])[:, None]) & (layers < np.array(last[1:])[:, None])
    return float((np.where(can, weights[:, None], np.inf).min(axis=0) * sizes).sum())


def _windows(
    homes: Homes, passing: Passing, schedule: Schedule, share: float, limit: float
) -> tuple[list[int], list[int]] | None:
    """Return between which layers each stage can begin, and the end of the last, if no row takes longer than `limit`.

    A stage alone takes at most that; and all stages up to one at most that times their rows. A straight pipeline's
    row also waits for what leads to its stage. None where there is no such cut.
    """
    stages, layers, work = len(homes.spans), len(passing.work) - 1, passing.work
    alone, slack = share / schedule.copies, 1e-9 * limit
    chained = schedule.placement == "straight" and schedule.copies == 1
    waits = passing.leading if chained else [0.0] * (layers + 1)
    room = limit + slack + (alone + 1) * passing.quicker
    begun = [alone * one - wait for one, wait in zip(work, waits, strict=True)]
    done = [alone * one for one in work]
    last = [0]
    for s in range(stages):
        stop = bisect_right(done, room + begun[last[-1]]) - 1
        most = bisect_right(work, homes.before[s] * (limit + slack + share * passing.quicker) / share) - 1
        last.append(min(stop, most, layers - (stages - 1 - s)))
        if last[-1] <= s:
            return None
    first = [layers]
    for s in reversed(range(stages)):
        start = bisect_left(begun, done[first[-1]] - room)
        most = bisect_left(work, work[-1] - homes.behind[s] * (limit + slack + share * passing.quicker) / share)
        first.append(max(start, most, s))
        if first[-1] >= first[-2]:
            return None
    first.reverse()
    if last[-1] < layers or first[0] > 0 or any(a > b for a, b in zip(first, last, strict=True)):
        return None
    return first, last


def agreeing(agreed: Synchronisation, share: float) -> tuple[float, float]:
    """Return how often a stage's holders send gradients, and parameters, per step, if each is on another host.

    `share` are the micro-batches that each of them has: of a stage that is held twice, half of its replica's.
    """
    if agreed.server:
        return 0.0, 0.0
    if "parameters" in agreed.shards:
        return share, 2 * share
    reduced = share if "gradients" in agreed.shards else 1.0
    return (reduced, 1.0) if agreed.gathers else (2 * reduced, 0.0)
