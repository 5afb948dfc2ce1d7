"""What a model costs, layer by layer: the profile, as measured, and questions about it between measured points.

A profile knows one device kind and dtype. Times are not linear in the micro-batch size, so they are kept at several
sizes and interpolated. It does not know how layers are grouped: that is a `Plan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import msgspec
import networkx as nx

from planner.basis.errors import ARTEFACT, PlanError
from planner.values.cluster import Cluster


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one operation at one micro-batch size: median, 10th, 25th, 75th and 90th percentile."""

    samples: int
    low_s: float
    lower_s: float
    median_s: float
    upper_s: float
    high_s: float

    @classmethod
    def of(cls, samples: int, seconds: Sequence[float]) -> Timing:
        """Summarise measured seconds; none at all count as zero.

        >>> Timing.of(1, [1.0, 2.0, 3.0]).upper_s
        2.5
        """
        found = sorted(seconds) or [0.0]

        def quantile(share: float) -> float:
            at = share * (len(found) - 1)
            below = int(at)
            above = min(below + 1, len(found) - 1)
            return max(0.0, found[below] + (found[above] - found[below]) * (at - below))

        low, lower, median, upper, high = (quantile(share) for share in (0.1, 0.25, 0.5, 0.75, 0.9))
        return cls(samples=samples, low_s=low, lower_s=lower, median_s=median, upper_s=upper, high_s=high)

    def scaled(self, factor: float, *, samples: int = 0) -> Timing:
        """Return so many times the seconds, of other `samples` where these are given."""
        return Timing(
            samples=samples or self.samples,
            low_s=self.low_s * factor,
            lower_s=self.lower_s * factor,
            median_s=self.median_s * factor,
            upper_s=self.upper_s * factor,
            high_s=self.high_s * factor,
        )


def _sound(timings: Sequence[Timing]) -> bool:
    """Whether all seconds are finite and not negative."""
    return all(0 <= n < math.inf for t in timings for n in (t.low_s, t.lower_s, t.median_s, t.upper_s, t.high_s))


class LayerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """A layer's times with a given number of threads, one `Timing` per measured micro-batch size.

    `backward` is the whole backward as autograd runs it; `backward_input` and `backward_weight` are its two halves
    run apart (zero-bubble schedules), whose sum is usually larger. `recompute` is the forward as
    `torch.utils.checkpoint` repeats it when this layer is a stage's last: it stops at the last tensor backward needs.
    `optimizer` is the update, `norm` taking the norm of the gradients before it, where the model clips them; the update
    then scales them, too.
    """

    threads: int
    forward: tuple[Timing, ...]
    backward: tuple[Timing, ...]
    backward_input: tuple[Timing, ...]
    backward_weight: tuple[Timing, ...]
    recompute: tuple[Timing, ...]
    optimizer: Timing
    norm: Timing | None = None


class LayerSizes(msgspec.Struct, frozen=True, kw_only=True):
    """A layer's bytes and FLOP at one micro-batch size.

    `saved_bytes` is kept from forward to backward, deduplicated by storage, without parameters, inputs and outputs;
    `output_bytes` is sent onward, and kept as well where `output_saved`: until the layer's own backward where the layer
    itself `saves_output`, otherwise until those who read it have had theirs. The peaks are transient bytes above what
    was live when the layer's forward or backward started: `backward_first_peak_bytes` while gradients are allocated,
    `backward_peak_bytes` while they are accumulated into.

    Of a backward in halves the first keeps `between_bytes` of gradients for the second, deduplicated by storage, and
    where it is `between_output` the gradient of the layer's output besides. `input_peak_bytes` are the first half's,
    `weight_first_peak_bytes` and `weight_peak_bytes` the second's. All are 0 where nobody has measured them.
    """

    samples: int
    saved_bytes: int
    output_bytes: int
    output_saved: bool
    forward_peak_bytes: int
    backward_first_peak_bytes: int
    backward_peak_bytes: int
    flop: int
    saves_output: bool = True
    between_bytes: int = 0
    between_output: bool = False
    input_peak_bytes: int = 0
    weight_first_peak_bytes: int = 0
    weight_peak_bytes: int = 0


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """How a layer divides over t devices (tensor parallelism).

    `forward` and `backward` are the all-reduces of its output's bytes that it needs per micro-batch in each direction
    (a column-split followed by a row-split linear needs 1 and 1, a transformer block 2 and 2), `whole` is the share of
    its saved bytes that every device holds in full (0 with sequence parallelism).
    """

    forward: int
    backward: int
    whole: float = 0.0


class LayerProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One layer: its static bytes, and its times and sizes at the measured micro-batch sizes.

    `gradient_bytes` are what is added up from the first backward to the update, and reduced: in float32 beside weights
    of 16 bits where the optimizer keeps them so.

    `split` says how it divides over devices, where the model file says that it does.
    """

    name: str
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    optimizer_peak_bytes: int
    times: tuple[LayerTimes, ...]
    sizes: tuple[LayerSizes, ...]
    split: Split | None = None
    like: str = ""
    """The layer of the same kind that was measured for it; "" where it was measured itself."""

    @property
    def output_saved(self) -> bool:
        """Whether some layer keeps this one's output for its backward."""
        return self.sizes[-1].output_saved


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that one layer makes and later layers read: an edge of the graph, or several when many read it.

    `source` is -1 for a model input. `bytes_at` pairs micro-batch sizes with bytes. `gradient` says whether a
    gradient of the same size flows back.
    """

    name: str
    source: int
    targets: tuple[int, ...]
    bytes_at: tuple[tuple[int, int], ...]
    gradient: bool


class Tied(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes of one parameter that several layers hold: a stage that has more than one of them holds it once."""

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


class WholeStep(msgspec.Struct, frozen=True, kw_only=True):
    """The unsplit model measured beside its layers, at one number of threads and one micro-batch size.

    `layers_*` are the sums over the layers measured in the same interleaved passes.
    """

    threads: int
    samples: int
    forward_s: float
    backward_s: float
    optimizer_s: float
    layers_forward_s: float
    layers_backward_s: float
    layers_optimizer_s: float
    norm_s: float = 0.0
    layers_norm_s: float = 0.0


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """How the model file's `data()` are made into batches; `samples` of them are an epoch (0: nobody knows).

    With `workers`, processes of each rank that loads, the next batches are made while a step computes: `making` are
    seconds for one share in one of them, of which `busy` is the part for which it needs a core. Without, a rank makes
    them itself.
    """

    workers: int = 0
    making: tuple[Timing, ...] = ()
    busy: float = 1.0
    samples: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0 or not 0 <= self.busy <= 1 or not _sound(self.making):
            raise ValueError("loading: workers and seconds must not be negative, and busy is a part of them")
        if self.workers and not self.making:
            raise ValueError("loading.making: what workers make takes a time")


SCHEMA = 3
"""Of a profile's file: since 3 it says the length of its sequences."""


