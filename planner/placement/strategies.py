"""The strategies: how a model can be spread over K devices. The registry is the only list of them.

A strategy turns a question (profile, cluster, K, M, batch) into a plan, or says why it cannot. Every schedule and every
way of synchronising replicas is a strategy under its own name; those that are more than that stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from planner.basis.errors import unknown
from planner.orders import schedules, synchronisation
from planner.placement import pipeline as placement
from planner.placement.pipeline import Question
from planner.values.plan import Plan

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
    return placement.pipeline(q._replace(k=1, replicas=1, tensor=1), "single", "1f1b")


@strategy("naive", "N/K layers per device, one device works at a time")
def naive(q: Question) -> Plan:
    """Model parallelism without a pipeline."""
    return placement.pipeline(q, "naive", "naive", cut="equal")


@strategy("balanced", "as naive, cut where the slowest stage is fastest")
def balanced(q: Question) -> Plan:
    """Model parallelism without a pipeline, balanced by cost."""
    return placement.pipeline(q, "balanced", "naive")


@strategy("data-parallel", "the whole model on every device, gradients all-reduced")
def data_parallel(q: Question) -> Plan:
    """K replicas; each accumulates over its M / K micro-batches, then all reduce their gradients."""
    return replicas(q, "data-parallel", "all-reduce")


@strategy("tensor-parallel", "every layer's tensors split over all devices")
def tensor_parallel(q: Question) -> Plan:
    """Column and row split (Shoeybi et al., arXiv 1909.08053) of the layers that declare how they split."""
    return placement.pipeline(q._replace(tensor=q.k, replicas=1), "tensor-parallel", "1f1b")


@strategy("1f1b-replicated", "1F1B, each stage with as many replicas as PipeDream's optimizer gives it")
def one_forward_one_backward_replicated(q: Question) -> Plan:
    """Synchronous training on PipeDream's partition."""
    return placement.replicated(q, "1f1b-replicated", "1f1b")


@strategy("pipedream-replicated", "PipeDream as published: its partition, its replicas, no flush")
def pipedream_replicated(q: Question) -> Plan:
    """Asynchronous 1F1B-RR with weight stashing."""
    return placement.replicated(q, "pipedream-replicated", "pipedream")


def replicas(q: Question, name: str, way: str) -> Plan:
    """One replica of the whole model per device, synchronised as `way` says."""
    return placement.pipeline(q._replace(replicas=q.k // q.tensor, chunks=1), name, "1f1b", synchronisation=way)


def _register_the_rest() -> None:
    for name in schedules.names():
        if name not in (*_REGISTRY, "forward-only"):
            summary = (schedules.get(name).order.__doc__ or name).partition("\n")[0].partition(" (")[0].rstrip(".")
            strategy(name, summary)(lambda q, name=name: placement.pipeline(q, name, name))  # type: ignore[misc]
    for name in synchronisation.names():
        if name != "all-reduce":
            summary = synchronisation.get(name).summary
            strategy(name, summary)(lambda q, name=name: replicas(q, name, name))  # type: ignore[misc]


_register_the_rest()
