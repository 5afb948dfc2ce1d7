"""GPipe (Huang et al., arXiv 1811.06965): how throughput and the largest model grow with devices and micro-batches.

Layers are counted and priced as everywhere (`profiles.estimate`), for a core of a TPU v3 and, in place of the P100, for
the P40 of the same generation. RMSProp in float32: 12 bytes per parameter, as in the paper.

Every stage is recomputed whole, loss included, as the paper has it: a device holds what passes its two ends for all
micro-batches, and the activations of one. An update needs no temporary memory (XLA fuses it; torch's kernels would).

**Speed.** Tables 2 and 3 say "batch size was adjusted to fit memory if necessary" and not to what. Ours is the largest
power of two samples per micro-batch that fits, and one where not even one does: Transformer-48 on two devices, whose
parameters fill 15.3 of 17.2 GB (by table 1, too, two hold 26 layers). So only the order is compared.

**Memory.** Table 1: the largest L (Transformer-L) or D (AmoebaNet-D(L, D)) whose every stage fits. Batches of 32 and
128 are cut into micro-batches of one sample: the paper does not say M, and this is what the largest model needs.
Compared is how many times more parameters K devices train than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import amoebanet
import by_hand
import megatron_gpt
import msgspec
import torch
from by_hand import GIB, Figure, Result, Table

from planner.costs.stage_memory import stage_memory
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.profile import LayerProfile, Profile, Value
from profiles import hardware
from profiles.estimate import profile_of

HIDDEN, HEADS, SEQ, VOCABULARY = 2048, 32, 1024, 32000
"""Transformer-L's width, heads, tokens per sample and words; its feed-forward layers have 4 x 2048 = 8192."""
MOST = 256
"""Samples per micro-batch beyond which nothing is tried."""
SMALL_TPU_BYTES = 8 * GIB
"""Memory of a core of the TPU v2, on which table 1 has AmoebaNet; its times are those of the v3 here, as well."""
CORES_PER_CHIP = {"tpu-v3": 2}
SIZES = (1, 4, 16, 64)
"""Samples per micro-batch that are counted; between them times and bytes are interpolated."""


def root_mean_square(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters)  # type: ignore[arg-type]


@cache
def _short(device: str) -> Profile:
    return profile_of(
        megatron_gpt.gpt(HIDDEN, HEADS, 3, SEQ, VOCABULARY),
        megatron_gpt.batch(SEQ, VOCABULARY),
        hardware=device,
        dtype=None,
        sizes=SIZES,
        optimizer=root_mean_square,
    )


@cache
def transformer(layers: int, device: str) -> Profile:
    """Transformer-L: the estimate of a short one, with its middle block L times."""
    short = _short(device)
    block = short.layers[2]
    blocks = tuple(msgspec.structs.replace(block, name=f"block{i}") for i in range(layers))
    one = next(v for v in short.values if v.source == 2)
    values = tuple(
        Value(name=f"v{i}", source=i, targets=(i + 1,), bytes_at=one.bytes_at, gradient=i >= 0)
        for i in range(-1, layers + 1)
    )
    return msgspec.structs.replace(short, layers=(short.layers[0], *blocks, short.layers[-1]), values=values)


@cache
def network(layers: int, filters: int, device: str, sizes: tuple[int, ...] = SIZES) -> Profile:
    """AmoebaNet-D(L, D)."""
    return profile_of(
        amoebanet.amoebanet(layers, filters),
        amoebanet.batch(),
        hardware=device,
        dtype=None,
        sizes=sizes,
        optimizer=root_mean_square,
    )


