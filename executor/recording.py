"""What a rank records of a step: every action's times, and in one step the memory around each of them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from executor.allocator import AllocationRecorder
from executor.devices import Backend
from executor.rank import Rank, Stamped
from planner.orders.action import Action
from planner.orders.operations import REDUCE_ASYNC
from planner.values.trace import COMPUTE, KINDS, LINK, Event, MemoryPoint


def recording_of(folder: Path, rank: int) -> Path:
    """Return the file to which a rank writes what it records, a step per line."""
    return folder / f"rank{rank}.recorded.jsonl"


def recorded_by(folder: Path, rank: int) -> list[RankStep]:
    """Return what a rank has recorded, and has written to its end."""
    file = recording_of(folder, rank)
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [msgspec.json.decode(line, type=RankStep) for line in lines if line.endswith(b"\n")]


def shorten(folder: Path, rank: int, steps: int) -> None:
    """Forget what a rank has recorded of steps behind the first so many."""
    kept = [step for step in recorded_by(folder, rank) if step.step < steps]
    recording_of(folder, rank).write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in kept))


class RankStep(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank recorded of a step, which is counted from 0: its events in seconds of the shared clock."""

    step: int
    events: tuple[Event, ...]


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The events and the memory curve of the step in which a rank's memory was recorded."""

    events: tuple[Event, ...]
    memory: tuple[MemoryPoint, ...]


def events(me: Rank, stamps: list[Stamped], rank: int, backend: Backend, offset: float) -> tuple[Event, ...]:
    """Turn a step's stamps into events in seconds of the shared clock.

    A recompute happens inside its backward, on the last stage behind the loss's; it is shown in front of it, where
    the program has it. A transfer is seen to be over when somebody waits for it: the link lane shows it from the
    posting of its receive to the end of that wait.
    """
    found: list[Event] = []

    def seconds(stamp: object) -> float:
        return backend.seconds(stamp) + offset

    for stamped in stamps:
        action, start, ready = stamped.action, seconds(stamped.start), seconds(stamped.ready)
        end = seconds(stamped.end)
        if stamped.repeats:
            repeat = found.pop()
            times = [seconds(stamp) for stamp in stamped.repeats]
            repeated = sum(times[1::2]) - sum(times[::2])
            start = ready = repeat.ready + repeated
            found.append(msgspec.structs.replace(repeat, end=start))
        for receive, stamp, size in stamped.arrived:
            since = seconds(stamp)
            found.append(Event(rank, LINK, str(receive), since, since, max(since, ready), size))
        if stamped.reduced is not None:
            since, reduction = seconds(stamped.reduced), str(action._replace(op=REDUCE_ASYNC))
            found.append(Event(rank, LINK, reduction, since, since, max(since, ready)))
        # What is waited for inside, as for gathered parameters, is shown in front, as it is priced.
        waits = [seconds(stamp) for stamp in stamped.waits]
        ready += sum(waits[1::2]) - sum(waits[::2])
        found.append(Event(rank, COMPUTE, str(action), start, ready, end))
    return tuple(found)


def memory_step(me: Rank, rank: int, backend: Backend, offset: float) -> RankMemory:
    """Perform one more step and record its memory: between actions by kind, inside them at their worst.

    What is known by name is counted; the rest is activations, of which the first step's first action has none. Where
    steps overlap, so many are performed that they fill and drain the pipeline; what is returned is one when it is full.
    """
    rolling = me.course.rolling
    count, full = (rolling.least + 1, rolling.filling + 1) if rolling is not None else (1, 0)
    known: dict[str, dict[str, int]] = {}
    timed: tuple[Event, ...] = ()
    names: list[tuple[str, str]] = []

    def name(action: Action) -> str:
        return str(me.course.named(action))

    def watch(action: Action, when: str) -> None:
        if when == "before":
            known[name(action)] = me.bytes_by_kind()
            names.append((name(action), str(action)))

    me.begin(count)
    with AllocationRecorder(backend) as recorder:
        for step in range(count):
            begin = len(names)
            me.step(recorder, watch)
            if step == full:
                timed = events(me, me.stamped, rank, backend, offset)
                wanted = range(begin, len(names))
    points: list[MemoryPoint] = []
    live = 0
    times = {e.action: e for e in timed if e.lane == COMPUTE}
    static = sum(known[names[0][0]].values())
    for place, (own, action) in enumerate(names):
        peak, kept = recorder.span(own)
        if place in wanted:
            event = times[action]
            kinds = dict.fromkeys(KINDS, 0.0) | {k: float(v) for k, v in known[own].items()}
            kinds["activations"] = max(0.0, static + live - sum(known[own].values()))
            for time_, inside in ((event.ready, 0), ((event.ready + event.end) / 2, peak)):
                values = kinds | {"transient": float(inside)}
                points.append(MemoryPoint(rank, time_, tuple(values[k] for k in KINDS)))
        live += kept
    return RankMemory(events=timed, memory=tuple(points))
