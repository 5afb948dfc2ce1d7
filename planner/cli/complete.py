"""What the shell completes: names of plans, strategies, profiles and clusters. Quick: nothing heavy is loaded."""

from __future__ import annotations

from pathlib import Path

from planner.store import FOLDER


def _starting(text: str, *names: str) -> list[str]:
    return [name for name in names if name.startswith(text)]


def plans(incomplete: str) -> list[str]:
    """Complete best, and the plans of the last simulation; files are the shell's own."""
    return _starting(incomplete, "best", *sorted(path.stem for path in Path(FOLDER, "plans").glob("*.toml")))


def strategies(incomplete: str) -> list[str]:
    """Complete the registered strategies."""
    from planner.placement.strategies import all_strategies

    return _starting(incomplete, *(entry.name for entry in all_strategies()))


def synchronisations(incomplete: str) -> list[str]:
    """Complete the registered ways in which replicas agree."""
    from planner.orders.synchronisation import names

    return _starting(incomplete, *names())


def mappings(incomplete: str) -> list[str]:
    """Complete what can stand side by side."""
    from planner.placement.mapping import MAPPINGS

    return _starting(incomplete, *MAPPINGS)


def objectives(incomplete: str) -> list[str]:
    """Complete the registered objectives."""
    from planner.search.objective import names

    return _starting(incomplete, *names())


def profiles(incomplete: str) -> list[str]:
    """Complete the profiles of the store, and the shipped ones."""
    from profiles import shipped

    own = sorted(path.stem for path in Path(FOLDER, "profiles").glob("*.json"))
    return _starting(incomplete, *own, *shipped.profiles())


def clusters(incomplete: str) -> list[str]:
    """Complete the shipped clusters; files are the shell's own."""
    from profiles import shipped

    return _starting(incomplete, *shipped.clusters())


def columns(incomplete: str) -> list[str]:
    """Complete the columns of the tables."""
    from planner.cli.tables import NAMES

    return _starting(incomplete, *NAMES)
