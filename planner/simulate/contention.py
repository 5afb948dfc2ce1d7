"""The interpreter with contention: a walk per device through its row of the program, which SimPy's events resume.

It means what the executor does. Receives are posted where they stand; a transfer starts when all of its parties have
posted (rendezvous) and shares its links with others; a compute waits for its message, then for its share of the cores.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Generator
from functools import partial
from typing import NamedTuple

import numpy as np
import simpy

from planner.costs.flows import latency
from planner.costs.loading import waiting
from planner.costs.placed import Placed
from planner.costs.priced import Costs, costs_of
from planner.costs.prices import TransferKind
from planner.costs.stage_costs import MEDIAN
from planner.orders import codes
from planner.orders.operations import OPERATIONS, PULL, PUSH, named
from planner.programs.lowering import unroll
from planner.programs.waits import MESSAGES, Linked, waits_for_ever
from planner.simulate.network import Network, load
from planner.simulate.resources import Alone, FairShare, Then
from planner.simulate.steady import steady_step
from planner.simulate.turns import Turns, foreseen
from planner.values.plan import asynchronous
from planner.values.trace import COMPUTE, LINK, Event, Trace

ALL = 0
"""The one lane of all servers' updates."""

Walk = Generator[None, None, None]


class Failure(NamedTuple):
    """A device that stops at a moment and is back, its stage restored, some seconds later; its action starts anew.

    Where it would only have waited meanwhile, nothing is lost.
    """

    device: str
    at_s: float
    down_s: float


def simulated_step(placed: Placed) -> float:
    """Return the seconds per step of one walk through a plan's program, at the median costs."""
    plan = placed.plan
    costs = costs_of(placed, Linked(unroll(plan)))
    run = Run(costs, plan.devices, together=not placed.synchronisation.asynchronous)
    run.play()
    if asynchronous(plan):
        return steady_step(plan, costs.linked, np.array(run.end))
    return max(run.last, run.made, float(costs.least[MEDIAN]))


def interpret(costs: Costs, devices: tuple[str, ...]) -> Trace:
    """Walk the program with the costs from time 0 and return what happened."""
    run = Run(costs, devices)
    run.play()
    return run.trace()


@dataclasses.dataclass
class Ahead:
    """A transfer that begins before it is posted: who has not foreseen it, when it starts, what has happened."""

    unseen: int
    starts: float = 0.0
    posted: float = -1.0
    sent: bool = False


