"""What a strategy is asked, and the devices it may use."""

from __future__ import annotations

from typing import NamedTuple

from planner.values.cluster import Cluster, Device
from planner.values.profile import Profile


class Question(NamedTuple):
    """What a strategy is asked: K devices of a cluster, M micro-batches in a batch of so many samples.

    `replicas` copies of the pipeline, `chunks` stages per device (0: as few as the schedule takes, two where it takes
    any number), each stage's tensors split over `tensor` devices, replicas kept equal by `synchronisation`.
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

    @property
    def samples(self) -> int:
        """Samples per micro-batch."""
        return self.batch // self.m

    @property
    def devices(self) -> tuple[Device, ...]:
        """The K devices."""
        return self.cluster.take(self.k).devices