def cluster_of(device: str, count: int) -> Cluster:
    """As many devices as are asked for, joined by their own kind of link; two cores of a TPU share a chip's memory."""
    _, kind = hardware.get(device)
    each = CORES_PER_CHIP.get(device, count)
    chips = [f"chip{i}" for i in range(-(-count // each))]

    def link(between: tuple[str, str], bytes_per_s: float) -> Link:
        return Link(
            between=between,
            latency_s=hardware.LINK_LATENCY_S,
            bandwidth_bytes_per_s=hardware.LINK_EFFICIENCY * bytes_per_s,
            shared=False,
        )

    inside = kind.memory_bytes_per_s if device in CORES_PER_CHIP else kind.link_bytes_per_s
    return Cluster(
        name=device,
        hosts=tuple(Host(name=chip, cores=hardware.HOST_CORES, memory_bytes=hardware.HOST_BYTES) for chip in chips),
        devices=tuple(
            Device(name=f"d{i}", memory_bytes=kind.memory_bytes, host=chips[i // each]) for i in range(count)
        ),
        links=(
            *(link((chip, chip), inside) for chip in chips),
            *(link(pair, kind.link_bytes_per_s) for pair in pairwise(chips)),
        ),
    )


def balance_of(profile: Profile, k: int) -> list[int]:
    """Cut so that the slowest stage is fastest: fill stages up to a limit, and find the smallest limit that works."""
    weights = [t.forward[-1].median_s + t.backward[-1].median_s for t in (own.times[0] for own in profile.layers)]
    low, high = max(weights), sum(weights)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if len(filled(weights, middle)) <= k else (middle, high)
    counts = filled(weights, high)
    while len(counts) < k:
        widest = max(range(len(counts)), key=counts.__getitem__)
        counts[widest : widest + 1] = [counts[widest] - counts[widest] // 2, counts[widest] // 2]
    return counts


def filled(weights: Sequence[float], limit: float) -> list[int]:
    """Layers per stage, each as full as the limit allows."""
    counts, held = [0], 0.0
    for weight in weights:
        if counts[-1] and held + weight > limit:
            counts.append(0)
            held = 0.0
        counts[-1] += 1
        held += weight
    return counts


def most_samples(profile: Profile, balance: Sequence[int], m: int, capacity: float) -> int:
    """Samples per micro-batch, a power of two: the most that fit, and at least one."""
    stops = [sum(balance[: i + 1]) for i in range(len(balance))]
    stages = [range(stop - count, stop) for stop, count in zip(stops, balance, strict=True)]
    samples = 1
    while samples < MOST and all(_stage_bytes(profile, own, 2 * samples, m) <= capacity for own in stages):
        samples *= 2
    return samples


def throughput(profile: Profile, device: str, k: int, m: int, capacity: float) -> tuple[float, int]:
    """Samples per second, and samples per micro-batch."""
    cluster = cluster_of(device, k)
    balance = balance_of(profile, k)
    samples = most_samples(profile, balance, m, capacity)
    plan = by_hand.plan("gpipe", profile.layers, balance, cluster, m, samples, recompute=True)
    return m * samples / by_hand.makespan(profile, plan, cluster), samples


def fits(profile: Profile, k: int, samples: int, capacity: float, m: int) -> bool:
    """Whether K stages of a model fit: from the input on, each takes as many layers as it can hold."""
    start, count = 0, len(profile.layers)
    for _ in range(k):
        stop = start
        while stop < count and _stage_bytes(profile, range(start, stop + 1), samples, m) <= capacity:
            stop += 1
        if stop == start:
            return False
        start = stop
        if start == count:
            return True
    return False


def _stage_bytes(profile: Profile, layers: range, samples: int, m: int) -> float:
    """What a stage holds at most: everything static, all micro-batches' ends, and one micro-batch's activations."""
    of, again = (stage_memory(profile, layers, samples, runs) for runs in ((layers,), ()))
    static = of.parameters + of.buffers + of.gradients + of.optimizer
    last = layers.stop == len(profile.layers)
    return static + m * (of.received + (0.0 if last else of.kept)) + of.saved - of.kept + again.backward_peak


def largest_transformer(k: int) -> tuple[int, float]:
    """Most layers on K cores of a TPU v3, and the parameters of that model.

    All stages but the first and the last are alike, so that more than three need not be tried.
    """
    _, core = hardware.get("tpu-v3")
    short = transformer(3, "tpu-v3")
    own = [layer.parameter_bytes / 4 for layer in short.layers]

    def most(stages: int) -> int:
        layers = 1
        while fits(transformer(layers + 1, "tpu-v3"), stages, 1, core.memory_bytes, 32):
            layers += 1
        return layers

    if k <= 3:
        layers = most(k)
    else:
        layers = most(3) + (k - 3) * (most(3) - most(2))
    return layers, own[0] + layers * own[1] + own[-1]


def largest_network(k: int) -> tuple[str, float]:
    """The widest AmoebaNet-D that K TPUs v2 train, with as many cells as the authors took, and its parameters."""
    cells = {1: 18, 2: 18, 4: 36, 8: 72}[k]
    low, high = 0.125, 2.5
    while high - low > 0.001:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(widened(cells, middle), k, 1, SMALL_TPU_BYTES, 128) else (low, middle)
    parameters = sum(own.parameter_bytes for own in widened(cells, low).layers) / 4
    return f"({cells}, {FILTERS * low:.0f})", parameters


FILTERS = 512
"""The width that is counted; others follow from it."""


def widened(cells: int, width: float) -> Profile:
    """AmoebaNet-D(cells, width x 512): parameters grow with the square of the width, activations with the width.

    So the width is a number like any other, and growth is free of the steps in which authors try widths.
    """
    known = network(cells, FILTERS, "tpu-v3", (1,))

    def layer(own: LayerProfile) -> LayerProfile:
        static = {name: round(getattr(own, name) * width**2) for name in STATIC}
        sizes = tuple(
            msgspec.structs.replace(size, **{name: round(getattr(size, name) * width) for name in PASSING})
            for size in own.sizes
        )
        return msgspec.structs.replace(own, sizes=sizes, **static)

    values = tuple(
        msgspec.structs.replace(v, bytes_at=tuple((n, round(size * width)) for n, size in v.bytes_at))
        for v in known.values
    )
    return msgspec.structs.replace(known, layers=tuple(map(layer, known.layers)), loss=layer(known.loss), values=values)


STATIC = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
PASSING = (
    *("saved_bytes", "output_bytes"),
    *("forward_peak_bytes", "backward_peak_bytes", "backward_first_peak_bytes"),
)


def _number(text: str) -> float:
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


def run(*, quick: bool = False) -> Result:
    """All cells, or (`quick`) only Transformer-48's speeds and the largest Transformers."""
    figures: list[Figure] = []
    speed = Table(
        "C. GPipe, throughput relative to the first cell (arXiv 1811.06965, tables 2 and 3)",
        ("model", "device", "K", "M", "published", "ours", "samples per micro-batch"),
    )
    cells: dict[tuple[str, str], list[tuple[int, int, float]]] = {}
    for r in by_hand.read("gpipe_speedup.csv"):
        key = r["model"], "tpu-v3" if r["device"] == "TPU" else "p40"
        cells.setdefault(key, []).append(
            (int(r["K_partitions"]), int(r["M_microbatches"]), float(r["normalised_throughput"]))
        )
    wrong = 0
    for (model, device), published in cells.items():
        if quick and model != "Transformer-48":
            continue
        if model.startswith("Transformer"):
            profile = transformer(int(model.rpartition("-")[2]), device)
        else:
            layers, filters = map(int, model[model.index("(") + 1 : -1].split(","))
            profile = network(layers, filters, device)
        small = device == "tpu-v3" and not model.startswith("Transformer")
        capacity = SMALL_TPU_BYTES if small else hardware.get(device)[1].memory_bytes
        ours = [throughput(profile, device, k, m, capacity) for k, m, _ in published]
        wrong += by_hand.disorder([p for *_, p in published], [o for o, _ in ours], [(k, m) for k, m, _ in published])
        for (k, m, p), (own, samples) in zip(published, ours, strict=True):
            speed.rows.append((model, device, k, m, p, f"{own / ours[0][0]:.2f}" if ours[0][0] else "none", samples))
    figures.append(Figure("GPipe: pairs in a row or a column in another order", wrong, 0, "pairs"))
    memory = Table(
        "C. GPipe, the largest model (table 1)",
        ("devices", "published", "parameters", "growth", "ours", "parameters", "growth", "error"),
    )
    growth: list[float] = []
    first: dict[str, tuple[float, float]] = {}
    for r in by_hand.read("gpipe_memory.csv"):
        if not r["experiment"].startswith("pipeline"):
            continue
        k = int(r["experiment"].rpartition("-")[2])
        kind = r["model"].partition("-")[0]
        if quick and kind != "Transformer":
            continue
        name, own = (largest_transformer if kind == "Transformer" else largest_network)(k)
        theirs = _number(r["params"])
        a, b = first.setdefault(kind, (theirs, own))
        error = (own / b) / (theirs / a) - 1
        growth.append(error)
        cells_ = f"{theirs / a:.2f}", f"{kind}{name if kind == 'AmoebaNet' else f'-{name}'}", f"{own / 1e9:.3g}B"
        memory.rows.append((k, r["model"], r["params"], *cells_, f"{own / b:.2f}", f"{error:+.1%}"))
    figures.append(Figure("GPipe: growth of the largest model, largest error", 100 * max(map(abs, growth)), 15.0))
    return Result([speed, memory], figures)
