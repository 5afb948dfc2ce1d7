"""`plan search`: the best plan of the whole space, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.cli import complete
from planner.cli.options import (
    AllOption,
    ChunksOption,
    ClusterOption,
    FilterOption,
    HostPriceOption,
    JsonOption,
    MappingOption,
    PriceOption,
    ProfileOption,
    RecomputeOption,
    ReplicasOption,
    SavingOption,
    SortOption,
    StrategyOption,
    SynchronisationOption,
    TensorOption,
    axes,
)
from planner.cli.searching import Question, run


def search(
    k: Annotated[list[int] | None, typer.Option("--k", help="Only this number of devices; may be repeated.")] = None,
    m: Annotated[list[int] | None, typer.Option("--m", help="Only this number of micro-batches.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Samples per step; may be repeated. Default: the profile's.")
    ] = None,
    sequence: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per sample, of which there is a profile; several are compared per token.", min=1),
    ] = None,
    strategy: StrategyOption = None,
    replicas: ReplicasOption = None,
    tensor: TensorOption = None,
    chunks: ChunksOption = None,
    synchronisation: SynchronisationOption = None,
    mapping: MappingOption = None,
    recompute: RecomputeOption = None,
    saving: SavingOption = None,
    objective: Annotated[
        str,
        typer.Option(
            help="throughput, epoch, memory or cost; cost also hires slower devices that cost less.",
            autocompletion=complete.objectives,
        ),
    ] = "throughput",
    epoch: Annotated[
        int,
        typer.Option(
            help="Samples to train on, or tokens of several lengths, for the objective epoch, a deadline or a budget.",
            min=0,
        ),
    ] = 0,
    price: PriceOption = None,
    host_price: HostPriceOption = None,
    deadline: Annotated[
        float | None, typer.Option(help="Hours, more than 0, within which --epoch samples must be done.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="What --epoch samples may cost at most, from 0; slower devices that cost less are hired, too."
        ),
    ] = None,
    stale: Annotated[bool, typer.Option(help="Let plans with stale gradients compete.")] = False,
    profile: ProfileOption = None,
    cluster: ClusterOption = None,
    seconds: Annotated[float, typer.Option(help="Seconds to search at most.", min=0.1)] = float("inf"),
    sort: SortOption = None,
    words: FilterOption = None,
    every: AllOption = False,
    restart: Annotated[bool, typer.Option(help="Forget what an earlier, interrupted search has evaluated.")] = False,
    json: JsonOption = False,
) -> None:
    """Rank every strategy, K, M, batch, length, replicas and saving for a profile and a cluster; explain the best plan.

    Ctrl-C keeps what was found; the same command goes on where it was.
    """
    question = Question(
        profile=profile,
        cluster=cluster,
        batches=tuple(batch or ()),
        sequences=tuple(sequence or ()),
        axes=axes(
            k=k,
            m=m,
            strategy=strategy,
            replicas=replicas,
            tensor=tensor,
            chunks=chunks,
            synchronisation=synchronisation,
            mapping=mapping,
            saving=saving,
            recompute=recompute,
        ),
        objective=objective,
        epoch=epoch,
        price=price,
        host_price=host_price,
        deadline_h=deadline,
        budget=budget,
        stale=stale,
        seconds=seconds,
        restart=restart,
    )
    run(question, sort=sort, words=words or (), every=every, json=json)
