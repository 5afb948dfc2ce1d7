"""What the links alone make a step take: a lower bound that knows of sharing, beside the walk that does not.

A host's memory is such a link, too: copies pass it, and updates on the host.
Everything that passes a link in a step passes it one after the other, or shares it, which takes as long. No transfer
begins before the walk says so (its head), and after the last of them the step goes on for at least the shortest of
their tails. So the step takes, for every link and every moment, at least that moment, and what the link still has to
carry of what comes later, and the shortest tail of that: the preemptive one-machine bound (Carlier, European Journal of
Operational Research 1982).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.basis.memo import memoised
from planner.costs.flows import latency
from planner.costs.placed import Placed
from planner.costs.priced import Prices
from planner.costs.prices import TransferKind
from planner.orders import codes
from planner.orders.codes import OP, STAGE, STAGES
from planner.orders.operations import FETCH, OPS, OPTIMIZER, PUSH, named
from planner.programs.waits import Linked, Numbers
from planner.simulate.longest_path import taken, timed
from planner.simulate.network import carried
from planner.values.cluster import Cluster

Floats = npt.NDArray[np.float64]

LOOKED_AT = 6
"""So many links, those with most to carry, are looked at closely."""
Everybody = list[list[TransferKind]]
"""For each kind of transfer its own price, and those of the same transfers of other replicas."""
SERVED, COPIED = named(group="server"), named(group="host")
WIDE = 32
"""Of collectives with more flows than that only a few are counted, where every device has links of its own."""

_ROUNDING = 1e-9
"""What a transfer keeps its engine for beyond its seconds, relative to them, is none: the same buckets, added up."""


class Passing(NamedTuple):
    """What passes shared links: transfers that somebody waits for (`numbers`), then updates on hosts.

    `plane` tells of which operation each is, `kind` the transfers' kinds. Each begins no earlier than its `head`, and
    behind it the step goes on for `behind` at least. `total` are the seconds for which all of them keep each link,
    `by_kind` those of one transfer of a kind, `updating` those of each update. `following` is what goes on behind each
    action; it is written where asked for, or where there are updates.
    """

    numbers: npt.NDArray[np.int64]
    plane: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int32]
    head: Floats
    behind: Floats
    total: dict[int, float]
    by_kind: dict[int, dict[int, float]]
    updating: dict[int, Floats]
    following: Floats

    def busy(self, link: int) -> Floats:
        """Return the seconds for which each keeps a link."""
        of = np.zeros(int(self.kind.max(initial=-1)) + 1)
        for kind, seconds in self.by_kind.get(link, {}).items():
            if kind < len(of):
                of[kind] = seconds
        updates = len(self.head) - len(self.numbers)
        return np.append(of[self.kind], self.updating.get(link, np.zeros(updates)))


def heaviest(total: Mapping[int, float]) -> list[int]:
    """Return the links with most to carry, of those that carry anything."""
    return [link for _, link in sorted((busy, link) for link, busy in total.items() if busy > 0)[-LOOKED_AT:]]


def link_bound(
    placed: Placed,
    linked: Linked,
    prices: Prices,
    everybody: Everybody,
    begun: Floats,
) -> float:
    """Return seconds that a step takes at least because of what its links carry, 0 where nothing is shared.

    `begun` is when the walk begins each transfer. Where `linked` is one replica for all, the others' transfers
    (`everybody`) begin when its own do.
    """
    found = passing(placed, linked, prices, everybody, begun)
    bound = 0.0
    for link in heaviest(found.total):
        busy = found.busy(link)
        mine = np.flatnonzero(busy > 0)
        plane, head, busy, behind = found.plane[mine], found.head[mine], busy[mine], found.behind[mine]
        planes, heads, rests = by_plane(plane, head, behind)
        together: Floats = np.bincount(plane, busy)[planes].astype(np.float64)
        bound = max(bound, one_machine(head, busy, behind), one_machine(heads, together, rests))
    return bound


def by_plane(
    plane: npt.NDArray[np.int64], head: Floats, behind: Floats
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Put everything of an operation together: return the operations, their first heads and what is behind the last.

    That may be more than all from a moment on: what is short behind another operation is left out.
    """
    starts = np.flatnonzero(np.append(True, plane[1:] != plane[:-1]))
    return plane[starts], np.minimum.reduceat(head, starts), np.minimum.reduceat(behind, starts)


