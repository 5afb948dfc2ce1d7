"""Actions as 64-bit numbers, so that a row of a program is an array and a pass over it is arithmetic.

A code holds operation, port, stage and micro-batch: `op << OP | port << PORT | stage << STAGE | (microbatch + 1)`, 0
standing for no micro-batch. A message's port tells which of its stage's edges it takes; it is 0 where there is one.
`planner.orders.action.Action` is the same thing for people.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.orders.operations import (
    NUMBER,
    OPS,
    TABLE,
)

Codes = npt.NDArray[np.int64]
Order = tuple[Codes, ...]
"""Actions of every device, one row per device."""

# Where the fields of a code begin, and how large they may become. Compiled loops hold these as constants.
OP, PORT, STAGE = 56, 50, 32
PORTS, STAGES, MICROBATCH = (1 << OP - PORT) - 1, (1 << PORT - STAGE) - 1, (1 << STAGE) - 1
SAME = (1 << PORT) - 1
"""Stage and micro-batch, without operation and port."""


def code(op: str, stage: int, microbatch: int | None = None, port: int = 0) -> int:
    """Pack one action. Raises `OverflowError` for a stage, port or micro-batch that its field cannot hold.

    >>> unpack(code("B", 3, 0)), unpack(code("SEND_F", 1, 2, 1))
    (('B', 3, 0, 0), ('SEND_F', 1, 2, 1))
    """
    own = 0 if microbatch is None else microbatch + 1
    if not (0 <= stage <= STAGES and 0 <= port <= PORTS and 0 <= own <= MICROBATCH):
        raise OverflowError(f"{stage}{op}{microbatch} (port {port}): a program has room for {STAGES + 1} stages")
    return NUMBER[op] << OP | port << PORT | stage << STAGE | own


def unpack(number: int) -> tuple[str, int, int | None, int]:
    """Return operation, stage, micro-batch and port of a code."""
    microbatch = number & MICROBATCH
    return OPS[number >> OP], number >> STAGE & STAGES, microbatch - 1 if microbatch else None, number >> PORT & PORTS


def run(op: str, stage: int, microbatches: int | range | Codes) -> Codes:
    """Return one operation of one stage for several micro-batches, in order."""
    if isinstance(microbatches, int):
        microbatches = range(microbatches)
    if isinstance(microbatches, range):  # numpy would ask a range for its numbers one by one
        microbatches = np.arange(microbatches.start, microbatches.stop, microbatches.step, dtype=np.int64)
    return microbatches + (code(op, stage) + 1)


def weave(*parts: Codes) -> Codes:
    """Take one of each part in turn; all are equally long.

    >>> [unpack(c)[0] for c in weave(run("F", 0, 2), run("B", 0, 2)).tolist()]
    ['F', 'B', 'F', 'B']
    """
    return np.stack(parts, axis=1).reshape(-1)


def join(*parts: Codes) -> Codes:
    """Put parts behind each other."""
    return np.concatenate([*parts, np.empty(0, np.int64)])


def ops(row: Codes) -> Codes:
    """Number of the operation (index into `OPS`) of every action."""
    return row >> OP


def stages(row: Codes) -> Codes:
    """Stage of every action."""
    return (row >> STAGE) & STAGES


def ports(row: Codes) -> Codes:
    """Port of every action: which of its stage's edges a message takes."""
    return (row >> PORT) & PORTS


def microbatches(row: Codes) -> Codes:
    """Micro-batch of every action, -1 where it has none."""
    return (row & MICROBATCH) - 1


def kinds(row: Codes) -> Codes:
    """Operation, port and stage of every action, without its micro-batch."""
    return row >> STAGE


def has(row: Codes, *wanted: str) -> npt.NDArray[np.bool_]:
    """Where the operation is one of `wanted`."""
    found = np.zeros(len(row), bool)
    for op in wanted:
        found |= ops(row) == NUMBER[op]
    return found


def with_op(row: Codes, op: str) -> Codes:
    """The same stages and micro-batches with another operation."""
    return (row & SAME) | (NUMBER[op] << OP)


def insert(row: Codes, where: npt.NDArray[np.bool_], op: str, *, behind: bool) -> Codes:
    """Add `op`, for the same stage and micro-batch, before or behind every action that `where` marks."""
    at = np.flatnonzero(where)
    return np.insert(row, at + 1 if behind else at, with_op(row[at], op))


def flatten(rows: Order) -> tuple[Codes, Codes]:
    """Return all rows behind each other, and where each begins (with the end of the last one).

    Rows that stand behind each other already, as `cut` leaves them, are not copied.
    """
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    whole = rows[0].base if rows else None
    if isinstance(whole, np.ndarray) and whole.dtype == np.int64 and whole.shape == (offsets[-1],):
        begin = whole.ctypes.data
        if all(
            row.base is whole and (row.ctypes.data == begin + 8 * at or not len(row))
            for row, at in zip(rows, offsets.tolist(), strict=False)
        ):
            return whole, offsets
    return join(*rows), offsets


def cut(flat: Codes, offsets: Codes) -> Order:
    """Return the rows of which `flat` is made."""
    return tuple(flat[a:b] for a, b in pairwise(offsets.tolist()))


class Extent(NamedTuple):
    """What occurs in a program: actions of each operation, stages and micro-batches (at least one of each)."""

    present: Codes
    stages: int
    microbatches: int


def extent(flat: Codes) -> Extent:
    """Count operations, stages and micro-batches in one pass."""
    present, most = np.zeros(len(OPS), np.int64), np.zeros(2, np.int64)
    _extent(len(flat), flat, present, most)
    return Extent(present, int(most[0]) + 1, max(1, int(most[1])))


def held(flat: Codes, offsets: Codes, stages: int) -> npt.NDArray[np.int8]:
    """Which stages (second index) each row computes."""
    found = np.zeros((len(offsets) - 1) * stages, np.int8)
    _held(len(flat), flat, offsets, stages, TABLE.computes, found)
    return found.reshape(-1, stages)


@kernel
def _extent(flat, present, most):  # type: ignore[no-untyped-def]
    stage = microbatch = 0
    for action in flat:
        present[action >> OP] += 1
        stage = max(stage, action >> STAGE & STAGES)
        microbatch = max(microbatch, action & MICROBATCH)
    most[0] = stage
    most[1] = microbatch
    return 0


@kernel
def _held(flat, offsets, stages, computes, found):  # type: ignore[no-untyped-def]
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            if computes[flat[i] >> OP]:
                found[d * stages + (flat[i] >> STAGE & STAGES)] = 1
    return 0
