"""What every action and every transfer of a program costs: the price list of its plan, written beside them.

How they disturb each other (shared cores and links) is the simulator's matter.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.costs.flows import Flow
from planner.costs.loading import least_step, making, waiting
from planner.costs.placed import Placed
from planner.costs.prices import BY_DEVICE, PriceList, TransferKind
from planner.costs.stage_costs import MEDIAN, QUANTILES, Quantile, Spread
from planner.orders import codes
from planner.orders.action import Action
from planner.orders.codes import OP, PORT, PORTS, STAGE, STAGES
from planner.orders.operations import AGREEMENTS, LOAD, OPS, OPTIMIZER
from planner.programs.waits import Linked, Numbers
from planner.values.cluster import Cluster, Device
from planner.values.trace import Trace

Floats = npt.NDArray[np.float64]
_SHARES = tuple(QUANTILES.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """The price list of one program, whose rows are performed by `devices`, of a group of them the first.

    `seconds` holds what each action (of `linked.flat`) computes when it has its cores for itself, posting time for
    sends and receives; `spread` the quantiles of every kind of action and `kind` which one each action is. `kinds` are
    the transfers' prices, `transfer_kind` which one each transfer has (-1 where there is none). `applying` is what a
    parameter server needs to update each stage, `updates` what actions that update on a host bring over links and
    through its memory. `making` is for how long the workers of a rank keep a core busy behind each LOAD, `least` how
    long a step is at least on their account, at every quantile, and `late` for how long the inputs' LOADs wait.
    `contended` is off when the seconds were measured under contention.
    """

    cluster: Cluster
    devices: tuple[Device, ...]
    linked: Linked
    seconds: Floats
    spread: Floats
    kind: Numbers
    kinds: tuple[TransferKind, ...]
    transfer_kind: Numbers
    applying: dict[int, float]
    updates: dict[int, tuple[Flow, ...]] = dataclasses.field(default_factory=dict)
    making: dict[int, float] = dataclasses.field(default_factory=dict)
    least: Spread = dataclasses.field(default_factory=lambda: np.zeros(len(QUANTILES)))
    late: float = 0.0
    contended: bool = True

    def replayed(self, trace: Trace, share: int = 0) -> Costs:
        """Return the same costs with the computing times of a measured trace: the replay of DESIGN.md section 8.

        What the simulator then still gets wrong is the schedule and communication model alone. Of a plan without flush
        the trace is one step, and every unrolled one takes its times: a pipeline has a `share` of its micro-batches.
        """

        def named(action: Action) -> Action:
            m = action.microbatch
            return action._replace(microbatch=m % share) if share and m is not None else action

        work = [{named(action): seconds for action, seconds in own.items()} for own in trace.work]
        reducing = codes.has(self.linked.flat, *AGREEMENTS)
        seconds = [
            seconds if reduces else work[row].get(named(action), seconds)
            for action, row, seconds, reduces in zip(
                self.linked.actions, self.linked.row.tolist(), self.seconds.tolist(), reducing.tolist(), strict=True
            )
        ]
        return dataclasses.replace(self, seconds=np.array(seconds), contended=False)

    @property
    def by_operation(self) -> dict[str, float]:
        """Median seconds of each operation per stage, as "1B"; the devices of a stage are alike."""
        first = np.unique(codes.kinds(self.linked.flat), return_index=True)[1]
        found = {f"{self.linked.actions[i].stage}{self.linked.actions[i].op}": float(self.seconds[i]) for i in first}
        if self.late:
            for name in {f"{self.linked.actions[i].stage}{LOAD}" for i in waiting(self.linked)}:
                found[name] += self.late
        return found | {f"{k.stage}{k.op}": k.seconds for k in self.kinds if k.op in AGREEMENTS}

    @property
    def certain(self) -> bool:
        """Whether no operation has any spread."""
        return bool((self.spread[:, 0] == self.spread[:, -1]).all())

    def at(self, quantile: Quantile) -> Costs:
        """Return the same costs with every operation at one quantile."""
        index = list(QUANTILES).index(quantile)
        return dataclasses.replace(self, seconds=self.spread[self.kind, index])

    def drawn(self, random: np.random.Generator) -> Costs:
        """Draw every action's seconds from its own spread, independently.

        The quantile function is linear between the measured percentiles and constant beyond them: no draw is outside
        of what was seen.
        """
        share = random.random(len(self.kind))
        right = np.clip(np.searchsorted(_SHARES, share), 1, len(_SHARES) - 1)
        low, high = np.array(_SHARES)[right - 1], np.array(_SHARES)[right]
        part = np.clip((share - low) / (high - low), 0.0, 1.0)
        below, above = self.spread[self.kind, right - 1], self.spread[self.kind, right]
        return dataclasses.replace(self, seconds=below + part * (above - below))


class Prices(NamedTuple):
    """The price list of a plan before it is written beside every action.

    An action's kind is a number made of its device's class, its port, stage and operation:
    `shift[row] + (port x stages + stage) x ops + op`. `place` says where each kind stands in `spread` (kinds,
    quantiles), `listing` prices others; the rest is as in `Costs`.
    """

    shift: npt.NDArray[np.int64]
    place: Numbers
    spread: Floats
    kinds: tuple[TransferKind, ...]
    transfer_kind: Numbers
    applying: dict[int, float]
    listing: PriceList

    @property
    def by_number(self) -> Floats:
        """Median seconds of every kind's number."""
        return np.ascontiguousarray(self.spread[:, MEDIAN])[self.place]


