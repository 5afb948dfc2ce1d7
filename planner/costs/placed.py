"""One plan of one profile on one cluster, and what follows from the three together: made once, at the door.

Everything that prices, interprets or bounds a plan takes this value, so nobody else splits tensors, takes devices from
a cluster or asks which rows hold a stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import combinations

import msgspec

from planner.basis.memo import memoised
from planner.costs import tensor
from planner.orders import schedules, synchronisation
from planner.orders.edges import Edge
from planner.orders.schedules import Schedule
from planner.orders.synchronisation import Synchronisation
from planner.values.cluster import Cluster, Device
from planner.values.plan import Plan
from planner.values.profile import Profile, value_bytes

MANY = 64
"""Of more devices that serve not every path is compared."""


class Placed:
    """A plan with its own devices and the model as each of them sees it.

    `whole` is the profile of the unsplit model, `profile` what one of the devices that split a stage's tensors sees;
    `cluster` has exactly the plan's devices. Raises `PlanError` when the cluster lacks one, or no layer says how
    it splits where the plan splits tensors.
    """

    def __init__(self, profile: Profile, plan: Plan, cluster: Cluster) -> None:
        self.whole, self.plan = profile, plan
        self.cluster = cluster.only(plan.device_names)
        self.profile = tensor.split(profile, plan.groups, self.cluster)

    def seen(self, speed: float) -> Profile:
        """Return what a device of a speed sees of the model: its times over the speed are seconds, the wires' too."""
        return tensor.split(self.whole, self.plan.groups, self.cluster, speed)

    def with_plan(self, plan: Plan) -> Placed:
        """Return another plan for the same devices in the same place."""
        return Placed(self.whole, plan, self.cluster)

    @property
    def schedule(self) -> Schedule:
        """The plan's schedule."""
        return schedules.get(self.plan.schedule)

    @property
    def synchronisation(self) -> Synchronisation:
        """How the plan's replicas agree on parameters."""
        return synchronisation.get(self.plan.synchronisation)

    @cached_property
    def ranges(self) -> tuple[range, ...]:
        """Each stage's layers. Raises `PlanError` (exit 4) when the plan is for other layers."""
        return self.plan.layer_ranges([layer.name for layer in self.profile.layers])

    @cached_property
    def checkpoints(self) -> tuple[tuple[range, ...], ...]:
        """Each stage's checkpoints: runs of layers whose forward is repeated in one go, before their backward."""
        return tuple(
            tuple(range(layers.start + run.start, layers.start + run.stop) for run in self.plan.checkpoints(stage))
            for stage, layers in enumerate(self.ranges)
        )

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """What stands for every row of the plan's program: its device, or its group's first, as weak as any of them."""
        return tuple(map(weakest, self.members))

    @cached_property
    def members(self) -> tuple[tuple[Device, ...], ...]:
        """The devices of every row of the plan's program: one, or as many as split its tensors."""
        by_name = {device.name: device for device in self.cluster.devices}
        return tuple(tuple(by_name[name] for name in group) for group in self.plan.groups)

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """The rows that hold each stage: those that reduce its gradients together."""
        return self.plan.holders

    def edge_bytes(self, edge: Edge, *, gradients: bool) -> float:
        """Bytes per micro-batch that go along an edge, or (only values with gradients) come back."""
        scale = self.cluster.message_scale
        if not edge.values:
            start = self.ranges[edge.consumer].start
            return scale * self.profile.crossing_bytes(start, self.plan.samples, gradients=gradients)
        return scale * sum(
            value_bytes(value, self.plan.samples)
            for value in self.profile.values
            if value.name in edge.values and (value.gradient or not gradients)
        )

    @cached_property
    def capacities(self) -> tuple[float, ...]:
        """Each row's memory in bytes: that of the smallest device in its group."""
        return tuple(float(device.memory_bytes) for device in self.devices)

    @cached_property
    def host_capacities(self) -> dict[str, float]:
        """Each host's memory in bytes, by its name."""
        return {host.name: float(host.memory_bytes) for host in self.cluster.hosts}

    @cached_property
    def alike(self) -> bool:
        """Whether one replica of the pipeline stands for all: its devices, and the links and hosts that they use.

        A device that serves is another sort.
        """
        if self.plan.uneven or not self.even:
            return False
        if not self._served_by_devices:
            return True
        if set(self.plan.servers) != set(self.plan.device_names):
            return False
        rows, depth = range(len(self.plan.groups)), self.plan.depth
        return all(len(set(map(self.served, rows[place::depth]))) == 1 for place in range(depth))

    @cached_property
    def even(self) -> bool:
        """Whether the devices of all replicas, and the links of their messages and copies, are as quick."""
        if len({(d.speed, d.threads, d.memory_bytes) for d in self.cluster.devices}) > 1:
            return False
        return self.plan.replicas == 1 or self.plan.uneven or len(self._looks) == 1

    @property
    def _served_by_devices(self) -> bool:
        return self.synchronisation.server == "devices"

    @property
    def _looks(self) -> frozenset[object]:
        """What replicas look like to what they send: the figures of the links that their transfers pass."""
        plan, cluster = self.plan, self.cluster
        homes = [self.schedule.homes(stage, plan.depth) for stage in range(len(plan.stages))]
        ends = [(edge.producer, edge.consumer) for edge in plan.edges]
        ends += [pair for group in plan.tied for pair in combinations(group, 2)]
        pairs = {pair for one, other in ends for pair in zip(homes[one], homes[other], strict=True)}
        copies = plan.offload or plan.host_optimizer or self.synchronisation.server == "host"
        within = tuple(sorted(pair for pair in pairs if pair[0] != pair[1]))

        def make() -> frozenset[object]:
            starts = range(0, len(plan.groups), plan.depth)
            return frozenset(_look(cluster, plan.groups[i : i + plan.depth], within, copies=copies) for i in starts)

        return memoised(cluster, ("looks", plan.groups, within, copies), make)

    def served(self, row: int) -> object:
        """The figures of the links between each of a row's devices and those that serve, whatever their order."""
        return tuple(map(self._served, self.plan.groups[row]))

    def _served(self, name: str) -> object:
        """The figures of the links between a device and those that serve.

        Of very many servers only the links at the device's own end are looked at: its own, and its host's.
        Where all devices serve, each has one less than there are, and how many are how far counts, too.
        """
        cluster, servers = self.cluster, self.plan.servers

        def make() -> object:
            if len(servers) > MANY:
                return cluster.ends.get(name), cluster.ends.get(cluster.routes.host_of[name])
            found = Counter(cluster.figures(cluster.path(name, server)) for server in servers if server != name)
            return frozenset(found.items() if len(servers) == len(cluster.devices) else found)

        return memoised(cluster, ("served", name, servers), make)

    @property
    def overlaps(self) -> bool:
        """Whether collectives hide behind computing: where devices share cores, they compute on the same ones."""
        return not any(device.shares_cores for device in self.cluster.devices)