class ProfileKey(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile is valid for. A difference in any field makes it stale.

    `sequence` is the number of tokens of a sample; 0 where samples are no sequences. `dtype` is that of the parameters;
    with a `precision` ("bf16" or "fp16") much of the model runs in fewer bits (autocast). Its layers may be `compiled`.
    """

    model: str
    source_sha256: str
    device: str
    dtype: str
    cores: int
    torch: str
    python: str
    sequence: int = 0
    precision: str = ""
    compiled: bool = False
    schema: int = SCHEMA

    @property
    def numbers(self) -> str:
        """The dtype, the precision where there is one, and whether layers are compiled, in words."""
        lower = f", {self.precision} where autocast lowers it" if self.precision else ""
        return f"{self.dtype}{lower}{', compiled layer by layer' if self.compiled else ''}"

    @property
    def computing(self) -> str:
        """The dtype in which most is computed."""
        return {"bf16": "bfloat16", "fp16": "float16"}.get(self.precision, self.dtype)

    def differences(self, other: ProfileKey) -> list[str]:
        """List the fields that differ, as `name: mine -> theirs`."""
        return [
            f"{field}: {getattr(self, field)} -> {getattr(other, field)}"
            for field in self.__struct_fields__
            if getattr(self, field) != getattr(other, field)
        ]


class Measuring(msgspec.Struct, frozen=True, kw_only=True):
    """How a profile was measured: what its budget left out, and what follows from other times.

    Everything was measured in `rounds` at least. Sizes `between` those that were measured are interpolated, those
    `beyond` continue the line of the last. Layers of one kind differ by the share `unlike` at most. `derived` says in
    words what else was not run. `one_by_one` if no more than one layer was in memory, so that the cut model was not
    compared with the whole one; `interrupted` if somebody ended it. For the share `waiting` of the time not even one
    thread had a core, because other programs had them all.
    """

    rounds: int
    between: tuple[int, ...] = ()
    beyond: tuple[int, ...] = ()
    unlike: float = 0.0
    derived: tuple[str, ...] = ()
    one_by_one: bool = False
    interrupted: bool = False
    waiting: float = 0.0


class Profile(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Everything measured about one model on one machine.

    `layers` are in execution order; `loss` is what the last stage does after its last layer. `action_s` is the
    executor's own time per forward or backward action, on top of the layers. `tied` names parameters shared by
    several layers. `load` is the time to produce one batch, or to take it from processes that have, as `loading` says.
    `machine` is where all of it was measured, or, of an `estimated` profile, the hardware it was computed for from
    counted operations. `sources` are the files that the
    model file imports from its own folder, by their paths from there: the key's hash is of these, too. `opaque` are
    modules that stay whole inside a layer, as torch cannot follow their forward, each with the reason; `unused` the
    parameters that no layer holds, as nothing reads them; `evaluating` says that `model()` returns the model in
    evaluation mode, in which it is then trained. `clip` is the norm to which the model clips all its gradients
    together, 0 where it does not; `rate_s` the seconds of setting the next step's learning rate behind an update.
    `measuring` says how it was measured, where it was. A micro-batch has `least` samples at least: two where batch norm
    refuses one.
    """

    key: ProfileKey
    created: str
    model_path: str
    layers: tuple[LayerProfile, ...]
    loss: LayerProfile
    values: tuple[Value, ...]
    tied: tuple[tuple[str, ...], ...]
    whole: tuple[WholeStep, ...]
    load: tuple[Timing, ...]
    batch_bytes: tuple[tuple[int, int, int], ...]
    """(samples, bytes of the inputs, bytes of the targets) of one batch."""
    batch: int
    action_s: float
    noise: float
    machine: Cluster
    estimated: bool = False
    sources: tuple[str, ...] = ()
    opaque: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    tied_bytes: tuple[Tied, ...] = ()
    """Of each group of `tied`, in its order; older profiles do not know them."""
    evaluating: bool = False
    machine_created: str = ""
    """When the machine's own part was measured: links, overheads and, unless the model's own was, contention."""
    clip: float = 0.0
    loading: Loading | None = None
    rate_s: float = 0.0
    measuring: Measuring | None = None
    least: int = 1

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: a profile needs at least one layer")
        for index, layer in enumerate((*self.layers, self.loss)):
            if not layer.times or not layer.sizes:
                raise ValueError(f"layers[{index}] '{layer.name}': no measured times or sizes")
            timings = [
                timing
                for t in layer.times
                for timing in (
                    *(*t.forward, *t.backward, *t.backward_input, *t.backward_weight, *t.recompute),
                    t.optimizer,
                    *((t.norm,) if t.norm else ()),
                )
            ]
            if not _sound(timings):
                raise ValueError(f"layers[{index}] '{layer.name}': times must be finite and not negative")
        if not _sound(self.load) or not all(0 <= n < math.inf for n in (self.action_s, self.noise, self.rate_s)):
            raise ValueError("load, action_s, noise and rate_s must be finite and not negative")
        self._check_values()

    def _check_values(self) -> None:
        """Raise `ValueError` unless every value flows forward and every layer is between the first and the last."""
        for value in self.values:
            if value.source < -1 or not all(value.source < t < len(self.layers) for t in value.targets):
                raise ValueError(f"values '{value.name}': layer {value.source} cannot feed layers {value.targets}")
            if any(size < 0 for _, size in value.bytes_at) or not value.bytes_at:
                raise ValueError(f"values '{value.name}': the bytes must be known and not negative")
        reading = {target for value in self.values for target in value.targets}
        read = {value.source for value in self.values if value.targets}
        for index, layer in enumerate(self.layers):
            if index > 0 and index not in reading:
                raise ValueError(f"layers[{index}] '{layer.name}': it reads no value")
            if index < len(self.layers) - 1 and index not in read:
                raise ValueError(f"layers[{index}] '{layer.name}': nothing reads what it makes")

    def drawn_bytes(self, samples: int) -> tuple[float, float]:
        """Return the bytes of so many samples' inputs, and of their targets."""
        inputs, targets = (
            interpolate([(float(row[0]), float(row[kind])) for row in self.batch_bytes], samples) for kind in (1, 2)
        )
        return inputs, targets

    def ties(self, ranges: Sequence[range]) -> tuple[tuple[int, ...], ...]:
        """Return the groups of stages, of so many layers each, that share a parameter."""
        home = {self.layers[i].name: s for s, layers in enumerate(ranges) for i in layers}
        groups = [tuple(sorted({home[layer] for layer in layers})) for _, *layers in self.tied]
        return tuple(sorted({group for group in groups if len(group) > 1}))

    def repeated(self, layers: range, *, first: bool = False) -> dict[int, Tied]:
        """Return what layers of a run say too much, by layer: parameters that a later one of them holds as well.

        Or, where the `first` is to say it, an earlier one.
        """
        place = {self.layers[i].name: i for i in layers}
        found: dict[int, Tied] = {}
        for (_, *names), size in zip(self.tied, self.tied_bytes, strict=False):
            holders = sorted(place[name] for name in names if name in place)
            for i in holders[1:] if first else holders[:-1]:
                before = found.get(i, Tied(parameter_bytes=0, gradient_bytes=0, optimizer_bytes=0))
                sums = ((field, getattr(before, field) + getattr(size, field)) for field in Tied.__struct_fields__)
                found[i] = Tied(**dict(sums))
        return found

    def held_bytes(self, layers: range, field: str, *, first: bool = False) -> list[float]:
        """Return a run's layers' bytes, a `field` of `Tied`; what several share is the last one's, or the `first`'s.

        Added up they are those of one stage: it has each parameter, and reduces and gathers it, once.
        """
        repeated = self.repeated(layers, first=first)
        return [float(getattr(self.layers[i], field) - getattr(repeated.get(i), field, 0)) for i in layers]

    def counted_once(self) -> Profile:
        """Return the profile in which a parameter that several layers hold is the last one's alone.

        Whatever the stages, none holds less than its layers then say: what a lower bound adds up.
        """
        repeated = self.repeated(range(len(self.layers)))
        if not repeated:
            return self
        if "counted once" not in self.tables:
            layers = tuple(
                msgspec.structs.replace(
                    layer,
                    **{field: getattr(layer, field) - getattr(repeated[i], field) for field in Tied.__struct_fields__},
                )
                if i in repeated
                else layer
                for i, layer in enumerate(self.layers)
            )
            self.tables["counted once"] = msgspec.structs.replace(self, layers=layers)
        found = self.tables["counted once"]
        assert isinstance(found, Profile)
        return found

    @property
    def sequence(self) -> int:
        """Tokens of a sample, of which all times and bytes are; 0 where samples are no sequences."""
        return self.key.sequence

    @property
    def norm(self) -> bool:
        """Whether an update needs the norm of all gradients."""
        return self.clip > 0 or self.key.precision == "fp16"

    @property
    def device_kind(self) -> str:
        """What the profiled device is, as in `profiles/data/hardware.toml`; "" where nobody says."""
        return self.machine.devices[0].kind if self.machine.devices else ""

    @cached_property
    def graph(self) -> nx.DiGraph[int]:
        """The layers as a networkx graph: nodes are layer indices, edges carry `bytes` at the largest measured size."""
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from((i, {"name": layer.name}) for i, layer in enumerate(self.layers))
        for value in self.values:
            for target in value.targets:
                if value.source >= 0:
                    graph.add_edge(value.source, target, bytes=value.bytes_at[-1][1], value=value.name)
        return graph

    @cached_property
    def tables(self) -> dict[object, object]:
        """What others have derived from this profile and keep with it (`planner.basis.memo`)."""
        return {}

    def crossing(self, cut: int) -> list[Value]:
        """Return the values alive between layer `cut - 1` and layer `cut`: what a stage boundary there must carry.

        A skip connection over several stages is alive at every boundary in between and is relayed by the stages there.
        """
        return self._crossings[cut] if 0 <= cut < len(self._crossings) else []

    @cached_property
    def _crossings(self) -> list[list[Value]]:
        """The values alive in front of every layer."""
        alive: list[list[Value]] = [[] for _ in self.layers]
        for value in self.values:
            for cut in range(value.source + 1, max(value.targets, default=value.source) + 1):
                alive[cut].append(value)
        return alive

    def crossing_bytes(self, cut: int, samples: int, *, gradients: bool = False) -> float:
        """Bytes that cross `cut` per micro-batch of `samples`, forward or (only values with gradients) backward."""
        key = "crossing", cut, samples, gradients
        found = self.tables.get(key)
        if not isinstance(found, (int, float)):
            found = sum(value_bytes(v, samples) for v in self.crossing(cut) if v.gradient or not gradients)
            self.tables[key] = found
        return found


def value_bytes(value: Value, samples: int) -> float:
    """Bytes of a value at a micro-batch of `samples`."""
    return interpolate([(float(n), float(b)) for n, b in value.bytes_at], samples)


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate linearly between measured points; beyond them continue the last segment, but never below zero.

    One point alone scales in proportion.

    >>> interpolate([(1, 2.0), (3, 4.0)], 2), interpolate([(1, 2.0), (3, 4.0)], 5), interpolate([(2, 1.0)], 4)
    (3.0, 6.0, 2.0)
    """
    if len(points) == 1:
        return points[0][1] * x / points[0][0]
    right = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def decode(data: bytes, where: str) -> Profile:
    """Read a profile from JSON.

    Raises `PlanError` (exit 4) that names the field when the file is damaged or from another version.
    """
    try:
        profile = msgspec.json.decode(data, type=Profile)
        if profile.key.schema != SCHEMA:
            raise ValueError(f"key.schema: it is {profile.key.schema}, and this version writes and reads {SCHEMA}")
        return profile
    except (msgspec.DecodeError, ValueError) as error:
        raise PlanError(
            what="the profile cannot be read",
            where=where,
            why=str(error),
            fix="plan profile model.py   (measures it again and replaces the file)",
            code=ARTEFACT,
        ) from error
