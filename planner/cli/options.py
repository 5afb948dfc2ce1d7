"""Options that several commands have: one name, one help, one way to read them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner.basis.errors import PlanError, unknown
from planner.cli import complete
from planner.cli.tables import NAMES
from planner.orders import synchronisation as synchronisations
from planner.placement import savings, strategies
from planner.placement.mapping import MAPPINGS

ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="A profile's path or name, or a shipped one, as resnet50. Default: the last one.",
        autocompletion=complete.profiles,
    ),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Other hardware than the profiled: a TOML file, or a shipped name, as dgx-a100.",
        autocompletion=complete.clusters,
    ),
]
StrategyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        help="Only this strategy; may be repeated. Default: all of them.",
        autocompletion=complete.strategies,
    ),
]
ReplicasOption = Annotated[
    list[int] | None, typer.Option("--replicas", help="Only pipelines of so many replicas; may be repeated.", min=1)
]
TensorOption = Annotated[
    list[int] | None, typer.Option("--tensor", help="Only with tensors split over so many devices.", min=1)
]
ChunksOption = Annotated[
    list[int] | None, typer.Option("--chunks", help="Only with so many stages per device (v).", min=1)
]
SynchronisationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--synchronisation",
        help="How replicas of pipelines agree: all-reduce, zero-1, ...; may be repeated.",
        autocompletion=complete.synchronisations,
    ),
]
MappingOption = Annotated[
    str | None,
    typer.Option(
        "--mapping",
        help="On several hosts, what stands side by side: the stages of pipelines, or the replicas of stages.",
        metavar="PIPELINES|STAGES",
        autocompletion=complete.mappings,
    ),
]
RecomputeOption = Annotated[
    bool | None, typer.Option("--recompute/--no-recompute", help="Only plans that repeat forwards, or none that do.")
]
SavingOption = Annotated[
    list[str] | None,
    typer.Option("--saving", help="Only with these memory savings: none, or names joined by +; may be repeated."),
]
PriceOption = Annotated[float | None, typer.Option("--price", help="Price of every device per hour.", min=0.0)]
HostPriceOption = Annotated[
    float | None, typer.Option("--host-price", help="Price of every host per hour; hosts are rented whole.", min=0.0)
]
SortOption = Annotated[
    str | None,
    typer.Option(
        "--sort",
        help=f"Sort the table by {', '.join(NAMES[:-1])} or {NAMES[-1]}. Default: the best first.",
        metavar="COLUMN",
        autocompletion=complete.columns,
    ),
]
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter", help="Show only plans whose name has this text, as gpipe; may be repeated.", metavar="TEXT"
    ),
]
AllOption = Annotated[
    bool, typer.Option("--all", help="Show all plans, not only the best; of a search all that were evaluated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def axes(
    *,
    k: list[int] | None = None,
    m: list[int] | None = None,
    strategy: list[str] | None = None,
    replicas: list[int] | None = None,
    tensor: list[int] | None = None,
    chunks: list[int] | None = None,
    synchronisation: list[str] | None = None,
    mapping: str | None = None,
    saving: list[str] | None = None,
    recompute: bool | None = None,
) -> dict[str, tuple[Any, ...]]:
    """Return the axes of a space that are asked for, by their names in `planner.search.space.Space`; others are empty.

    Raises `PlanError` (exit 2) with the nearest name for an unknown strategy, synchronisation, mapping or saving.
    """
    if mapping is not None and mapping not in MAPPINGS:
        raise unknown("mapping", mapping, MAPPINGS, where="--mapping", fix="--mapping stages")
    chosen = tuple(_savings(text) for text in saving or ())
    if recompute is not None:
        among = chosen or savings.COMBINATIONS
        chosen = tuple(c for c in among if any(savings.get(name).repeats for name in c) == recompute)
        if not chosen:
            raise PlanError(
                what="--recompute and --saving exclude each other",
                where="--saving",
                why=f"none of {', '.join(saving or ())} {'repeats forwards' if recompute else 'leaves that out'}",
                fix="leave one of them out",
            )
    return {
        "ks": tuple(k or ()),
        "ms": tuple(m or ()),
        "strategies": tuple(strategies.get(name).name for name in strategy or ()),
        "replicas": tuple(replicas or ()),
        "tensors": tuple(tensor or ()),
        "chunks": tuple(chunks or ()),
        "synchronisations": tuple(synchronisations.get(name).name for name in synchronisation or ()),
        "mappings": (mapping,) if mapping else (),
        "savings": chosen,
    }


def _savings(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    names = tuple(text.split("+"))
    for name in names:
        if name not in savings.names():
            raise unknown("saving", name, ("none", *savings.names()), where="--saving", fix="join names by +")
    return names