def one_machine(head: Floats, busy: Floats, behind: Floats) -> float:
    """Return how long a link takes at least for what begins after its head, keeps it busy, and has a step behind it."""
    order = np.argsort(head)
    rest = np.cumsum(busy[order][::-1])[::-1]
    least = np.minimum.accumulate(behind[order][::-1])[::-1]
    return float((head[order] + rest + least).max(initial=0.0))


def passing(
    placed: Placed,
    linked: Linked,
    prices: Prices,
    everybody: Everybody,
    begun: Floats,
    *,
    everywhere: bool = False,
) -> Passing:
    """Return what passes the links; with `everywhere`, what goes on behind every action."""
    kinds, transfer_kind = prices.kinds, prices.transfer_kind
    waiting = _waiting(linked)
    used = np.flatnonzero((linked.parties > 0) & (waiting > 0))  # what nobody waits for may outlast the step
    kind = transfer_kind[used]
    counts = np.bincount(kind, minlength=len(kinds))
    on_link, on_host = _busy(placed.cluster, everybody), updates(placed, linked, prices)
    total = _total(on_link, counts, on_host)
    none = np.zeros(0)
    if not any(total.values()):
        return Passing(used[:0], used[:0], kind[:0], none, none, {}, {}, {}, none)
    tails = np.full(linked.transfers, -1.0)
    following = np.zeros(len(linked.flat) if everywhere or on_host.places.size else 0)
    _tails(
        len(linked.flat),
        _Rows(linked.flat, linked.offsets, linked.posts, linked.waits, linked.needs),
        _Seconds(len(OPS), prices.shift, prices.by_number),
        _Behind(taken(prices), transfer_kind, waiting, tails, following),
    )
    early = np.array([k.early for k in kinds])
    hidden = np.array([k.busy > k.seconds * (1 + _ROUNDING) for k in kinds])
    plane = np.searchsorted([base for _, base in linked.planes], used, side="right")
    return Passing(
        numbers=used,
        plane=np.append(plane, np.zeros(len(on_host.places), np.int64)),
        kind=kind,
        head=np.concatenate((begun[used] - early[kind], on_host.begun)),
        behind=np.concatenate((np.where(hidden[kind], 0.0, tails[used]), following[on_host.places])),
        total=total,
        by_kind=on_link,
        updating=on_host.busy,
        following=following,
    )


def busiest(placed: Placed, linked: Linked, prices: Prices) -> float:
    """Return seconds for which a program keeps its busiest link at work, or its servers: no steady state is quicker.

    Servers apply what each worker has pushed, one after the other.
    """
    counts = np.bincount(prices.transfer_kind[linked.parties > 0], minlength=len(prices.kinds))
    on_link = _busy(placed.cluster, everybody(placed, prices, linked.devices))
    total = _total(on_link, counts, updates(placed, linked, prices))
    pushes = np.bincount(codes.stages(linked.flat[codes.has(linked.flat, PUSH)]), minlength=linked.stages)
    alike = len(placed.plan.groups) / linked.devices
    applying = sum(alike * pushes[stage] * seconds for stage, seconds in prices.applying.items())
    return max(float(applying), *total.values(), 0.0)


class Updates(NamedTuple):
    """Updates on hosts: their places in a program, when the walk begins them, how long each keeps each link busy."""

    places: npt.NDArray[np.int64]
    begun: Floats
    busy: dict[int, Floats]