def prices_of(placed: Placed, linked: Linked) -> Prices:
    """Price every kind of action and transfer; as `costs_of`."""
    prices = PriceList(placed, linked.edges)
    sorts = list(map(prices.sort, range(linked.devices)))
    classes = {sort: number for number, sort in enumerate(dict.fromkeys(sorts))}
    examples = [sorts.index(sort) for sort in classes]
    plane = linked.stages * len(OPS)
    width = linked.ports * plane
    shift = width * np.array([classes[sort] for sort in sorts], np.int64)
    place = np.full(width * len(classes), -1, np.int32)
    _occurring(len(linked.flat), linked.flat, linked.offsets, shift, len(OPS), plane, place)
    found = np.flatnonzero(place >= 0)
    place = np.zeros(len(place), np.int32)
    place[found] = np.arange(len(found))
    spread = np.array(
        [
            prices.action(
                OPS[n % len(OPS)],
                n % plane // len(OPS),
                examples[n // width],
                n % width // plane,
            )
            for n in found.tolist()
        ]
    )
    kinds, transfer_kind = _transfers(linked, prices)
    applying = {s: prices.applying(s) for s in range(linked.stages)} if placed.synchronisation.server else {}
    return Prices(shift, place, spread, kinds, transfer_kind, applying, prices)


def costs_of(placed: Placed, linked: Linked) -> Costs:
    """Price every action and transfer of a plan's program, or of that of its first replicas.

    Raises `PlanError` when the plan is for other layers, two neighbours have no link, or a device none to its host.
    """
    if placed.cluster.buffered:
        linked = linked.buffered()
    prices = prices_of(placed, linked)
    kind, seconds = np.empty(len(linked.flat), np.int32), np.empty(len(linked.flat))
    _price(
        len(linked.flat),
        *(
            linked.flat,
            linked.offsets,
            prices.shift,
            len(OPS),
            linked.stages * len(OPS),
            prices.place,
        ),
        *(np.ascontiguousarray(prices.spread[:, MEDIAN]), kind, seconds),
    )
    return Costs(
        cluster=placed.cluster,
        devices=placed.devices[: linked.devices],
        linked=linked,
        seconds=seconds,
        spread=prices.spread,
        kind=kind,
        kinds=prices.kinds,
        transfer_kind=prices.transfer_kind,
        applying=prices.applying,
        updates=_updates(linked, prices.listing) if placed.plan.host_optimizer else {},
        making=making(placed, linked),
        least=least_step(placed),
    )


def _updates(linked: Linked, prices: PriceList) -> dict[int, tuple[Flow, ...]]:
    """What each update on a host moves, by the action's place."""
    places = np.flatnonzero(codes.has(linked.flat, OPTIMIZER))
    stages, rows = codes.stages(linked.flat[places]).tolist(), linked.row[places].tolist()
    return {i: prices.updating(stage, row) for i, stage, row in zip(places.tolist(), stages, rows, strict=True)}


@kernel
def _occurring(flat, offsets, shift, ops, plane, place):  # type: ignore[no-untyped-def]
    """Mark the kinds of actions that occur."""
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            port = flat[i] >> PORT & PORTS
            place[shift[d] + port * plane + (flat[i] >> STAGE & STAGES) * ops + (flat[i] >> OP)] = 0
    return 0


@kernel
def _price(flat, offsets, shift, ops, plane, place, medians, kind, seconds):  # type: ignore[no-untyped-def]
    """Write every action's kind and its median beside it."""
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            port = flat[i] >> PORT & PORTS
            own = place[shift[d] + port * plane + (flat[i] >> STAGE & STAGES) * ops + (flat[i] >> OP)]
            kind[i] = own
            seconds[i] = medians[own]
    return 0


def _transfers(linked: Linked, prices: PriceList) -> tuple[tuple[TransferKind, ...], Numbers]:
    """Price transfers kind by kind: those of one stage between the same two devices cost the same."""
    numbers, firsts = np.full(linked.transfers, -1, np.int32), np.empty(linked.transfers, np.int32)
    kinds: list[TransferKind] = []
    for op, base in linked.planes:
        count = _group(
            linked.slots(op),
            *(base, linked.slots(op) // linked.microbatches, linked.microbatches, op in BY_DEVICE, len(kinds)),
            *(linked.parties, linked.source, linked.target, firsts, numbers),
        )
        for first in firsts[len(kinds) : count].tolist():
            ends = (int(linked.source[first]), int(linked.target[first])) if op in BY_DEVICE else (-1, -1)
            kinds.append(prices.transfer(op, (first - base) // linked.microbatches, *ends))
    return tuple(kinds), numbers


@kernel
def _group(base, stages, last, messages, count, parties, source, target, firsts, numbers):  # type: ignore[no-untyped-def]
    """Number the kinds of one plane from `count` on; `firsts` are the first transfers of each. Returns the new count.

    A plane has the transfers of some `stages`, of messages of edges.

    Of messages the devices count; those of a stage come in runs, so that the last one's kind is looked at first.
    """
    for stage in range(stages):
        begin = count
        latest = -1
        for t in range(base + stage * last, base + (stage + 1) * last):
            if parties[t] == 0:
                continue
            if latest < 0 or (
                messages and (source[t] != source[firsts[latest]] or target[t] != target[firsts[latest]])
            ):
                latest = count
                for known in range(begin, count):
                    if source[t] == source[firsts[known]] and target[t] == target[firsts[known]]:
                        latest = known
                        break
                if latest == count:
                    firsts[count] = t
                    count += 1
            numbers[t] = latest
    return count
