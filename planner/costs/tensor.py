"""Tensor-parallel stages: what one of t devices that split every layer's tensors sees of a model.

Layers that declare how they split (`LayerProfile.split`) keep 1 / t of their parameters, of their computing and of what
they save; the collectives they need per micro-batch are added to their times (Shoeybi et al., arXiv 1909.08053). Other
layers are whole on every device.
"""

from __future__ import annotations

import msgspec

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs import collectives
from planner.values.cluster import Cluster
from planner.values.profile import LayerProfile, LayerSizes, LayerTimes, Profile, Timing

_PASSES = {"forward": "forward", "recompute": "forward", "backward": "backward", "backward_input": "backward"}


def split(profile: Profile, groups: collectives.Groups, cluster: Cluster, speed: float = 0.0) -> Profile:
    """Return the profile of one device of `groups`, which each split a stage's tensors between them.

    A layer's times are divided by a device's `speed` later, what it sends is not: here it takes as much longer as that
    will make it quicker. Without a speed it is that of the slowest device, so that it is never too long.

    Raises `PlanError` (exit 2) when no layer declares how it splits.
    """
    tensor = len(groups[0])
    if tensor == 1:
        return profile
    if not any(layer.split for layer in profile.layers):
        raise PlanError(
            what="no layer says how its tensors split",
            where=f"profile of {profile.key.model}",
            why=f"a stage over {tensor} devices needs layers that split by column, row or block",
            fix="define splits(model) in the model file, which returns {'layer name': 'block'}",
        )

    # All groups reduce at the same time; the slowest one's seconds hold for all.
    reduce = collectives.over(cluster, groups, collectives.ALL_REDUCE)

    scale = speed or min(device.speed for device in cluster.devices)

    def make() -> Profile:
        layers = tuple(_layer(layer, tensor, reduce, scale) for layer in profile.layers)
        # Whole steps were measured unsplit; what a seam costs is a share of times that have changed.
        return msgspec.structs.replace(profile, layers=layers, whole=(), tied_bytes=())

    return memoised(profile, ("split", tensor, reduce.figures, scale), make)


def _layer(layer: LayerProfile, n: int, reduce: collectives.Choice, scale: float) -> LayerProfile:
    how = layer.split
    if how is None:
        return layer
    outputs = {size.samples: float(size.output_bytes) for size in layer.sizes}

    def time(timing: Timing, collective: float) -> Timing:
        quantiles = {f: getattr(timing, f) / n + collective for f in Timing.__struct_fields__ if f != "samples"}
        return Timing(samples=timing.samples, **quantiles)

    def reduced(samples: int) -> float:
        known = min(outputs, key=lambda s: abs(s - samples))
        return scale * reduce.seconds(outputs[known] * samples / known)

    def of(own: LayerTimes) -> LayerTimes:
        changed = {
            kind: tuple(time(t, getattr(how, direction) * reduced(t.samples)) for t in getattr(own, kind))
            for kind, direction in _PASSES.items()
        }
        weight = tuple(time(t, 0.0) for t in own.backward_weight)
        return msgspec.structs.replace(
            own,
            **changed,
            backward_weight=weight,
            optimizer=time(own.optimizer, 0.0),
            norm=own.norm and time(own.norm, 0.0),
        )

    def sizes(own: LayerSizes) -> LayerSizes:
        share = how.whole + (1 - how.whole) / n
        return msgspec.structs.replace(
            own,
            saved_bytes=round(own.saved_bytes * share),
            forward_peak_bytes=round(own.forward_peak_bytes * share),
            backward_first_peak_bytes=round(own.backward_first_peak_bytes * share),
            backward_peak_bytes=round(own.backward_peak_bytes * share),
            between_bytes=round(own.between_bytes * share),
            input_peak_bytes=round(own.input_peak_bytes * share),
            weight_first_peak_bytes=round(own.weight_first_peak_bytes * share),
            weight_peak_bytes=round(own.weight_peak_bytes * share),
            flop=own.flop // n,
        )

    fields = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "optimizer_peak_bytes")
    return msgspec.structs.replace(
        layer,
        times=tuple(map(of, layer.times)),
        sizes=tuple(map(sizes, layer.sizes)),
        **{field: -(-getattr(layer, field) // n) for field in fields},
    )
