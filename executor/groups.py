"""The process groups of a run: who talks to whom besides passing messages. Made by all ranks, in the same order."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from executor.torch_adapter import timeout
from planner.orders import synchronisation
from planner.programs.rolling import rolls
from planner.values.plan import Plan


class Groups:
    """The groups that a plan needs. Making them is something that all ranks do at the same time.

    `all` carries the messages, apart from the collectives. `replicas` says of which pipeline each row is, and
    `pipeline` joins the rows of this rank's. `holding` joins those that hold each stage, for its gradients: one group
    per stage, as what is done in a group is done by all in one order; `gathering` does so for sharded parameters.
    `judging` joins those that have losses. `evaluating` carries the messages of evaluations, between which some of the
    training may be under way.
    """

    def __init__(self, plan: Plan) -> None:
        shards = synchronisation.get(plan.synchronisation).shards
        rows = range(len(plan.groups))
        self.all = group_of(rows)
        self.evaluating = group_of(rows) if rolls(plan) else self.all
        self.replicas = tuple(row * plan.pipelines // len(rows) for row in rows)
        own = self.replicas[dist.get_rank()]
        pipelines = [among(row for row in rows if self.replicas[row] == r) for r in range(plan.pipelines)]
        self.pipeline = pipelines[own]
        self.holding = [among(holders) for holders in plan.holders]
        self.gathering = [among(holders) for holders in plan.holders] if "parameters" in shards else []
        self.judging = among(plan.holders[-1])


def among(rows: Iterable[int]) -> dist.ProcessGroup | None:
    """Make the group of some rows; None for one row alone."""
    wanted = sorted(rows)
    return group_of(wanted) if len(wanted) > 1 else None


def group_of(rows: Iterable[int]) -> dist.ProcessGroup:
    """Make a group with the run's patience: torch would wait half an hour in it for a rank that has stopped."""
    found: dist.ProcessGroup = dist.new_group(list(rows), timeout=timeout())
    return found
