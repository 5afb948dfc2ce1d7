"""Reports made from simulated steps: what a run would have given is the prediction, slightly disturbed."""

from __future__ import annotations

import msgspec

from planner.search.possible import Rejected
from planner.search.ranking import Ranking
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome, compare
from planner.values.plan import Plan, Stage
from planner.values.profile import Profile
from planner.values.trace import Event, Trace
from reports.page import Report
from tests import factory

ASSUMPTIONS = (
    "Costs between measured micro-batch sizes are interpolated linearly.",
    "The links carry nothing but this plan's messages.",
    "Every step costs the same; the first one, with its allocations, is not predicted.",
)
ENVIRONMENT = {"Torch": "2.13.0", "Backend": "gloo", "Cores": "8", "System": "Linux, x86-64"}
HOSTILE = "</script><img src=x onerror=alert(1)>"
TIMES = (0.0021, 0.0030, 0.0026, 0.0024)


def pieces(
    stages: int = 4, *, microbatches: int = 8, schedule: str = "1f1b", memory_bytes: int = 60_000, layers: int = 2
) -> tuple[Profile, Plan, Cluster]:
    """A pipeline of `stages` with `layers` layers each, and one sample per micro-batch."""
    times = [TIMES[i % len(TIMES)] / layers for i in range(stages) for _ in range(layers)]
    names = [f"block{i}.{part}" for i in range(stages) for part in ("attention", "feedforward", "norm", "mix")[:layers]]
    profile = factory.profile(times, [2 * t for t in times], spread=0.05, names=names, message_bytes=4000)
    plan = Plan(
        strategy=schedule,
        schedule=schedule,
        stages=tuple(
            Stage(layers=tuple(names[s * layers : (s + 1) * layers]), devices=(f"d{s}",)) for s in range(stages)
        ),
        microbatches=microbatches,
        batch=microbatches,
    )
    cluster = factory.devices(stages, memory_bytes=memory_bytes, latency_s=2e-4, bandwidth=2e7)
    return profile, plan, cluster


def measured(outcome: Outcome, *, factor: float = 1.04, steps: int = 5) -> Outcome:
    """What a run of `outcome`'s plan might have measured: everything `factor` times as long, a little uneven."""
    traces = tuple(stretched(outcome.trace, factor + 0.004 * (i - steps // 2)) for i in range(steps))
    ends = sorted(trace.end for trace in traces)
    return msgspec.structs.replace(
        outcome,
        source="measured",
        steps=traces,
        step_times_s=tuple(trace.end for trace in traces),
        interval_s=(ends[0], ends[-1]),
        losses=tuple(2.3 * 0.93**i + 0.02 * (-1) ** i for i in range(steps)),
    )


def stretched(trace: Trace, factor: float) -> Trace:
    events = tuple(
        Event(e.device, e.lane, e.action, e.start * factor, e.ready * factor, e.end * factor, e.bytes)
        for e in trace.events
    )
    memory = tuple(
        msgspec.structs.replace(p, time=p.time * factor, bytes=tuple(b * (1 + 0.02 * p.device) for b in p.bytes))
        for p in trace.memory
    )
    return msgspec.structs.replace(trace, events=events, memory=memory)


def report(stages: int = 4, *, run: bool = True, ranked: bool = True, **more: object) -> Report:
    profile, plan, cluster = pieces(stages, **more)  # type: ignore[arg-type]
    predicted = simulate(profile, plan, cluster)
    real = measured(predicted) if run else None
    ranking = None
    if ranked:
        others = [msgspec.structs.replace(plan, strategy=s, schedule=s) for s in ("gpipe", "naive")]
        others += [msgspec.structs.replace(p, recompute=True) for p in (plan, *others)]
        outcomes = sorted(
            (predicted, *(simulate(profile, p, cluster) for p in others)), key=lambda o: (not o.fits, o.step_s)
        )
        ranking = Ranking(
            k=stages,
            m=plan.microbatches,
            batch=plan.batch,
            profile="model-1",
            cluster=cluster,
            outcomes=tuple(outcomes),
            rejected=(Rejected(strategies=("data-parallel",), why="9 micro-batches are not a multiple of 4 replicas"),),
        )
    replays = tuple(0.985 * t.end for t in real.steps) if real else ()
    return Report(
        predicted=predicted,
        measured=real,
        comparison=compare(predicted, real, replays=replays) if real else None,
        ranking=ranking,
        profile=profile,
        cluster=cluster,
        environment=ENVIRONMENT,
        assumptions=ASSUMPTIONS,
        command=f"plan report {plan}",
        created="2026-01-02T03:04:05+00:00",
    )


def crowded(events: int) -> Report:
    """A report whose predicted trace has at least so many events: one step drawn again and again."""
    profile, plan, cluster = pieces(8, microbatches=160)
    predicted = simulate(profile, plan, cluster)
    once = trace = predicted.trace
    while len(trace.events) < events:
        end = trace.end
        later = tuple(
            Event(e.device, e.lane, e.action, e.start + end, e.ready + end, e.end + end, e.bytes) for e in once.events
        )
        trace = msgspec.structs.replace(trace, events=trace.events + later)
    predicted = msgspec.structs.replace(predicted, steps=(trace,))
    return msgspec.structs.replace(report(run=False, ranked=False), predicted=predicted, profile=profile)


def hostile() -> Report:
    """A report whose layers, devices, environment and command try to be markup."""
    names = [HOSTILE, "plain", f"{HOSTILE}{'x' * 300}", "ünïcode ☃"]
    profile = factory.profile([0.01] * 4, names=names, message_bytes=100)
    stages = tuple(Stage(layers=(name,), devices=(f"<b>d{i}</b>{HOSTILE}",)) for i, name in enumerate(names))
    cluster = factory.devices(4)
    devices = tuple(
        msgspec.structs.replace(device, name=stage.devices[0])
        for device, stage in zip(cluster.devices, stages, strict=True)
    )
    _, plan, _ = pieces()
    predicted = simulate(
        profile, msgspec.structs.replace(plan, stages=stages), msgspec.structs.replace(cluster, devices=devices)
    )
    real = measured(predicted)
    return msgspec.structs.replace(
        report(),
        predicted=predicted,
        measured=real,
        comparison=compare(predicted, real),
        profile=profile,
        environment={HOSTILE: HOSTILE},
        assumptions=(HOSTILE,),
        command=f"plan report '{HOSTILE}'",
    )
