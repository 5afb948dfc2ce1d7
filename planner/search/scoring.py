"""What a plan scores in a search: an objective under terms, for what a step trains on and what its devices cost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planner.search import objective as objectives
from planner.search.cost import Terms, least_price_per_hour, price_per_hour
from planner.search.objective import Reckoned
from planner.search.space import Block, Candidate
from planner.values.cluster import Cluster
from planner.values.plan import Plan


class Scoring:
    """Scores of plans, and of what is not a plan yet; less is better."""

    def __init__(self, objective: str, terms: Terms, cluster: Cluster, unit: str) -> None:
        """`unit` is what steps are compared by: "sample" or "token".

        Raises `PlanError` (exit 2) where the objective needs prices that the cluster does not have.
        """
        self.objective, self.terms, self.cluster, self.unit = objectives.get(objective), terms, cluster, unit
        objectives.check(self.objective, terms, cluster)

    def of(self, plan: Plan, step_s: float, peak: float) -> float:
        """Return the score of a plan with this step time and peak."""
        price = price_per_hour(self.cluster, plan.device_names)
        return float(self.objective.score(Reckoned(step_s, peak, price, self._units(plan)), self.terms))

    def late(self, plan: Plan, step_s: float) -> bool:
        """Whether a plan with this step time does not meet the deadline or the budget."""
        return not self.terms.met(step_s, self._units(plan), price_per_hour(self.cluster, plan.device_names))

    def least(self, candidate: Candidate, seconds: float) -> float:
        """Return the least score of a candidate's plan that takes so many seconds at least."""
        price = least_price_per_hour(self.cluster, candidate.devices)
        return float(self.objective.score(Reckoned(seconds, 0.0, price, candidate.units), self.terms))

    def least_of(self, block: Block, seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return scores that a block's points cannot beat, as little as these seconds; infinite off the terms."""
        price, units = least_price_per_hour(self.cluster, block.point.devices), block.point.units
        score = self.objective.score(Reckoned(seconds, 0.0, price, units), self.terms)
        return np.where(self.terms.met(seconds, units, price), score, np.inf)

    def words(self, score: float) -> str:
        """Say a score."""
        return self.objective.words(score, self.unit)

    def _units(self, plan: Plan) -> int:
        return plan.units if self.unit == "token" else plan.batch
