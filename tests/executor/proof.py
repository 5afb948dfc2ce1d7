"""The proof of gradients: plans on real processes against one process with the same micro-batches in the same order.

    one process    every layer in one module, `Noise` of each micro-batch, one after the other, summed gradients, update
    a plan         every schedule x savings x devices x replicas: gradients of the first step, weights behind five

Both draw from `executor.noise`. Equal to the last bit where sums have one order; to 1e-6 of the largest elsewhere.
`benchmarks/are_the_gradients_right` runs all of it, `test_proof_of_gradients.py` a part.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from executor.abilities import missing
from executor.feed import open_feed
from executor.launch import launch
from executor.layers import LayeredModel, cut
from executor.model_file import ModelFile, load
from executor.noise import Noise
from executor.rank import Rank, split
from executor.worker import join
from planner.basis.errors import PlanError
from planner.orders import codes, schedules
from planner.orders.action import Action
from planner.orders.operations import BACKWARD, BACKWARD_WEIGHT, OPTIMIZER
from planner.placement import partition
from planner.programs.lowering import compute_order, swaps
from planner.values.plan import Plan, Stage

HERE = Path(__file__).parent
MODELS = HERE / "proof_models.py"
NAMES = ("gpt", "unet", "normed", "tied")
PRECISIONS = ("", "_bf16")
SAVINGS = ("none", "stages", "layers", "blocks", "swap", "stages+swap", "layers+swap", "host")
BATCH, MICROBATCHES, STEPS, SEED = 16, 8, 5, 11
TOLERANCE = 1e-6
"""Relative to the largest of a tensor, where sums have another order."""
ROUNDED = 2.0**-9
"""The same of weights behind several steps in bf16: one whose last bit differs may be rounded to another number."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A plan of one of the models, by its name."""

    name: str
    model: str
    plan: Plan


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Cases that one launch of ranks runs; `folder` receives what they find."""

    folder: str
    cases: tuple[Case, ...]


class Found(NamedTuple):
    """What became of a case: whether all is equal, the largest relative difference, and whether that is right."""

    case: Case
    equal: bool
    difference: float
    right: bool
    why: str = ""


class _Cut(NamedTuple):
    file: ModelFile
    layered: LayeredModel
    names: tuple[str, ...]


@functools.cache
def cut_model(model: str) -> _Cut:
    """Cut a model, with the values that all runs begin with."""
    file = load(f"{MODELS}:{model}")
    layered = cut(file, file.build(SEED))
    return _Cut(file, layered, tuple(layer.name for layer in layered.layers))


def _copied(layered: LayeredModel) -> LayeredModel:
    """A model of the same values that may be trained."""
    around = layered.surroundings
    return copy.deepcopy(layered, {id(around): around})


def plan_of(
    model: str,
    schedule: str,
    depth: int,
    *,
    saving: str = "none",
    replicas: int = 1,
    lopsided: bool = False,
    **options: Any,
) -> Plan:
    """A plan of `depth` devices for so many replicas; a `lopsided` one has most layers in its last stage."""
    cut, how = cut_model(model), schedules.get(schedule)
    chunks = max(how.chunks[0], 2 if how.chunks[1] != 1 else 1)
    names, count = cut.names, depth * chunks
    ranges = partition.equal(len(names), count)
    if lopsided:
        ranges = tuple(range(s, s + 1) if s < count - 1 else range(s, len(names)) for s in range(count))
    stages = tuple(
        Stage(
            layers=tuple(names[i] for i in own),
            devices=tuple(f"d{r * depth + home}" for r in range(replicas) for home in how.homes(s, depth)),
        )
        for s, own in enumerate(ranges)
    )
    homes = {names[i]: s for s, own in enumerate(ranges) for i in own}
    shared = {tuple(sorted({homes[name] for name in layers})) for _, *layers in cut.layered.tied()}
    repeated = {
        "stages": {"recompute": True},
        "layers": {"recompute_layers": names[::2]},
        "host": {"host_optimizer": True},
        "blocks": {"recompute_blocks": tuple((a, b) for a, b in zip(names[1::3], names[2::3], strict=False))},
    }
    return Plan(
        strategy=schedule,
        schedule=schedule,
        stages=stages,
        microbatches=MICROBATCHES,
        batch=BATCH,
        chunks=chunks,
        tied=tuple(sorted(group for group in shared if len(group) > 1)),
        stage_seconds=((1.0, 1.0, 1.0),) * count if how.measured else (),
        **repeated.get(saving, {}),
        **options,
    )


def synchronous() -> list[str]:
    """Every registered schedule that trains with a flush."""
    return [n for n in schedules.names() if schedules.get(n).trains and not schedules.get(n).asynchronous]


def matrix(k: int, models: tuple[str, ...], savings: tuple[str, ...] = SAVINGS) -> Iterator[Case]:
    """Yield every plan of k devices that there is: one pipeline of all, and replicas of shorter ones."""
    for model in models:
        for schedule in synchronous():
            for replicas in (r for r in (1, 2, 4) if k % r == 0):
                for saving in savings:
                    for lopsided in (
                        (False, True) if replicas == 1 and saving in ("none", "stages") and k > 1 else (False,)
                    ):
                        case = _case(model, schedule, k // replicas, saving, replicas, lopsided=lopsided)
                        if case is not None:
                            yield case


def _case(model: str, schedule: str, depth: int, saving: str, replicas: int, *, lopsided: bool) -> Case | None:
    """A case, or None where a schedule cannot be arranged so, or has nothing to swap."""
    swapped = {"offload": True} if saving.endswith("swap") else {}
    kind = saving.removesuffix("swap").removesuffix("+") or "none"
    try:
        plan = plan_of(model, schedule, depth, saving=kind, replicas=replicas, lopsided=lopsided, **swapped)
        compute_order(plan)
    except (PlanError, ValueError):
        return None
    if swapped and not swaps(plan):
        return None
    assert not missing(plan), missing(plan)
    shape = f"{depth}x{replicas}{'-lopsided' if lopsided else ''}"
    return Case(name=f"{model}-{schedule}-{shape}-{saving}", model=model, plan=plan)


@record
def main(path: str) -> None:
    """Run the cases of a job on one rank."""
    job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    backend = join("cpu", 1)
    for case in job.cases:
        file, layered, _ = cut_model(case.model)
        me = Rank(file, _copied(layered), case.plan, backend, dist.get_rank(), seed=SEED)
        first: dict[str, torch.Tensor] = {}

        def watch(action: Action, when: str, me: Rank = me, first: dict[str, torch.Tensor] = first) -> None:
            if action.op == OPTIMIZER and when == "before":
                own = me.stages[action.stage].gradients()
                first.update({f"{action.stage}:{name}": gradient.clone() for name, gradient in own.items()})

        for step in range(STEPS):
            me.step(None, watch if step == 0 else None)
        me.feed.close()
        losses = sum(float(loss) for loss in me.losses.values())
        found = {"gradients": first, "state": me.state(), "loss": losses}
        torch.save(found, Path(job.folder) / f"{case.name}.{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Plain(NamedTuple):
    """What one process has: the gradients of its first step, its weights behind all, the last step's loss."""

    gradients: dict[str, torch.Tensor]
    state: dict[str, Any]
    loss: float


