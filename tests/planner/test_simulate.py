"""The simulator against the longest path of the action graph, and its shared resources against arithmetic."""

from __future__ import annotations

from typing import Any

import msgspec
import networkx as nx
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import Costs, costs_of
from planner.orders import schedules
from planner.orders.operations import REDUCE_GRAD
from planner.orders.schedules import Shape
from planner.placement import strategies
from planner.placement.question import Question
from planner.placement.strategies import all_strategies
from planner.programs.lowering import lower
from planner.programs.program import Program
from planner.programs.waits import Linked
from planner.simulate.contention import interpret
from planner.simulate.longest_path import walk
from planner.simulate.predict import simulate
from planner.simulate.resources import FairShare
from planner.values.cluster import Cluster, Host
from planner.values.plan import Plan, Stage
from planner.values.profile import Profile
from planner.values.trace import KINDS
from tests.factory import devices, needs, pipeline, profile, shapes

COST = st.integers(1, 9).map(float)


def longest_path(program: Program, costs: Costs) -> float:
    """Makespan as the longest path of the action graph: what no contention and no sharing allows to be quicker."""
    graph: nx.DiGraph = nx.DiGraph()
    seconds = dict(zip(enumerate(costs.linked.actions), costs.seconds.tolist(), strict=True))
    rows = costs.linked.row.tolist()
    before: dict[int, object] = {}
    transfers = {(k.op, k.stage): k.seconds for k in costs.kinds}
    for (i, action), own in seconds.items():
        d = rows[i]
        begin, end = (d, action, "begin"), (d, action, "end")
        graph.add_edge(begin, end, seconds=own)
        if action.op == REDUCE_GRAD and (REDUCE_GRAD, action.stage) in transfers:
            graph.add_edge(begin, (action, "meet"), seconds=0.0)
            graph.add_edge((action, "meet"), end, seconds=transfers[REDUCE_GRAD, action.stage])
        if d in before:
            graph.add_edge(before[d], begin, seconds=0.0)
        before[d] = end
        receive = needs(action)
        if receive in program.messages:
            message = program.messages[receive]
            graph.add_edge((message.source, message.send, "begin"), (d, receive, "go"), seconds=0.0)
            graph.add_edge((d, receive, "begin"), (d, receive, "go"), seconds=0.0)
            # The compute starts once the message is there: its own node, so that its duration comes behind it.
            graph.add_edge((d, receive, "go"), begin, seconds=transfers[receive.op, receive.stage])
    return float(nx.dag_longest_path_length(graph, weight="seconds"))


@given(shapes(), st.integers(0, 3), st.booleans(), st.data())
def test_simulation_is_the_longest_path(
    drawn: tuple[str, Shape], latency: int, recompute: bool, data: st.DataObject
) -> None:
    name, shape = drawn
    forward, backward = (data.draw(st.lists(COST, min_size=shape.stages, max_size=shape.stages)) for _ in range(2))
    costs_profile = profile(forward, backward, message_bytes=1)
    plan, program = pipeline(name, shape.devices, shape.microbatches, chunks=shape.chunks, recompute=recompute)
    cluster = devices(shape.devices, latency_s=float(latency), bandwidth=1e300)
    costs = costs_of(Placed(costs_profile, plan, cluster), Linked(program))
    assert interpret(costs, plan.devices).end == pytest.approx(longest_path(program, costs), rel=1e-12)


