"""The strategies: how a model can be spread over K devices. The registry is the only list of them.

A strategy turns a question (profile, cluster, K, M, batch) into a plan, or says why it cannot. Every schedule and every
way of synchronising replicas is a strategy under its own name; those that are more than that stand here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from planner.basis.errors import unknown
from planner.costs.placed import Placed
from planner.orders import schedules, synchronisation
from planner.placement import freeing, savings
from planner.placement import pipeline as placement
from planner.placement.question import Question
from planner.placement.replicated import replicated
from planner.values.plan import Plan

Spread = Callable[[Question], Plan]
Devices = Literal["one", "stages", "replicas", "tensor", "chosen"]
Axis = Literal["k", "replicas", "chunks", "tensor", "synchronisation"]
EVERY: tuple[Axis, ...] = ("k", "replicas", "chunks", "tensor", "synchronisation")


class Strategy(NamedTuple):
    """A registered strategy: its name, what it does in a few words, and how.

    `schedule` is the one its plans run. `devices` is what K devices are to it: it takes `one` of them; they are the
    `stages` of a pipeline (or of several, where the question asks for replicas), `replicas` of the whole model, or
    split its `tensor`s; or it has `chosen` by itself which stage gets how many. `takes` are the axes of a question that
    it heeds; it decides about the others itself. `synchronisation` is how its replicas agree, "" where the question
    says so. `arrange` makes the plan that `spread` gives.
    """

    name: str
    summary: str
    arrange: Spread
    schedule: str
    devices: Devices
    takes: tuple[Axis, ...]
    synchronisation: str

    def spread(self, q: Question) -> Plan:
        """Return its plan. Raises `PlanError` (exit 2) where there is none, or where recomputing would free nothing."""
        return self.finish(q, self.arrange(q))

    def finish(self, q: Question, plan: Plan) -> Plan:
        """Return its plan with the savings that choose layers once the cut is known; raises as `spread`.

        Where it chooses by itself which stage gets how many devices, they have chosen already.
        """
        if self.devices != "chosen":
            plan = savings.apply(q, plan, savings.behind_cut(q.savings))
        freeing.check(Placed(q.profile, plan, q.cluster))
        return plan

    @property
    def asynchronous(self) -> bool:
        """Whether its steps overlap, whatever the question."""
        served = bool(self.synchronisation) and synchronisation.get(self.synchronisation).asynchronous
        return served or schedules.get(self.schedule).asynchronous


_REGISTRY: dict[str, Strategy] = {}


def strategy(
    name: str,
    summary: str,
    *,
    schedule: str,
    devices: Devices = "stages",
    takes: tuple[Axis, ...] = EVERY,
    synchronisation: str = "",
) -> Callable[[Spread], Spread]:
    """Register `Question -> Plan` under `name`; see `Strategy` for the rest."""

    def register(function: Spread) -> Spread:
        _REGISTRY[name] = Strategy(name, summary, function, schedule, devices, takes, synchronisation)
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


@strategy(
    "single",
    "one device, gradients accumulated over the micro-batches",
    schedule="1f1b",
    devices="one",
    takes=(),
)
def single(q: Question) -> Plan:
    """Everything on one device; on a CPU host one process with all its cores."""
    return placement.pipeline(q._replace(k=1, replicas=1, tensor=1, chunks=1), "single", "1f1b")


@strategy("naive", "N/K layers per device, one device works at a time", schedule="naive", takes=("k", "tensor"))
def naive(q: Question) -> Plan:
    """Model parallelism without a pipeline."""
    return placement.pipeline(q, "naive", "naive", cut="equal")


@strategy("balanced", "as naive, cut where the slowest stage is fastest", schedule="naive", takes=("k", "tensor"))
def balanced(q: Question) -> Plan:
    """Model parallelism without a pipeline, balanced by cost."""
    return placement.pipeline(q, "balanced", "naive")


@strategy(
    "data-parallel",
    "the whole model on every device, gradients all-reduced",
    schedule="1f1b",
    devices="replicas",
    takes=("k", "tensor"),
    synchronisation=synchronisation.USUAL,
)
def data_parallel(q: Question) -> Plan:
    """K replicas; each accumulates over its M / K micro-batches, then all reduce their gradients."""
    return replicas(q, "data-parallel", synchronisation.USUAL)


@strategy(
    "tensor-parallel",
    "every layer's tensors split over all devices",
    schedule="1f1b",
    devices="tensor",
    takes=("k",),
)
def tensor_parallel(q: Question) -> Plan:
    """Column and row split (Shoeybi et al., arXiv 1909.08053) of the layers that declare how they split."""
    return placement.pipeline(q._replace(tensor=q.k, replicas=1, chunks=1), "tensor-parallel", "1f1b")


@strategy(
    "1f1b-replicated",
    "1F1B, each stage with as many replicas as PipeDream's optimizer gives it",
    schedule="1f1b",
    devices="chosen",
    takes=("k",),
)
def one_forward_one_backward_replicated(q: Question) -> Plan:
    """Synchronous training on PipeDream's partition."""
    return replicated(q, "1f1b-replicated", "1f1b")


@strategy(
    "pipedream-replicated",
    "PipeDream as published: its partition, its replicas, no flush",
    schedule="pipedream",
    devices="chosen",
    takes=("k",),
)
def pipedream_replicated(q: Question) -> Plan:
    """Asynchronous 1F1B-RR with weight stashing."""
    return replicated(q, "pipedream-replicated", "pipedream")


def replicas(q: Question, name: str, by: str) -> Plan:
    """One replica of the whole model per device, synchronised `by` that name; one alone has nobody to agree with."""
    count = q.k // q.tensor
    agreed = by if count > 1 else synchronisation.USUAL
    return placement.pipeline(q._replace(replicas=count, chunks=1), name, "1f1b", synchronisation=agreed)


def _register_the_rest() -> None:
    for name in schedules.names():
        chosen = schedules.get(name)
        if name not in _REGISTRY and chosen.trains:
            summary = (chosen.order.__doc__ or name).partition("\n")[0].partition(" (")[0].rstrip(".")
            free = chosen.chunks[0] != chosen.chunks[1]
            takes = EVERY if free else tuple(axis for axis in EVERY if axis != "chunks")
            strategy(name, summary, schedule=name, takes=takes)(
                lambda q, name=name: placement.pipeline(q, name, name)  # type: ignore[misc]
            )
    for name in synchronisation.names():
        if name != synchronisation.USUAL:
            strategy(
                name,
                synchronisation.get(name).summary,
                schedule="1f1b",
                devices="replicas",
                takes=("k", "tensor"),
                synchronisation=name,
            )(lambda q, name=name: replicas(q, name, name))  # type: ignore[misc]


_register_the_rest()
