"""What the links alone make a step take: a lower bound that knows of sharing, beside the walk that does not.

Everything that passes a link in a step passes it one after the other, or shares it, which takes as long. No transfer
begins before the walk says so (its head), and after the last of them the step goes on for at least the shortest of
their tails. So the step takes, for every link and every moment, at least that moment, and what the link still has to
carry of what comes later, and the shortest tail of that: the preemptive one-machine bound (Carlier, European Journal of
Operational Research 1982).
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.basis.memo import memoised
from planner.costs.placed import Placed
from planner.costs.priced import Prices
from planner.orders.codes import OP, OPS, STAGE, STAGES
from planner.orders.operations import named
from planner.programs.waits import Linked
from planner.simulate.longest_path import taken
from planner.simulate.network import carried
from planner.values.cluster import Cluster

Floats = npt.NDArray[np.float64]

LOOKED_AT = 6
"""So many links, those with most to carry, are looked at closely."""
SERVED = named(group="server")
WIDE = 32
"""Of collectives with more flows than that only a few are counted, where every device has links of its own."""


def link_bound(
    placed: Placed,
    linked: Linked,
    prices: Prices,
    begun: Floats,
) -> float:
    """Return seconds that a step takes at least because of what its links carry, 0 where nothing is shared.

    `begun` is when the walk begins each transfer. Where `linked` is one replica for all, the others' transfers begin
    when its own do.
    """
    kinds, transfer_kind = prices.kinds, prices.transfer_kind
    waiting = _waiting(linked)
    used = np.flatnonzero((linked.parties > 0) & (waiting > 0))  # what nobody waits for may outlast the step
    numbers = transfer_kind[used]
    counts = np.bincount(numbers, minlength=len(kinds))
    on_link = _busy(placed, prices, linked.devices)
    total = {link: sum(counts[kind] * busy for kind, busy in users.items()) for link, users in on_link.items()}
    heavy = sorted((busy, link) for link, busy in total.items() if busy > 0)[-LOOKED_AT:]
    if not heavy:
        return 0.0
    tails = np.full(linked.transfers, -1.0)
    _tails(
        len(linked.flat),
        *(linked.flat, linked.offsets, linked.posts, linked.waits, linked.copies),
        *(len(OPS), prices.shift, prices.by_number),
        *(taken(prices), transfer_kind, waiting, tails),
    )
    bound = 0.0
    for _, link in heavy:
        busy_of = np.zeros(len(kinds))
        busy_of[list(on_link[link])] = list(on_link[link].values())
        mine = used[busy_of[numbers] > 0]
        kind = transfer_kind[mine]
        early = np.array([k.early for k in kinds])
        hidden = np.array([k.busy > k.seconds for k in kinds])
        head = begun[mine] - early[kind]
        order = np.argsort(head)
        rest = np.cumsum(busy_of[kind][order][::-1])[::-1]
        behind = np.where(hidden[kind], 0.0, tails[mine])[order]
        bound = max(bound, float((head[order] + rest + np.minimum.accumulate(behind[::-1])[::-1]).max()))
    return bound


def _busy(placed: Placed, prices: Prices, rows: int) -> dict[int, dict[int, float]]:
    """Seconds for which each kind of transfer keeps each shared link busy, together with those of other replicas."""
    cluster, bandwidth = placed.cluster, placed.cluster.bandwidths
    found: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    common = _common(cluster)
    for number, kind in enumerate(prices.kinds):
        alike = [kind]
        if kind.source >= 0 and (common or kind.op in SERVED):
            shifts = range(rows, len(placed.plan.groups), rows)
            ends = ((kind.op, kind.stage, kind.source + shift, kind.target + shift) for shift in shifts)
            alike += [prices.listing.transfer(*end) for end in ends]
        for one in alike:
            flows = one.flows if common or len(one.flows) <= WIDE else one.flows[:1]
            for link, size in carried(flows, one.seconds, bandwidth).items():
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
    for waits in (linked.waits, linked.copies):
        found += np.bincount(waits[waits >= 0], minlength=linked.transfers)
    return found


@kernel
def _tails(flat, offsets, posts, waits, copies, ops, shift, seconds, price, kind, left, tails):  # type: ignore[no-untyped-def]
    """Write for how long a step goes on at least behind each transfer: rows are walked from their ends.

    `left` counts the actions that wait for a transfer and have not been met yet; what posts a transfer is passed when
    there is none.
    """
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
                own = after + seconds[shift[d] + (flat[i] >> STAGE & STAGES) * ops + (flat[i] >> OP)]
                if i < met[d]:
                    met[d] = i
                    if waits[i] >= 0:
                        tails[waits[i]] = max(tails[waits[i]], own)
                        left[waits[i]] -= 1
                    if copies[i] >= 0:
                        tails[copies[i]] = max(tails[copies[i]], own)
                        left[copies[i]] -= 1
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
