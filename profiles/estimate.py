"""A profile without the device: operations are counted on tensors without data, seconds follow from data sheets.

The model is cut, run forward and backward, and its bytes are found by the code that measures; in place of a clock stand
the roofline and the fitted efficiencies of `profiles.hardware`. What this does not know: the caches, the fusing of
operations (`torch.compile`), the time a host needs to launch kernels, workspaces of kernels, and the data loader.

With a dtype other than the model's own, parameters, activations and gradients are in that dtype and, when the model's
own is float32, the optimizer keeps a float32 copy of the parameters beside its state: 2 + 2 + 12 bytes per parameter
for Adam in float16 (mixed precision as in ZeRO, arXiv 1910.02054, section 3.1). Beside bfloat16 weights it keeps
gradients in float32, which are accumulated and reduced: 2 + 4 + 12 bytes (Megatron-LM's
`accumulate_allreduce_grads_in_fp32`, which it sets for bf16; DeepSpeed's BF16_Optimizer).
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import msgspec
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from executor.batch import tensors
from executor.layers import cut, unchanged_buffers
from executor.model_file import ModelFile, lengths, load, sha256
from executor.precision import SCALED
from executor.torch_adapter import pytree, tensors_without_data
from executor.user_code import Loss, default_loss, default_optimizer
from planner.basis.errors import PlanError
from planner.values.profile import LayerProfile, LayerSizes, LayerTimes, Profile, ProfileKey, Split, Tied, Timing, Value
from profiles import hardware as devices
from profiles.chain import Chain
from profiles.counting import AsOnGpu, Counter
from profiles.hardware import Hardware, Operation
from profiles.kinds import find
from profiles.sizes import Static, recorded_sizes
from profiles.splits import splits_of
from profiles.states import static_of, tied_of
from profiles.subject import check_batch, needs_two

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

MAIN_GRADIENTS = (torch.bfloat16,)
"""Dtypes of weights beside which the optimizer keeps gradients in float32: their own are too coarse to add up."""

ACTION_S = 20e-6
"""Seconds of the executor's own work per forward or backward. An assumption: on a GPU most of it is hidden behind
kernels that are still running."""

REAL_SIZES = (1, 2, 4)
"""Micro-batch sizes for a model that needs data; larger ones are extrapolated."""

REAL_BYTES = 2**32
"""The most parameter bytes with which a model that needs data is run for real."""

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The operations of one layer, or of the loss, at one micro-batch size.

    `first_backward` allocates gradients where `backward` adds to those that are there. `backward_input` is what the
    gradients of the layer's inputs need; the rest of a backward is its weight half. `recompute` is the forward up to
    the last tensor that the backward needs.
    """

    forward: tuple[Operation, ...]
    first_backward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    backward_input: tuple[Operation, ...]
    recompute: tuple[Operation, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """A model, counted: every layer's work, sizes, static bytes and split, the loss last, in the model's order."""

    names: tuple[str, ...]
    dtype: str
    work: dict[int, list[Work]]
    sizes: dict[int, list[LayerSizes]]
    static: list[Static]
    values: tuple[Value, ...]
    splits: dict[int, Split]
    tied: tuple[tuple[str, ...], ...]
    tied_bytes: tuple[Tied, ...]
    batch_bytes: tuple[tuple[int, int, int], ...]
    sequence: int
    least: int


def estimate(
    path: str,
    *,
    hardware: str,
    dtype: str | None = None,
    sizes: Sequence[int] | None = None,
    progress: Progress,
    sequence: int = 0,
) -> Profile:
    """Estimate a profile of the model file at `path` on a device that need not be there.

    `sequence` asks for samples of so many tokens; by default the model file decides.
    `sizes` are micro-batch sizes in samples, by default all powers of two up to the batch; `dtype` is bf16, fp16 or
    fp32, by default the model's own. Raises `PlanError` when the model file fails, or (exit 2) for unknown hardware.
    """
    devices.get(hardware)
    file = load(path, sequence)
    file = dataclasses.replace(file, compiled=False)  # operations are counted one by one
    check_batch(file)
    if dtype is not None:
        file = dataclasses.replace(file, precision="")  # another precision is asked for
    counted = count(file, sizes, dtype, progress)
    name = path.replace("\\", "/").rpartition("/")[2]
    return _profile(counted, file, hardware, name=name, source=sha256(path), fused=False)


def profile_of(
    model: nn.Module,
    batch: Callable[[int], tuple[Any, Any]],
    *,
    hardware: str,
    dtype: str | None = "bf16",
    sizes: Sequence[int],
    batch_size: int | None = None,
    loss: Loss = default_loss,
    optimizer: Callable[[Any], torch.optim.Optimizer] = default_optimizer,
    splits: Callable[[nn.Module], Any] | None = None,
    fused_accumulation: bool = False,
    name: str = "model",
) -> Profile:
    """Estimate a profile of a model that is at hand, on any device: on "meta" it may be larger than this machine.

    `batch(n)` gives inputs and targets, also on "meta". With `fused_accumulation` the products that make weights'
    gradients add to them as well, as Megatron's kernels do; torch adds in a kernel of its own.
    """
    file = ModelFile(
        path=name,
        model=lambda: model,
        batch=batch,
        loss=loss,
        optimizer=optimizer,
        layers=None,
        batch_size=batch_size or max(sizes),
        splits=splits,
    )
    counted = count(file, sizes, dtype)
    return _profile(counted, file, hardware, name=name, source="", fused=fused_accumulation)


def count(
    file: ModelFile,
    sizes: Sequence[int] | None = None,
    dtype: str | None = None,
    progress: Progress = lambda what, done, of: None,
) -> Counted:
    """Count a model's operations and bytes, without data where that is possible, else on small real batches.

    Raises `PlanError` when the model fails, or when it needs data and is too large to be run here.
    """
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(
            what=f"unknown dtype '{dtype}'", where="--dtype", why="known: bf16, fp16, fp32", fix="--dtype bf16"
        )
    wanted = sorted(set(sizes or (2**i for i in range(file.batch_size.bit_length()) if 2**i <= file.batch_size)))
    if not wanted or wanted[0] < 1:
        raise PlanError(
            what="micro-batch sizes must be positive", where="--sizes", why=f"they are {wanted}", fix="--sizes 1,4,16"
        )
    built: list[int] = []
    try:
        return _count(file, wanted, DTYPES.get(dtype or ""), tensors_without_data, built, progress, chosen=bool(sizes))
    except PlanError as error:
        if error.__cause__ is None or isinstance(error.__cause__, msgspec.ValidationError):
            raise  # what the model file says is wrong, with data or without
        if built and built[0] > REAL_BYTES:
            raise PlanError(
                what="the model cannot be counted without data, and is too large to be run here",
                where=error.where,
                why=f"{error.why}; its parameters have {built[0] / 2**30:.1f} GiB, the limit is {REAL_BYTES / 2**30:g}",
                fix="take what looks at values out of the forward, or profile it on the device itself",
            ) from error
        return _count(file, list(REAL_SIZES), DTYPES.get(dtype or ""), nullcontext, built, progress, chosen=False)


def _count(
    file: ModelFile,
    sizes: list[int],
    dtype: torch.dtype | None,
    mode: Callable[[], AbstractContextManager[Any]],
    built: list[int],
    progress: Progress,
    *,
    chosen: bool,
) -> Counted:
    drawn = {n: file.draw(n, seed=n) for n in {1, 2, *sizes}}
    empty = mode is not nullcontext
    with ExitStack() as stack:
        stack.enter_context(mode())
        model = file.build(seed=0)
        built.append(sum(p.nbytes for p in model.parameters()))
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        dtype = dtype or own
        stack.enter_context(_placed(model, dtype, empty=empty))
        batches = {n: pytree.tree_map(lambda t: _input(t, dtype, empty=empty), batch) for n, batch in drawn.items()}
        ready = dataclasses.replace(file, batch=batches.__getitem__)
        layered = cut(ready, model)
        least = 2 if needs_two(ready, model) else 1
        sizes = sizes if chosen else [n for n in sizes if n >= least]
        kinds = find(layered, layered.parted(*batches[2])[0])
        shorter, standing = kinds.short, kinds.standing
        chain = Chain(ready, shorter, torch.device("cpu"))
        work: dict[int, list[Work]] = {}
        found: dict[int, list[LayerSizes]] = {}
        bytes_of: dict[int, dict[str, tuple[int, bool]]] = {}
        stack.enter_context(AsOnGpu())
        for i, samples in enumerate(sizes):
            progress("operations of every layer", i, len(sizes))
            work[samples], found[samples], bytes_of[samples] = _counted(chain, samples)
        names, tied = [layer.name for layer in layered.layers], layered.tied()
        shared = [(name, layered.model.get_parameter(name)) for name, *_ in tied]
        splits = splits_of(chain, sizes[0], list(zip(names, standing, strict=True)))
        name_of = layered.parameter_names()
        trained = [
            {name_of.get(id(p), str(i)): p for i, p in enumerate(layer.module.parameters()) if p.requires_grad}
            for layer in shorter.layers
        ]
        held = [_held(layer.module) for layer in shorter.layers]
    progress("operations of every layer", len(sizes), len(sizes))
    mixed = own == torch.float32 and dtype != torch.float32
    main = torch.float32 if mixed and dtype in MAIN_GRADIENTS else dtype
    static = [
        static_of(file, bytes_, of, mixed=mixed, gradients=main) for bytes_, of in zip(held, trained, strict=True)
    ]
    each = [((p.nbytes, 0), {name: p} if p.requires_grad else {}) for name, p in shared]
    once = [static_of(file, bytes_, of, mixed=mixed, gradients=main) for bytes_, of in each]
    parts = (*standing, len(shorter.layers))
    return Counted(
        names=(*names, "loss"),
        dtype=str(dtype).removeprefix("torch."),
        work={n: [of[part] for part in parts] for n, of in work.items()},
        sizes={n: [of[part] for part in parts] for n, of in found.items()},
        static=[*(static[part] for part in standing), _NOTHING],
        values=kinds.values(layered, bytes_of),
        splits=splits,
        tied=tied,
        tied_bytes=tuple(map(tied_of, once)),
        batch_bytes=tuple((n, _nbytes(batches[n][0]), _nbytes(batches[n][1])) for n in sizes),
        sequence=file.sequence or next(iter(lengths(drawn[2][0])), 0),
        least=least,
    )


_NOTHING = Static(parameter_bytes=0, buffer_bytes=0, gradient_bytes=0, optimizer_bytes=0, optimizer_peak_bytes=0)


@contextmanager
def _placed(model: nn.Module, dtype: torch.dtype, *, empty: bool) -> Iterator[None]:
    """Give a model parameters of one dtype while inside, without data if `empty`; then its own again."""
    held = [(module, name, t) for module in model.modules() for name, t in _tensors_of(module)]
    if not empty and any(t.is_meta for _, _, t in held):
        raise PlanError(
            what="the model needs data, and has none",
            where="the model on torch's meta device",
            why="counting it without data failed",
            fix="build it on the CPU",
        )
    made: dict[int, torch.Tensor] = {}
    for module, name, tensor in held:
        new = _input(tensor.detach(), dtype, empty=empty)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        setattr(module, name, made.setdefault(id(tensor), new))
    try:
        yield
    finally:
        for module, name, tensor in held:
            setattr(module, name, tensor)


def _tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The module's own parameters and buffers, by attribute."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _input(value: Any, dtype: torch.dtype, *, empty: bool) -> Any:
    """A tensor as the model takes it, without data if `empty`."""
    if not isinstance(value, torch.Tensor):
        return value
    wanted = dtype if value.is_floating_point() else value.dtype
    return torch.empty_like(value, dtype=wanted, device="cpu") if empty else value.to(wanted)


def _nbytes(tree: Any) -> int:
    return sum(t.nbytes for t in tensors(tree))


def _counted(chain: Chain, samples: int) -> tuple[list[Work], list[LayerSizes], dict[str, tuple[int, bool]]]:
    """Every part's work and sizes at one micro-batch size, and the bytes of the values between them."""
    passes = Counter()
    sizes, values = recorded_sizes(chain, passes, samples)
    halves = Counter()
    needed: dict[int, int] = {}

    @contextmanager
    def until_saved(part: int, kind: str) -> Iterator[None]:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            needed[part] = halves.here
            return tensor

        with halves.marked(f"{kind}.{part}"), saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def around(part: int, kind: str) -> AbstractContextManager[None]:
        return halves.marked(f"{kind}.{part}")

    inputs, targets = chain.draw(samples)
    with unchanged_buffers(chain.layered.model), torch.random.fork_rng(devices=[]):
        done = chain.forward(inputs, targets, _unwatched)
        chain.backward(done, _unwatched)
        gradients = done.gradients
        with halves:
            done = chain.forward(inputs, targets, until_saved)
            done.gradients = gradients
            chain.halves(done, around)
    for parameter in chain.whole.parameters():
        parameter.grad = None
    parts = range(len(chain.layers) + 1)

    def of(counter: Counter, name: str) -> tuple[Operation, ...]:
        return tuple(counter.operations.get(name, ()))

    work = [
        Work(
            forward=of(passes, f"forward1.{part}"),
            first_backward=of(passes, f"backward0.{part}")[_root(chain, part) :],
            backward=of(passes, f"backward1.{part}")[_root(chain, part) :],
            backward_input=of(halves, f"backward_input.{part}"),
            recompute=of(halves, f"forward.{part}")[: needed.get(part, 0)],
        )
        for part in parts
    ]
    flop = [int(sum(operation.flop for operation in layer.forward)) for layer in work]
    # torch's own counter does not know every attention; ours does
    return work, [msgspec.structs.replace(size, flop=flop[part]) for part, size in enumerate(sizes)], values


def _root(chain: Chain, part: int) -> int:
    """A layer's backward begins with a gradient of 1 that only the seam needs; the loss has one of its own."""
    return 1 if part < len(chain.layers) else 0


@contextmanager
def _unwatched(part: int, kind: str) -> Iterator[None]:
    yield


def _held(module: nn.Module) -> tuple[int, int]:
    """Bytes of a layer's parameters and of its buffers."""
    return sum(p.nbytes for p in module.parameters()), sum(b.nbytes for b in module.buffers())


def _profile(counted: Counted, file: ModelFile, hardware: str, *, name: str, source: str, fused: bool) -> Profile:
    """Put seconds to the operations. Every percentile is the same: an estimate has no spread."""
    own_name, device = devices.get(hardware)
    layers = tuple(
        LayerProfile(
            name=layer,
            parameter_bytes=static.parameter_bytes,
            buffer_bytes=static.buffer_bytes,
            gradient_bytes=static.gradient_bytes,
            optimizer_bytes=static.optimizer_bytes,
            optimizer_peak_bytes=static.optimizer_peak_bytes,
            times=(
                _times(
                    device,
                    {n: work[part] for n, work in counted.work.items()},
                    static,
                    fused=fused,
                    joined=file.clip > 0 or file.precision == SCALED,
                ),
            ),
            sizes=tuple(counted.sizes[n][part] for n in counted.sizes),
            split=counted.splits.get(part),
        )
        for part, (layer, static) in enumerate(zip(counted.names, counted.static, strict=True))
    )
    return Profile(
        key=ProfileKey(
            model=name,
            source_sha256=source,
            device=f"{own_name} (estimated)",
            dtype=counted.dtype,
            cores=devices.HOST_CORES,
            torch=str(torch.__version__),
            python=platform.python_version(),
            sequence=counted.sequence,
            precision=file.precision,
        ),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model_path=file.path,
        layers=layers[:-1],
        loss=layers[-1],
        least=counted.least,
        values=counted.values,
        tied=counted.tied,
        tied_bytes=counted.tied_bytes,
        whole=(),
        load=tuple(Timing.of(n, []) for n, _, _ in counted.batch_bytes),
        batch_bytes=counted.batch_bytes,
        batch=file.batch_size,
        clip=file.clip,
        action_s=ACTION_S,
        noise=0.0,
        machine=device.cluster(own_name),
        estimated=True,
    )


def _times(device: Hardware, work: dict[int, Work], static: Static, *, fused: bool, joined: bool) -> LayerTimes:
    def timings(seconds: Callable[[Work], float]) -> tuple[Timing, ...]:
        return tuple(Timing.of(n, [seconds(of)]) for n, of in work.items())

    def backward(of: Work) -> float:
        return device.total_seconds(of.first_backward if fused else of.backward)

    def inputs(of: Work) -> float:
        if not static.gradient_bytes:
            return backward(of)
        return min(backward(of), device.total_seconds(of.backward_input))

    moved = 2 * (static.parameter_bytes + static.optimizer_bytes) + (3 if joined else 1) * static.gradient_bytes
    update = [Operation("memory", "float32", 0.0, moved)] if static.gradient_bytes else []
    read = [Operation("memory", "float32", 0.0, static.gradient_bytes)] if static.gradient_bytes else []
    return LayerTimes(
        threads=1,
        forward=timings(lambda of: device.total_seconds(of.forward)),
        backward=timings(backward),
        backward_input=timings(inputs),
        backward_weight=timings(lambda of: backward(of) - inputs(of)),
        recompute=timings(lambda of: device.total_seconds(of.recompute)),
        optimizer=Timing.of(next(iter(work)), [device.total_seconds(update)]),
        norm=Timing.of(next(iter(work)), [device.total_seconds(read)]) if joined else None,
    )
