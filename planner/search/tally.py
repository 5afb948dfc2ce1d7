"""What became of every point of a space, counted by family: each point is in exactly one column."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from planner.search.answer import Family, Found
from planner.search.space import Block, Candidate


class Tally:
    """Counts of a search while it runs; those whose gradients are stale do not compete unless they may."""

    def __init__(self, blocks: list[Block], savings: tuple[tuple[str, ...], ...], *, stale: bool) -> None:
        self.blocks, self.savings = blocks, savings
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, str] = {}
        self.examples: dict[str, str] = {}
        for block in blocks:
            for candidate in block.at(0, savings):
                family = candidate.family
                self.counts[family]["points"] += len(block.ms)
                if block.point.asynchronous and not stale:
                    self.counts[family]["stale"] += len(block.ms)
                    self.reasons[family] = "its gradients are stale; --stale lets it compete"
        self.points = sum(counts["points"] for counts in self.counts.values())

    def aside(self, candidate: Candidate, *, back: bool = False) -> None:
        """Count a candidate that is put aside, as no plan of it fits; or that comes back to be looked at."""
        change = self.counts[candidate.family]
        (change.subtract if back else change.update)(("too large", "outlined"))

    def impossible(self, candidate: Candidate, why: str) -> None:
        """Count a candidate that is no plan."""
        self.counts[candidate.family]["impossible"] += 1
        self.examples.setdefault(candidate.family, candidate.key)
        self.reasons.setdefault(candidate.family, why)

    def evaluated(self, found: Found) -> None:
        """Count a candidate that has been looked at, by a bound or by the fast interpreter."""
        self.counts[found.family]["evaluated"] += 1
        self.counts[found.family]["too large"] += found.lack > 1

    def late(self, found: Found) -> None:
        """Say of a family that it has plans that are too slow or too dear."""
        self.reasons.setdefault(found.family, "it does not meet the deadline or the budget")

    def families(self, unopened: Iterable[int]) -> tuple[Family, ...]:
        """Return what became of every family; `unopened` are the blocks of points that cannot fit, one per point."""
        large = Counter[str]()
        for number, count in Counter(unopened).items():
            for candidate in self.blocks[number].at(0, self.savings):
                large[candidate.family] += count
        return tuple(
            Family(
                name=name,
                points=c["points"],
                evaluated=c["evaluated"],
                fitting=c["evaluated"] + c["outlined"] - c["too large"],
                slower=c["points"] - c["evaluated"] - c["impossible"] - c["stale"] - c["outlined"] - large[name],
                too_large=c["too large"] + large[name],
                impossible=c["impossible"],
                stale=c["stale"],
                why=self.reasons.get(name, ""),
                example=self.examples.get(name, ""),
            )
            for name, c in sorted(self.counts.items())
        )
