"""A plan as a TOML file, which people edit."""

from __future__ import annotations

import math
import re
from pathlib import Path

import msgspec

from planner.basis import files
from planner.basis.errors import ARTEFACT, PlanError
from planner.orders import schedules
from planner.values.plan import Plan, norm_without_flush, shares_without_flush


def read(path: Path) -> Plan:
    """Read a plan from TOML. Raises `PlanError` (exit 4) that names the field."""
    try:
        plan = msgspec.toml.decode(files.toml(path), type=Plan)
        _check_fields(plan)
        _check_shape(plan)
        return plan
    except OSError as error:
        why, fix = error.strerror or str(error), "plan simulate   (writes the plans it compares)"
        raise PlanError(what="the plan cannot be read", where=str(path), why=why, fix=fix, code=ARTEFACT) from error
    except PlanError as error:  # a name that is in no registry
        raise PlanError(
            what=error.what,
            where=f"{path}, {error.where.removeprefix('plan.')}",
            why=error.why,
            fix="correct that field, or run plan simulate to write the plan again",
            code=ARTEFACT,
        ) from error
    except (msgspec.DecodeError, ValueError) as error:
        fix = "correct that field, or run plan simulate to write the plan again"
        raise PlanError(
            what="the plan is not valid", where=str(path), why=str(error), fix=fix, code=ARTEFACT
        ) from error


def _check_fields(plan: Plan) -> None:
    """Raise `ValueError` for what no plan has that was planned: names that are no file names, unknown stages or layers.

    What names layers names the plan's own; a checkpoint is a run of layers of one stage, and none overlaps another.
    """
    for field, name in (("strategy", plan.strategy), ("mark", plan.mark or "-")):
        if not re.fullmatch(r"[A-Za-z0-9+_.-]+", name) or ".." in name:
            raise ValueError(f"{field}: '{name}' is no name: letters, digits, '-', '_' and '+'")
    count = len(plan.stages)
    for group in plan.tied:
        if len(group) < 2 or list(group) != sorted(set(group)) or group[0] < 0 or group[-1] >= count:
            raise ValueError(f"tied: {list(group)} are no stages of the {count}, the lowest first")
    seconds = plan.stage_seconds
    if seconds and (len(seconds) != count or not all(0 <= x < math.inf for each in seconds for x in each)):
        raise ValueError(f"stage_seconds: there must be three times, 0 or more, for each of the {count} stages")
    place = {name: (s, i) for s, stage in enumerate(plan.stages) for i, name in enumerate(stage.layers)}
    runs = [(name, name) for name in plan.recompute_layers] + list(plan.recompute_blocks)
    field = "recompute_layers" if plan.recompute_layers else "recompute_blocks"
    taken: set[tuple[int, int]] = set()
    for first, last in runs:
        unknown = next((name for name in (first, last) if name not in place), None)
        if unknown is not None:
            raise ValueError(f"{field}: '{unknown}' is no layer of the plan")
        (stage, begin), (other, end) = place[first], place[last]
        if stage != other or begin > end:
            raise ValueError(f"{field}: {first} to {last} is no run of layers of one stage")
        run = {(stage, i) for i in range(begin, end + 1)}
        if run & taken:
            raise ValueError(f"{field}: {first} is recomputed twice")
        taken |= run


def _check_shape(plan: Plan) -> None:
    """Raise `ValueError` when the schedule cannot arrange the plan's stages, or does not place them where they are."""
    replicas = plan.turns if plan.uneven else ()
    share = plan.microbatches if plan.uneven else plan.microbatches // plan.replicas
    shape = schedules.Shape(plan.depth, share, plan.chunks, replicas)
    reason = schedules.why_not(schedules.get(plan.schedule), shape)
    if reason is not None:
        raise ValueError(f"schedule: {plan.schedule} cannot arrange {shape.stages} stages, M={share}: {reason}")
    shared = shares_without_flush(plan)
    if shared is not None:
        raise ValueError(f"tied: {shared}")
    alone = norm_without_flush(plan)
    if alone is not None:
        raise ValueError(f"norm: {alone}")


def to_toml(plan: Plan) -> str:
    """Return the plan as TOML, the form `read` takes."""
    return msgspec.toml.encode(plan).decode()