class Run:
    """One walk of all devices through their rows; `play` plays it."""

    def __init__(
        self, costs: Costs, devices: tuple[str, ...], *, together: bool = True, failures: tuple[Failure, ...] = ()
    ) -> None:
        self.costs, self.devices, self.together = costs, devices, together
        linked = self.linked = costs.linked
        self.env = simpy.Environment()
        self.seconds: list[float] = costs.seconds.tolist()
        self.posts, self.waits, self.needs = (a.tolist() for a in (linked.posts, linked.waits, linked.needs))
        self.also: list[int] = linked.also.tolist()
        self.missing: list[int] = linked.parties.tolist()
        self.kind_of: list[int] = costs.transfer_kind.tolist()
        self.done = bytearray(linked.transfers)
        self.waiting: dict[int, list[Then]] = {}
        self.begun: dict[int, float] = {}
        self.free: dict[int, float] = {}
        self.in_turn = [kind.lane >= 0 for kind in costs.kinds]
        self.takes = [kind.seconds for kind in costs.kinds]
        self.pushes = [kind.op == PUSH for kind in costs.kinds]
        self.start, self.ready, self.end = ([0.0] * len(linked.flat) for _ in range(3))
        self.moved: list[tuple[int, float, float]] = []
        self.at = linked.offsets[:-1].tolist()
        self.left, self.made = linked.devices, 0.0
        self.late = frozenset(waiting(linked)) if costs.late else frozenset()
        self.network = Network(self.env, costs.cluster.bandwidths)
        self.cores = _cores(self.env, costs)
        self.posting: list[bool] = codes.has(linked.flat, *named(group="pair")).tolist()
        self.nothing = Alone(self.env)
        self.server = Turns()
        self.pushed: dict[int, list[int]] = {}
        self.failures = sorted(failures, key=lambda failure: failure.at_s)
        self.delays = [self._delay(kind) for kind in costs.kinds]
        self.loads = [
            load(kind.flows, (kind.busy or kind.seconds) - delay, costs.cluster.bandwidths)
            for kind, delay in zip(costs.kinds, self.delays, strict=True)
        ]
        self.alone = [
            kind.work == 0 and kind.op not in (PULL, PUSH) and own.free
            for kind, own in zip(costs.kinds, self.loads, strict=True)
        ]
        shared = {kind.lane for kind, own in zip(costs.kinds, self.loads, strict=True) if not own.free}
        lanes = shared - {-1}
        self.queued = [kind.lane in lanes for kind in costs.kinds]
        ahead = {n for n, kind in enumerate(costs.kinds) if self.queued[n] and kind.early > 0}
        self.parts = [self._parts(kind) for kind in costs.kinds]
        self.turns = Turns()
        self.foreseen = foreseen(linked, self.kind_of, ahead) if ahead else {}
        self.ahead: dict[int, Ahead] = {
            transfer: Ahead(self.missing[transfer]) for mine in self.foreseen.values() for transfer, _ in mine
        }
        self.unfinished: dict[int, list[Then]] = {}
        self.resumes: list[Then] = [partial(next, self.device(device)) for device in range(linked.devices)]
        for resume in self.resumes:
            self.nothing.serve(0.0, resume)

    def _delay(self, kind: TransferKind) -> float:
        """Seconds before a transfer loads its links: of one message its latency, which others may use meanwhile.

        A collective's latencies lie between its rounds.
        """
        return latency(self.costs.cluster, kind.flows, kind.seconds) if kind.source >= 0 else 0.0

    @property
    def last(self) -> float:
        """When the last action was done."""
        return max(self.end, default=0.0)

    def device(self, device: int) -> Walk:
        """Walk one row; what it waits for at a `yield` sends it on."""
        env, serve, resume = self.env, self.cores[device].serve, self.resumes[device]
        passing, posting, costs = self.costs.devices[device].waits, self.posting, self.costs
        wake = next(host.wake_s for host in costs.cluster.hosts if host.name == costs.devices[device].host)
        posts, waits, needs, seconds, done = self.posts, self.waits, self.needs, self.seconds, self.done
        start, ready, end, also = self.start, self.ready, self.end, self.also
        foreseen, unfinished, updates, waiting = self.foreseen, self.unfinished, self.costs.updates, self.waiting
        failures = [failure for failure in self.failures if failure.device == self.devices[device]]
        making, late = self.costs.making if self.costs.contended else {}, self.costs.late
        now = env.now
        for i in range(int(self.linked.offsets[device]), int(self.linked.offsets[device + 1])):
            start[i], self.at[device] = now, i
            post, wait, copy = posts[i], waits[i], needs[i]
            if post >= 0:
                self.post(post)
            if wait >= 0 and not done[wait]:
                waiting.setdefault(wait, []).append(resume)
                yield
                now = env.now
            if copy >= 0 and not done[copy]:
                waiting.setdefault(copy, []).append(resume)
                yield
                now = env.now
            while wait >= 0 and also:  # what comes along the stage's other edges
                wait = also[wait]
                if wait >= 0 and not done[wait]:
                    waiting.setdefault(wait, []).append(resume)
                    yield
                    now = env.now
            wait = waits[i]
            ready[i] = now if wait < 0 or wait != post else self.begun[wait]
            own = seconds[i]
            while failures and failures[0].at_s <= now + own:
                failure = failures.pop(0)
                self.nothing.serve(max(0.0, failure.at_s + failure.down_s - now), resume)
                yield
                now = env.now
            if i in self.late:  # nothing computes while a batch is waited for
                self.nothing.serve(late, resume)
                yield
                now = env.now
            if i in foreseen:
                self.foresee(i)
            if own > 0:
                if i in updates:
                    self.update(i, own, resume)
                elif passing and not posting[i]:  # nobody computes, but who has waited has to get a core again
                    self.nothing.serve(own, resume)
                    if wake and costs.contended:
                        yield
                        serve(wake, resume)
                else:
                    serve(own, resume)
                yield
                now = env.now
            if copy in unfinished:  # what is gathered while it is used
                unfinished[copy].append(resume)
                yield
                now = env.now
            end[i] = now
            if i in making:
                serve(making[i], self.batch_is_made)
        self.left -= 1

    def batch_is_made(self, _: object) -> None:
        """Note that workers are done with what the next step loads: they share the cores with what computes."""
        self.made = self.env.now

    def play(self) -> None:
        """Walk all rows to their ends. Raises `PlanError` when actions wait for each other for ever."""
        self.env.run()
        if self.left:
            raise waits_for_ever(self.linked, self.at)

    def update(self, i: int, seconds: float, then: Then) -> None:
        """Update parameters on the host, whose memory others use, too."""
        self.network.send(load(self.costs.updates[i], seconds, self.costs.cluster.bandwidths), seconds, then)

    def post(self, transfer: int) -> None:
        """Begin the transfer when its last party has come."""
        self.missing[transfer] -= 1
        if self.missing[transfer]:
            return
        number = self.kind_of[transfer]
        if self.queued[number]:
            self.queue(transfer, self.costs.kinds[number])
            return
        now = begun = self.env.now
        if self.in_turn[number]:
            begun = self.turn(self.costs.kinds[number])
        self.begun[transfer] = begun
        if self.alone[number]:
            rest = max(0.0, begun - now + self.takes[number])  # rounding
            self.env.timeout(rest).callbacks.append(partial(self.finish, transfer))
        elif begun > now:
            self.env.timeout(begun - now).callbacks.append(lambda _: self.begin(number, partial(self.finish, transfer)))
        elif self.pushes[number]:
            self.begin(number, partial(self.push, transfer, number))
        else:
            self.begin(number, partial(self.finish, transfer))

    def foresee(self, i: int) -> None:
        """Begin what the device will post after this action, and what begins before it is posted, when it does."""
        for transfer, post in self.foreseen[i]:
            kind, ahead = self.costs.kinds[self.kind_of[transfer]], self.ahead[transfer]
            ahead.starts = max(ahead.starts, self.env.now + sum(self.seconds[i:post]) - kind.early)
            ahead.unseen -= 1
            if not ahead.unseen:
                delay = max(0.0, ahead.starts - self.env.now)
                self.env.timeout(delay).callbacks.append(partial(self.take_turn, transfer, kind))

    def queue(self, transfer: int, kind: TransferKind) -> None:
        """Let a posted transfer wait for its turn; what has begun before is over when all is sent and posted."""
        ahead = self.ahead.get(transfer)
        if ahead is not None and ahead.sent:
            self.finish(transfer)
            return
        if ahead is not None:
            ahead.posted = self.env.now
        if ahead is None or ahead.unseen:  # nobody, or not everybody, could foresee it
            self.take_turn(transfer, kind)

    def take_turn(self, transfer: int, kind: TransferKind, _: simpy.Event | None = None) -> None:
        """Send a transfer when its engine is free; those who wait go on after its `seconds`, or all that it hides."""
        self.turns.take(kind.lane, lambda _: self.send_in_turn(transfer, kind))

    def send_in_turn(self, transfer: int, kind: TransferKind) -> None:
        """Keep the engine for as long as all bytes take; let those who wait go on when they can."""
        number = self.kind_of[transfer]
        self.begun[transfer] = self.env.now + kind.early

        def sent(_: object) -> None:
            self.turns.leave(kind.lane)
            for resume in self.unfinished.pop(transfer, ()):
                resume(None)

        def over(_: object) -> None:
            sent(None)
            ahead = self.ahead.get(transfer)
            if ahead is not None and ahead.posted < 0:
                ahead.sent = True
            else:
                self.finish(transfer)

        def usable(_: object) -> None:
            self.unfinished[transfer] = []
            self.finish(transfer)
            self.network.send(self.loads[number], kind.busy - kind.seconds, sent)

        if kind.early > 0 or kind.busy <= kind.seconds:
            self.send(number, over, kind.busy)
        elif kind.seconds > 0:
            self.send(number, usable, kind.seconds)
        else:
            usable(None)

    def turn(self, kind: TransferKind) -> float:
        """Return when a transfer begins that is done in turn with others of its lane, and take its time there."""
        start = max(self.env.now - kind.early, self.free.get(kind.lane, 0.0))
        self.free[kind.lane] = start + kind.busy
        return max(self.env.now, start + kind.early)  # rounding could make it a little earlier than now

    def finish(self, transfer: int, _: simpy.Event | None = None) -> None:
        """Let those go on who wait for it."""
        self.moved.append((transfer, min(self.begun[transfer], self.env.now), self.env.now))
        self.done[transfer] = True
        for resume in self.waiting.pop(transfer, ()):
            resume(None)

    def begin(self, number: int, then: Then) -> None:
        """Serve a transfer of a kind on its links and on its ends' cores; call `then` with the last of these parts."""
        parts = self.parts[number]
        if not parts:
            self.send(number, then, self.takes[number])
            return
        left = 1 + len(parts)

        def done(_: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                then(None)

        self.send(number, done, self.takes[number])
        for part, share in parts:
            part.serve(share, done)

    def send(self, number: int, then: Then, seconds: float) -> None:
        """Bring a transfer's bytes over its links, after its latency."""
        own, delay = self.loads[number], self.delays[number]
        if own.free:
            self.nothing.serve(seconds, then)
        elif delay:
            rest = seconds - delay
            self.env.timeout(delay).callbacks.append(lambda _: self.network.send(own, rest, then))
        else:
            self.network.send(own, seconds, then)

    def _parts(self, kind: TransferKind) -> list[tuple[FairShare | Alone, float]]:
        """Cores that a kind of transfer uses, each for how long."""
        cores, work = self.cores, kind.work
        if not work:
            return []
        if cores[kind.source] is cores[kind.target]:
            return [(cores[kind.source], 2 * work)]
        return [(cores[kind.source], work), (cores[kind.target], work)]

    def push(self, transfer: int, number: int, _: object) -> None:
        """Gradients have come to a server, which updates its parameters with them."""
        stage = self.costs.kinds[number].stage
        self.pushed.setdefault(stage, []).append(transfer)
        mine = self.pushed[stage]
        if self.together and len(mine) % self._workers(stage):
            return  # the last one updates
        pushed = mine[-self._workers(stage) :] if self.together else [transfer]
        self.server.take(ALL, lambda _: self.apply(stage, pushed))

    def apply(self, stage: int, pushed: list[int]) -> None:
        """Let a server update a stage's parameters, then those go on who have pushed their gradients to it."""

        def applied(_: object) -> None:
            self.server.leave(ALL)
            for each in pushed:
                self.finish(each)

        self.nothing.serve(self.costs.applying[stage], applied)

    def _workers(self, stage: int) -> int:
        pushes = self.linked.flat >> codes.STAGE == codes.code(PUSH, stage) >> codes.STAGE
        return len(np.unique(self.linked.row[pushes]))

    def trace(self) -> Trace:
        """Everything that happened, device by device."""
        rows = self.linked.row.tolist()
        events = [
            Event(rows[i], COMPUTE, str(action), self.start[i], self.ready[i], self.end[i])
            for i, action in enumerate(self.linked.actions)
        ]
        posting: dict[int, list[int]] = defaultdict(list)  # a gather is on the link of each who joins it
        for i, transfer in enumerate(self.posts):
            posting[transfer].append(i)
        for transfer, begin, end in self.moved:
            kind = self.costs.kinds[self.kind_of[transfer]]
            if kind.op in MESSAGES:
                action = str(self.linked.receive(transfer))
                events.append(Event(kind.target, LINK, action, begin, begin, end, kind.bytes))
            elif OPERATIONS[kind.op].lane == LINK:
                for i in posting[transfer]:
                    events.append(Event(rows[i], LINK, str(self.linked.actions[i]), begin, begin, end, kind.bytes))
        events.sort(key=lambda event: (event.device, event.start, event.end))
        return Trace(devices=self.devices, events=tuple(events))


def _cores(env: simpy.Environment, costs: Costs) -> list[FairShare | Alone]:
    """One pool per host whose CPU devices share cores; everything else computes alone."""
    pools: dict[tuple[str, int], FairShare] = {}
    sharing: list[FairShare | Alone] = []
    hosts = {host.name: host for host in costs.cluster.hosts}
    count: dict[str, int] = {}
    for device in costs.devices:
        count[device.host] = count.get(device.host, 0) + device.shares_cores
    for device in costs.devices:
        alone = count[device.host] == 1 and not any(costs.making.values())
        if alone or not (costs.contended and device.shares_cores):
            sharing.append(Alone(env))
            continue
        key = (device.host, 1 if device.waits else device.threads)  # who waits only posts
        if key not in pools:
            pools[key] = FairShare(env, partial(hosts[device.host].speed, threads=key[1]))
        sharing.append(pools[key])
    return sharing
