"""The space of plans that a search ranks: strategies, K, M, batches, lengths, replicas, splits, chunks, savings.

A candidate is a point of it. There are hundreds of thousands, so they come in blocks, and each has a bound that costs
nothing (`planner.search.bounds`): making a plan costs milliseconds.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from planner.orders import schedules, synchronisation
from planner.placement import savings, strategies
from planner.placement.devices import choose
from planner.placement.mapping import MAPPINGS, across
from planner.placement.pipeline import arranged
from planner.placement.question import Mapping, Question
from planner.placement.strategies import Strategy
from planner.search.hiring import FASTEST, hires, offered
from planner.search.simplicity import mechanisms_of
from planner.values.cluster import Cluster
from planner.values.plan import Plan
from planner.values.profile import Profile

SMALL = 16
"""Up to so many devices every K is tried; beyond, powers of two and all of them."""


class Space(NamedTuple):
    """What is tried: strategies by name, K, M, replicas, tensor splits, chunks, synchronisations, sets of savings.

    `batches` are samples per step, `sequences` tokens per sample: 0 for what the profile has, several where there is a
    profile of each. `mappings` are tried where they differ: pipelines with replicas on several hosts. So are `hires`:
    which devices K are, where hosts cost differently (`planner.search.hiring`); none said are what a question needs:
    all where it is about money, else the fastest.
    """

    strategies: tuple[str, ...]
    ks: tuple[int, ...]
    ms: tuple[int, ...]
    replicas: tuple[int, ...]
    tensors: tuple[int, ...]
    chunks: tuple[int, ...]
    synchronisations: tuple[str, ...]
    savings: tuple[tuple[str, ...], ...]
    batches: tuple[int, ...]
    mappings: tuple[Mapping, ...] = MAPPINGS
    sequences: tuple[int, ...] = (0,)
    hires: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """What plans are compared by the seconds of: samples, or tokens where samples are of several lengths."""
        return "token" if len(self.sequences) > 1 else "sample"

    @property
    def units(self) -> int:
        """Samples, or tokens, of which every batch takes a whole number of steps."""
        return math.lcm(*(batch * max(1, tokens) for batch in self.batches for tokens in self.sequences))


class Candidate(NamedTuple):
    """One point of the space."""

    strategy: str
    k: int
    m: int
    replicas: int
    chunks: int
    tensor: int
    synchronisation: str
    savings: tuple[str, ...]
    batch: int
    mapping: Mapping = ""
    sequence: int = 0
    hire: str = FASTEST

    @property
    def units(self) -> int:
        """What a step trains on: samples, or tokens where lengths are compared."""
        return self.batch * max(1, self.sequence)

    @property
    def family(self) -> str:
        """What a person would call its kind: the strategy and its savings."""
        agreed = () if self.agreed in (synchronisation.USUAL, self.how.synchronisation) else (self.agreed,)
        return "+".join((self.strategy, *agreed, *self.savings))

    @property
    def how(self) -> Strategy:
        """The strategy itself."""
        return strategies.get(self.strategy)

    @property
    def devices(self) -> int:
        """How many devices its plan takes."""
        return 1 if self.how.devices == "one" else self.k

    def offered(self, cluster: Cluster) -> Cluster:
        """Return the cluster from which its plan takes devices."""
        return offered(cluster, self.devices, self.hire)

    @property
    def tensor_count(self) -> int:
        """Over how many devices every stage's tensors are split."""
        return self.k if self.how.devices == "tensor" else self.tensor

    @property
    def depth(self) -> int:
        """Devices, or groups that split tensors, of one pipeline; at most, where the strategy chooses by itself."""
        if self.how.devices in ("one", "tensor", "replicas"):
            return 1
        return self.k // (self.tensor * self.replicas)

    @property
    def replica_count(self) -> int:
        """How many replicas take their share of the micro-batches; one where the strategy chooses by itself."""
        return self.k // self.tensor if self.how.devices == "replicas" else self.replicas

    @property
    def bare(self) -> Candidate:
        """The same point without savings."""
        return self._replace(savings=())

    @property
    def shape(self) -> Candidate:
        """The same point without savings, however its replicas agree."""
        return self._replace(savings=(), synchronisation="")

    @property
    def agreed(self) -> str:
        """How its replicas agree; one alone has nobody to agree with."""
        if self.how.devices == "replicas" and self.replica_count == 1:
            return synchronisation.USUAL
        return self.how.synchronisation or self.synchronisation or synchronisation.USUAL

    @property
    def arranged(self) -> tuple[schedules.Schedule, int]:
        """The schedule that its plan has, and the stages per device: one device alone has nothing to arrange."""
        return arranged(schedules.get(self.how.schedule), self.depth, self.chunks)

    @property
    def asynchronous(self) -> bool:
        """Whether its steps overlap: by its schedule, or because its replicas do not wait for each other."""
        return schedules.get(self.how.schedule).asynchronous or synchronisation.get(self.agreed).asynchronous

    @property
    def mechanisms(self) -> int:
        """How many mechanisms its plan has at least (`planner.search.simplicity`)."""
        if self.how.devices == "chosen":
            return len(self.savings) + (self.m > 1 or self.asynchronous)  # one micro-batch may be on one device
        schedule, chunks = self.arranged
        return len(
            mechanisms_of(
                schedule,
                synchronisation.get(self.agreed),
                stages=self.depth * chunks,
                chunks=chunks,
                tensor=self.tensor_count,
                replicas=self.replica_count,
                share=self.m // self.replica_count,
                used=self.savings,
            )
        )

    @property
    def repeats(self) -> bool:
        """Whether its savings repeat forwards."""
        return any(savings.get(name).repeats for name in self.savings)

    @property
    def swaps(self) -> bool:
        """Whether its savings copy activations to the host and back."""
        return any(savings.get(name).swaps for name in self.savings)

    @property
    def does(self) -> tuple[object, ...]:
        """What its plan does, but for M and savings: equal for two names of one plan.

        With one device per replica there is nothing to arrange but micro-batches one after the other.
        """
        schedule, agreed = schedules.get(self.how.schedule), synchronisation.get(self.agreed)
        if self.depth > 1:
            return self.shape, agreed.name
        said = "" if self.replica_count == 1 else agreed.name
        return schedule.updates, self.replica_count, self.tensor_count, said, self.batch, self.sequence, self.hire

    @property
    def key(self) -> str:
        """The same point under the same name in every search; `parse` reads it."""
        numbers = self.k, self.m, self.batch, self.sequence, self.replicas, self.chunks, self.tensor
        names = self.mapping, self.synchronisation, "+".join(self.savings), self.hire
        return "|".join(map(str, (self.strategy, *numbers, *names)))

    @classmethod
    def parse(cls, key: str) -> Candidate:
        """Return the point that a key names.

        >>> Candidate.parse(Candidate("1f1b", 8, 32, 2, 1, 1, "zero-1", ("recompute",), 64).key).savings
        ('recompute',)
        """
        strategy, *numbers, mapping, agreed, chosen, hire = key.split("|")
        k, m, batch, sequence, replicas, chunks, split = map(int, numbers)
        savings = tuple(chosen.split("+")) if chosen else ()
        return cls(strategy, k, m, replicas, chunks, split, agreed, savings, batch, _mapping(mapping), sequence, hire)


