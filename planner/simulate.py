"""The simulator: a SimPy process per device walks its row of the program and emits the trace it leaves.

It means what the executor does. Receives are posted where they stand; a transfer starts when both ends are posted
(rendezvous) and shares its links with others; a compute waits for its message, then for its share of the cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from random import Random

import msgspec
import simpy

from planner.cluster import Cluster
from planner.costs import Costs, costs_of
from planner.lowering import lower
from planner.memory import memory_curve
from planner.outcome import Outcome
from planner.plan import Plan
from planner.profile import Profile
from planner.program import RECEIVES, REDUCE_GRAD, Action, Message, Program, needs
from planner.resources import Alone, FairShare, Process
from planner.trace import COMPUTE, LINK, Event, Trace

SAMPLES = 3
"""Steps drawn per prediction: a step has dozens of draws, so few steps are enough."""
SEED = 0


def simulate(profile: Profile, plan: Plan, cluster: Cluster) -> Outcome:
    """Predict one step of `plan` on `cluster`: its trace, its memory curve and the interval of its step time.

    A step waits again and again for the slower of its devices, so jitter costs time even where no median changes.
    Therefore every action's duration is drawn from its measured spread, for a few steps, and the median step is the
    prediction. The interval simulates the step at the 10th and the 90th percentile of all durations at once.
    """
    program = lower(plan)
    taken = placed(plan, cluster)
    costs = costs_of(profile, plan, program, taken)

    def step(prices: Costs) -> Trace:
        return interpret(program, prices, plan.devices)

    if costs.certain:
        steps = [step(costs)]
        ends = (steps[0].end, steps[0].end)
    else:
        random = Random(SEED)
        steps = [step(costs.drawn(random)) for _ in range(SAMPLES)]
        ends = (step(costs.at("low")).end, step(costs.at("high")).end)
    trace = sorted(steps, key=lambda drawn: drawn.end)[len(steps) // 2]
    trace = msgspec.structs.replace(trace, memory=memory_curve(trace, program, plan, profile))
    return Outcome(
        plan=plan,
        source="simulated",
        steps=(trace,),
        profiled_s=costs.by_operation,
        interval_s=(min(*ends, trace.end), max(*ends, trace.end)),
        capacity_bytes=tuple(float(device.memory_bytes) for device in taken.devices),
    )


def replay(profile: Profile, plan: Plan, cluster: Cluster, measured: Trace) -> Trace:
    """Put the measured computing times of one step through the simulator."""
    program = lower(plan)
    costs = costs_of(profile, plan, program, placed(plan, cluster))
    return interpret(program, costs.replayed(measured), plan.devices)


def placed(plan: Plan, cluster: Cluster) -> Cluster:
    """Return the cluster reduced to the plan's devices, in the order of the program's rows."""
    taken = cluster.take(len(plan.devices))
    by_name = {device.name: device for device in taken.devices}
    return msgspec.structs.replace(taken, devices=tuple(by_name[name] for name in plan.devices))


def interpret(program: Program, costs: Costs, devices: tuple[str, ...]) -> Trace:
    """Walk the program with the costs from time 0 and return what happened."""
    run = _Run(program, costs)
    run.env.run()
    run.events.sort(key=lambda event: (event.device, event.start, event.end))
    return Trace(devices=devices, events=tuple(run.events))


class _Run:
    def __init__(self, program: Program, costs: Costs) -> None:
        self.program, self.costs = program, costs
        self.env = simpy.Environment()
        self.events: list[Event] = []
        messages = program.messages
        self.half_posted: set[Action] = set()
        self.arrived: Mapping[Action, simpy.Event] = {a: self.env.event() for a in messages if a.op in RECEIVES}
        self.reducing = {stage: _Meeting(self.env, len(program.replicas[stage])) for stage in costs.reductions}
        self.links = _links(self.env, costs.cluster)
        self.cores = _cores(self.env, costs)
        for device, row in enumerate(program.rows):
            self.env.process(self.device(device, row))

    def device(self, device: int, row: tuple[Action, ...]) -> Process:
        seconds, cores = self.costs.seconds[device], self.cores[device]
        for action in row:
            start = ready = self.env.now
            receive = needs(action)
            if action in self.program.messages:
                self.post(self.program.messages[action])
            elif receive is not None and receive in self.arrived:
                yield self.arrived[receive]
                ready = self.env.now
            elif action.op == REDUCE_GRAD and action.stage in self.reducing:
                yield self.reducing[action.stage].join()
                ready = self.env.now
                yield self.env.timeout(self.costs.reductions[action.stage])
            if seconds[action] > 0:
                yield cores.use(seconds[action])
            self.events.append(Event(device, COMPUTE, str(action), start, ready, self.env.now))

    def post(self, message: Message) -> None:
        """Start the transfer when its other end has been posted before."""
        if message.send in self.half_posted:
            self.env.process(self.transfer(*message))
        self.half_posted.add(message.send)

    def transfer(self, source: int, send: Action, target: int, receive: Action) -> Process:
        start = self.env.now
        way, seconds = self.costs.ways[source, target], self.costs.transfers[send]
        work = self.costs.works[send]
        shares = [self.links[index].use(seconds) for index in way] if seconds > 0 else []
        if work > 0 and self.cores[source] is self.cores[target]:
            shares.append(self.cores[source].use(2 * work))
        elif work > 0:
            shares += [self.cores[end].use(work) for end in (source, target)]
        if len(shares) == 1:
            yield shares[0]
        elif shares:
            yield simpy.AllOf(self.env, shares)
        size = self.costs.sizes[send]
        self.events.append(Event(target, LINK, str(receive), start, start, self.env.now, size))
        self.arrived[receive].succeed()


class _Meeting:
    """Fires when all replicas have come."""

    def __init__(self, env: simpy.Environment, expected: int) -> None:
        self.missing, self.complete = expected, env.event()

    def join(self) -> simpy.Event:
        self.missing -= 1
        if self.missing == 0:
            self.complete.succeed()
        return self.complete


def _links(env: simpy.Environment, cluster: Cluster) -> list[FairShare | Alone]:
    return [FairShare(env, lambda active: 1.0 / active) if link.shared else Alone(env) for link in cluster.links]


def _cores(env: simpy.Environment, costs: Costs) -> list[FairShare | Alone]:
    """One pool per host whose CPU devices share cores; everything else computes alone."""
    pools: dict[tuple[str, int], FairShare] = {}
    sharing: list[FairShare | Alone] = []
    hosts = {host.name: host for host in costs.cluster.hosts}
    for device in costs.cluster.devices:
        neighbours = [d for d in costs.cluster.devices if d.host == device.host and d.shares_cores]
        if not (costs.contended and device.shares_cores and len(neighbours) > 1):
            sharing.append(Alone(env))
            continue
        key = (device.host, device.threads)
        if key not in pools:
            pools[key] = FairShare(env, partial(hosts[device.host].speed, threads=device.threads))
        sharing.append(pools[key])
    return sharing
