"""What a strategy is asked, and the devices it may use."""

from __future__ import annotations

from typing import Literal, NamedTuple

from planner.placement.devices import choose
from planner.values.cluster import Cluster, Device
from planner.values.profile import Profile

Mapping = Literal["", "stages", "pipelines"]


class Question(NamedTuple):
    """What a strategy is asked: K devices of a cluster, M micro-batches in a batch of so many samples.

    `replicas` copies of the pipeline, `chunks` stages per device (0: as few as the schedule takes, two where it takes
    any number), each stage's tensors split over `tensor` devices, replicas kept equal by `synchronisation`.

    `mapping` says which devices stand side by side: the replicas of a stage (`stages`: gradients stay within a host,
    activations go from host to host) or the stages of a pipeline (`pipelines`: the other way round); "" for the one
    that is quicker by `planner.placement.mapping`. `savings` are applied by name (`planner.placement.savings`): the
    model is cut with them in mind.
    """

    profile: Profile
    cluster: Cluster
    k: int
    m: int
    batch: int
    replicas: int = 1
    chunks: int = 0
    tensor: int = 1
    synchronisation: str = ""
    mapping: Mapping = ""
    savings: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Samples per micro-batch."""
        return self.batch // self.m

    @property
    def devices(self) -> tuple[Device, ...]:
        """The K devices, the fastest there are (`planner.placement.devices.choose`)."""
        return choose(self.cluster, self.k)