@given(shapes(), st.integers(0, 3), st.sampled_from(["", "recompute", "zero-1", "zero-3"]), st.data())
def test_the_fast_interpreter_equals_simpy(
    drawn: tuple[str, Shape], latency: int, more: str, data: st.DataObject
) -> None:
    """Every time of every action, and every device's peak, on every registered schedule."""
    name, shape = drawn
    forward, backward = (data.draw(st.lists(COST, min_size=shape.stages, max_size=shape.stages)) for _ in range(2))
    costs_profile = profile(forward, backward, message_bytes=100)
    fields: dict[str, Any] = {"recompute": more == "recompute"}
    if more.startswith("zero") and schedules.get(name).updates == "step":
        fields |= {"replicas": 2, "synchronisation": more, "microbatches": 2 * shape.microbatches}
    rows = shape.devices * fields.get("replicas", 1)
    plan, program = pipeline(
        name, shape.devices, **({"microbatches": shape.microbatches, "chunks": shape.chunks} | fields)
    )
    cluster = devices(rows, latency_s=float(latency), bandwidth=1e3)
    costs = costs_of(Placed(costs_profile, plan, cluster), Linked(program))
    outcome = simulate(costs_profile, plan, cluster)
    walked = walk(costs)
    events = [e for e in outcome.trace.events if e.lane == "compute"]
    ends = {(e.device, e.action): (e.ready, e.end) for e in events}
    fast = zip(costs.linked.row.tolist(), costs.linked.actions, walked.ready, walked.end, strict=True)
    for row, action, ready, end in fast:
        assert (ready, end) == pytest.approx(ends[row, str(action)], rel=1e-12)
    peaks = MemoryModel(Placed(costs_profile, plan, cluster), costs.linked).peaks()
    assert peaks == pytest.approx([point.total for point in outcome.peak], rel=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), COST)
def test_data_parallel_is_the_longest_path(k: int, share: int, f: float) -> None:
    cluster = devices(k, bandwidth=1e3)
    question = Question(profile([f, 2 * f]), cluster, k, k * share, k * share)
    plan = next(s for s in all_strategies() if s.name == "data-parallel").spread(question)
    program = lower(plan)
    costs = costs_of(Placed(question.profile, plan, cluster), Linked(program))
    assert interpret(costs, plan.devices).end == pytest.approx(longest_path(program, costs), rel=1e-12)


def shared_cores(count: int, cores: int) -> Cluster:
    return Cluster(
        name="shared",
        hosts=(Host(name="h", cores=cores, memory_bytes=10**9, slowdown=((1, 1.0), (2, 1.25))),),
        links=devices(1).links,
        elastic=True,
    ).take(count)


@pytest.mark.parametrize(("count", "factor"), [(1, 1.0), (2, 1.25), (4, 2.5)])
def test_cores_are_shared(count: int, factor: float) -> None:
    """Four processes on two cores take twice as long, and what busy neighbours cost comes on top."""
    question = Question(profile([1.0]), shared_cores(count, 2), count, count, count)
    plan = next(s for s in all_strategies() if s.name == "data-parallel").spread(question)
    assert simulate(question.profile, plan, question.cluster).step_s == pytest.approx(2.0 * factor, abs=1e-6)


def test_transfers_share_a_link() -> None:
    """Two pipelines that send at the same moment over one link take twice as long for it, on links of their own not."""
    plan = Plan(
        strategy="gpipe",
        schedule="gpipe",
        stages=(Stage(layers=("layer0",), devices=("d0", "d2")), Stage(layers=("layer1",), devices=("d1", "d3"))),
        microbatches=2,
        batch=2,
    )
    costs = profile([1.0, 1.0], message_bytes=100)
    shared, own = (simulate(costs, plan, devices(4, bandwidth=100.0, shared=shared)).trace for shared in (True, False))
    assert [e.end - e.start for e in own.events if e.lane == "link"] == [1.0] * 4
    forward = [e for e in shared.events if e.lane == "link" and e.op == "RECV_F"]  # with gradients a reduction travels
    assert [e.end - e.start for e in forward] == [2.0] * 2


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=8))
def test_fair_share_conserves_work(users: list[tuple[int, int]]) -> None:
    """A single server shared fairly is busy as long as anyone is there: all are done when it would be by turns."""
    env = simpy.Environment()
    server = FairShare(env, lambda active: 1.0 / active)
    left: list[float] = []

    for arrival, work in users:
        env.timeout(arrival).callbacks.append(
            lambda _, work=work: server.serve(work, lambda _: left.append(env.now)),
        )
    env.run()
    clock = 0.0
    for arrival, work in sorted(users):
        clock = max(clock, arrival) + work
    assert max(left) == pytest.approx(clock)
    assert len(left) == len(users)


