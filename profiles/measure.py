"""Measure a model file on this machine: the whole profile, in one call."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterator, Sequence

import torch

from executor import devices
from executor.compiling import check_compiler
from executor.devices import Backend
from executor.model_file import ModelFile, imported, load, sha256
from planner.basis.errors import PlanError
from planner.values.cluster import Cluster
from planner.values.profile import LayerProfile, Measuring, Profile, ProfileKey
from profiles import crowding, machine, subject
from profiles.chain import Chain
from profiles.kinds import Kinds
from profiles.loading import Loaded, measure_loading
from profiles.machine import Machine
from profiles.passes import InPlace, OneByOne, Passes
from profiles.rates import rate_s
from profiles.sizes import Static
from profiles.splits import splits_of
from profiles.states import tied_bytes
from profiles.subject import Subject
from profiles.times import WANTED_ROUNDS, LayerTimer
from profiles.watch import Budget, Stopwatch

LOADS, CROWD = 0.1, 0.15
"""Of the budget, for loading batches, and for running the model on busy cores."""
CROWD_SHARE = 0.5
"""Of the budget, for starting the processes that crowd the cores, and running the model in them."""
CROWD_PASSES = 19
"""Passes that one of them runs at least, and waits for."""

Progress = Callable[[str, int, int], None]
"""Told what is being measured, and how much of how much is done."""


def measure(
    path: str,
    *,
    device: str,
    sizes: Sequence[int] | None,
    budget_s: float,
    progress: Progress,
    sequence: int = 0,
    remeasure_machine: bool = False,
    one_by_one: bool | None = None,
    fold: bool | None = None,
) -> Profile:
    """Measure every layer of the model file at `path`, and the machine, on `device`.

    `sequence` asks for samples of so many tokens; by default the model file decides.
    `sizes` are micro-batch sizes in samples, at least three; by default as many of the powers of two up to the batch as
    curves need, from 2 where batch norm refuses 1. `budget_s` bounds the wall seconds of all measuring of the model,
    from its first byte to its last pass, to within the last pass begun; one pass of the smallest size is run, and the
    bytes of two are counted, whatever it takes. Before it come importing, building and checking the model (what
    checking takes beyond `subject.CHECKS_S` is part of the budget), and once per machine what is the machine's own,
    unless that is to be measured again; and compiling, of one layer of each kind, where the model file asks for it.

    `one_by_one` is whether only one layer at a time is to be in memory, `fold` whether one layer of each kind is run;
    None decides by memory and budget. Raises `PlanError` when the model file fails.
    """
    chosen = _candidates(path, sizes)
    file = load(path, sequence)
    tokens = file.tokens()
    subject.check_batch(file)
    backend = devices.open_device(device)
    if file.compiled:
        check_compiler(path, device)
    model = subject.prepare(file, device, one_by_one=one_by_one, budget_s=budget_s)
    if file.compiled and not model.resident:
        raise PlanError(
            what="compiled layers cannot be profiled one at a time",
            where=path,
            why="each would be compiled anew whenever it gets its data, and the whole model does not fit into memory",
            fix="leave out compiled = True, or profile on a machine with more memory",
        )
    least = 2 if model.resident and subject.needs_two(file, model.layered.model) else 1
    candidates = chosen or [n for n in _powers_of_two(file.batch_size) if n >= least]
    progress("links and overheads", 0, 1)
    probed = machine.machine(device, again=remeasure_machine)
    progress("links and overheads", 1, 1)

    progress("seconds of every layer", 0, 100)
    budget_s = max(0.0, budget_s - model.late_s)
    budget = Budget(budget_s)
    crowded = device == "cpu" and not file.compiled and _crowded(model, probed, budget_s, candidates[0])
    layers_s = budget_s * (1 - LOADS) - (_crowd_s(model, probed, CROWD * budget_s) if crowded else 0.0)
    fold = file.compiled or _slow(model, device, candidates, layers_s) if fold is None else fold
    kinds = model.kinds(fold=fold or not model.resident)
    unsplit = 2 * model.sample_s * candidates[0] <= layers_s
    passes = _passes(file, kinds, backend, resident=model.resident, unsplit=unsplit)
    if file.compiled:
        progress("compiling", 0, 1)
        passes.chain.compile(candidates[:2], _threads(device))
        progress("compiling", 1, 1)
        budget = Budget(budget_s)
    static = [*passes.static(), Static(0, 0, 0, 0, 0)]
    names = [*(layer.name for layer in model.layered.layers), "loss"]
    splits = splits_of(passes.chain, candidates[0], list(zip(names, kinds.standing, strict=False)))

    def told(done: int, of: int) -> None:
        progress("seconds of every layer", done, of)

    timer = LayerTimer(
        passes,
        _threads(device),
        candidates,
        told,
        every=bool(chosen),
        sample_s=model.sample_s,
        room_bytes=subject.SHARE * devices.free_bytes(device),
    )
    timer.run(budget, layers_s)
    loads_s = max(0.0, min(LOADS * budget_s, budget.left))
    loaded = measure_loading(file, model.layered, backend, _batches(file.batch_size), _displace, loads_s)
    cluster = probed.cluster
    crowd_s = _crowd_s(model, probed, CROWD_PASSES * timer.step_s(timer.looked_at[0]))
    if crowded and not kinds.folded and not timer.interrupted and crowd_s <= budget.left:
        progress("contention", 0, 1)
        cluster = _busy(path, tokens, timer, min(CROWD * budget_s, budget.left), cluster, file.batch_size)
        progress("contention", 1, 1)

    parts = (*kinds.standing, len(kinds.short.layers))
    first = [kinds.standing.index(part) for part in kinds.standing]
    profiles = tuple(
        LayerProfile(
            name=name,
            parameter_bytes=static[part].parameter_bytes,
            buffer_bytes=static[part].buffer_bytes,
            gradient_bytes=static[part].gradient_bytes,
            optimizer_bytes=static[part].optimizer_bytes,
            optimizer_peak_bytes=static[part].optimizer_peak_bytes,
            times=timer.layer(part),
            sizes=tuple(of[part] for _, of in sorted(passes.sizes.items())),
            split=splits.get(i),
            like=names[first[i]] if i < len(first) and first[i] != i else "",
        )
        for i, (name, part) in enumerate(zip(names, parts, strict=True))
    )
    files, dtype = imported(path), subject.dtype_of(model.layered.model)
    unheld = model.layered.unheld().items()
    return Profile(
        key=key_of(path, device, tokens, files, dtype, file.precision, compiled=file.compiled),
        sources=files,
        opaque=model.layered.opaque,
        unused=tuple(name for name, tensor in unheld if isinstance(tensor, torch.nn.Parameter)),
        evaluating=not any(part.training for part in model.layered.model.modules()),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model_path=path,
        layers=profiles[:-1],
        loss=profiles[-1],
        values=kinds.values(model.layered, passes.values),
        tied=model.layered.tied(),
        tied_bytes=tied_bytes(file, model.layered),
        whole=timer.whole(kinds.standing),
        load=loaded.load,
        batch_bytes=loaded.batch_bytes,
        loading=loaded.loading,
        batch=file.batch_size,
        least=least,
        clip=file.clip,
        rate_s=rate_s(file, backend, model.layered.model),
        action_s=probed.action_s,
        noise=timer.noise(),
        machine=cluster,
        machine_created=probed.created,
        measuring=Measuring(
            rounds=timer.rounds,
            between=timer.between,
            beyond=timer.left_out,
            unlike=timer.unlike(kinds.alike) if kinds.folded else 0.0,
            derived=(*timer.derived, *_not_run(model, loaded, unsplit=unsplit)),
            one_by_one=not model.resident,
            interrupted=timer.interrupted,
            waiting=passes.watch.waiting if device == "cpu" else 0.0,
        ),
    )


def _candidates(path: str, sizes: Sequence[int] | None) -> list[int]:
    chosen = sorted(set(sizes or ()))
    if chosen and (len(chosen) < 3 or chosen[0] < 1):
        raise PlanError(
            what="a profile needs at least three micro-batch sizes",
            where="--sizes",
            why=f"the sizes are {', '.join(map(str, chosen))}: time is not linear in the size",
            fix="plan profile model.py --sizes 1,4,16   (positive and different)",
        )
    return chosen


def _passes(file: ModelFile, kinds: Kinds, backend: Backend, *, resident: bool, unsplit: bool) -> Passes:
    chain = Chain(file, kinds.short, backend.device, resident=resident)
    watch = Stopwatch(backend)
    return InPlace(chain, backend, watch, unsplit=unsplit) if resident else OneByOne(chain, backend, watch)


def _not_run(model: Subject, loaded: Loaded, *, unsplit: bool) -> Iterator[str]:
    """Say in words what of a model, beside its layers, there was no time for."""
    yield from model.unchecked
    if model.resident and not unsplit:
        yield "the unsplit model was not run beside its layers, so what is lost between them is part of their times"
    if loaded.left_out:
        sizes = " or ".join(map(str, loaded.left_out))
        yield f"batches of {sizes} samples were not drawn: loading them follows from fewer, in proportion"


def _slow(model: Subject, device: str, sizes: Sequence[int], layers_s: float) -> bool:
    """Whether all layers at all sizes would leave too few rounds, so that one of each kind is to be run."""
    threads = _threads(device)
    factor = sum(max(threads) / own for own in threads) * sum(sizes)
    return WANTED_ROUNDS * 2 * model.sample_s * factor > layers_s


def _crowd_s(model: Subject, probed: Machine, seconds: float) -> float:
    """Seconds that it takes to run the model in as many processes as crowd the cores, for so many seconds."""
    return probed.launch_s + model.build_s * crowding.processes() / devices.cores() + seconds


def _crowded(model: Subject, probed: Machine, budget_s: float, samples: int) -> bool:
    """Whether there is time and memory for that; otherwise a standard load has said how busy cores slow each other."""
    passes_s = CROWD_PASSES * model.sample_s * samples
    in_time = _crowd_s(model, probed, max(passes_s, CROWD * budget_s)) <= CROWD_SHARE * budget_s
    return model.resident and in_time and subject.crowds(model, crowding.processes())


def _busy(path: str, tokens: int, timer: LayerTimer, budget_s: float, cluster: Cluster, batch: int) -> Cluster:
    """The cluster with the model's own slowdown, on the size nearest to an eighth of the batch that is quick enough."""
    quick = [n for n in timer.looked_at if CROWD_PASSES * timer.step_s(n) <= budget_s] or timer.looked_at[:1]
    samples = min(quick, key=lambda n: abs(n - batch / 8))
    busy = crowding.Load(device="cpu", model=path, samples=samples, sequence=tokens, budget_s=budget_s)
    try:
        return crowding.crowded(cluster, crowding.measure(busy))
    except KeyboardInterrupt:
        timer.interrupted = True
        return cluster


