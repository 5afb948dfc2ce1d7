"""Profiles and clusters that come with the program: hardware and models without measuring (see data/README.md).

A profile is built from a table of what somebody else measured: seconds, bytes and readers of every node of a model's
graph, at one batch. The table says nothing else, so the rest is assumed here, and only here:

- **Sizes.** One batch is measured. Seconds and bytes of other micro-batches follow in proportion to the samples, which
  is optimistic below about a dozen: kernels do not become shorter for ever.
- **Nodes.** Modules are layers, under the name that they have in the source; so are `Add` and `Concat`, at no time,
  because the source timed modules only. `Size`, `View` and `__getitem__` cost nothing and make no tensor: who reads
  them reads what they stand for. A second output (Inception's auxiliary classifier) is read by the last layer, behind
  which the loss is.
- **Input.** Its time is that of waiting for the data loader. It is left out, as PipeDream's optimizer does: loading
  happens in other processes, ahead of time, and 636 ms (AlexNet) would hide the model.
- **Sequences.** A model that embeds its inputs has samples of as many tokens as its first embedding makes vectors.
- **Loss.** It was not timed: no seconds, but the logits' size is kept for its backward (log-softmax).
- **Backward's halves.** Not measured: half each for layers with parameters, all input's for the others.
- **Kept for the backward.** By kind of node, as torch does it: see `_SAVES_INPUT`, `_SAVES_OUTPUT` and `_saved_bytes`.
  A ReLU works in place. Batch norm's per-channel statistics are left out.
- **Optimizer.** SGD with momentum: one buffer as large as the parameters. Its seconds are those of its memory traffic.
- **Machine.** The source does not state the device. VGG-16's first ReLU reads and writes 740 GB/s: more than a P100's
  memory can (732), less than a V100's (900). So V100s are assumed: the cluster dgx1-v100.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from pathlib import Path

import msgspec

from planner.basis.errors import ARTEFACT, PlanError
from planner.values import cluster_file
from planner.values.profile import LayerProfile, LayerSizes, LayerTimes, Profile, ProfileKey, Timing, Value

DATA = Path(__file__).parent / "data"
MACHINE = "dgx1-v100"

FLOAT_BYTES = 4
TOKEN_BYTES = 8
"""torch's class numbers and tokens are 64-bit integers."""
MASK_BYTES = 1
"""Per element: torch's dropout keeps a mask of booleans."""
OPTIMIZER_TRAFFIC = 5
"""Parameters, gradients and momentum are read; parameters and momentum are written."""
MEMORY_BYTES_PER_S = 900e9
"""HBM2 of a V100 (NVIDIA Tesla V100 datasheet)."""
LSTM_KEPT = 5
"""Tensors as large as the output that an LSTM keeps besides it: four gates and the cell (Hochreiter's equations)."""

_SAVES_INPUT = {
    "Conv2d", "Linear", "Classifier", "BatchNorm2d", "MaxPool2d", "AvgPool2d", "LSTM", "EmuBidirLSTM",
    "RecurrentAttention",
}  # fmt: skip
_SAVES_OUTPUT = {"ReLU", "LSTM", "EmuBidirLSTM", "RecurrentAttention"}
_ENTRY_OF_ITEM = {"RecurrentAttention": {0: 0, 2: 3}}
"""Which recorded tensor `__getitem__` means: the source lists (rnn, h, c, attention, scores), the module returns
(rnn, (h, c), attention, scores)."""


class _Node(msgspec.Struct, frozen=True):
    number: int
    op: str
    forward_s: float
    backward_s: float
    made: tuple[int, ...]
    parameter_bytes: int
    read_by: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.op.partition("(")[0]


class _Wire(msgspec.Struct):
    """A value while its readers are being found; `source` is -1 for a model input."""

    name: str
    source: int
    size: int
    targets: list[int]


def profiles() -> dict[str, Path]:
    """The files of the shipped profiles by name."""
    return {path.stem: path for path in sorted(DATA.glob("*.csv"))}


def clusters() -> dict[str, Path]:
    """The files of the shipped clusters by name."""
    return {path.stem: path for path in sorted((DATA / "clusters").glob("*.toml"))}


def read(path: Path) -> Profile:
    """Build the profile of a table in the format of data/README.md.

    Raises `PlanError` (exit 4) that names what is wrong with it.
    """
    try:
        data = path.read_bytes()
        notes, nodes = _table(data.decode())
        return _profile(path.stem, hashlib.sha256(data).hexdigest(), notes, nodes)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise PlanError(
            what="the profile's table cannot be read",
            where=str(path),
            why=f"there is no {error}" if isinstance(error, KeyError) else str(error),
            fix="compare it with the shipped ones, for example profiles/data/vgg16.csv",
            code=ARTEFACT,
        ) from error