def weakest(devices: Sequence[Device]) -> Device:
    """Return the first of devices that wait for each other, as slow and as small as any of them."""
    first = devices[0]
    if len(devices) == 1:
        return first
    speed, memory = min(d.speed for d in devices), min(d.memory_bytes for d in devices)
    threads = min(d.threads for d in devices)
    if (speed, memory, threads) == (first.speed, first.memory_bytes, first.threads):
        return first
    return msgspec.structs.replace(first, speed=speed, memory_bytes=memory, threads=threads)


def _look(
    cluster: Cluster, groups: tuple[tuple[str, ...], ...], pairs: tuple[tuple[int, int], ...], *, copies: bool
) -> object:
    """The figures of the links between the rows of one replica, both ways, and to its hosts, where there are such.

    There must be if it `copies`.
    """
    between = tuple(
        cluster.figures(path)
        for one, other in pairs
        for a, b in zip(groups[one], groups[other], strict=True)
        for path in (cluster.path(a, b), cluster.path(b, a))
    )
    routes = cluster.routes
    rate = {host.name: host.memory_bytes_per_s for host in cluster.hosts}
    own = [name for group in groups for name in group if copies or routes.apart(name)]
    return between, tuple((rate[routes.host_of[name]], cluster.figures(routes.to_host(name))) for name in own)