_DISPLACING = 2**24
"""Floats, 64 MiB: reading and writing as many leaves little of anything else in a core's caches."""


def _displace() -> None:
    """Leave the caches as computing does."""
    torch.relu_(torch.ones(_DISPLACING))


def key_of(
    path: str, device: str, sequence: int, files: Sequence[str], dtype: str, precision: str, *, compiled: bool = False
) -> ProfileKey:
    """What a profile of this file on this machine, made now, with samples of so many tokens, would be valid for.

    `files` are what it imports from its folder, `dtype` and `precision` the model's own, and it may be `compiled`: none
    is known without running it.
    """
    return ProfileKey(
        model=path.replace("\\", "/").rpartition("/")[2],
        source_sha256=sha256(path, files),
        device=devices.describe(device),
        dtype=dtype,
        cores=devices.cores(),
        torch=str(torch.__version__),
        python=platform.python_version(),
        sequence=sequence,
        precision=precision,
        compiled=compiled,
    )


def _powers_of_two(batch: int) -> list[int]:
    return [2**i for i in range(batch.bit_length()) if 2**i <= batch]


def _batches(batch: int) -> list[int]:
    return sorted({max(1, batch // 4), max(1, batch // 2), batch})


def _threads(device: str) -> list[int]:
    """Threads a rank can have on this machine: all cores for one process, half for two, and so on down to one."""
    if device != "cpu":
        return [1]
    cores = devices.cores()
    return sorted({max(1, cores // n) for n in (2**i for i in range(cores.bit_length() + 1))}, reverse=True)