def _mapping(name: str) -> Mapping:
    return next((one for one in MAPPINGS if one == name), "")


def space(profile: Profile, cluster: Cluster, *batches: int, **chosen: tuple[object, ...]) -> Space:
    """Return the whole space for a profile, a cluster and batches, each axis as `chosen` where it is given.

    K goes up to the number of devices. M goes over the divisors of each replica's share of a batch (powers of two of
    them, where there are many) times the replicas, whatever the replicas. Tensor splits go over the powers of two
    inside a host if layers say how they split.
    """
    count = cluster.hosts[0].cores if cluster.elastic else len(cluster.devices)
    powers = [2**i for i in range(count.bit_length())]
    ks = tuple(range(1, count + 1)) if count <= SMALL else tuple(sorted({*powers, count}))
    shares = ((copies, batch // copies) for batch in batches for copies in ks if batch % copies == 0)
    divisors = sorted({copies * m for copies, share in shares for m in _divisors(share)})
    inside = max(Counter(device.host for device in cluster.devices).values(), default=1)
    splits = any(layer.split for layer in profile.layers)
    most = max(1, len(profile.layers))
    axes: dict[str, tuple[object, ...]] = {
        "strategies": tuple(s.name for s in strategies.all_strategies()),
        "ks": ks,
        "ms": tuple(divisors),
        "replicas": tuple(sorted({1, *(k for k in ks if k <= count)})),
        "tensors": tuple(t for t in powers if t == 1 or (splits and t <= inside)),
        "chunks": tuple(v for v in (1, 2, 3, 4) if v <= most),
        "synchronisations": synchronisation.searched(),
        "savings": savings.COMBINATIONS,
        "batches": tuple(dict.fromkeys(batches)),
    }
    return Space(**{**axes, **{name: axis for name, axis in chosen.items() if axis}})  # type: ignore[arg-type]


def _divisors(share: int) -> list[int]:
    """Into how many micro-batches a share of the batch can be cut."""
    found = [m for m in range(1, share + 1) if share % m == 0]
    return found if len(found) <= SMALL else sorted({m for m in found if m & (m - 1) == 0} | {share})


class Block(NamedTuple):
    """Points that differ only in M, how replicas agree, where they stand and what they save; `point` says the rest."""

    point: Candidate
    ms: tuple[int, ...]
    agreed: tuple[str, ...]
    mappings: tuple[Mapping, ...]

    def at(self, m: int, savings: tuple[tuple[str, ...], ...]) -> Iterator[Candidate]:
        """Yield the points with this M and one of these sets of savings."""
        for agreed, mapping, saved in itertools.product(self.agreed, self.mappings, savings):
            yield self.point._replace(m=m, synchronisation=agreed, mapping=mapping, savings=saved)


def candidates(of: Space, profile: Profile, cluster: Cluster) -> Iterator[Candidate]:
    """Yield every point that can possibly be a plan; of several names of one plan the first."""
    for block in blocks(of, profile, cluster):
        for m in block.ms:
            yield from block.at(m, of.savings)


def blocks(of: Space, profile: Profile, cluster: Cluster) -> Iterator[Block]:
    """Yield the candidates of a space in blocks."""
    seen = set[tuple[object, ...]]()
    every = [strategies.get(name) for name in of.strategies]
    for chosen in sorted(every, key=lambda one: one.devices == "stages"):  # a pipeline of one stage has a shorter name
        for point in _points(of, chosen, profile, cluster):
            replicas = point.replica_count
            whole = (m for m in of.ms if m % replicas == 0 and point.batch % m == 0)
            ms = tuple(m for m in whole if point.batch // m >= profile.least)
            free = "synchronisation" in chosen.takes and replicas > 1
            agreed = []
            for name in of.synchronisations if free else ("",):
                does = point._replace(synchronisation=name).does
                if does not in seen:
                    seen.add(does)
                    agreed.append(name)
            if ms and agreed:
                apart = point.replicas > 1 and point.depth > 1 and across(choose(point.offered(cluster), point.devices))
                yield Block(point, ms, tuple(agreed), of.mappings if apart else ("",))


def _points(of: Space, chosen: Strategy, profile: Profile, cluster: Cluster) -> Iterator[Candidate]:
    """Yield every length, batch, K, tensor split, replicas, chunks and hire that a strategy can have."""
    whole = sum(len(layer.times) > 0 for layer in profile.layers)
    schedule = schedules.get(chosen.schedule)
    ks = of.ks if "k" in chosen.takes else (min(of.ks),)
    tensors = of.tensors if "tensor" in chosen.takes else (1,)
    copies = of.replicas if "replicas" in chosen.takes else (1,)
    chunks = _chunks(chosen, schedule, of)
    for sequence, batch, k, ways, replicas in itertools.product(of.sequences, of.batches, ks, tensors, copies):
        if k % (ways * replicas):
            continue
        for v in chunks:
            point = Candidate(chosen.name, k, 0, replicas, v, ways, "", (), batch, sequence=sequence)
            if point.depth * max(1, v) <= whole:
                own = hires(cluster, point.devices)
                yield from (point._replace(hire=hire) for hire in of.hires or (FASTEST,) if hire in own)


def _chunks(chosen: Strategy, schedule: schedules.Schedule, of: Space) -> tuple[int, ...]:
    if "chunks" not in chosen.takes or schedule.chunks[1] is not None:
        return (0,)
    return tuple(v for v in of.chunks if v > 1)


def question(point: Candidate, profile: Profile, cluster: Cluster) -> Question:
    """Return what a point's strategy is asked."""
    return Question(
        profile,
        point.offered(cluster),
        k=point.devices,
        m=point.m,
        batch=point.batch,
        replicas=point.replicas,
        chunks=point.chunks,
        tensor=point.tensor,
        synchronisation=point.synchronisation,
        mapping=point.mapping,
        savings=point.savings,
    )


def begun(point: Candidate, profile: Profile, cluster: Cluster) -> Plan:
    """Return the plan at a point without what is chosen once the cut is known; raises as `make`."""
    return point.how.arrange(question(point, profile, cluster))


def finished(point: Candidate, plan: Plan, profile: Profile, cluster: Cluster) -> Plan:
    """Return the plan that `begun` made; raises as `make`."""
    return point.how.finish(question(point, profile, cluster), plan)


def make(point: Candidate, profile: Profile, cluster: Cluster) -> Plan:
    """Return the plan at a point. Raises `PlanError` where there is none."""
    return finished(point, begun(point, profile, cluster), profile, cluster)