def updates(placed: Placed, linked: Linked, prices: Prices) -> Updates:
    """Return a program's updates on hosts, each with those of other replicas at the same place: none on devices."""
    if not placed.plan.host_optimizer:
        return Updates(np.zeros(0, np.int64), np.zeros(0), {})
    places = np.flatnonzero(codes.has(linked.flat, OPTIMIZER))
    ready, _, seconds, _ = timed(linked, prices)
    busy: dict[int, Floats] = defaultdict(lambda: np.zeros(len(places)))
    bandwidth = placed.cluster.bandwidths
    stages, rows = codes.stages(linked.flat[places]).tolist(), linked.row[places].tolist()
    for at, (place, stage, row) in enumerate(zip(places.tolist(), stages, rows, strict=True)):
        for shift in range(0, len(placed.plan.groups), linked.devices):
            flows = prices.listing.updating(stage, row + shift)
            for link, size in carried(flows, seconds[place], bandwidth).items():
                busy[link][at] += size / bandwidth[link]
    return Updates(places, ready[places], dict(busy))


def _total(on_link: dict[int, dict[int, float]], counts: npt.NDArray[np.int64], on_host: Updates) -> dict[int, float]:
    """Seconds for which all transfers, so many of each kind, and updates keep each link busy."""
    total = {link: float(busy.sum()) for link, busy in on_host.busy.items()}
    many = counts.tolist()
    for link, users in on_link.items():
        total[link] = total.get(link, 0.0) + sum(many[kind] * busy for kind, busy in users.items())
    return total


def crowded(placed: Placed, prices: Prices, everybody: Everybody) -> Prices:
    """Return prices in which replicas that do the same at the same moments share the links that they have in common.

    Replicas whose paths have the same links of several devices, all of them, and links of their own that are as quick,
    cannot be told apart: nothing is quicker for one than for the others. So where one begins a message, all do, and
    each gets its part of the link. Replicas that only their own links tell apart do not begin together.
    """
    bandwidth = placed.cluster.bandwidths
    common = _common(placed.cluster) | set(placed.cluster.memories.values())
    look = partial(_pattern, cluster=placed.cluster, common=common)
    patterns = zip(*(map(look, alike) for alike in everybody if len(alike) > 1), strict=True)
    found = list(patterns)
    same = [replica for replica, pattern in enumerate(found) if pattern == found[0]]
    if len(same) < 2:
        return prices
    kinds = list(prices.kinds)
    for number, alike in enumerate(everybody):
        if len(alike) < 2 or alike[0].op in SERVED:
            continue
        own = alike[0]
        total: dict[int, float] = defaultdict(float)
        for replica in same:
            for link, size in carried(alike[replica].flows, own.seconds, bandwidth).items():
                total[link] += size / bandwidth[link]
        sending = max((total[link] for link in total if link in common), default=0.0)
        longer = latency(placed.cluster, own.flows, own.seconds) + sending - own.seconds
        if longer > 0:
            busy = own.busy + longer if own.busy else 0.0
            kinds[number] = own._replace(seconds=own.seconds + longer, busy=busy)
    return prices._replace(kinds=tuple(kinds))


def _pattern(kind: TransferKind, cluster: Cluster, common: frozenset[int]) -> tuple[object, ...]:
    """What a transfer's paths are to others: common links by their numbers, the device's own by how quick they are."""
    looks = _looks(cluster)
    return tuple(tuple(n if n in common else looks[n] for n in flow.path) for flow in kind.flows)


def _looks(cluster: Cluster) -> list[object]:
    """How quick each directed link, port and memory is, by its number."""

    def make() -> list[object]:
        links = 2 * len(cluster.links)
        return [cluster.figures((number,)) for number in range(links)] + list(cluster.bandwidths[links:])

    return memoised(cluster, "looks of links", make)


def everybody(placed: Placed, prices: Prices, rows: int) -> Everybody:
    """Return for each kind of transfer those of all replicas, where others may meet them and one is walked for all."""
    common = _common(placed.cluster)
    shifts = range(rows, len(placed.plan.groups), rows)
    found: Everybody = []
    for kind in prices.kinds:
        alike = [kind]
        if kind.source >= 0 and kind.op not in COPIED and (common or kind.op in SERVED):
            alike += [prices.listing.again(kind, kind.source + shift, kind.target + shift) for shift in shifts]
        elif kind.op in COPIED:
            copy = partial(prices.listing.copying, size=kind.bytes, back=kind.op == FETCH)
            alike += [kind._replace(flows=copy(kind.source + shift)) for shift in shifts]
        found.append(alike)
    return found


