"""Candidates' plans, made on their devices: what was made last is kept, as it is often asked for again at once."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from planner.costs.placed import Placed
from planner.placement import cutting
from planner.placement.repeating import least_repeated
from planner.search.plan_bounds import plan_bound
from planner.search.space import Candidate, Space, begun, finished, question
from planner.values.cluster import Cluster
from planner.values.plan import Plan
from planner.values.profile import Profile

MADE = 16
"""Plans that are kept, as a candidate is often looked at again at once."""


class Plans:
    """Makes the plans of a space's candidates; `lengths` are the profiles of its several sequence lengths."""

    def __init__(self, profile: Profile, cluster: Cluster, space: Space, lengths: Mapping[int, Profile]) -> None:
        self.profile, self.cluster, self.space, self.lengths = profile, cluster, space, lengths
        self.made: dict[str, Placed] = {}
        self.begun: dict[str, Plan] = {}

    def profile_of(self, one: Candidate | Plan) -> Profile:
        """Return the profile of a candidate's, or a plan's, sequence length."""
        return self.lengths.get(one.sequence, self.profile)

    def placed(self, candidate: Candidate) -> Placed:
        """Return a candidate's plan on its devices. Raises `PlanError` where there is none."""
        if candidate.key not in self.made:
            self.made[candidate.key] = Placed(self.profile_of(candidate), self._plan(candidate), self.cluster)
            while len(self.made) > MADE:
                self.made.pop(next(iter(self.made)))
        return self.made[candidate.key]

    def squeezed(self, candidate: Candidate, placed: Placed) -> bool:
        """Return whether memory decided where a candidate's plan is cut."""
        return cutting.squeezed(question(candidate, self.profile_of(candidate), self.cluster), placed)

    def before_choice(self, candidate: Candidate) -> tuple[Plan, float]:
        """Return a plan whose layers to repeat are not chosen yet, and seconds that none that fits can beat."""
        placed = Placed(self.profile_of(candidate), self._begun(candidate), self.cluster)
        return placed.plan, plan_bound(placed, least_repeated(placed))

    def _plan(self, candidate: Candidate) -> Plan:
        """Make a candidate's plan, and mark what tells its name from those of the others in this space."""
        marks = [f"b{candidate.batch}"] if len(self.space.batches) > 1 else []
        marks += [f"s{candidate.sequence}"] if candidate.sequence else []
        marks += [candidate.hire] if candidate.hire else []
        plan = finished(candidate, self._begun(candidate), self.profile_of(candidate), self.cluster)
        return msgspec.structs.replace(plan, mark="-".join([*marks, plan.mark]).strip("-")) if marks else plan

    def _begun(self, candidate: Candidate) -> Plan:
        """Make a candidate's plan but for what is chosen behind its cut; the last is kept, to be finished."""
        if candidate.key not in self.begun:
            self.begun = {candidate.key: begun(candidate, self.profile_of(candidate), self.cluster)}
        return self.begun[candidate.key]
