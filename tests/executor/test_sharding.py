"""Data parallelism in its kinds on real processes: it equals the large batch in one process."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from executor.elementwise import check_elementwise
from executor.launch import launch
from executor.model_file import load
from planner.basis.errors import PlanError
from tests.executor.jobs import SEED, Case, Cases, main
from tests.executor.test_gradients import plan_of, reference

MODELS = str(Path(__file__).parent / "shared_models.py")
ZERO = ("zero-1", "zero-2", "zero-3")
STEPS = 5


def case(
    name: str, devices: int, replicas: int, synchronisation: str, schedule: str = "1f1b", **options: object
) -> Case:
    model = f"{MODELS}:{name}"
    plan = plan_of(model, schedule, devices, replicas=replicas, synchronisation=synchronisation, **options)
    return Case(name=f"{name}-{synchronisation}-{schedule}", model=model, plan=plan, steps=STEPS)


def cases(k: int) -> list[Case]:
    if k == 2:
        names = ("model", "clipped", "half", "fp16", "frozen", "tied", "routed", "adagrad", "momentum")
        found = [case(name, 1, 2, kind) for kind in ZERO for name in names]
        servers = ("d0", "d1")
        found += [case(name, 1, 2, "parameter-server", servers=servers) for name in ("model", "tied", "routed")]
        found += [case(name, 1, 2, kind, "gpipe", recompute=True) for kind in ZERO[1:] for name in ("model", "tied")]
        return found
    found = [case(name, 2, 2, kind) for kind in ZERO for name in ("model", "tied", "clipped")]
    return [*found, *(case("model", 4, 1, kind, "chimera") for kind in ZERO)]


@pytest.mark.parametrize("k", [2, 4])
def test_it_equals_the_large_batch(k: int, tmp_path: Path) -> None:
    todo = cases(k)
    spec = tmp_path / "cases.json"
    spec.write_bytes(msgspec.json.encode(Cases(folder=str(tmp_path), cases=tuple(todo))))
    launch(main, str(spec), k, tmp_path / "logs")
    for one in todo:
        expected = reference(one.model, one.plan.replicas, one.steps)
        ranks = [torch.load(tmp_path / f"{one.name}.{r}.pt", weights_only=True) for r in range(k)]
        # bfloat16's rounding turns last digits into larger ones
        near = 1e-4 if one.name.startswith("half") else 1e-6
        for found in ranks:
            for name, gradient in found["gradients"].items():
                most = near * float(expected.gradients[name].abs().max())
                torch.testing.assert_close(
                    gradient, expected.gradients[name], rtol=near, atol=most, msg=one.name + name
                )
            for name, value in found["state"].items():
                most = near * float(expected.state[name].abs().max())
                torch.testing.assert_close(value, expected.state[name], rtol=near, atol=most, msg=one.name + name)
            if expected.norm is not None:
                torch.testing.assert_close(found["norm"], expected.norm, rtol=max(near, 1e-5), atol=0.0)
        if not one.plan.servers:  # servers update with gradients as soon as they have them
            assert {name for found in ranks for name in found["gradients"]} == set(expected.gradients), one.name
        assert {name for found in ranks for name in found["state"]} == set(expected.state)
        measured = sum(float(loss) for found in ranks for loss in found["losses"].values())
        assert measured == pytest.approx(expected.loss, rel=near)


@pytest.mark.parametrize("name", ["lars", "adafactor", "muon"])
def test_what_is_not_elementwise_is_refused(name: str) -> None:
    file = load(f"{MODELS}:{name}")
    with pytest.raises(PlanError, match="cannot be sharded"):
        check_elementwise(file, file.build(SEED), "zero-1")


@pytest.mark.parametrize("name", ["model", "adagrad", "momentum"])
def test_what_is_elementwise_is_not(name: str) -> None:
    file = load(f"{MODELS}:{name}")
    check_elementwise(file, file.build(SEED), "zero-1")
