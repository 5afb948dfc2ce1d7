"""`plan show`: a plan as a person reads it: its stages, and its schedule as a grid."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner.basis.errors import PlanError
from planner.basis.units import samples_words, seconds, size
from planner.cli import output
from planner.cli.complete import clusters, plans, profiles
from planner.cli.opened import Meant, meant
from planner.cli.options import JsonOption
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import costs_of
from planner.orders.action import Action
from planner.orders.codes import Order
from planner.orders.edges import Edges
from planner.orders.operations import COMPUTES, OPERATIONS, RECOMPUTE
from planner.programs.lowering import compute_order, unroll
from planner.programs.messages import messages
from planner.programs.program import Program
from planner.programs.waits import Linked
from planner.values.plan import Plan, windows

ROWS = 16
"""Devices of the grid."""
CELLS = 10_000
"""Actions of a grid in JSON."""


def show(
    plan: Annotated[
        str, typer.Argument(help="best, a plan of the last simulation, or a plan file.", autocompletion=plans)
    ] = "best",
    profile: Annotated[
        str | None, typer.Option(help="A profile's path or name. Default: the simulation's.", autocompletion=profiles)
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Other hardware than the simulation's.", autocompletion=clusters)
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print all actions instead, a line per device.")] = False,
    json: JsonOption = False,
) -> None:
    """Print a plan's stages (layers, devices, seconds and bytes) and its schedule as a grid."""
    if csv and json:
        raise PlanError(
            what="--csv and --json exclude each other",
            where="plan show",
            why="an answer is one document",
            fix="leave one of them out",
        )
    question = meant(plan, profile, cluster)
    placed = Placed(question.profile, question.plan, question.cluster)
    if csv:
        print(written(question.plan), end="")
    elif json:
        output.document("show", as_data(placed))
    else:
        _print(question, placed)


def written(plan: Plan) -> str:
    """Return every action of every device: a line each, the device's name first."""
    lines = unroll(plan).to_csv().splitlines()
    return "".join(f"{name},{line}\n" for name, line in zip(plan.devices, lines, strict=True))


def slots(order: Order, edges: Edges) -> list[list[Action | None]]:
    """Return when each device computes what, if every compute takes one slot and messages take none; None is idle.

    >>> from planner.orders.edges import chain
    >>> from planner.orders.schedules import Shape, arrange
    >>> for row in slots(arrange("gpipe", Shape(2, 2)), chain(2)): print(" ".join(str(a or "...") for a in row))
    0F0 0F1 ... ... 0B0 0B1
    ... 1F0 1F1 1B0 1B1
    """
    linked = Linked(Program(messages(order, edges), edges)).buffered()
    posts, ends = linked.posts.tolist(), linked.offsets[1:].tolist()
    sent: dict[int, int] = {}
    placed: list[list[Action | None]] = [[] for _ in ends]
    at = linked.offsets[:-1].tolist()
    moved = True
    while moved:
        moved = False
        for d, row in enumerate(placed):
            while at[d] < ends[d] and all(t in sent for t in linked.awaited(at[d])):
                action = linked.actions[at[d]]
                if OPERATIONS[action.op].computes:
                    begin = max([len(row), *(sent[t] for t in linked.awaited(at[d]))])
                    row += [*[None] * (begin - len(row)), action]
                elif posts[at[d]] >= 0:
                    sent[posts[at[d]]] = len(row)
                at[d] += 1
                moved = True
    return placed


def stages(placed: Placed) -> list[dict[str, Any]]:
    """Every stage: layers, devices, median seconds per micro-batch by operation, bytes of parameters and peak."""
    plan = placed.plan
    linked = Linked(unroll(plan, replicas=1 if placed.alike else None))
    spent = costs_of(placed, linked).by_operation
    peaks = MemoryModel(placed, linked).peaks().tolist()
    found = []
    for number, (stage, layers) in enumerate(zip(plan.stages, placed.ranges, strict=True)):
        held = [row for row in plan.holders[number] if row < len(peaks)]
        found.append(
            {
                "stage": number,
                "layers": list(stage.layers),
                "devices": list(stage.devices),
                "seconds": {op: spent[f"{number}{op}"] for op in COMPUTES if f"{number}{op}" in spent},
                "recompute_s": spent.get(f"{number}{RECOMPUTE}", 0.0),
                "parameter_bytes": sum(placed.profile.layers[i].parameter_bytes for i in layers),
                "peak_bytes": max(peaks[row] for row in held),
            }
        )
    return found


