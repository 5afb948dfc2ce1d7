"""One plan of one profile on one cluster, and what follows from the three together: made once, at the door.

Everything that prices, interprets or bounds a plan takes this value, so nobody else splits tensors, takes devices from
a cluster or asks which rows hold a stage.
"""

from __future__ import annotations

from functools import cached_property

from planner.costs import tensor
from planner.orders import schedules, synchronisation
from planner.orders.edges import Edge
from planner.orders.schedules import Schedule
from planner.orders.synchronisation import Synchronisation
from planner.values.cluster import Cluster, Device
from planner.values.plan import Plan
from planner.values.profile import Profile, value_bytes


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
        """The device of every row of the plan's program, of a group its first."""
        by_name = {device.name: device for device in self.cluster.devices}
        return tuple(by_name[group[0]] for group in self.plan.groups)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of `devices`."""
        return tuple(group[0] for group in self.plan.groups)

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """The rows that hold each stage: those that reduce its gradients together."""
        return self.plan.holders

    def edge_bytes(self, edge: Edge, *, gradients: bool) -> float:
        """Bytes per micro-batch that go along an edge, or (only values with gradients) come back."""
        if not edge.values:
            return self.profile.crossing_bytes(self.ranges[edge.consumer].start, self.plan.samples, gradients=gradients)
        return sum(
            value_bytes(value, self.plan.samples)
            for value in self.profile.values
            if value.name in edge.values and (value.gradient or not gradients)
        )

    @cached_property
    def capacities(self) -> tuple[float, ...]:
        """Each row's memory in bytes: that of the smallest device in its group."""
        memory = {device.name: float(device.memory_bytes) for device in self.cluster.devices}
        return tuple(min(memory[name] for name in group) for group in self.plan.groups)

    @cached_property
    def host_capacities(self) -> dict[str, float]:
        """Each host's memory in bytes, by its name."""
        return {host.name: float(host.memory_bytes) for host in self.cluster.hosts}

    @cached_property
    def alike(self) -> bool:
        """Whether one replica of the pipeline stands for all, as far as devices go: one that serves is another sort."""
        if self.plan.uneven:
            return False
        if self.synchronisation.server == "devices" and set(self.plan.servers) != set(self.plan.device_names):
            return False
        return len({(d.speed, d.threads, d.memory_bytes) for d in self.devices}) == 1

    @property
    def overlaps(self) -> bool:
        """Whether collectives hide behind computing: where devices share cores, they compute on the same ones."""
        return not any(device.shares_cores for device in self.devices)
