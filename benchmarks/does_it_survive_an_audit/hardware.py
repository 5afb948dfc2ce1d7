"""The clusters that the audit asks about, written out: several hosts, slow and shared links, few surprises."""

from __future__ import annotations

from planner.values.cluster import Cluster, Device, Host, Link

GB = 1e9
GBIT = 1e9 / 8
GIB = 2**30


def hosts_of(
    hosts: int,
    each: int,
    *,
    nic: float,
    pcie: float = 12 * GB,
    nics: int = 1,
    latency_s: float = 0.0,
    memory_bytes: int = 16 * GIB,
    shared: bool = True,
) -> Cluster:
    """Return `hosts` hosts of `each` V100: PCIe to the host, `nics` NICs of `nic` bytes/s per host, one switch.

    With as many NICs as devices each device has its own (a rail); with one, all pass through their host.
    """
    links = []
    names = [(f"host{h}", [f"gpu{h * each + d}" for d in range(each)]) for h in range(hosts)]
    for host, devices in names:
        links += [
            Link(between=(device, host), latency_s=latency_s, bandwidth_bytes_per_s=pcie, shared=shared)
            for device in devices
        ]
        rails = devices if nics == each and nics > 1 else [host] * nics
        links += [
            Link(between=(end, "switch"), latency_s=latency_s, bandwidth_bytes_per_s=nic, shared=shared)
            for end in rails
        ]
    return Cluster(
        name=f"{hosts} x {each} V100",
        hosts=tuple(Host(name=host, cores=40, memory_bytes=512 * GIB) for host, _ in names),
        devices=tuple(
            Device(name=device, memory_bytes=memory_bytes, host=host) for host, devices in names for device in devices
        ),
        switches=("switch",),
        links=tuple(links),
    )


FOUR_BY_FOUR = hosts_of(4, 4, nic=10 * GBIT)
"""4 hosts of 4 V100, PCIe 12 GB/s, one 10 Gbit/s NIC per host: the audit's default."""
TWO_BY_EIGHT = hosts_of(2, 8, nic=25 * GBIT)
"""2 hosts of 8 V100, PCIe 12 GB/s, one 25 Gbit/s NIC per host."""
