"""Runs without flush against a sequential replay with delayed weights, written from the papers' recurrences.

Of a stage s of p with one holder, micro-batch t is computed with the version (updates counted from 0)

    PipeDream       t - (p - 1 - s)   w_i(t+1) = w_i(t) - lr grad f(w_1(t-p+1), ..., w_p(t)), arXiv 1806.03377
    vertical sync   t - (p - 1)       the version that the input stage has
    PipeDream-2BW   step - 1          W(t+1) = W(t) - lr grad f(W(t-1)), of steps, arXiv 2006.09503

and of the first ones with version 0. Holders that take micro-batches in turn update once for each turn, with its mean
and a turn late, as the reduction goes on beside the next micro-batch.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from functools import cache
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from executor.evaluations import evaluated
from executor.feed import open_feed
from executor.launch import launch
from executor.layers import cut
from executor.model_file import load
from executor.noise import Noise
from executor.rank import split
from executor.steps import file_of, joined
from planner.values.plan import Plan, Stage
from planner.values.step import Step
from tests.executor.stale_models import evaluate
from tests.executor.training_jobs import SEED, Case, Cases, main

MODEL = str(Path(__file__).parent / "stale_models.py")
STEPS, MICROBATCHES, BATCH = 5, 4, 16


@cache
def layers() -> tuple[str, ...]:
    file = load(MODEL)
    return tuple(layer.name for layer in cut(file, file.build(SEED)).layers)


def plan_of(schedule: str, holders: tuple[int, ...], m: int = MICROBATCHES, **options: bool) -> Plan:
    """A plan whose stages have so many holders each; where all have as many, each pipeline has one of each."""
    names, p = layers(), len(holders)
    cuts = [round(i * len(names) / p) for i in range(p + 1)]
    even, devices = len(set(holders)) == 1, iter(range(sum(holders)))
    own = [
        tuple(f"d{r * p + s}" if even else f"d{next(devices)}" for r in range(count)) for s, count in enumerate(holders)
    ]
    stages = tuple(Stage(layers=names[cuts[s] : cuts[s + 1]], devices=own[s]) for s in range(p))
    return Plan(strategy=schedule, schedule=schedule, stages=stages, microbatches=m, batch=BATCH, **options)


class Replay:
    """One process that keeps every version of every stage, and trains with those that the recurrence says."""

    def __init__(self, case: Case) -> None:
        self.plan, self.file = case.plan, load(case.model)
        layered = cut(self.file, self.file.build(SEED))
        self.layered = layered
        self.module = layered.stage(range(len(layered.layers)))
        self.holders = [len(stage.devices) for stage in self.plan.stages]
        ranges, names = self.plan.layer_ranges([layer.name for layer in layered.layers]), layered.parameter_names()
        self.own = [list(layered.stage(own).parameters()) for own in ranges]
        self.names = [[names[id(p)] for p in own] for own in self.own]
        self.masters = [[nn.Parameter(p.detach().clone()) for p in own] for own in self.own]
        named = [list(zip(n, m, strict=True)) for n, m in zip(self.names, self.masters, strict=True)]
        self.optimizers = [self.file.optimizer_of(own) for own in named]
        self.schedulers = [self.file.scheduler(o, case.steps) for o in self.optimizers]
        self.versions = [[[p.detach().clone() for p in own]] for own in self.own]
        self.added: dict[int, list[torch.Tensor]] = {}
        self.count: dict[int, int] = defaultdict(int)
        pipelines = self.plan.pipelines
        self.feeds = [
            open_feed(self.file, BATCH // pipelines, replicas=pipelines, replica=r, seed=SEED) for r in range(pipelines)
        ]

    def version(self, s: int, step: int, own: int) -> int:
        """The version that a stage's holder computes with, of the micro-batch that its pipeline counts as `own`."""
        r, p = self.holders, len(self.holders)
        turns = r if self.plan.uneven else [1] * p
        late = [int(count > 1) for count in r]

        def of(stage: int) -> int:
            """In flight at a holder are the devices from its stage on, divided among the stage's holders."""
            flight = -(-sum(turns[stage:]) // turns[stage])
            return max(0, own // turns[stage] - (flight - 1) - late[stage])

        match self.plan.schedule:
            case "pipedream":
                return of(s)
            case "pipedream-vertical":
                return min(of(s), of(0) * turns[0] // turns[s])  # it has no newer one
            case _:
                return max(0, step - 1)

    def step(self, step: int) -> float:
        """Train one step; return the mean of its micro-batches' losses."""
        m, shares = self.plan.microbatches, [feed.take() for feed in self.feeds]
        each = m // len(self.feeds)
        inputs = [x for share in shares for x in share.inputs[0].chunk(each)]
        targets = [y for share in shares for y in split(share.targets, each)]
        total = 0.0
        for own in range(each):
            for pipeline in range(len(shares)):  # a turn of all pipelines
                place = pipeline * each + own
                total += self.microbatch(step, step * each + own, place, inputs[place], targets[place]) / m
        return total

    def microbatch(self, step: int, own: int, place: int, x: torch.Tensor, y: torch.Tensor) -> float:
        for s, parameters in enumerate(self.own):
            for parameter, value in zip(parameters, self.versions[s][self.version(s, step, own)], strict=True):
                parameter.data, parameter.grad = value.clone(), None
        self.module.noise = Noise(SEED, step, place, torch.device("cpu"))
        loss = self.file.loss(self.module(x), y)
        loss.backward()
        window = self.plan.schedule == "pipedream-2bw"
        for s, parameters in enumerate(self.own):
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            self.added[s] = (
                [a + g for a, g in zip(self.added[s], gradients, strict=True)] if self.count[s] else gradients
            )
            self.count[s] += 1
            needed = self.plan.microbatches if window else self.holders[s]
            if self.count[s] < needed:
                continue
            for master, gradient in zip(self.masters[s], self.added[s], strict=True):
                master.grad = gradient / needed
            self.optimizers[s].step()
            self.versions[s].append([master.detach().clone() for master in self.masters[s]])
            self.count[s] = 0
            if window or (own + 1) % (self.plan.microbatches // self.plan.pipelines) == 0:
                self.schedulers[s].step()
        return float(loss.detach())

    def state(self) -> dict[str, torch.Tensor]:
        """The weights behind all updates."""
        names, masters = ([one for own in of for one in own] for of in (self.names, self.masters))
        return {name: master.detach() for name, master in zip(names, masters, strict=True)}

    def judged(self) -> float:
        """The loss on the validation data with the weights behind all updates."""
        parameters, masters = ([one for own in of for one in own] for of in (self.own, self.masters))
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data = master.detach().clone()
        inputs, targets = evaluate()[:]
        self.module.eval()
        self.module.noise = None
        with torch.no_grad():
            found = float(self.file.loss(self.module(inputs), targets))
        self.module.train()
        return found


def cases(k: int) -> list[Case]:
    """What is run over k devices."""
    straight = (1,) * k
    found = [
        Case(name=schedule, model=MODEL, plan=plan_of(schedule, straight), steps=STEPS)
        for schedule in ("pipedream", "pipedream-vertical", "pipedream-2bw")
    ]
    some = {
        2: [
            Case(name="adam", model=f"{MODEL}:adam", plan=plan_of("pipedream", straight), steps=STEPS),
            Case(name="few", model=MODEL, plan=plan_of("pipedream", straight, m=1), steps=STEPS),
            Case(name="one", model=MODEL, plan=plan_of("pipedream-vertical", straight), steps=1),
            Case(name="stopped", model=MODEL, plan=plan_of("pipedream", straight), steps=10**6, stop_s=0.1),
        ],
        3: [
            Case(name="adam", model=f"{MODEL}:adam", plan=plan_of("pipedream-2bw", straight), steps=STEPS),
            Case(name="recompute", model=MODEL, plan=plan_of("pipedream", straight, recompute=True), steps=STEPS),
            Case(name="judged", model=MODEL, plan=plan_of("pipedream", straight), steps=6, evaluate_every=2),
        ],
        4: [
            Case(name="adam", model=f"{MODEL}:adam", plan=plan_of("pipedream-vertical", straight), steps=STEPS),
            Case(name="few", model=MODEL, plan=plan_of("pipedream", straight, m=2), steps=STEPS),
            Case(name="stopped", model=MODEL, plan=plan_of("pipedream-2bw", straight), steps=10**6, stop_s=0.1),
        ],
    }
    found += some[k]
    shapes = {2: ((2,),), 3: ((1, 2), (2, 1)), 4: ((2, 2), (1, 2, 1))}
    for holders in shapes.get(k, ()):
        even = len(set(holders)) == 1
        for schedule in ("pipedream", "pipedream-vertical", "pipedream-2bw"):
            if schedule == "pipedream-2bw" and not even:
                continue
            plan = plan_of(schedule, holders, m=8 if holders == (2, 1) else MICROBATCHES)
            name = f"{schedule}-{'.'.join(map(str, holders))}"
            found.append(Case(name=name, model=MODEL, plan=plan, steps=STEPS))
    return found


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_run_without_flush_is_a_replay_with_delayed_weights(k: int, tmp_path: Path) -> None:
    todo = cases(k)
    spec = tmp_path / "cases.json"
    spec.write_bytes(msgspec.json.encode(Cases(folder=str(tmp_path), cases=tuple(todo))))
    launch(main, str(spec), k, tmp_path / "logs")
    for case in todo:
        compare(case, tmp_path, k)


def compare(case: Case, folder: Path, k: int) -> None:
    own = folder / case.name
    steps = joined(own, k)
    assert {len(alone(own, rank)) for rank in range(k)} == {len(steps)}
    assert len(steps) < 10**6 if case.stop_s else len(steps) == case.steps
    replay = Replay(case)
    judged = {e.step: e.loss for e in evaluated(own)}
    for step, found in enumerate(steps):
        rate = replay.schedulers[0].get_last_lr()[0]
        assert found.loss == pytest.approx(replay.step(step), rel=1e-5), (case.name, step)
        assert found.rate == pytest.approx(rate), (case.name, step)
        if step + 1 in judged:
            assert judged[step + 1] == pytest.approx(replay.judged(), rel=1e-5), (case.name, step)
    assert bool(judged) == bool(case.evaluate_every)
    expected, seen = replay.state(), set()
    for rank in range(k):
        for name, tensor in torch.load(own / f"rank{rank}.pt", weights_only=True).items():
            near = 1e-4 if case.stop_s else 1e-6  # hundreds of steps
            most = near * float(expected[name].abs().max())
            off = float((tensor - expected[name]).abs().max())
            assert off <= most, (case.name, name, off / most * near)
            seen.add(name)
    assert seen == set(expected), case.name


def alone(folder: Path, rank: int) -> list[Step]:
    """One rank's steps."""
    data = file_of(folder, rank).read_bytes()
    return [Step(*numbers) for numbers in struct.iter_unpack("<5d", data)]
