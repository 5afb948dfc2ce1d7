"""The table of operations: it is whole, and what derives from it agrees with it."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from planner.cli.draw import LETTERS, NAMES
from planner.orders.codes import PORTS, STAGES, code, unpack
from planner.orders.operations import OPERATIONS, OPS, ROLES, TABLE, Operation
from planner.programs.waits import MESSAGES, PLANES


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=str)
def test_an_operation_names_only_operations_and_roles(operation: Operation) -> None:
    assert operation.role in ROLES
    for field in ("posts", "takes", "needs", "wants", "makes"):
        assert getattr(operation, field) in ("", *OPS)
    for transfer in (operation.posts, operation.takes, operation.needs, operation.wants):
        assert not transfer or OPERATIONS[transfer].posts == transfer  # a transfer is named by one of its parties
    assert bool(operation.posts) == bool(operation.group)
    assert bool(operation.end) == (operation.group == "pair")
    assert not operation.takes or OPERATIONS[operation.takes].end == "target"
    assert not operation.makes or OPERATIONS[operation.makes].end == "source"
    assert operation.busy or not operation.computes


def test_tables_for_loops_have_an_entry_per_operation() -> None:
    assert {len(column) for column in TABLE} == {len(OPS)}
    assert PLANES[: len(MESSAGES)] == MESSAGES  # messages are numbered first


def test_what_is_drawn_has_words() -> None:
    assert set(LETTERS.values()) == set(NAMES)
    assert len({role.letter for role in ROLES.values() if role.letter}) == len(NAMES)


def test_the_page_has_a_colour_for_every_role() -> None:
    """A colour as a variable, for scripts, and as a class, for what is HTML."""
    styles = resources.files("reports").joinpath("assets", "page.css").read_text()
    assert set(re.findall(r"^  --role-([\w-]+):", styles, re.M)) == set(ROLES)
    assert set(re.findall(r"^\.role-([\w-]+) ", styles, re.M)) == set(ROLES)


def test_a_code_has_room() -> None:
    """65,536 stages and 2^31 micro-batches, and what has no room is refused rather than written over its neighbour."""
    for stage, microbatch, port in ((65_535, 2**31, 0), (STAGES, 0, PORTS), (0, 2**32 - 2, 1)):
        assert unpack(code("LOAD", stage, microbatch, port)) == ("LOAD", stage, microbatch, port)
    for stage, microbatch, port in ((STAGES + 1, 0, 0), (0, 2**32 - 1, 0), (0, 0, PORTS + 1)):
        with pytest.raises(OverflowError, match="room"):
            code("F", stage, microbatch, port)
