"""The strategies: how a model can be spread over K devices. The registry is the only list of them.

A strategy turns a question (profile, cluster, K, M, batch) into a plan, or says why it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from planner import partition
from planner.cluster import Cluster
from planner.costs import StageCosts
from planner.errors import PlanError, unknown
from planner.plan import Plan, Stage
from planner.profile import Profile


class Question(NamedTuple):
    """What a strategy is asked: K devices of a cluster, M micro-batches in a batch of so many samples."""

    profile: Profile
    cluster: Cluster
    k: int
    m: int
    batch: int


Spread = Callable[[Question], Plan]


class Strategy(NamedTuple):
    """A registered strategy: its name, what it does in a few words, and how."""

    name: str
    summary: str
    spread: Spread


_REGISTRY: dict[str, Strategy] = {}


def strategy(name: str, summary: str) -> Callable[[Spread], Spread]:
    """Register `Question -> Plan` under `name`."""

    def register(function: Spread) -> Spread:
        _REGISTRY[name] = Strategy(name, summary, function)
        return function

    return register


def all_strategies() -> tuple[Strategy, ...]:
    """Every registered strategy."""
    return tuple(_REGISTRY.values())


def get(name: str) -> Strategy:
    """Return a strategy. Raises `PlanError` with the nearest name for an unknown one."""
    if name not in _REGISTRY:
        raise unknown("strategy", name, _REGISTRY, where="--strategy", fix="choose one of the known strategies")
    return _REGISTRY[name]


@strategy("single", "one device, gradients accumulated over the micro-batches")
def single(q: Question) -> Plan:
    """Everything on one device; on a CPU host one process with all its cores."""
    return _plan(q, "single", "1f1b", (range(len(q.profile.layers)),), replicas=1)


@strategy("naive", "N/K layers per device, one device works at a time")
def naive(q: Question) -> Plan:
    """Model parallelism without a pipeline."""
    return _plan(q, "naive", "naive", partition.equal(len(q.profile.layers), _stages(q)))


@strategy("balanced", "as naive, cut where the slowest stage is fastest")
def balanced(q: Question) -> Plan:
    """Model parallelism without a pipeline, balanced by cost."""
    return _plan(q, "balanced", "naive", _balanced(q))


@strategy("data-parallel", "the whole model on every device, gradients all-reduced")
def data_parallel(q: Question) -> Plan:
    """K replicas; each accumulates over its M / K micro-batches, then all reduce their gradients."""
    if q.m % q.k:
        raise PlanError(
            what="data parallelism cannot deal the micro-batches out evenly",
            where=f"strategy data-parallel, K={q.k}, M={q.m}",
            why=f"{q.m} micro-batches are not a multiple of {q.k} replicas",
            fix=f"plan simulate --k {q.k} --m {(q.m // q.k + 1) * q.k}",
        )
    return _plan(q, "data-parallel", "1f1b", (range(len(q.profile.layers)),), replicas=q.k)


@strategy("gpipe", "a pipeline: all forwards, then all backwards")
def gpipe(q: Question) -> Plan:
    """GPipe over balanced stages."""
    return _plan(q, "gpipe", "gpipe", _balanced(q))


@strategy("1f1b", "a pipeline: one forward, one backward, fewer activations held")
def one_forward_one_backward(q: Question) -> Plan:
    """1F1B over balanced stages."""
    return _plan(q, "1f1b", "1f1b", _balanced(q))


def _stages(q: Question) -> int:
    if q.k > len(q.profile.layers):
        raise PlanError(
            what=f"K={q.k} stages are more than the model's {len(q.profile.layers)} layers",
            where="--k",
            why="every stage needs at least one layer",
            fix=f"plan simulate --k {len(q.profile.layers)} --m {q.m}",
        )
    return q.k


def _balanced(q: Question) -> tuple[range, ...]:
    threads = q.cluster.take(q.k).devices[0].threads
    weights = []
    for i in range(len(q.profile.layers)):
        costs = StageCosts(q.profile, range(i, i + 1), q.batch // q.m)
        weights.append(costs.forward(threads) + costs.backward(threads))
    return partition.balanced(weights, _stages(q))


def _plan(q: Question, name: str, schedule: str, ranges: tuple[range, ...], replicas: int = 1) -> Plan:
    taken = q.cluster.take(len(ranges) * replicas)
    names = [layer.name for layer in q.profile.layers]
    stages = tuple(
        Stage(
            layers=tuple(names[i] for i in layers),
            devices=tuple(taken.devices[r * len(ranges) + s].name for r in range(replicas)),
        )
        for s, layers in enumerate(ranges)
    )
    plan = Plan(
        strategy=name,
        schedule=schedule,
        stages=stages,
        microbatches=q.m,
        batch=q.batch,
        threads=taken.devices[0].threads,
    )
    _check_tied(q.profile, plan)
    return plan


def _check_tied(profile: Profile, plan: Plan) -> None:
    """Raise `PlanError` when a parameter would live in two stages: nothing would keep its copies equal yet."""
    home = {layer: i for i, stage in enumerate(plan.stages) for layer in stage.layers}
    for parameter, *layers in profile.tied:
        stages = sorted({home[layer] for layer in layers})
        if len(stages) > 1:
            raise PlanError(
                what=f"the tied parameter '{parameter}' would be split",
                where=f"plan {plan}, layers {' and '.join(layers)} in stages {stages}",
                why="copies of a tied parameter in several stages are not synchronised yet",
                fix="untie it in the model file, or use single or data-parallel",
            )
