"""What computing hides: transfers that wait for their turn on an engine, and that begin before they are asked for."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Container

from planner.programs.waits import Linked
from planner.simulate.resources import Then


class Turns:
    """Engines (a device's network, a copy engine each way) that bring one transfer after the other."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Then]] = {}

    def take(self, lane: int, begin: Then) -> None:
        """Call `begin` when everything that came before has left."""
        if lane in self._waiting:
            self._waiting[lane].append(begin)
        else:
            self._waiting[lane] = deque()
            begin(None)

    def leave(self, lane: int) -> None:
        """Let the next one begin."""
        if self._waiting[lane]:
            self._waiting[lane].popleft()(None)
        else:
            del self._waiting[lane]


def foreseen(linked: Linked, kind_of: list[int], ahead: Container[int]) -> dict[int, list[tuple[int, int]]]:
    """Return by action which transfers of the kinds `ahead` can be foreseen when it computes: (transfer, its post).

    From this action on the device waits for nothing until it posts the transfer: when it will do so is known. Device
    rows that begin with the post itself foresee nothing.
    """
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    posts, waits, needs = (a.tolist() for a in (linked.posts, linked.waits, linked.needs))
    for first, stop in zip(linked.offsets[:-1].tolist(), linked.offsets[1:].tolist(), strict=True):
        for post in range(first + 1, stop):
            if posts[post] >= 0 and kind_of[posts[post]] in ahead:
                at = post - 1
                while at > first and waits[at] < 0 and needs[at] < 0:
                    at -= 1
                found[at].append((posts[post], post))
    return found
