"""Shared links: max-min fair rates by hand, and their laws for any transfers on any links."""

from __future__ import annotations

import math

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from planner.costs.flows import Flow, together
from planner.simulate.network import Load, Network, load
from planner.values.cluster import Cluster, Device, Host, Link


class Watched(Network):
    """A network that checks its rates whenever they have settled, and adds up what passes its links."""

    def __init__(self, env: simpy.Environment, bandwidth: list[float]) -> None:
        super().__init__(env, bandwidth)
        self.delivered = [0.0] * len(bandwidth)
        self.wrong: list[str] = []

    def _run_at(self, sending, speed) -> None:  # type: ignore[no-untyped-def]
        self._deliver(sending)
        super()._run_at(sending, speed)

    def _leave(self, sending) -> None:  # type: ignore[no-untyped-def]
        self._deliver(sending)
        super()._leave(sending)

    def _deliver(self, sending) -> None:  # type: ignore[no-untyped-def]
        passed = (self.env.now - sending.since) * sending.speed
        for link, rate in zip(sending.load.links, sending.load.rates, strict=True):
            self.delivered[link] += passed * rate

    def _settle(self, event) -> None:  # type: ignore[no-untyped-def]
        super()._settle(event)
        self.check()

    def check(self) -> None:
        """No link above its bandwidth; whoever is slower than alone has a full link on which nobody is faster."""
        carried = [sum(s.speed * rate for s, rate in users.items()) for users in self.users]
        for link, capacity in enumerate(self.bandwidth):
            if carried[link] > capacity * (1 + 1e-6):
                self.wrong.append(f"link {link} carries {carried[link]} of {capacity}")
        for sending in {s: None for users in self.users for s in users}:
            mine = sending.speed * sending.load.rate
            if sending.speed < 1 - 1e-9 and not any(
                carried[link] >= self.bandwidth[link] * (1 - 1e-6)
                and all(s.speed * s.load.rate <= mine * (1 + 1e-6) for s in self.users[link])
                for link in sending.load.links
            ):
                self.wrong.append(f"nothing holds {sending.load} back at {sending.speed}")


def play(bandwidth: list[float], *sent: tuple[float, tuple[Flow, ...], float]) -> tuple[list[float], Watched]:
    """Send transfers (from when, which flows, how long alone); return when each is over."""
    env = simpy.Environment()
    network = Watched(env, bandwidth)
    ends = [math.nan] * len(sent)

    def over(index: int) -> None:
        ends[index] = env.now

    for index, (begin, flows, seconds) in enumerate(sent):
        own = load(flows, seconds, bandwidth)

        def start(_: simpy.Event, own: Load = own, index: int = index, seconds: float = seconds) -> None:
            network.send(own, seconds, lambda _: over(index))

        env.timeout(begin).callbacks.append(start)
    env.run()
    assert not network.wrong
    return ends, network


def message(path: tuple[int, ...], size: float, bandwidth: list[float]) -> tuple[tuple[Flow, ...], float]:
    return (Flow(path, size),), max(size / bandwidth[number] for number in path)


def test_a_slow_flow_takes_only_its_rate_of_a_fast_link() -> None:
    """1 GB over 1 GB/s and 100 GB/s beside 10 GB over the latter: 10 / (100 - 1) s, not half of the link."""
    links = [1e9, 100e9]
    ends, _ = play(links, (0.0, *message((0, 1), 1e9, links)), (0.0, *message((1,), 10e9, links)))
    assert ends == pytest.approx([1.0, 10 / 99])


def test_three_flows_over_a_chain() -> None:
    """Links of 10 and 4; a over both, b over the first, c over the second: a and c get 2, b gets 8."""
    links = [10.0, 4.0]
    sent = [(0.0, *message(path, 8.0, links)) for path in ((0, 1), (0,), (1,))]
    assert play(links, *sent)[0] == pytest.approx([4.0, 1.0, 4.0])


def test_who_comes_later_slows_who_is_there() -> None:
    """Alone for a second, two share for two: the first has 2 of its 3 then, and so on by hand."""
    links = [1.0]
    ends, _ = play(links, (0.0, *message((0,), 3.0, links)), (1.0, *message((0,), 1.0, links)))
    assert ends == pytest.approx([4.0, 3.0])


