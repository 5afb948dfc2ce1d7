"""Directed links: a number for each direction, the way back, several equal links between two nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.values.cluster import AllReduce, Cluster, Device, Host, Link
from planner.values.cluster_file import read

FILE = """
name = "pair"
buffered = true
posts = [[1, 2.0]]
all_reduces = [{ devices = 4, points = [[1, 3.0]] }]
[[hosts]]
name = "h"
cores = 2
memory_bytes = 1
[[devices]]
name = "d"
count = 2
host = "h"
memory_bytes = 1
[[links]]
between = ["d0", "d1"]
latency_s = 0.0
bandwidth_bytes_per_s = 1e9
"""


def two_hosts(nics: int) -> Cluster:
    links = [
        *(Link(between=(f"d{i}", f"h{i // 2}"), latency_s=0.0, bandwidth_bytes_per_s=4.0) for i in range(4)),
        *(
            Link(between=("switch", f"h{h}"), latency_s=0.0, bandwidth_bytes_per_s=1.0)
            for h in range(2)
            for _ in range(nics)
        ),
    ]
    return Cluster(
        name="two hosts",
        hosts=tuple(Host(name=f"h{h}", cores=1, memory_bytes=1) for h in range(2)),
        devices=tuple(Device(name=f"d{i}", memory_bytes=1, host=f"h{i // 2}") for i in range(4)),
        links=tuple(links),
        switches=("switch",),
    )


def test_the_way_back_is_the_same_links_in_the_other_direction() -> None:
    cluster = two_hosts(1)
    there, back = cluster.path("d0", "d3"), cluster.path("d3", "d0")
    assert there == (0, 9, 10, 7), "d0 to h0, h0 to the switch against its link's order, the switch to h1, h1 to d3"
    assert cluster.routes.back(there) == back
    assert not set(there) & set(back), "full duplex"
    assert [cluster.link_of(n) for n in there] == [cluster.link_of(n) for n in reversed(back)]


def test_devices_take_turns_on_equal_links() -> None:
    """Two NICs per host: the first device of each host uses the first, the second the second."""
    cluster = two_hosts(2)
    links = [cluster.path(f"d{i}", f"d{i + 2}") for i in range(2)]
    assert [number // 2 for number in links[0]] == [0, 4, 6, 2]
    assert [number // 2 for number in links[1]] == [1, 5, 7, 3]
    assert [number // 2 for number in cluster.path("d0", "d3")] == [0, 4, 7, 3]


def test_a_hosts_link_to_itself_is_one_pool() -> None:
    link = Link(between=("h", "h"), latency_s=0.0, bandwidth_bytes_per_s=1.0)
    cluster = Cluster(
        name="box",
        hosts=(Host(name="h", cores=2, memory_bytes=1),),
        devices=tuple(Device(name=f"d{i}", memory_bytes=1, host="h") for i in range(2)),
        links=(link,),
    )
    assert cluster.path("d0", "d1") == cluster.path("d1", "d0") == (0,) == cluster.routes.back((0,))


def test_copies_to_the_host_and_back_use_both_directions() -> None:
    routes = two_hosts(1).routes
    assert (routes.to_host("d1"), routes.back(routes.to_host("d1"))) == ((2,), (3,))


def test_a_cluster_file_has_every_field_of_communication(tmp_path: Path) -> None:
    """`buffered`, promised and once refused, and all others."""
    (tmp_path / "c.toml").write_text(FILE)
    cluster = read(tmp_path / "c.toml")
    assert (cluster.buffered, cluster.posts) == (True, ((1, 2.0),))
    assert cluster.all_reduces == (AllReduce(devices=4, points=((1, 3.0),)),)
    assert cluster.path("d0", "d1") == (0,)
    assert cluster.path("d1", "d0") == (1,)


@pytest.mark.parametrize("nics", [1, 2, 3])
def test_paths_lead_where_they_should(nics: int) -> None:
    cluster = two_hosts(nics)
    for one in cluster.devices:
        for other in cluster.devices:
            if one == other:
                continue
            at = one.name
            for number in cluster.path(one.name, other.name):
                first, second = cluster.link_of(number).between[:: -1 if number % 2 else 1]
                assert first == at
                at = second
            assert at == other.name
