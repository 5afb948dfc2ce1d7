"""How fast is the simulation? Every question's figures, with its target beside them.

    python benchmarks/how_fast_is_the_simulation/run.py [--json] [--quick]

It needs no measured profile: a chain of layers is made here. Figures are medians of rounds in which everything that is
compared takes its turn. Exits 7 when a target is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import simpy

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import Costs, Prices, costs_of, prices_of
from planner.orders import schedules
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.search.search import Search
from planner.search.space import space
from planner.simulate import extrapolate
from planner.simulate.contention import Run as SimPyPass
from planner.simulate.evaluate import evaluate
from planner.simulate.longest_path import makespan
from planner.simulate.predict import simulate
from planner.values import cluster_file
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import Plan, Stage
from planner.values.profile import LayerProfile, LayerSizes, LayerTimes, Profile, ProfileKey, Split, Timing, Value
from profiles import shipped

MISSED = 7
ROUNDS, QUICK_ROUNDS = 7, 3

SMALLEST_RATE = 50e6
"""Actions per second of the critical path with peak memory."""
LARGEST_BUILDING = 1.0
"""Building a program, in times of simulating it."""
SMALLEST_SHARE = 1 / 3
"""Of the plain model's actions per second."""
LONG_S, WIDE_S, PLAN_S, SEARCH_S, LARGE_SEARCH_S, PROOF_S = 1.0, 10.0, 0.1, 5.0, 60.0, 20.0
WIDE = 1024
"""Devices up to which a search has `SEARCH_S`; larger ones have `LARGE_SEARCH_S`."""
LARGEST_ERROR = 1e-9
LARGEST_BYTES, LARGE_SEARCH_BYTES = 2 * 1024**3, 4 * 1024**3

FORWARD_S, BACKWARD_S = 1e-3, 2e-3
SIZES = (1, 2, 4, 8)
KIBIBYTE = 1024
PASSES = ("forward", "backward", "backward_input", "backward_weight", "recompute")
MESSAGE_BYTES = 1000


class Figure(NamedTuple):
    """One number; `target` is the most it may be, or the least where `least` says so. None: for information."""

    question: str
    name: str
    value: float
    unit: str
    target: float | None = None
    least: bool = False

    @property
    def met(self) -> bool:
        if self.target is None:
            return True
        return self.value >= self.target if self.least else self.value <= self.target


# What is simulated