def test_both_directions_at_once() -> None:
    """Full duplex: two numbers of one link, two bandwidths."""
    links = [2.0, 2.0]
    ends, _ = play(links, (0.0, *message((0,), 4.0, links)), (0.0, *message((1,), 4.0, links)))
    assert ends == [2.0, 2.0]


def test_a_ring_does_not_contend_with_itself() -> None:
    """Four hops over one pool take what the price list says; beside a message, the ring is one user of the pool."""
    links = [1.0]
    ring = tuple(Flow((0,), 3.0) for _ in range(4))
    assert play(links, (0.0, ring, 3.0))[0] == [3.0]
    assert play(links, (0.0, ring, 3.0), (0.0, *message((0,), 3.0, links)))[0] == pytest.approx([6.0, 6.0])


def test_a_rings_hops_advance_in_step() -> None:
    """A message on one hop slows all of them: links 0 to 3 are asked for half until the message has gone."""
    links = [1.0] * 4
    ring = tuple(Flow((number,), 4.0) for number in range(4))
    ends, network = play(links, (0.0, ring, 4.0), (0.0, *message((2,), 1.0, links)), (0.0, *message((0,), 1.0, links)))
    assert ends == pytest.approx([5.0, 2.0, 2.0])
    assert network.delivered == pytest.approx([5.0, 4.0, 5.0, 4.0])


def test_links_of_ones_own_are_not_shared() -> None:
    links = [math.inf]
    assert load((Flow((0,), 1.0),), 1.0, links).free


LINKS = st.lists(st.sampled_from([1.0, 2.0, 3.0, 10.0, 100.0]), min_size=1, max_size=5)


@st.composite
def transfers(draw: st.DrawFn) -> tuple[list[float], list[tuple[float, tuple[Flow, ...], float]]]:
    """Up to eight transfers of one to three flows, some slower alone than their links, on up to five links."""
    links = draw(LINKS)
    number = st.integers(0, len(links) - 1)
    path = st.lists(number, min_size=1, max_size=len(links), unique=True).map(tuple)
    sent = []
    for _ in range(draw(st.integers(1, 8))):
        flows = tuple(
            Flow(way, float(draw(st.integers(1, 20)))) for way in draw(st.lists(path, min_size=1, max_size=3))
        )
        carried = [sum(size for way, size in flows if link in way) for link in range(len(links))]
        least = max(size / bandwidth for size, bandwidth in zip(carried, links, strict=True))
        sent.append((float(draw(st.integers(0, 10))), flows, least * draw(st.sampled_from([1.0, 1.5, 4.0]))))
    return links, sent


@given(transfers())
def test_laws_of_the_network(drawn: tuple[list[float], list[tuple[float, tuple[Flow, ...], float]]]) -> None:
    """All bytes arrive; nobody is quicker than alone; rates are max-min fair (`Watched.check`); links never idle."""
    links, sent = drawn
    ends, network = play(links, *sent)
    for (begin, _, seconds), end in zip(sent, ends, strict=True):
        assert end >= (begin + seconds) * (1 - 1e-9)
    for link, bandwidth in enumerate(links):
        mine = [(begin, size) for begin, flows, _ in sent for way, size in flows if link in way]
        size = sum(size for _, size in mine)
        assert network.delivered[link] == pytest.approx(size, rel=1e-6)
        if mine:
            assert max(ends) >= (min(begin for begin, _ in mine) + size / bandwidth) * (1 - 1e-9)


@given(transfers())
def test_alone_everything_takes_its_price(
    drawn: tuple[list[float], list[tuple[float, tuple[Flow, ...], float]]],
) -> None:
    links, sent = drawn
    begin, flows, seconds = sent[0]
    assert play(links, (begin, flows, seconds))[0] == pytest.approx([begin + seconds], rel=1e-12)


def test_what_flows_take_together() -> None:
    """Two of 3 bytes over one link of 2 bytes/s with a second of latency: what the link carries, or each its own."""
    cluster = Cluster(
        name="pair",
        hosts=(Host(name="h", cores=1, memory_bytes=1),),
        devices=tuple(Device(name=f"d{i}", memory_bytes=1, host="h") for i in range(2)),
        links=(Link(between=("d0", "d1"), latency_s=1.0, bandwidth_bytes_per_s=2.0),),
    )
    there, back = Flow((0,), 3.0), Flow((1,), 3.0)
    assert together(cluster, (there, back)) == 2.5
    assert together(cluster, (there, there)) == 3.0
    assert together(cluster, ()) == 0.0
