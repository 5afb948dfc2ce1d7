"""Gradients of real processes against one process that accumulates over the same micro-batches: bit for bit."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import nn

from executor.batch import Drawn
from executor.compiling import COMPILERS
from executor.feed import open_feed
from executor.launch import launch
from executor.layers import cut
from executor.model_file import ModelFile, load
from executor.precision import DTYPES
from executor.rank import split
from executor.torch_adapter import pytree
from planner.orders import schedules
from planner.placement import partition
from planner.values.plan import Plan, Stage
from tests.executor.jobs import SEED, Case, Cases, main
from tests.executor.small_models import routes

HERE = Path(__file__).parent
MODELS = str(HERE / "small_models.py")
UNET = str(HERE.parent.parent / "examples" / "unet.py")
BATCH, MICROBATCHES = 16, 4
UNEVEN = (":ignoring", ":weighted", ":shifting")
"""Micro-batches count differently: their gradients are those of the whole batch at once."""


def plan_of(
    model: str,
    schedule: str,
    k: int,
    *,
    recompute: bool = False,
    replicas: int = 1,
    bucket_bytes: int = 0,
    chunks: int = 1,
    **options: Any,
) -> Plan:
    """A plan of k devices, `chunks` stages on each, for so many replicas."""
    file = load(model)
    layered = cut(file, file.build(SEED))
    names = [layer.name for layer in layered.layers]
    ranges, how = partition.equal(len(names), k * chunks), schedules.get(schedule)
    stages = tuple(
        Stage(
            layers=tuple(names[i] for i in r),
            devices=tuple(f"d{replica * k + home}" for replica in range(replicas) for home in how.homes(s, k)),
        )
        for s, r in enumerate(ranges)
    )
    homes = {names[i]: s for s, r in enumerate(ranges) for i in r}
    tied = {tuple(sorted({homes[name] for name in layers})) for _, *layers in layered.tied()}
    return Plan(
        strategy=schedule,
        schedule=schedule,
        stages=stages,
        microbatches=MICROBATCHES,
        batch=BATCH,
        recompute=recompute,
        bucket_bytes=bucket_bytes,
        tied=tuple(sorted(group for group in tied if len(group) > 1)),
        norm=file.clip > 0 or file.precision == "fp16",
        chunks=chunks,
        stage_seconds=((1.0, 1.0, 1.0),) * len(stages) if how.measured else (),
        **options,
    )


def feeds_of(model: str, replicas: int) -> list[Any]:
    """What the replicas draw their shares of each step's batch from."""
    return [open_feed(load(model), BATCH // replicas, replicas=replicas, replica=r, seed=SEED) for r in range(replicas)]


def drawn(feeds: list[Any]) -> tuple[tuple[torch.Tensor, ...], object]:
    """A step's batch: the shares that its replicas draw, one behind the other."""
    inputs, targets = zip(*((share.inputs, share.targets) for share in (feed.take() for feed in feeds)), strict=True)
    return tuple(map(torch.cat, zip(*inputs, strict=True))), pytree.tree_map(
        lambda *parts: torch.cat(parts) if isinstance(parts[0], torch.Tensor) else None, *targets
    )


def called(file: ModelFile, whole: nn.Module, tensors: tuple[torch.Tensor, ...]) -> Any:
    """Call a model with some tensors in the place of its batch's."""
    drawn = file.drawn(2, seed=0)
    _, structure = pytree.tree_flatten(drawn.given)
    args, keywords = Drawn(samples=0, given=pytree.tree_unflatten(tensors, structure), targets=None).arguments()
    return whole(*args, **keywords)


class Plain(NamedTuple):
    """What a plain loop's last step has: gradients, loss, the norm where they are clipped, the scale where the loss
    is scaled; and how many of its steps were left out.
    """

    gradients: dict[str, torch.Tensor]
    loss: float
    norm: torch.Tensor | None
    state: dict[str, torch.Tensor]
    scale: float
    skipped: int


def reference(model: str, replicas: int, steps: int = 1) -> Plain:
    """The whole model in this process, gradients accumulated over the micro-batches in ascending order.

    Every replica's losses are parts of the whole step's mean: in float16 that decides what overflows.
    """
    file, feeds = load(model), feeds_of(model, replicas)
    whole = file.build(SEED)
    optimizer = file.optimizer_of((n, p) for n, p in whole.named_parameters() if p.requires_grad)
    assert optimizer is not None
    scaler = torch.amp.GradScaler("cpu", enabled=file.precision == "fp16")
    lower = torch.autocast("cpu", DTYPES.get(file.precision, torch.bfloat16), enabled=bool(file.precision))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    parts, skipped = 1 if model.endswith(UNEVEN) else MICROBATCHES, 0
    for _ in range(steps):
        optimizer.zero_grad()
        total, (inputs, targets) = 0.0, drawn(feeds)
        for x, y in zip(zip(*(t.chunk(parts) for t in inputs), strict=True), split(targets, parts), strict=True):
            with lower:
                loss = file.loss(called(file, whole, x), y) / parts
            scaler.scale(loss).backward()
            total += float(loss.detach())
        scaler.unscale_(optimizer)
        gradients = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(whole.parameters(), file.clip) if file.clip else None
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
    torch.set_num_threads(before)
    return Plain(gradients, total, norm, whole.state_dict(), scaler.get_scale(), skipped)


def cases(k: int) -> list[Case]:
    found = [
        Case(
            name=f"{schedule}-{recompute}",
            model=MODELS,
            plan=plan_of(MODELS, schedule, k, recompute=recompute),
            oracle=not recompute and k > 1,
        )
        for schedule, recompute in product(("gpipe", "1f1b", "naive"), (False, True))
    ]
    for name in ("clipped", "clipped_tied"):
        for replicas in (1, 2) if k > 1 else (1,):
            if k // replicas < (1 if name == "clipped" else 2) or k // replicas > 3:
                continue
            plan = plan_of(f"{MODELS}:{name}", "1f1b", k // replicas, replicas=replicas)
            found.append(Case(name=f"{name}-{replicas}", model=f"{MODELS}:{name}", plan=plan))
    if k < 4:
        half = [f"{MODELS}:{name}" for name in ("bf16", "bf16_skips")]
        for model, recompute in product(half, (False, True)):
            plan = plan_of(model, "1f1b", k, recompute=recompute)
            found.append(Case(name=f"{model.partition(':')[2]}-{recompute}", model=model, plan=plan, steps=2))
        for replicas in range(1, k + 1):
            plan = plan_of(f"{MODELS}:fp16", "1f1b", k // replicas, replicas=replicas)
            found.append(Case(name=f"fp16-{replicas}", model=f"{MODELS}:fp16", plan=plan, steps=8))
    if k > 1:
        grouped = f"{MODELS}:grouped"
        found.append(Case(name="grouped", model=grouped, plan=plan_of(grouped, "gpipe", k)))
    if k == 2 and any(map(shutil.which, COMPILERS)):
        own = f"{MODELS}:fused"
        for recompute in (False, True):
            plan = plan_of(own, "1f1b", 2, recompute=recompute)
            found.append(Case(name=f"compiled-{recompute}", model=own, plan=plan, steps=3))
    if k == 2:
        found.append(Case(name="replicas", model=MODELS, plan=plan_of(MODELS, "1f1b", 1, replicas=2)))
        many = plan_of(MODELS, "1f1b", 1, replicas=2, bucket_bytes=500)
        found.append(Case(name="buckets", model=MODELS, plan=many))
        for name, (devices, replicas) in product(UNEVEN, ((2, 1), (1, 2))):
            plan = plan_of(MODELS + name, "1f1b", devices, replicas=replicas)
            steps = 3 if name == ":shifting" else 1  # targets are ignored from the second one on
            found.append(Case(name=f"{name[1:]}-{replicas}", model=MODELS + name, plan=plan, steps=steps))
        some = f"{MODELS}:sometimes"
        experts = f"{MODELS}:routed"
        for name, own in (
            ("routed", plan_of(experts, "1f1b", 1, replicas=2)),
            ("routed-2", plan_of(experts, "1f1b", 2)),
        ):
            found.append(Case(name=name, model=experts, plan=own, steps=6))
        found.append(Case(name="sometimes", model=some, plan=plan_of(some, "1f1b", 1, replicas=2)))
        for name in ("tied", "twice", "kept", "fields", "odd", "asleep", "bare", "padded", "warming", "frozen"):
            own = f"{MODELS}:{name}"
            found.append(Case(name=name, model=own, plan=plan_of(own, "1f1b", 2)))
        own = str(HERE / "gradient_models.py:adversary")
        found.append(Case(name="adversary", model=own, plan=plan_of(own, "1f1b", 2)))
        own = f"{MODELS}:warming"
        found.append(Case(name="warming-True", model=own, plan=plan_of(own, "gpipe", 2, recompute=True), steps=2))
        found.append(Case(name="listed", model=f"{MODELS}:listed", plan=plan_of(f"{MODELS}:listed", "1f1b", 2)))
    if k == 4:
        own = f"{MODELS}:frozen"
        found.append(Case(name="frozen", model=own, plan=plan_of(own, "1f1b", 4)))
        found.append(Case(name="turned", model=f"{MODELS}:turned", plan=plan_of(f"{MODELS}:turned", "gpipe", 4)))
        found.append(Case(name="skips", model=f"{MODELS}:skips", plan=plan_of(f"{MODELS}:skips", "1f1b", 4)))
        found.append(
            Case(
                name="skips-recompute",
                model=f"{MODELS}:skips",
                plan=plan_of(f"{MODELS}:skips", "gpipe", 4, recompute=True),
            )
        )
        found.append(Case(name="unet", model=UNET, plan=plan_of(UNET, "1f1b", 4)))
        tied = f"{MODELS}:tied"
        found.append(Case(name="tied-both", model=tied, plan=plan_of(tied, "1f1b", 2, replicas=2)))
        found.append(Case(name="both", model=MODELS, plan=plan_of(MODELS, "1f1b", 2, replicas=2)))
    return found


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_are_those_of_one_process(k: int, tmp_path: Path) -> None:
    todo = cases(k)
    spec = tmp_path / "cases.json"
    spec.write_bytes(msgspec.json.encode(Cases(folder=str(tmp_path), cases=tuple(todo))))
    launch(main, str(spec), k, tmp_path / "logs")
    for case in todo:
        expected, total, norm, state, scale, skipped = reference(case.model, case.plan.replicas, case.steps)
        if case.name.startswith("fp16"):
            assert 0 < skipped < case.steps
        ranks = [torch.load(tmp_path / f"{case.name}.{r}.pt", weights_only=True) for r in range(k)]
        # Sums of other orders differ in the last digits.
        compiled = case.model.endswith(":fused")
        exact = case.plan.replicas == 1 and not case.plan.tied and not case.model.endswith(UNEVEN) and not compiled
        for rank, found in enumerate(ranks):
            for name, gradient in found["gradients"].items():
                if exact:
                    assert torch.equal(gradient, expected[name]), f"{case.name}, rank {rank}, {name}"
                else:
                    most = 1e-6 * float(expected[name].abs().max())
                    torch.testing.assert_close(
                        gradient, expected[name], rtol=1e-6, atol=most, msg=f"{case.name} {name}"
                    )
        seen = {name for found in ranks for name in found["gradients"]}
        assert seen == set(expected), case.name
        for found in ranks:
            for name, tensor in found["state"].items():
                if exact and norm is None:
                    same = (
                        torch.equal(tensor, state[name]) if isinstance(tensor, torch.Tensor) else tensor == state[name]
                    )
                    assert same, f"{case.name}, {name}"
                elif norm is not None or compiled or case.model.endswith(":routed"):
                    torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-7)
            assert found["scale"] is None or float(found["scale"]) == scale
            if norm is not None:
                torch.testing.assert_close(found["norm"], norm, rtol=1e-6, atol=0.0)
        measured = sum(float(loss) for found in ranks for loss in found["losses"].values())
        assert measured == pytest.approx(total, rel=1e-6)
        whole = load(case.model).build(0)
        whole.load_state_dict({name: t for found in ranks for name, t in found["state"].items()})
        if case.oracle:
            for rank in range(k):
                theirs = torch.load(tmp_path / f"{case.name}.torch.{rank}.pt", weights_only=True)
                for name, gradient in theirs.items():
                    assert torch.equal(gradient, ranks[rank]["gradients"][name]), f"torch: {case.name}, {name}"


def test_experts_are_idle_on_one_replica_in_a_step_and_on_all() -> None:
    """What the case of experts is about: idle on one of two, on both, and on both in the first step but not later."""
    feeds = feeds_of(f"{MODELS}:routed", 2)
    busy = [[set(routes(feed.take().inputs[0]).tolist()) for feed in feeds] for _ in range(6)]
    assert any(one ^ other for one, other in busy)
    assert any(set(range(6)) - (one | other) for one, other in busy[1:])
    assert set().union(*(one | other for one, other in busy[1:])) - (busy[0][0] | busy[0][1])


def test_replicas_start_alike(tmp_path: Path) -> None:
    """A model with other weights in every process is the first replica's everywhere, and stays that."""
    model = f"{MODELS}:unseeded_weights"
    case = Case(name="alike", model=model, plan=plan_of(model, "1f1b", 1, replicas=2))
    spec = tmp_path / "cases.json"
    spec.write_bytes(msgspec.json.encode(Cases(folder=str(tmp_path), cases=(case,))))
    launch(main, str(spec), 2, tmp_path / "logs")
    one, other = (torch.load(tmp_path / f"alike.{rank}.pt", weights_only=True)["state"] for rank in range(2))
    assert one.keys() == other.keys() == {"weight", "bias"}
    assert all(torch.equal(one[name], other[name]) for name in one)
