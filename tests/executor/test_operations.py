"""The executor's dispatch against the table of operations."""

from executor.abilities import PERFORMS
from executor.rank import Rank
from planner.orders import operations


def test_what_a_rank_performs_is_in_the_table() -> None:
    """Everything else of the table is refused before a run starts, in the operation's words (`abilities.missing`)."""
    assert all(callable(getattr(Rank, method)) for method in PERFORMS.values())
    assert set(PERFORMS) <= set(operations.OPS)
