"""Who makes a value and who takes it: the edges of a program. By default its stages are a chain.

Along an edge the producer's micro-batch m goes to the consumer's micro-batch m, and where the edge has a gradient it
comes back for the same micro-batch. An action says which of its stage's edges it takes by a port: the edge's place
among those that leave (sending forward, receiving backward) or reach (receiving forward, sending backward) the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from planner.orders.codes import PORTS, STAGES, Codes
from planner.orders.operations import OPERATIONS


class Edge(NamedTuple):
    """One stage takes what another makes.

    `values` are the names of the profile's values that go along it; empty means everything that the layers before the
    consumer's make and it or later layers read, so that what jumps over stages is relayed. Only with `gradient` does
    anything come back: a teacher's consumers send nothing.
    """

    producer: int
    consumer: int
    gradient: bool = True
    values: tuple[str, ...] = ()


class EdgeTable(NamedTuple):
    """The same for loops.

    Of every edge its ends, its port at each, and whether a gradient comes back. Stage s has the edges
    `leaving[leaves[s]:leaves[s + 1]]` and `reaching[reaches[s]:reaches[s + 1]]`, by port.
    """

    producer: Codes
    consumer: Codes
    producer_port: Codes
    consumer_port: Codes
    gradient: Codes
    leaves: Codes
    leaving: Codes
    reaches: Codes
    reaching: Codes


class Edges:
    """The edges of a program of some stages. Equal when they are the same; immutable."""

    def __init__(self, edges: Iterable[Edge], stages: int) -> None:
        """Raise `ValueError` for an edge to a stage that is not there, or more edges at one than there are ports."""
        self.edges, self.stages = tuple(edges), stages
        producers, consumers = [edge.producer for edge in self.edges], [edge.consumer for edge in self.edges]
        if any(not 0 <= s < stages <= STAGES + 1 for s in (*producers, *consumers)):
            raise ValueError(f"edges: a stage is not one of {stages}, of at most {STAGES + 1}")
        if len(set(zip(producers, consumers, strict=True))) < len(self.edges):
            raise ValueError("edges: a stage sends to another along one edge only")
        if max((int(np.bincount(end).max()) for end in (producers, consumers) if end), default=0) > PORTS + 1:
            raise ValueError(f"edges: a stage has at most {PORTS + 1} on each side")

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.edges)

    def __len__(self) -> int:
        return len(self.edges)

    def __getitem__(self, index: int) -> Edge:
        return self.edges[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edges) and (self.edges, self.stages) == (other.edges, other.stages)

    def __hash__(self) -> int:
        return hash(self.edges)

    @cached_property
    def table(self) -> EdgeTable:
        """The edges as arrays."""
        producer = np.array([edge.producer for edge in self.edges], np.int64)
        consumer = np.array([edge.consumer for edge in self.edges], np.int64)
        gradient = np.array([edge.gradient for edge in self.edges], np.int64)
        starts, orders, ports = [], [], []
        for end in (producer, consumer):
            order = np.argsort(end, kind="stable")
            start = np.searchsorted(end[order], np.arange(self.stages + 1))
            port = np.empty(len(end), np.int64)
            port[order] = np.arange(len(end)) - start[end[order]]
            starts.append(start.astype(np.int64))
            orders.append(order.astype(np.int64))
            ports.append(port)
        found = EdgeTable(producer, consumer, ports[0], ports[1], gradient, starts[0], orders[0], starts[1], orders[1])
        for column in found:
            column.flags.writeable = False
        return found

    def number(self, op: str, stage: int, port: int) -> int:
        """Number of the edge along which an action sends or receives. Raises `IndexError` where it has none there."""
        table = self.table
        leaves = OPERATIONS[op].side == "leaving"
        starts, order = (table.leaves, table.leaving) if leaves else (table.reaches, table.reaching)
        at = int(starts[stage]) + port
        if not at < starts[stage + 1]:
            raise IndexError(f"stage {stage} has no edge at port {port} for {op}")
        return int(order[at])

    def place(self, op: str, number: int) -> tuple[int, int]:
        """Stage and port of the action `op` that sends or receives along an edge.

        >>> chain(3).place("RECV_F", 1), chain(3).number("RECV_F", 2, 0)
        ((2, 0), 1)
        """
        table = self.table
        if OPERATIONS[op].side == "leaving":
            return int(table.producer[number]), int(table.producer_port[number])
        return int(table.consumer[number]), int(table.consumer_port[number])


@lru_cache(maxsize=256)
def chain(stages: int) -> Edges:
    """Return the edges of a pipeline: every stage sends to the next."""
    return Edges((Edge(stage, stage + 1) for stage in range(stages - 1)), stages)
