"""A plan as a TOML file, which people edit."""

from __future__ import annotations

from pathlib import Path

import msgspec

from planner.basis.errors import ARTEFACT, PlanError
from planner.orders import schedules
from planner.values.plan import Plan, shares_without_flush


def read(path: Path) -> Plan:
    """Read a plan from TOML. Raises `PlanError` (exit 4) that names the field."""
    try:
        plan = msgspec.toml.decode(path.read_bytes(), type=Plan)
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


def to_toml(plan: Plan) -> str:
    """Return the plan as TOML, the form `read` takes."""
    return msgspec.toml.encode(plan).decode()