def as_data(placed: Placed) -> dict[str, Any]:
    """A plan as JSON data, with units in the names; the grid is left out where it is long."""
    plan = placed.plan
    order = compute_order(plan, 1)
    short = sum(map(len, order)) <= CELLS
    return {
        "plan": str(plan),
        "strategy": plan.strategy,
        "schedule": plan.schedule,
        "cluster": placed.cluster.name,
        "microbatches": plan.microbatches,
        "batch_samples": plan.batch,
        "tokens_per_sample": plan.sequence,
        "replicas": plan.replicas,
        "tensor": plan.tensor,
        "chunks": plan.chunks,
        "synchronisation": plan.synchronisation,
        "stages": stages(placed),
        "grid": [[str(cell) if cell else None for cell in row] for row in slots(order, plan.edges)] if short else None,
    }


def _print(question: Meant, placed: Placed) -> None:
    from rich.table import Table

    plan = question.plan
    depth = f"{len(plan.stages)} {'stage' if len(plan.stages) == 1 else 'stages'}"
    dealt = f", {plan.replicas} replicas" if plan.replicas > 1 else ""
    dealt += f", tensors split over {plan.tensor}" if plan.tensor > 1 else ""
    title = f"{plan}: {question.profile.key.model} on {placed.cluster.name}, {depth}{dealt}, schedule {plan.schedule}, "
    title += f"M={plan.microbatches} micro-batches of {samples_words([plan.samples], [plan.sequence])}"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    found = stages(placed)
    ops = [op for op in COMPUTES if any(op in stage["seconds"] for stage in found)]
    words = {"F": "forward", "B": "backward", "I": "of input", "W": "of weights"}
    for name in ("stage", "layers"):
        table.add_column(name, justify="right" if name == "stage" else "left")
    for name in ("devices", *(words[op] for op in ops), "parameters", "peak"):
        table.add_column(name, justify="left" if name == "devices" else "right", no_wrap=name != "devices")
    for stage in found:
        names, devices = stage["layers"], stage["devices"]
        layers = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        on = ", ".join(devices) if len(devices) <= 4 else f"{devices[0]} … {devices[-1]} ({len(devices)})"
        times = [seconds(stage["seconds"].get(op, 0.0)) for op in ops]
        memory = size(stage["parameter_bytes"]), size(stage["peak_bytes"])
        table.add_row(str(stage["stage"]), layers.replace("[", "\\["), on, *times, *memory)
    output.results.print(title, markup=False, soft_wrap=True)
    output.results.print(table)
    for line in drawn(plan, output.results.width):
        print(line)
    output.results.print("\nnext: plan show --csv   (all actions, with messages)", markup=False)


def drawn(plan: Plan, width: int) -> list[str]:
    """Draw a schedule as a grid, a row per device and a column per slot; what does not fit in is cut, and said."""
    rows = slots(compute_order(plan, 1), plan.edges)
    names = plan.devices[: len(rows)]
    label = max(map(len, names[:ROWS]))
    cell = 1 + max((len(str(c)) for row in rows for c in row if c), default=1)
    columns = max(1, (width - label) // cell)
    longest = max(map(len, rows))
    lines = ["", "every compute drawn as one slot, messages as none (0F1 = stage 0, forward, micro-batch 1):"]
    for name, row in zip(names[:ROWS], rows, strict=False):
        text = "".join(f" {str(c) if c else '.':<{cell - 1}}" for c in row[:columns])
        lines.append(f"{name:<{label}}{text}".rstrip())
    notes = []
    if longest > columns:
        notes.append(f"the first {columns} of {longest} slots")
    if len(rows) > ROWS:
        notes.append(f"the first {ROWS} of {len(rows)} devices")
    if plan.replicas > 1 and not plan.uneven:
        notes.append(f"the first of {plan.replicas} replicas, which do the same with their own micro-batches")
    if windows(plan) > 1:
        notes.append(f"{windows(plan)} steps of M={plan.microbatches}, which overlap")
    return [*lines, f"({'; '.join(notes)})"] if notes else lines