def profile_of(layers: int, *, spread: float = 0.0) -> Profile:
    """A chain of layers that take nearly the same time, some a little more, as layers do."""

    def timings(seconds: float) -> tuple[Timing, ...]:
        return tuple(
            Timing(
                samples=n,
                low_s=seconds * n * (1 - spread),
                lower_s=seconds * n * (1 - spread / 2),
                median_s=seconds * n,
                upper_s=seconds * n * (1 + spread / 2),
                high_s=seconds * n * (1 + spread),
            )
            for n in SIZES
        )

    def layer(name: str, scale: float, bytes_: int) -> LayerProfile:
        return LayerProfile(
            name=name,
            parameter_bytes=bytes_,
            buffer_bytes=0,
            gradient_bytes=bytes_,
            optimizer_bytes=2 * bytes_,
            optimizer_peak_bytes=0,
            times=(
                LayerTimes(
                    threads=1,
                    forward=timings(scale * FORWARD_S),
                    backward=timings(scale * BACKWARD_S),
                    backward_input=timings(scale * BACKWARD_S / 2),
                    backward_weight=timings(scale * BACKWARD_S / 2),
                    recompute=timings(scale * FORWARD_S),
                    optimizer=Timing.of(1, []),
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
        )

    return Profile(
        key=ProfileKey(
            model="chain", source_sha256="0" * 64, device="none", dtype="float32", cores=1, torch="", python=""
        ),
        created="2026-01-01T00:00:00+00:00",
        model_path="chain.py",
        layers=tuple(layer(f"layer{i}", 1 + 0.01 * (i * 7 % 5), MESSAGE_BYTES) for i in range(layers)),
        loss=layer("loss", 0.0, 0),
        values=tuple(
            Value(
                name=f"v{i}",
                source=i,
                targets=(i + 1,),
                bytes_at=tuple((n, MESSAGE_BYTES * n) for n in SIZES),
                gradient=True,
            )
            for i in range(layers - 1)
        ),
        tied=(),
        whole=(),
        load=(Timing.of(1, []), Timing.of(8, [])),
        batch_bytes=((1, 0, 0), (8, 0, 0)),
        batch=8,
        action_s=0.0,
        noise=0.0,
        machine=separate(layers),
    )


def separate(count: int, *, shared: bool = False) -> Cluster:
    """Devices that compute for themselves, on one network: of links that nobody shares, or one that all do."""
    return Cluster(
        name=f"{count} devices",
        hosts=(Host(name="h", cores=count, memory_bytes=10**9 * count),),
        devices=tuple(Device(name=f"d{i}", memory_bytes=10**9, host="h") for i in range(count)),
        links=(Link(between=("h", "h"), latency_s=1e-5, bandwidth_bytes_per_s=1e8, shared=shared),),
    )


def processes(count: int) -> Cluster:
    """Processes on one host that share its cores and its network, messages taking cores as well."""
    return Cluster(
        name=f"{count} processes",
        hosts=(Host(name="h", cores=count, memory_bytes=10**9 * count, slowdown=((1, 1.0), (count, 1.25))),),
        links=separate(1, shared=True).links,
        transfer_work=((0, 5e-6), (MESSAGE_BYTES, 1e-5)),
        elastic=True,
    ).take(count)


def plan_of(schedule: str, devices: int, microbatches: int, chunks: int = 1) -> Plan:
    """One layer per stage, one sample per micro-batch."""
    chosen = schedules.get(schedule)
    stages = tuple(
        Stage(layers=(f"layer{s}",), devices=tuple(f"d{home}" for home in chosen.homes(s, devices)))
        for s in range(devices * chunks)
    )
    return Plan(
        strategy=schedule,
        schedule=schedule,
        stages=stages,
        microbatches=microbatches,
        batch=microbatches,
        chunks=chunks,
    )


def plain_gpipe(stages: int, microbatches: int) -> float:
    """GPipe as one writes it after SimPy's tutorial: a process per stage, a store per neighbour. Returns its end."""
    env = simpy.Environment()
    forward, backward = ([simpy.Store(env) for _ in range(stages)] for _ in range(2))

    def stage(s: int) -> Generator[simpy.Event, Any, None]:
        for m in range(microbatches):
            if s > 0:
                yield forward[s].get()
            yield env.timeout(FORWARD_S)
            if s < stages - 1:
                yield forward[s + 1].put(m)
        for m in range(microbatches):
            if s < stages - 1:
                yield backward[s].get()
            yield env.timeout(BACKWARD_S)
            if s > 0:
                yield backward[s - 1].put(m)

    for s in range(stages):
        env.process(stage(s))
    env.run()
    return float(env.now)


def plain_actions(stages: int, microbatches: int) -> int:
    """Its forwards, backwards, puts and gets: those that a program calls F, B, SEND and RECV."""
    return 2 * microbatches * stages + 4 * microbatches * (stages - 1)


# How it is measured


def medians(rounds: int, **work: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each, all taking turns in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, function in work.items():
            gc.collect()  # nobody pays for what the others left
            begin = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in times.items()}


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of some work, once."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# The questions


FIRST = """
import runpy, sys, time
plan_of, profile_of, separate = (runpy.run_path(sys.argv[1])[n] for n in ("plan_of", "profile_of", "separate"))
from planner.costs.placed import Placed
from planner.simulate.evaluate import evaluate
from planner.programs.waits import Linked
from planner.programs.lowering import unroll
plan, profile, cluster = plan_of("1f1b", 8, 2048), profile_of(8), separate(8)
for turn in range(2):
    begin = time.perf_counter()
    import numba  # else the first small loops run as Python
    evaluate(Placed(profile, plan, cluster), Linked(unroll(plan)))
    print(time.perf_counter() - begin)
"""
"""A process that evaluates a plan twice and says how long each took."""


def compiling(quick: bool) -> Iterator[Figure]:
    """How long does the first evaluation take where code is still to be compiled, or was kept by another process?"""
    question = "compiled code, 90,122 actions"

    def process(cache: str) -> list[float]:
        found = subprocess.run(
            [sys.executable, "-c", FIRST, __file__],
            env=os.environ | {"NUMBA_CACHE_DIR": cache},
            check=True,
            capture_output=True,
            text=True,
        )
        return [float(line) for line in found.stdout.split()]

    with tempfile.TemporaryDirectory() as cache:
        first, warm = process(cache)
        kept, _ = process(cache)
    yield Figure(question, "first evaluation ever: compiles", first, "s")
    yield Figure(question, "first of a later process: loads", kept, "s")
    yield Figure(question, "all others", warm, "s")


def critical_path(quick: bool) -> Iterator[Figure]:
    """How many actions per second has the critical path with peak memory, and what does building cost beside it?"""
    question = "critical path with peak memory"
    shapes = [(64, 512), (8, 32768)] if not quick else [(64, 512)]
    for stages, microbatches in shapes:
        profile, cluster = profile_of(stages), separate(stages)
        for schedule in ("gpipe", "1f1b"):
            plan = plan_of(schedule, stages, microbatches)
            linked = Linked(unroll(plan))

            def build(plan: Plan = plan) -> None:
                Linked(unroll(plan))

            prices = prices_of(Placed(profile, plan, cluster), linked)
            model = MemoryModel(Placed(profile, plan, cluster), linked)

            def path(linked: Linked = linked, prices: Prices = prices, model: MemoryModel = model) -> None:
                linked.__dict__.pop("answers", None)  # kept with the program, but found for the memory model
                makespan(linked, prices)
                model.peaks()

            def simulated(plan: Plan = plan, linked: Linked = linked) -> None:
                linked.__dict__.pop("answers", None)
                evaluate(Placed(profile, plan, cluster), linked)  # noqa: B023 - called at once

            taken = medians(QUICK_ROUNDS if quick else ROUNDS, build=build, path=path, simulate=simulated)
            name = f"{schedule}, K={stages}, M={microbatches}"
            actions = len(linked.flat)
            yield Figure(question, f"{name}: actions", actions, "")
            yield Figure(question, f"{name}: walk and peaks", actions / taken["path"], "/s", SMALLEST_RATE, True)
            yield Figure(question, f"{name}: with the pricing of every kind", actions / taken["simulate"], "/s")
            yield Figure(
                question, f"{name}: building / simulating", taken["build"] / taken["simulate"], "", LARGEST_BUILDING
            )


def simpy_pass(quick: bool) -> Iterator[Figure]:
    """How does the SimPy interpreter compare with a plain SimPy model of GPipe that knows none of its meanings?"""
    question = "SimPy"
    stages, microbatches = 8, 128 if quick else 512
    plan = plan_of("gpipe", stages, microbatches)
    linked = Linked(unroll(plan))
    profile, random = profile_of(stages, spread=0.1), np.random.default_rng(0)

    def costs(cluster: Cluster) -> Costs:
        return costs_of(Placed(profile, plan, cluster), linked).drawn(random)

    def one(priced: Costs) -> None:
        SimPyPass(priced, plan.devices).env.run()

    own, network, cores = (costs(c) for c in (separate(stages), separate(stages, shared=True), processes(stages)))
    taken = medians(
        QUICK_ROUNDS if quick else ROUNDS,
        plain=lambda: plain_gpipe(stages, microbatches),
        own=lambda: one(own),
        network=lambda: one(network),
        cores=lambda: one(cores),
    )
    plain = plain_actions(stages, microbatches) / taken["plain"]
    yield Figure(question, f"plain model, K={stages}, M={microbatches}", plain, "/s")
    for name, label in (("own", "own links"), ("network", "shared link"), ("cores", "shared link and cores")):
        rate = len(linked.flat) / taken[name]
        yield Figure(question, f"drawn durations, {label}", rate, "/s")
        yield Figure(question, f"drawn durations, {label}: of the plain model", rate / plain, "", SMALLEST_SHARE, True)


def long_steps(quick: bool) -> Iterator[Figure]:
    """How long does a step of 32,768 micro-batches take with its steady state continued, and is it the full walk's?"""
    question = "M=32768, steady state continued"
    stages, microbatches = 8, 32768
    cluster = separate(stages)
    plans = [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved", 2), ("zb-v", 2), ("v-half", 2), ("chimera", 1)]
    for schedule, chunks in plans[:2] if quick else plans:
        plan, profile = plan_of(schedule, stages, microbatches, chunks), profile_of(stages * chunks)
        taken = medians(QUICK_ROUNDS, work=lambda: evaluate(Placed(profile, plan, cluster)))["work"]  # noqa: B023
        continued = extrapolate.extrapolate(Placed(profile, plan, cluster))
        found = evaluate(Placed(profile, plan, cluster))
        full = evaluate(Placed(profile, plan, cluster), Linked(unroll(plan)))
        error = max(abs(found.step_s / full.step_s - 1), float(np.abs(found.peak_bytes / full.peak_bytes - 1).max()))
        how = "" if continued is not None else " (walked in full)"
        yield Figure(question, f"{schedule}{how}", taken, "s", LONG_S)
        yield Figure(question, f"{schedule}: difference from the full walk", error, "", LARGEST_ERROR)


def wide(quick: bool) -> Iterator[Figure]:
    """How long does a pipeline of 1,024 stages take, built, priced, walked and its memory counted?"""
    question = "K=1024"
    stages, microbatches = 1024, 1024 if quick else 2048
    profile, cluster = profile_of(stages), separate(stages)
    for schedule in ("1f1b",) if quick else ("gpipe", "1f1b"):
        plan = plan_of(schedule, stages, microbatches)
        taken = seconds_of(lambda: evaluate(Placed(profile, plan, cluster)))  # noqa: B023
        yield Figure(question, f"{schedule}, M={microbatches}", taken, "s", WIDE_S)


def predictions(quick: bool) -> Iterator[Figure]:
    """How long does a person wait for a plan at K=8, M=32: lowering, proof, five drawn passes, memory curve?"""
    question = "prediction, K=8, M=32, shared cores"
    stages = 8
    for schedule, chunks in (("naive", 1), ("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved", 2)):
        plan, cluster = plan_of(schedule, stages, 32, chunks), processes(stages)
        profile = profile_of(stages * chunks, spread=0.1)
        linked = Linked(unroll(plan))
        costs = costs_of(Placed(profile, plan, cluster), linked)
        taken = medians(
            QUICK_ROUNDS if quick else ROUNDS,
            one=lambda: SimPyPass(costs, plan.devices).env.run(),  # noqa: B023
            whole=lambda: simulate(profile, plan, cluster),  # noqa: B023
        )
        yield Figure(question, f"{schedule}, {len(linked.flat)} actions: one SimPy pass", taken["one"], "s")
        yield Figure(question, f"{schedule}, {len(linked.flat)} actions: prediction", taken["whole"], "s", PLAN_S)


def gpt3_blocks(layers: int, split: Split | None) -> Profile:
    """Blocks of GPT-3's size, of width 12,288, that can be split over devices where `split` says how.

    Each has 1.81e9 parameters of 2 bytes, gradients of 2, 12 of Adam's state and master copy; 34 bytes per token and
    unit of width saved (arXiv 2205.05198), 50 MB sent on; 7.4 TFLOP forward at 400 TFLOP/s.
    """
    whole, weights = profile_of(layers), 3_620_000_000
    size = {"saved_bytes": 855_000_000, "output_bytes": 50_000_000, "forward_peak_bytes": 100_000_000}

    def scaled(timing: Timing) -> Timing:
        return msgspec.structs.replace(
            timing, **{f: 18.6 * getattr(timing, f) for f in timing.__struct_fields__ if f != "samples"}
        )

    def block(layer: LayerProfile) -> LayerProfile:
        sizes = tuple(
            msgspec.structs.replace(
                own,
                backward_peak_bytes=100_000_000 * own.samples,
                backward_first_peak_bytes=100_000_000 * own.samples + weights,
                **{field: per_sample * own.samples for field, per_sample in size.items()},
            )
            for own in layer.sizes
        )
        slower = tuple(
            msgspec.structs.replace(times, **{f: tuple(map(scaled, getattr(times, f))) for f in PASSES})
            for times in layer.times
        )
        bytes_ = {"parameter_bytes": weights, "gradient_bytes": weights, "optimizer_bytes": 6 * weights}
        return msgspec.structs.replace(layer, sizes=sizes, times=slower, split=split, **bytes_)

    return msgspec.structs.replace(whole, layers=tuple(map(block, whole.layers)))


def superpod(count: int) -> Cluster:
    """The shipped cluster of DGX H100 with so many GPUs, a multiple of 1,024."""
    text = shipped.clusters()["h100x1024"].read_text()
    for number in (128, 1024):
        text = text.replace(f"count = {number}", f"count = {number * count // 1024}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"h100x{count}.toml"
        path.write_text(text)
        return cluster_file.read(path)


def searching(quick: bool) -> Iterator[Figure]:
    """How long does a search take over all strategies for 96 GPT-3 sized layers, and how much memory?

    Each in a process of its own, so that its memory is its own.
    """
    shapes = [
        (1024, "whole layers"),
        (1024, "layers that split"),
        (16384, "whole layers"),
        (16384, "layers that split"),
    ]
    for count, name in shapes[:1] if quick else shapes:
        found = subprocess.run(
            [sys.executable, __file__, "--search", f"{count}", name, "20" if quick else "300"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        answer = json.loads(found.stdout)
        question = f"search, 96 layers, {count:,} devices, batch {2 * count:,}"
        large = count > WIDE
        yield Figure(question, f"{name}: candidates", answer["points"], "")
        yield Figure(question, f"{name}: evaluated", answer["evaluated"], "")
        most = LARGE_SEARCH_S if large else SEARCH_S
        how = "the best is proved after" if answer["complete"] else "stopped without a proof after"
        yield Figure(question, f"{name}: {how}", answer["seconds"], "s", most)
        yield Figure(question, f"{name}: memory", answer["bytes"], "bytes", LARGE_SEARCH_BYTES if large else None)


def proofs(quick: bool) -> Iterator[Figure]:
    """How much of a processor does the proof of the best plan of real models on 16 devices take?"""
    clusters = ("dgx1-v100",) if quick else ("v100-4x4", "v100-2x8", "dgx1-v100")
    for model in ("vgg16", "resnet50"):
        profile = shipped.read(shipped.profiles()[model])
        for name in clusters:
            cluster = cluster_file.read(shipped.clusters()[name])
            begin = time.process_time()
            answer = Search(profile, cluster, space(profile, cluster, 1024)).run(seconds=10 * PROOF_S)
            how = "proved after" if answer.complete else "stopped without a proof after"
            taken = time.process_time() - begin
            yield Figure("search, batch 1,024", f"{model}, {name}: {how}", taken, "s", PROOF_S)


def one_search(count: int, name: str, seconds: float) -> None:
    """Search once and print how long it took, from the cluster's file to the proof, as JSON."""
    begin = time.perf_counter()
    cluster = superpod(count)
    profile = gpt3_blocks(96, Split(forward=2, backward=2) if name == "layers that split" else None)
    batch = 2 * count
    answer = Search(profile, cluster, space(profile, cluster, batch)).run(seconds=seconds)
    found = {
        "seconds": time.perf_counter() - begin,
        "points": answer.points,
        "evaluated": answer.evaluated,
        "complete": answer.complete,
        "best": answer.leaders[0].label if answer.leaders else "",
        "step_s": answer.leaders[0].step_s if answer.leaders else 0.0,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE,
    }
    print(json.dumps(found))


def memory(quick: bool) -> Iterator[Figure]:
    """How much memory did all of the above take?"""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE
    yield Figure("memory", "largest resident set", peak, "bytes", LARGEST_BYTES)


QUESTIONS: tuple[Callable[[bool], Iterator[Figure]], ...] = (
    *(compiling, critical_path, simpy_pass, long_steps, wide, predictions, proofs, searching),
    memory,  # the last: it speaks of all the others
)


def shown(value: float, unit: str) -> str:
    if unit == "/s":
        return f"{value / 1e6:.3g} M/s"
    if unit == "bytes":
        return f"{value / 1024**3:.2f} GiB"
    if unit == "s":
        return f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:.3g}" if value < 1e4 else f"{value:,.0f}"


def table(figures: list[Figure]) -> str:
    lines = ["| question | figure | | target | |", "|---|---|--:|--:|---|"]
    for f in figures:
        target = "" if f.target is None else f"{'at least' if f.least else 'at most'} {shown(f.target, f.unit)}"
        met = "" if f.target is None else "met" if f.met else "MISSED"
        lines.append(f"| {f.question} | {f.name} | {shown(f.value, f.unit)} | {target} | {met} |")
    return "\n".join(lines)


def environment() -> dict[str, str]:
    try:
        with open("/proc/cpuinfo") as file:
            processor = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    versions = {name: version(name) for name in ("simpy", "numpy", "numba")}
    return {"processor": processor, "cores": str(os.cpu_count()), "python": platform.python_version()} | versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes: whether it runs at all")
    parser.add_argument("--search", nargs=3, metavar=("DEVICES", "LAYERS", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        count, name, seconds = options.search
        one_search(int(count), name, float(seconds))
        return 0
    figures = [figure for question in QUESTIONS for figure in question(options.quick)]
    if options.json:
        found = [figure._asdict() | {"met": figure.met} for figure in figures]
        print(json.dumps({"environment": environment(), "figures": found}, indent=2))
    else:
        print(", ".join(f"{name} {value}" for name, value in environment().items()), end="\n\n")
        print(table(figures))
    return 0 if all(figure.met for figure in figures) else MISSED


if __name__ == "__main__":
    sys.exit(main())