@functools.cache
def plain(model: str, replicas: int) -> Plain:
    """Train in this process, over the micro-batches that so many replicas draw."""
    file, layered, _ = cut_model(model)
    layered = _copied(layered)
    whole, names = layered.stage(range(len(layered.layers))), layered.parameter_names()
    feeds = [open_feed(file, BATCH // replicas, replicas=replicas, replica=r, seed=SEED) for r in range(replicas)]
    parameters = {names[id(p)]: p for p in whole.parameters()}
    optimizer = file.optimizer_of((n, p) for n, p in parameters.items() if p.requires_grad)
    assert optimizer is not None
    first: dict[str, torch.Tensor] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    total = 0.0
    for step in range(STEPS):
        shares, total, share = [feed.take() for feed in feeds], 0.0, MICROBATCHES // replicas
        for m in range(MICROBATCHES):
            inputs, targets = layered.parted(shares[m // share].inputs, shares[m // share].targets)
            noise = Noise(SEED, step, m, torch.device("cpu"))
            whole.noise = noise
            result = whole(*(tensor.chunk(share)[m % share] for tensor in inputs))
            noise.at(len(layered.layers))
            loss = layered.loss(result, split(targets, share)[m % share]) / MICROBATCHES
            loss.backward()
            total += float(loss.detach())
        if not step:
            first = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        optimizer.step()
        whole.zero_grad()
    torch.set_num_threads(threads)
    return Plain(first, {name: value.detach() for name, value in layered.model.state_dict().items()}, total)


def ordered(plan: Plan, model: str) -> bool:
    """Whether a plan adds up everything in the order of one process: then all is equal to the last bit.

    Gradients of several micro-batches in ascending order, on one rank per stage; none that several stages add to; and
    no value that three layers read, where the half of a backward adds what comes from later stages last.
    """
    if plan.replicas > 1 or plan.tied or schedules.get(plan.schedule).copies > 1:
        return False
    values = cut_model(model).layered.layers
    readers = [sum(name in layer.inputs for layer in values) for name in {n for own in values for n in own.inputs}]
    if schedules.get(plan.schedule).splits and len(plan.stages) > 1 and max(readers) > 2:
        return False
    for row in compute_order(plan):
        done = row[codes.has(row, BACKWARD, BACKWARD_WEIGHT)]
        for stage in set(codes.stages(done).tolist()):
            microbatches = codes.microbatches(done[codes.stages(done) == stage]).tolist()
            if microbatches != sorted(microbatches):
                return False
    return True


def some(k: int) -> list[Case]:
    """Return a part in which every schedule meets every kind of saving or model somewhere: for each K others."""
    found = []
    models = [name + PRECISIONS[(at + k.bit_length()) % 3 == 0] for at, name in enumerate(NAMES)]
    for i, schedule in enumerate(synchronous()):
        if k == 1 and i % 3:
            continue  # one device has few orders
        turn = 3 * i + k
        replicas = 2 if k > 1 and i % 4 == 1 else 1
        saving, lopsided = SAVINGS[(turn + i // 4) % len(SAVINGS)], not i % 3 and k > replicas
        for wanted in (saving, "none"):  # nothing to swap, or no such order
            case = _case(models[turn % len(models)], schedule, k // replicas, wanted, replicas, lopsided=lopsided)
            if case is not None:
                found.append(case)
                break
    return found


def prove(cases: list[Case], k: int, folder: Path) -> list[Found]:
    """Run cases of k devices in one launch, and compare each with one process."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / "job.json"
    spec.write_bytes(msgspec.json.encode(Job(folder=str(folder), cases=tuple(cases))))
    launch(main, str(spec), k, folder / "logs")
    found = []
    for case in cases:
        paths = [folder / f"{case.name}.{rank}.pt" for rank in range(k)]
        found.append(_compared(case, [torch.load(path, weights_only=True) for path in paths]))
        for path in paths:
            path.unlink()
    return found


def _compared(case: Case, ranks: list[dict[str, Any]]) -> Found:
    expected = plain(case.model, case.plan.replicas)
    equal, close, worst, where = True, True, 0.0, ""
    rounded = cut_model(case.model).file.precision == "bf16"
    seen, weights = set(), dict[str, Any]()
    own = all(
        len(holders) == 1 for holders in case.plan.holders
    )  # each replica has statistics of its own micro-batches
    for found in ranks:
        mine = {name.partition(":")[2]: gradient for name, gradient in found["gradients"].items()}
        pairs = [(name, gradient, expected.gradients[name]) for name, gradient in mine.items()]
        gradients = len(pairs)
        pairs += [
            (n, value, expected.state[n]) for n, value in found["state"].items() if n in expected.gradients or own
        ]
        seen |= mine.keys()
        weights |= found["state"]
        for at, (name, got, wanted) in enumerate(pairs):
            equal &= torch.equal(got, wanted)
            apart = float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))
            close &= apart <= (TOLERANCE if at < gradients or not rounded else ROUNDED)
            if not apart <= worst:
                worst, where = apart, name
    complete = seen == set(expected.gradients) and weights.keys() == expected.state.keys()
    loss = sum(found["loss"] for found in ranks)
    near = abs(loss - expected.loss) <= 1e-5 * abs(expected.loss)
    right = complete and near and (equal if ordered(case.plan, case.model) else close)
    why = (
        "" if right else f"{where} {'' if complete else 'incomplete '}{'' if near else f'loss {loss} {expected.loss}'}"
    )
    return Found(case, equal, worst, right, why)