def _table(text: str) -> tuple[dict[str, str], list[_Node]]:
    """The `# name = value` lines, and the nodes with seconds and bytes."""
    lines = text.splitlines()
    notes = {m[1]: m[2] for line in lines if (m := re.fullmatch(r"# (\w+) = (.+)", line))}
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    nodes = [
        _Node(
            number,
            row["op"],
            float(row["forward_ms"]) / 1e3,
            float(row["backward_ms"]) / 1e3,
            tuple(int(size) for size in row["output_bytes"].split()),
            int(row["parameter_bytes"]),
            tuple(int(reader) for reader in row["read_by"].split()),
        )
        for number, row in enumerate(rows, start=1)
    ]
    for node in nodes:
        if not all(node.number < reader <= len(nodes) for reader in node.read_by):
            raise ValueError(
                f"node {node.number} '{node.op}': it cannot be read by {node.read_by}, which must be later"
            )
        if not node.made or min(*node.made, node.parameter_bytes) < 0:
            raise ValueError(f"node {node.number} '{node.op}': its bytes must be there and not negative")
        if not (0 <= node.forward_s < math.inf and 0 <= node.backward_s < math.inf):
            raise ValueError(f"node {node.number} '{node.op}': its times must be finite and not negative")
    return notes, nodes


def _profile(name: str, digest: str, notes: dict[str, str], nodes: list[_Node]) -> Profile:
    batch = int(notes["batch"])
    if batch < 1:
        raise ValueError(f"batch = {batch}: it must be positive")
    layers, wires = _wired(nodes)
    if not layers:
        raise ValueError("no node is a layer")
    values = tuple(
        Value(
            name=wire.name,
            source=wire.source,
            targets=tuple(sorted(set(wire.targets))),
            bytes_at=((batch, wire.size),),
            gradient=wire.source >= 0,
        )
        for wire in wires
        if wire.targets
    )
    logits = layers[-1].made[0]
    classes = int(re.findall(r"out_features=(\d+)", layers[-1].op)[-1])
    inputs = sum(v.bytes_at[0][1] for v in values if v.source < 0)
    machine = cluster_file.read(clusters()[MACHINE])
    stated = not notes["device"].startswith("not stated")
    return Profile(
        key=ProfileKey(
            model=name,
            source_sha256=digest,
            device=notes["device"] if stated else f"{machine.devices[0].kind} (assumed: see profiles/data/README.md)",
            dtype="float32",
            cores=0,
            torch="not stated by the source",
            python="not stated by the source",
            sequence=_tokens(layers, values, batch),
        ),
        created=notes["source"],
        model_path="",
        layers=tuple(_layer(i, node, layers, values, batch) for i, node in enumerate(layers)),
        loss=_loss(logits, batch),
        values=values,
        tied=(),
        whole=(),
        load=(Timing.of(batch, []),),
        batch_bytes=((batch, inputs, logits // (FLOAT_BYTES * classes) * TOKEN_BYTES),),
        batch=batch,
        action_s=0.0,
        noise=0.0,
        machine=machine,
    )


def _wired(nodes: list[_Node]) -> tuple[list[_Node], list[_Wire]]:
    """Fold the nodes that make no tensor into those whose tensor they stand for."""
    readings: dict[int, list[_Node]] = {node.number: [] for node in nodes}
    for node in nodes:
        for reader in node.read_by:
            readings[reader].append(node)
    layers: list[_Node] = []
    wires: list[_Wire] = []
    made: dict[int, dict[int, _Wire]] = {}  # the values that reading a node means, by their index in its output
    last_outputs: list[_Wire] = []
    for node in nodes:
        read = [wire for source in readings[node.number] for wire in list(made[source.number].values())[:1]]
        if node.kind.startswith("Input"):
            made[node.number] = {0: _Wire(f"node{node.number}", -1, node.made[0], [])}
            wires += made[node.number].values()
        elif node.kind in ("hidden", "Size"):  # no state yet, or no tensor
            made[node.number] = {}
        elif node.kind == "View":
            made[node.number] = dict(enumerate(read))
        elif node.kind == "__getitem__":
            (source,) = readings[node.number]
            item = int(node.op.partition("(")[2].rstrip(")"))
            entry = _ENTRY_OF_ITEM.get(source.kind, {}).get(item, item)
            made[node.number] = {0: made[source.number][entry]} if entry in made[source.number] else {}
        else:
            if node.kind == "Concat":  # the source gives GNMT's as large as one of its inputs
                node = msgspec.structs.replace(node, made=(sum(wire.size for wire in read),))
            if node.kind == "Embedding":
                for wire in read:  # tokens: the source gives them no bytes
                    wire.size = node.made[0] // (FLOAT_BYTES * _width(node)) * TOKEN_BYTES
            for wire in read:
                wire.targets.append(len(layers))
            several = len(node.made) > 1
            made[node.number] = {
                i: _Wire(f"node{node.number}[{i}]" if several else f"node{node.number}", len(layers), size, [])
                for i, size in enumerate(node.made)
            }
            if not node.read_by:
                last_outputs.append(made[node.number][0])
            wires += made[node.number].values()
            layers.append(node)
    for wire in last_outputs:
        if wire.source < len(layers) - 1:
            wire.targets.append(len(layers) - 1)
    return layers, wires


def _tokens(layers: list[_Node], values: tuple[Value, ...], batch: int) -> int:
    """How many tokens a sample has, 0 where the model embeds none of its inputs."""
    embedded = (value for value in values if value.source < 0 and layers[value.targets[0]].kind == "Embedding")
    return next((value.bytes_at[0][1] // (TOKEN_BYTES * batch) for value in embedded), 0)


def _width(embedding: _Node) -> int:
    return int(re.findall(r"\d+", embedding.op)[1])


def _layer(index: int, node: _Node, layers: list[_Node], values: tuple[Value, ...], batch: int) -> LayerProfile:
    read = [v for v in values if index in v.targets]
    own = [v for v in values if v.source == index]
    output = sum(v.bytes_at[0][1] for v in own) or node.made[0]
    saved = _saved_bytes(node)
    gradients = sum(v.bytes_at[0][1] for v in read if v.gradient)
    kept = node.kind in _SAVES_OUTPUT or any(layers[t].kind in _SAVES_INPUT for v in own for t in v.targets)
    weight_share = 0.5 if node.parameter_bytes else 0.0
    statistics = node.parameter_bytes + TOKEN_BYTES if node.kind == "BatchNorm2d" else 0

    def measured(seconds: float) -> tuple[Timing, ...]:
        return (Timing.of(batch, [seconds]),)

    return LayerProfile(
        name=f"node{node.number}-{node.kind}",
        parameter_bytes=node.parameter_bytes,
        buffer_bytes=statistics,  # running mean and variance, as large as weight and bias, and the count of batches
        gradient_bytes=node.parameter_bytes,
        optimizer_bytes=node.parameter_bytes,
        optimizer_peak_bytes=0,
        times=(
            LayerTimes(
                threads=1,
                forward=measured(node.forward_s),
                backward=measured(node.backward_s),
                backward_input=measured(node.backward_s * (1 - weight_share)),
                backward_weight=measured(node.backward_s * weight_share),
                recompute=measured(node.forward_s),
                optimizer=Timing.of(1, [OPTIMIZER_TRAFFIC * node.parameter_bytes / MEMORY_BYTES_PER_S]),
            ),
        ),
        sizes=(
            LayerSizes(
                samples=batch,
                saved_bytes=saved,
                output_bytes=output,
                output_saved=kept,
                forward_peak_bytes=0 if "inplace" in node.op else sum(node.made) + saved,
                backward_first_peak_bytes=gradients + node.parameter_bytes,
                backward_peak_bytes=gradients + node.parameter_bytes,
                flop=_flop(node),
            ),
        ),
    )


def _saved_bytes(node: _Node) -> int:
    """Bytes kept for the backward besides inputs and outputs."""
    output = node.made[0]
    match node.kind:
        case "MaxPool2d":  # where each maximum was
            return output // FLOAT_BYTES * TOKEN_BYTES
        case "Dropout":
            return output // FLOAT_BYTES * MASK_BYTES
        case "LSTM" | "EmuBidirLSTM":
            return LSTM_KEPT * output
        case "RecurrentAttention":  # tanh(query + key) for every pair and unit (Bahdanau et al., arXiv 1409.0473)
            units = int(re.findall(r"out_features=(\d+)", node.op)[0])
            return LSTM_KEPT * output + node.made[-1] * units
        case _:
            return 0


def _flop(node: _Node) -> int:
    """FLOP of a convolution's or a linear layer's forward; 0 for the others, which are bound by memory or unknown."""
    elements = node.made[0] // FLOAT_BYTES
    if node.kind == "Conv2d":
        incoming = re.findall(r"\d+", node.op.partition("(")[2])[0]
        kernel = re.findall(r"kernel_size=\((\d+), (\d+)\)", node.op)[0]
        return 2 * elements * int(incoming) * math.prod(int(side) for side in kernel)
    if node.kind in ("Linear", "Classifier"):
        return 2 * elements * int(re.findall(r"in_features=(\d+)", node.op)[0])
    return 0


def _loss(logits: int, batch: int) -> LayerProfile:
    nothing = (Timing.of(batch, []),)
    return LayerProfile(
        name="loss",
        parameter_bytes=0,
        buffer_bytes=0,
        gradient_bytes=0,
        optimizer_bytes=0,
        optimizer_peak_bytes=0,
        times=(
            LayerTimes(
                threads=1,
                forward=nothing,
                backward=nothing,
                backward_input=nothing,
                backward_weight=nothing,
                recompute=nothing,
                optimizer=Timing.of(1, []),
            ),
        ),
        sizes=(
            LayerSizes(
                samples=batch,
                saved_bytes=logits,
                output_bytes=FLOAT_BYTES,
                output_saved=False,
                forward_peak_bytes=logits,
                backward_first_peak_bytes=logits,
                backward_peak_bytes=logits,
                flop=0,
            ),
        ),
    )
