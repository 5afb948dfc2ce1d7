"""Measure a model file on this machine: the whole profile, in one call."""

from __future__ import annotations

import datetime
import platform
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from executor import averaging, devices
from executor.agreement import agree
from executor.evaluated import agree_evaluated
from executor.layers import cut
from executor.model_file import imported, load, sha256
from planner.basis.errors import PlanError
from planner.values.profile import LayerProfile, Profile, ProfileKey
from profiles import crowding, machine
from profiles.chain import Chain
from profiles.loading import measure_loading
from profiles.rates import rate_s
from profiles.sizes import Static, measure_sizes, measure_static, values_of
from profiles.splits import splits_of
from profiles.times import LayerTimer

LAYERS, LOADS, CROWD = 0.7, 0.1, 0.2
"""Of the budget, for the layers' times, for drawing batches, and for how busy cores slow each other."""

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
) -> Profile:
    """Measure every layer of the model file at `path`, and the machine, on `device`.

    `sequence` asks for samples of so many tokens; by default the model file decides.
    `sizes` are micro-batch sizes in samples, at least three; by default all powers of two up to the batch. `budget_s`
    bounds the seconds for which the model is run to be timed: sizes for which it is too short have no times, only
    bytes; what counts bytes and probes links comes on top. What was found of the machine before is taken, unless it is
    to be measured again. Raises `PlanError` when the model file fails.
    """
    file = load(path, sequence)
    tokens = file.tokens()
    backend = devices.open_device(device)
    layered = cut(file, file.build(seed=0))
    agree(file, layered)
    if file.evaluate is not None:
        agree_evaluated(file, layered)
    averaging.check(file, layered.model)
    chain = Chain(file, layered, backend.device)
    sizes = sorted(set(sizes or _powers_of_two(file.batch_size)))
    if len(sizes) < 3 or sizes[0] < 1:
        raise PlanError(
            what="a profile needs at least three micro-batch sizes",
            where="--sizes" if sizes else file.path,
            why=f"the sizes are {', '.join(map(str, sizes))}: time is not linear in the size",
            fix="plan profile model.py --sizes 1,4,16   (positive and different)",
        )
    measured = []
    by_size = {}
    for i, samples in enumerate(sizes):
        progress("bytes of every layer", i, len(sizes))
        layer_sizes, by_size[samples] = measure_sizes(chain, backend, samples)
        measured.append(layer_sizes)
    static = [
        *measure_static(chain, backend),
        Static(parameter_bytes=0, buffer_bytes=0, gradient_bytes=0, optimizer_bytes=0, optimizer_peak_bytes=0),
    ]
    splits = splits_of(chain, sizes[0])
    settings = [(threads, samples) for threads in _threads(device) for samples in sizes]
    timer = LayerTimer(chain, backend, settings, lambda done, of: progress("seconds of every layer", done, of))
    timer.run(LAYERS * budget_s)
    drawn = _batches(file.batch_size)
    loaded = measure_loading(file, layered, backend, drawn, timer.evict, LOADS * budget_s)
    progress("links and overheads", 0, 1)
    probed = machine.machine(device, again=remeasure_machine)
    progress("links and overheads", 1, 1)
    cluster = probed.cluster
    if device == "cpu" and CROWD * budget_s >= probed.launch_s:
        progress("contention", 0, 1)
        samples = min(sizes, key=lambda n: abs(n - file.batch_size / 8))
        busy = crowding.Load(device=device, model=path, samples=samples, sequence=tokens, budget_s=CROWD * budget_s)
        cluster = crowding.crowded(cluster, crowding.measure(busy))
        progress("contention", 1, 1)
    names = [*(layer.name for layer in layered.layers), "loss"]
    profiles = tuple(
        LayerProfile(
            name=name,
            parameter_bytes=static[part].parameter_bytes,
            buffer_bytes=static[part].buffer_bytes,
            gradient_bytes=static[part].gradient_bytes,
            optimizer_bytes=static[part].optimizer_bytes,
            optimizer_peak_bytes=static[part].optimizer_peak_bytes,
            times=timer.layer(part),
            sizes=tuple(by_samples[part] for by_samples in measured),
            split=splits.get(part),
        )
        for part, name in enumerate(names)
    )
    files, dtype = imported(path), _dtype(layered.model)
    return Profile(
        key=key_of(path, device, tokens, files, dtype, file.precision),
        sources=files,
        opaque=layered.opaque,
        unused=tuple(name for name, tensor in layered.unheld().items() if isinstance(tensor, torch.nn.Parameter)),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model_path=path,
        layers=profiles[:-1],
        loss=profiles[-1],
        values=values_of(chain, by_size),
        tied=layered.tied(),
        whole=timer.whole(),
        load=loaded.load,
        batch_bytes=loaded.batch_bytes,
        loading=loaded.loading,
        batch=file.batch_size,
        clip=file.clip,
        rate_s=rate_s(file, backend, layered.model),
        action_s=probed.action_s,
        noise=timer.noise(),
        machine=cluster,
        machine_created=probed.created,
    )


def key_of(path: str, device: str, sequence: int, files: Sequence[str], dtype: str, precision: str) -> ProfileKey:
    """What a profile of this file on this machine, made now, with samples of so many tokens, would be valid for.

    `files` are what it imports from its folder, `dtype` and `precision` the model's own: none is known without
    running it.
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
    )


def _dtype(model: torch.nn.Module) -> str:
    """The dtype of most of a model's parameters."""
    counts = Counter[torch.dtype]({torch.get_default_dtype(): 0})
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


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