def _busy(cluster: Cluster, everybody: Everybody) -> dict[int, dict[int, float]]:
    """Seconds for which each kind of transfer keeps each shared link busy, together with those of other replicas."""
    bandwidth, common = cluster.bandwidths, _common(cluster)
    found: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for number, alike in enumerate(everybody):
        for one in alike:
            flows = one.flows if common or len(one.flows) <= WIDE else one.flows[:1]
            for link, size in carried(flows, one.busy or one.seconds, bandwidth).items():
                found[link][number] += size / bandwidth[link]
    return found


def _common(cluster: Cluster) -> frozenset[int]:
    """Directed links that are no device's own: several may use them."""

    def make() -> frozenset[int]:
        own = {device.name for device in cluster.devices}
        found = (i for i, link in enumerate(cluster.links) if link.shared and own.isdisjoint(link.between))
        return frozenset(number for i in found for number in (2 * i, 2 * i + 1))

    return memoised(cluster, "common links", make)


def _waiting(linked: Linked) -> npt.NDArray[np.int64]:
    """How many actions wait for each transfer."""
    found = np.zeros(linked.transfers, np.int64)
    for waits in (linked.waits, linked.needs):
        found += np.bincount(waits[waits >= 0], minlength=linked.transfers)
    return found


class _Rows(NamedTuple):
    """A program's actions and what of transfers each posts, waits for and needs (`Linked`)."""

    flat: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    posts: Numbers
    waits: Numbers
    needs: Numbers


class _Seconds(NamedTuple):
    """Seconds of actions by their number: operation, stage and the row's shift."""

    ops: int
    shift: npt.NDArray[np.int64]
    by_number: Floats


class _Behind(NamedTuple):
    """What is found: `tails` behind every transfer of a kind with a price, `following` behind every action."""

    price: Floats
    kind: Numbers
    left: npt.NDArray[np.int64]
    tails: Floats
    following: Floats


@kernel
def _tails(rows_of, seconds_of, found):  # type: ignore[no-untyped-def]
    """Write for how long a step goes on at least behind each transfer: rows are walked from their ends.

    `left` counts the actions that wait for a transfer and have not been met yet; what posts a transfer is passed when
    there is none. `following` is what goes on behind each action, written where it has room.
    """
    flat, offsets, posts, waits, needs = rows_of
    ops, shift, seconds = seconds_of
    price, kind, left, tails, following = found
    written = len(following) > 0
    rows = len(offsets) - 1
    at = [offsets[d + 1] - 1 for d in range(rows)]
    met = [offsets[d + 1] for d in range(rows)]
    behind = [0.0 for d in range(rows)]
    moved = True
    up = True
    while moved:
        moved = False
        for turn in range(rows):
            d = rows - 1 - turn if up else turn
            i = at[d]
            after = behind[d]
            while i >= offsets[d]:
                if written:
                    following[i] = after
                own = after + seconds[shift[d] + (flat[i] >> STAGE & STAGES) * ops + (flat[i] >> OP)]
                if i < met[d]:
                    met[d] = i
                    if waits[i] >= 0:
                        tails[waits[i]] = max(tails[waits[i]], own)
                        left[waits[i]] -= 1
                    if needs[i] >= 0:
                        tails[needs[i]] = max(tails[needs[i]], own)
                        left[needs[i]] -= 1
                post = posts[i]
                if post >= 0:
                    if left[post] > 0:
                        break
                    if tails[post] >= 0:
                        own = max(own, tails[post] + price[kind[post]])
                after = own
                moved = True
                i -= 1
            at[d] = i
            behind[d] = after
        up = not up
    return 0
