"""Profiles and clusters made by hand, with round numbers, for tests that need no measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from planner.orders import schedules
from planner.orders.action import Action
from planner.orders.schedules import Shape
from planner.programs.lowering import lower
from planner.programs.program import Program
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import Plan, Stage
from planner.values.profile import (
    LayerProfile,
    LayerSizes,
    LayerTimes,
    Profile,
    ProfileKey,
    Split,
    Tied,
    Timing,
    Value,
    WholeStep,
)

KEY = ProfileKey(
    model="model.py", source_sha256="0" * 64, device="by hand", dtype="float32", cores=2, torch="2.13.0", python="3.11"
)
SIZES = (1, 2, 4, 8)


def timings(per_sample_s: float, spread: float = 0.0) -> tuple[Timing, ...]:
    return tuple(
        Timing(
            samples=n,
            low_s=per_sample_s * n * (1 - spread),
            lower_s=per_sample_s * n * (1 - spread / 2),
            median_s=per_sample_s * n,
            upper_s=per_sample_s * n * (1 + spread / 2),
            high_s=per_sample_s * n * (1 + spread),
        )
        for n in SIZES
    )


def layer(
    name: str,
    forward_s: float,
    backward_s: float,
    *,
    spread: float = 0.0,
    bytes_: int = 1000,
    gradient_bytes: int | None = None,
    optimizer_s: float = 0.0,
    recompute_s: float | None = None,
    half_s: float | None = None,
    split: Split | None = None,
) -> LayerProfile:
    """A layer whose times are per sample; its bytes are `bytes_` of everything, gradients unless given."""
    return LayerProfile(
        name=name,
        parameter_bytes=bytes_,
        buffer_bytes=0,
        gradient_bytes=bytes_ if gradient_bytes is None else gradient_bytes,
        optimizer_bytes=2 * bytes_,
        optimizer_peak_bytes=0,
        times=(
            LayerTimes(
                threads=1,
                forward=timings(forward_s, spread),
                backward=timings(backward_s, spread),
                backward_input=timings(backward_s / 2 if half_s is None else half_s, spread),
                backward_weight=timings(backward_s / 2 if half_s is None else half_s, spread),
                recompute=timings(forward_s if recompute_s is None else recompute_s, spread),
                optimizer=Timing.of(1, [optimizer_s]),
            ),
        ),
        sizes=tuple(
            LayerSizes(
                samples=n,
                saved_bytes=bytes_ * n,
                output_bytes=bytes_ * n,
                output_saved=True,
                forward_peak_bytes=2 * bytes_ * n,
                backward_first_peak_bytes=bytes_ * n + bytes_,
                backward_peak_bytes=bytes_ * n,
                flop=1000 * n,
            )
            for n in SIZES
        ),
        split=split,
    )


def profile(
    forward_s: Sequence[float],
    backward_s: Sequence[float] | None = None,
    *,
    spread: float = 0.0,
    names: Sequence[str] | None = None,
    message_bytes: int = 0,
    bytes_: Sequence[int] | None = None,
    gradients: float = 1.0,
    optimizer_s: float = 0.0,
    recompute_s: Sequence[float] | None = None,
    half_s: Sequence[float] | None = None,
    split: Split | None = None,
    tied: tuple[tuple[str, ...], ...] = (),
    tied_bytes: int = 0,
    whole: tuple[float, float] | None = None,
    machine: Cluster | None = None,
) -> Profile:
    """A chain of layers with the given seconds per sample; backward takes as long as forward unless given.

    A layer has `gradients` bytes of gradients per byte of parameters: 2 where they are wider; each `tied` parameter has
    `tied_bytes`. Measured `whole`, the
    model's forward and backward take these shares of its layers' seconds.
    """
    backward_s = backward_s or forward_s
    names = names or [f"layer{i}" for i in range(len(forward_s))]
    layers = tuple(
        layer(
            name,
            forward_s[i],
            backward_s[i],
            spread=spread,
            bytes_=(size := bytes_[i] if bytes_ else 1000),
            gradient_bytes=int(gradients * size),
            optimizer_s=optimizer_s,
            recompute_s=recompute_s[i] if recompute_s else None,
            half_s=half_s[i] if half_s else None,
            split=split,
        )
        for i, name in enumerate(names)
    )
    return Profile(
        key=KEY,
        created="2026-01-01T00:00:00+00:00",
        model_path="model.py",
        layers=layers,
        loss=layer("loss", 0.0, 0.0, bytes_=0),
        values=tuple(
            Value(
                name=f"v{i}",
                source=i,
                targets=(i + 1,),
                bytes_at=tuple((n, message_bytes * n) for n in SIZES),
                gradient=True,
            )
            for i in range(len(layers) - 1)
        ),
        tied=tied,
        tied_bytes=tuple(
            Tied(
                parameter_bytes=tied_bytes,
                gradient_bytes=int(gradients * tied_bytes),
                optimizer_bytes=2 * tied_bytes,
            )
            for _ in tied
        ),
        whole=(_whole(sum(forward_s), sum(backward_s), *whole),) if whole else (),
        load=(
            Timing.of(1, []),
            Timing.of(8, []),
        ),
        batch_bytes=((1, 0, 0), (8, 0, 0)),
        batch=8,
        action_s=0.0,
        noise=0.0,
        machine=machine or devices(len(layers)),
    )


def _whole(layers_forward_s: float, layers_backward_s: float, forward: float, backward: float) -> WholeStep:
    return WholeStep(
        threads=1,
        samples=1,
        forward_s=forward * layers_forward_s,
        backward_s=backward * layers_backward_s,
        optimizer_s=1.0,
        layers_forward_s=layers_forward_s,
        layers_backward_s=layers_backward_s,
        layers_optimizer_s=1.0,
    )


def devices(
    count: int,
    *,
    memory_bytes: int = 10**9,
    latency_s: float = 0.0,
    bandwidth: float = 1e15,
    shared: bool = False,
    host_bandwidth: float = 0.0,
) -> Cluster:
    """Separate devices on one host, joined by one link; each with one to the host's memory if that has a bandwidth."""
    copying = count if host_bandwidth else 0
    return Cluster(
        name=f"{count} devices",
        hosts=(Host(name="h", cores=count, memory_bytes=memory_bytes * count),),
        devices=tuple(Device(name=f"d{i}", memory_bytes=memory_bytes, host="h") for i in range(count)),
        links=(
            Link(between=("h", "h"), latency_s=latency_s, bandwidth_bytes_per_s=bandwidth, shared=shared),
            *(
                Link(between=(f"d{i}", "h"), latency_s=0.0, bandwidth_bytes_per_s=host_bandwidth, shared=False)
                for i in range(copying)
            ),
        ),
    )


