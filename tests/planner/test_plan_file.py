"""Plan files with faults are refused with the field; what is planned is read back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from planner.basis.errors import ARTEFACT, PlanError
from planner.values import plan_file
from planner.values.plan import Plan, Stage

PLAN = Plan(
    strategy="1f1b",
    schedule="1f1b",
    stages=(Stage(layers=("a", "b", "c"), devices=("d0",)), Stage(layers=("d",), devices=("d1",))),
    microbatches=2,
    batch=4,
)


def read(folder: Path, **changes: Any) -> Plan:
    path = folder / "plan.toml"
    path.write_text(plan_file.to_toml(msgspec.structs.replace(PLAN, **changes)))
    return plan_file.read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": ((0, 1),)},
        {"recompute_layers": ("a", "d")},
        {"recompute_blocks": (("a", "b"), ("c", "c"), ("d", "d"))},
        {"strategy": "zb-greedy", "schedule": "zb-greedy", "stage_seconds": ((1.0, 1.0, 0.0),) * 2},
        {"mark": "b4-stages"},
    ],
)
def test_what_is_written_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, **changes) == msgspec.structs.replace(PLAN, **changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"strategy": "../../x"}, "strategy"),
        ({"strategy": ""}, "strategy"),
        ({"mark": "/etc/x"}, "mark"),
        ({"tied": ((0, 2),)}, "tied"),
        ({"tied": ((1, 0),)}, "tied"),
        ({"tied": ((0,),)}, "tied"),
        ({"stage_seconds": ((1.0, 1.0, 1.0),)}, "stage_seconds"),
        ({"stage_seconds": ((1.0, -1.0, 1.0),) * 2}, "stage_seconds"),
        ({"recompute_layers": ("e",)}, "recompute_layers"),
        ({"recompute_layers": ("a", "a")}, "recompute_layers"),
        ({"recompute_blocks": (("b", "a"),)}, "recompute_blocks"),
        ({"recompute_blocks": (("c", "d"),)}, "recompute_blocks"),
        ({"recompute_blocks": (("a", "b"), ("b", "c"))}, "recompute_blocks"),
    ],
)
def test_faults_are_refused_with_the_field(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as raised:
        read(tmp_path, **changes)
    assert raised.value.why.startswith(f"{field}:")
    assert raised.value.code == ARTEFACT
