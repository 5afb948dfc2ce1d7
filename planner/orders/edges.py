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
import numpy.typing as npt

from planner.orders.codes import OP, PORT, PORTS, STAGE, STAGES, Codes
from planner.orders.operations import OPERATIONS, PAIR, TABLE

Starts = npt.NDArray[np.int32]


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


class KindTable(NamedTuple):
    """What each kind of action does along which edges, found once instead of at every action.

    A kind is the number `op * (stages + 1) + stage`. It takes values along the edges
    `taken[takes[kind]:takes[kind + 1]]`; each is made by a forward (slot: the stage that makes it) or a backward (slot:
    that stage, behind all forwards').
    What it makes is sent on to the stages `receiver[makes[kind]:makes[kind + 1]]`, by `send` and `receive`, codes
    without a micro-batch. The edge of a message is `ported[ports[kind] + port]`.
    """

    takes: Starts
    taken: Codes
    slot: Codes
    makes: Starts
    receiver: Codes
    send: Codes
    receive: Codes
    ports: Starts
    ported: Codes


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

    @cached_property
    def kinds(self) -> KindTable:
        """The edges by kinds of actions."""
        taking, making, posting = (self._by_kind(TABLE.takes), self._by_kind(TABLE.makes), self._by_kind(None))
        table, forward = self.table, TABLE.leaving == TABLE.source  # gradients are sent along edges that reach
        takes = forward[TABLE.takes[taking.op]]
        slot = np.where(takes, table.producer[taking.edge], self.stages + table.consumer[taking.edge])
        send = TABLE.makes[making.op]
        leaves = TABLE.leaving[send] > 0
        own = np.where(leaves, table.producer[making.edge], table.consumer[making.edge])
        own_port = np.where(leaves, table.producer_port[making.edge], table.consumer_port[making.edge])
        other = np.where(leaves, table.consumer[making.edge], table.producer[making.edge])
        port = np.where(leaves, table.consumer_port[making.edge], table.producer_port[making.edge])
        return KindTable(
            takes=taking.starts,
            taken=taking.edge,
            slot=slot,
            makes=making.starts,
            receiver=other,
            send=send << OP | own_port << PORT | own << STAGE,
            receive=TABLE.posts[send] << OP | port << PORT | other << STAGE,
            ports=posting.starts,
            ported=posting.edge,
        )

    def _by_kind(self, along: Codes | None) -> _ByKind:
        """List, kind by kind, the edges of the message that an operation takes or makes (`along`), or of its own ports.

        Along edges without a gradient nothing comes back, but they have ports.
        """
        table = self.table
        starts, edges, ops = [np.zeros(1, np.int32)], [table.producer[:0]], [table.producer[:0]]
        found = 0
        for op in range(len(OPERATIONS)):
            message = op if along is None else int(along[op])
            mine = np.zeros(self.stages + 1, np.int32)
            if message >= 0 and TABLE.group[message] == PAIR:
                leaves = bool(TABLE.leaving[message])
                first, order = (table.leaves, table.leaving) if leaves else (table.reaches, table.reaching)
                forward = leaves == bool(TABLE.source[message])
                has = np.ones(len(order), bool) if forward or along is None else table.gradient[order] > 0
                mine[:] = np.append(0, np.cumsum(has))[first]
                edges.append(order[has])
                ops.append(np.full(int(has.sum()), op, np.int64))
            starts.append(mine[1:] + found)
            found += int(mine[-1])
            starts.append(np.full(1, found, np.int32))
        return _ByKind(np.concatenate(starts), np.concatenate(edges), np.concatenate(ops))

    def number(self, op: str, stage: int, port: int) -> int:
        """Number of the edge along which an action sends or receives. Raises `IndexError` where it has none there."""
        table = self.table
        leaves = OPERATIONS[op].side == "leaving"
        starts, order = (table.leaves, table.leaving) if leaves else (table.reaches, table.reaching)
        at = int(starts[stage]) + port
        if not at < starts[stage + 1]:
            raise IndexError(f"stage {stage} has no edge at port {port} for {op}")
        return int(order[at])

    def ends(self, stage: int) -> tuple[bool, bool]:
        """Return whether a stage is where the model begins, and where it ends: nothing reaches it, nothing leaves it.

        >>> chain(3).ends(0), chain(3).ends(1), chain(3).ends(2)
        ((True, False), (False, False), (False, True))
        """
        table = self.table
        return (
            bool(table.reaches[stage] == table.reaches[stage + 1]),
            bool(table.leaves[stage] == table.leaves[stage + 1]),
        )

    def place(self, op: str, number: int) -> tuple[int, int]:
        """Stage and port of the action `op` that sends or receives along an edge.

        >>> chain(3).place("RECV_F", 1), chain(3).number("RECV_F", 2, 0)
        ((2, 0), 1)
        """
        table = self.table
        if OPERATIONS[op].side == "leaving":
            return int(table.producer[number]), int(table.producer_port[number])
        return int(table.consumer[number]), int(table.consumer_port[number])


class _ByKind(NamedTuple):
    starts: Starts
    edge: Codes
    op: Codes


@lru_cache(maxsize=256)
def chain(stages: int) -> Edges:
    """Return the edges of a pipeline: every stage sends to the next."""
    return Edges((Edge(stage, stage + 1) for stage in range(stages - 1)), stages)