def shared_cores(cores: int, *, memory_bytes: int = 10**9) -> Cluster:
    """A CPU that makes as many devices as it is asked for, which share its cores."""
    return Cluster(
        name="shared",
        hosts=(Host(name="h", cores=cores, memory_bytes=memory_bytes),),
        links=devices(1).links,
        elastic=True,
    )


def pipeline(
    schedule: str,
    devices: int,
    microbatches: int,
    *,
    chunks: int = 1,
    batch: int | None = None,
    replicas: int = 1,
    **fields: Any,
) -> tuple[Plan, Program]:
    """One layer per stage, one sample per micro-batch; of several replicas each has its devices behind the others."""
    chosen = schedules.get(schedule)
    stages = tuple(
        Stage(
            layers=(f"layer{s}",),
            devices=tuple(f"d{r * devices + home}" for r in range(replicas) for home in chosen.homes(s, devices)),
        )
        for s in range(devices * chunks)
    )
    plan = Plan(
        strategy=schedule,
        schedule=schedule,
        stages=stages,
        microbatches=microbatches,
        batch=batch or microbatches,
        chunks=chunks,
        **fields,
    )
    return plan, lower(plan)


def needs(action: Action) -> Action | None:
    """The receive that a compute of a chain of stages waits for, where it exists: written down here a second time."""
    op = {"F": "RECV_F", "B": "RECV_B", "I": "RECV_B", "R": "RECV_B"}.get(action.op)
    return Action(action.stage, op, action.microbatch) if op else None


def shapes(
    devices: int = 6, microbatches: int = 12, *, only: Callable[[schedules.Schedule], bool] = lambda schedule: True
) -> st.SearchStrategy[tuple[str, Shape]]:
    """Draw a registered schedule and a shape that it can arrange."""
    every = [name for name in schedules.names() if only(schedules.get(name))]

    @st.composite
    def draw(pick: st.DrawFn) -> tuple[str, Shape]:
        chosen = schedules.get(pick(st.sampled_from(every)))
        least, most = chosen.chunks
        shape = Shape(
            pick(st.integers(1, devices)), pick(st.integers(1, microbatches)), pick(st.integers(least, most or 3))
        )
        assume(schedules.why_not(chosen, shape) is None)
        return chosen.name, shape

    return draw()


def hosts_of(
    hosts: int, each: int, *, nic: float, latency_s: float = 0.0, inside: float = 1e4, shared: bool = True
) -> Cluster:
    """Hosts of devices that all have a shared link to their host, and a shared link from each host to one switch."""
    links = [
        *((f"d{h * each + i}", f"h{h}", inside, 0.0) for h in range(hosts) for i in range(each)),
        *((f"h{h}", "switch", nic, latency_s / 2) for h in range(hosts)),
    ]
    return Cluster(
        name=f"{hosts} x {each}",
        hosts=tuple(Host(name=f"h{h}", cores=each, memory_bytes=10**9) for h in range(hosts)),
        devices=tuple(
            Device(name=f"d{h * each + i}", memory_bytes=10**9, host=f"h{h}") for h in range(hosts) for i in range(each)
        ),
        switches=("switch",),
        links=tuple(
            Link(between=(a, b), bandwidth_bytes_per_s=bandwidth, latency_s=latency, shared=shared)
            for a, b, bandwidth, latency in links
        ),
    )