def test_interval_brackets_the_prediction() -> None:
    plan, _ = pipeline("gpipe", 3, 4)
    certain = simulate(profile([1.0] * 3), plan, devices(3)).step_s
    outcome = simulate(profile([1.0] * 3, spread=0.1), plan, devices(3))
    low, high = outcome.interval_s
    assert low == pytest.approx(certain * 0.9)
    assert high == pytest.approx(certain * 1.1)
    assert low < outcome.step_s < high
    assert simulate(profile([1.0] * 3, spread=0.1), plan, devices(3)) == outcome, "drawn from a fixed seed"


def test_jitter_costs_time() -> None:
    """Where devices wait for each other, a step takes longer than its median durations add up to."""
    plan, _ = pipeline("1f1b", 4, 32)
    certain = simulate(profile([1.0] * 4), plan, devices(4)).step_s
    assert simulate(profile([1.0] * 4, spread=0.2), plan, devices(4)).step_s > certain


def test_memory_of_a_step() -> None:
    """One layer per stage, 1000 bytes of everything: what is live can be counted by hand."""
    plan, _ = pipeline("gpipe", 2, 4)
    outcome = simulate(profile([1.0] * 2, message_bytes=1000), plan, devices(2))
    first, last = (dict(zip(KINDS, point.bytes, strict=True)) for point in outcome.peak)
    assert first["parameters"] == 1000
    assert first["optimizer"] == 2000
    assert first["activations"] == 4 * 2000, "saved and sent, for four micro-batches"
    assert last["communication"] == 4 * 1000, "what four micro-batches received"
    assert last["activations"] == 4 * 2000
    one = simulate(profile([1.0] * 2, message_bytes=1000), pipeline("1f1b", 2, 4)[0], devices(2))
    assert dict(zip(KINDS, one.peak[1].bytes, strict=True))["activations"] == 2000, "1F1B holds one on the last stage"


def test_recompute_keeps_less() -> None:
    costs = profile([1.0] * 2, message_bytes=1000)
    kept, repeated = (
        simulate(costs, pipeline("gpipe", 2, 8, recompute=recompute)[0], devices(2)) for recompute in (False, True)
    )
    assert repeated.peak_bytes < kept.peak_bytes
    assert repeated.step_s == pytest.approx(kept.step_s * 1.5)


def test_memory_limit_decides_whether_it_fits() -> None:
    plan, _ = pipeline("gpipe", 2, 4)
    costs: Profile = profile([1.0] * 2)
    need = simulate(costs, plan, devices(2)).peak_bytes
    assert simulate(costs, plan, devices(2, memory_bytes=int(need))).fits
    assert not simulate(costs, plan, devices(2, memory_bytes=int(need) - 1)).fits


def test_replay_of_a_simulated_trace_is_the_trace() -> None:
    """Replayed with its own durations, an uncontended simulation repeats itself."""
    plan, program = pipeline("1f1b", 3, 5)
    costs_profile = profile([1.0, 2.0, 3.0])
    cluster = devices(3)
    costs = costs_of(Placed(costs_profile, plan, cluster), Linked(program))
    trace = interpret(costs, plan.devices)
    again = interpret(costs.replayed(trace), plan.devices)
    assert again == trace
    assert msgspec.json.decode(msgspec.json.encode(trace), type=type(trace)) == trace


def test_the_peak_names_its_action() -> None:
    """GPipe holds all micro-batches when the first backward begins."""
    outcome = simulate(profile([1.0] * 2, message_bytes=10), pipeline("gpipe", 2, 4)[0], devices(2))
    assert outcome.peak_actions == ("0B0", "1B0")


def test_rounding_makes_no_bubble_negative() -> None:
    costs, cluster = profile([1.0] * 2), devices(1)
    plan = strategies.get("single").spread(Question(costs, cluster, 1, 1, 1))
    outcome = simulate(costs, plan, cluster)
    assert msgspec.structs.replace(outcome, idle=-2.2e-16).bubble == 0.0
    assert msgspec.structs.replace(outcome, idle=-0.1).bubble == -0.1, "what is wrong is not hidden"
