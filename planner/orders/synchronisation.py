"""How the replicas of a stage agree on its parameters. The registry is the only list; each is a lowering pass.

The passes add actions; what they cost is `planner.costs.priced`' matter, what is held where `planner.costs.memory`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.errors import unknown
from planner.orders import codes
from planner.orders.codes import Codes
from planner.orders.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    PULL,
    PUSH,
    RECOMPUTE,
    REDUCE_GRAD,
    RESHARD_BACKWARD,
    RESHARD_FORWARD,
    UNSHARD_BACKWARD,
    UNSHARD_FORWARD,
)

Sharded = Literal["optimizer", "gradients", "parameters"]
Pass = Callable[[Codes, int], Codes]
"""From one device's row, and the number of its micro-batches between two updates, to the row with synchronisation."""


class Synchronisation(NamedTuple):
    """A registered synchronisation.

    `shards` is what each replica holds only its part of; with `gathers` the parameters that each has updated are
    gathered behind the optimizer. `server` says where parameters live that are served. A search tries those that are
    `searched` for the replicas of every pipeline.
    """

    name: str
    summary: str
    add: Pass
    shards: tuple[Sharded, ...]
    gathers: bool
    server: Literal["", "devices", "host"]
    asynchronous: bool
    searched: bool


_REGISTRY: dict[str, Synchronisation] = {}
USUAL = "all-reduce"
"""The synchronisation of plans that do not say another."""


def synchronisation(
    name: str,
    summary: str,
    *,
    shards: tuple[Sharded, ...] = (),
    gathers: bool = False,
    server: Literal["", "devices", "host"] = "",
    asynchronous: bool = False,
    searched: bool = False,
) -> Callable[[Pass], Pass]:
    """Register a pass under `name`."""

    def register(add: Pass) -> Pass:
        _REGISTRY[name] = Synchronisation(name, summary, add, shards, gathers, server, asynchronous, searched)
        return add

    return register


def names() -> tuple[str, ...]:
    """List the registered ways."""
    return tuple(_REGISTRY)


def searched() -> tuple[str, ...]:
    """List those that a search tries with every schedule."""
    return tuple(name for name, one in _REGISTRY.items() if one.searched)


def get(name: str) -> Synchronisation:
    """Return one. Raises `PlanError` with the nearest name for an unknown one."""
    if name not in _REGISTRY:
        raise unknown("synchronisation", name, names(), where="plan.synchronisation", fix="choose one of the known")
    return _REGISTRY[name]


@synchronisation(
    USUAL, "gradients are accumulated locally and all-reduced once, overlapping the last backward", searched=True
)
def all_reduce(row: Codes, share: int) -> Codes:
    """Reduce a stage's gradients behind its last backward of every update."""
    return _behind(row, last_backward(row, share), REDUCE_GRAD)


@synchronisation(
    "zero-1", "as all-reduce, with each replica updating its shard", shards=("optimizer",), gathers=True, searched=True
)
def zero_1(row: Codes, share: int) -> Codes:
    """Reduce-scatter gradients once; the updated shards are gathered behind the optimizer (arXiv 1910.02054)."""
    return _behind(row, last_backward(row, share), REDUCE_GRAD)


@synchronisation(
    "zero-2",
    "gradients are reduced to shards after every backward",
    shards=("optimizer", "gradients"),
    gathers=True,
)
def zero_2(row: Codes, share: int) -> Codes:
    """Reduce-scatter after every backward, so that only a shard of the gradients is ever kept."""
    return codes.insert(row, codes.has(row, BACKWARD, BACKWARD_WEIGHT), REDUCE_GRAD, behind=True)


@synchronisation(
    "zero-3",
    "parameters are sharded too: gathered before use, freed after",
    shards=("optimizer", "gradients", "parameters"),
)
def zero_3(row: Codes, share: int) -> Codes:
    """All-gather before every forward and backward, reduce-scatter after every backward, as FSDP2 does.

    A gather is wanted one compute ahead, so that it overlaps; the weight gradient needs no parameters.
    """
    row = codes.insert(row, codes.has(row, BACKWARD, BACKWARD_WEIGHT), REDUCE_GRAD, behind=True)
    row = codes.insert(row, codes.has(row, FORWARD), RESHARD_FORWARD, behind=True)
    row = codes.insert(row, codes.has(row, BACKWARD, BACKWARD_INPUT), RESHARD_BACKWARD, behind=True)
    row = codes.insert(row, codes.has(row, FORWARD), UNSHARD_FORWARD, behind=False)
    takers = np.flatnonzero(codes.has(row, RECOMPUTE, BACKWARD, BACKWARD_INPUT))
    first = np.unique(codes.with_op(row[takers], BACKWARD), return_index=True)[1]
    marked = np.zeros(len(row), bool)
    marked[takers[first]] = True
    return codes.insert(row, marked, UNSHARD_BACKWARD, behind=False)


@synchronisation("parameter-server", "servers keep the parameters: pulled, gradients pushed, updated", server="devices")
def parameter_server(row: Codes, share: int) -> Codes:
    """Pull before the step's first forward, push behind its last backward; all wait for the slowest (Li, OSDI 2014)."""
    return _pull_and_push(row, share)


@synchronisation(
    "parameter-server-async",
    "as parameter-server, but nobody waits for the others",
    server="devices",
    asynchronous=True,
)
def parameter_server_async(row: Codes, share: int) -> Codes:
    """Pull and push at one's own pace: gradients are computed with parameters that others have changed since."""
    return _pull_and_push(row, share)


@synchronisation("central-storage", "variables live on the host, which averages and updates", server="host")
def central_storage(row: Codes, share: int) -> Codes:
    """As TensorFlow's CentralStorageStrategy: variables on the host's CPU, computing replicated."""
    return _pull_and_push(row, share)


def _pull_and_push(row: Codes, share: int) -> Codes:
    row = _behind(row, last_backward(row, share), PUSH)
    return codes.insert(row, first_forward(row, share), PULL, behind=False)


def _windows(row: Codes, share: int) -> Codes:
    """Which update each action belongs to, with its stage: a device's micro-batches come in runs of `share`."""
    own = codes.microbatches(row)
    rank = np.searchsorted(np.unique(own[own >= 0]), own)
    return codes.stages(row) << codes.STAGE | rank // share


def last_backward(row: Codes, share: int) -> npt.NDArray[np.bool_]:
    """Where each stage's last backward before every update is."""
    backward = np.flatnonzero(codes.has(row, BACKWARD, BACKWARD_WEIGHT))[::-1]
    found = np.zeros(len(row), bool)
    found[backward[np.unique(_windows(row, share)[backward], return_index=True)[1]]] = True
    return found


def first_forward(row: Codes, share: int) -> npt.NDArray[np.bool_]:
    """Where each stage's first forward after every update is."""
    forward = np.flatnonzero(codes.has(row, FORWARD))
    found = np.zeros(len(row), bool)
    found[forward[np.unique(_windows(row, share)[forward], return_index=True)[1]]] = True
    return found


def _behind(row: Codes, where: npt.NDArray[np.bool_], op: str) -> Codes:
    """Add `op` behind the marked actions; without a micro-batch where every stage has only one."""
    at = np.flatnonzero(where)
    added = codes.with_op(row[at], op)
    if op == REDUCE_GRAD and len(np.unique(codes.stages(added))) == len(added):
        added = added & ~codes.MICROBATCH
    return np.insert(row, at + 1, added)
