"""Laws of memory over every schedule, synchronisation and saving, and closed forms that nobody tuned."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.basis.errors import PlanError
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.orders import synchronisation
from planner.orders.schedules import Shape
from planner.programs.lowering import lower, unroll
from planner.programs.waits import Linked
from planner.values.plan import Plan, Stage, windows
from planner.values.profile import Profile
from planner.values.trace import KINDS
from tests.factory import devices, pipeline, profile, shapes

SAVINGS = (
    {},
    {"recompute": True},
    {"recompute_layers": ("layer0", "layer1")},
    {"recompute_blocks": (("layer0", "layer0"),)},
    {"offload": True},
    {"host_optimizer": True},
)


def costs_of(stages: int, sizes: list[int]) -> Profile:
    """One layer per stage with these bytes of everything, messages of 100 bytes, a batch of 10 and 1 per sample."""
    made = profile([1.0] * stages, bytes_=[sizes[s % len(sizes)] for s in range(stages)], message_bytes=100)
    return msgspec.structs.replace(made, batch_bytes=((1, 10, 1), (8, 80, 8)))


def plan_of(name: str, shape: Shape, replicas: int, agreed: str, saved: dict[str, object]) -> Plan | None:
    """The plan, or None where these do not go together."""
    served = synchronisation.get(agreed).server
    if agreed != "all-reduce" and replicas == 1:
        return None
    rows = shape.devices * replicas
    servers = ("h",) if served == "host" else tuple(f"d{i}" for i in range(rows)) if served else ()
    try:
        plan, _ = pipeline(
            name,
            shape.devices,
            shape.microbatches * replicas,
            chunks=shape.chunks,
            replicas=replicas,
            synchronisation=agreed,
            servers=servers,
            **saved,
        )
    except (PlanError, ValueError):
        return None
    return plan


def model_of(costs: Profile, plan: Plan) -> MemoryModel:
    cluster = devices(len(plan.device_names), host_bandwidth=1e9)
    return MemoryModel(Placed(costs, plan, cluster), Linked(unroll(plan)))


def curve(model: MemoryModel) -> list[list[tuple[float, ...]]]:
    """The bytes by kind of every row, from its first point to its last."""
    count = len(model.linked.flat)
    points = model.curve(list(map(float, range(count))), [i + 1.0 for i in range(count)])
    return [[p.bytes for p in points if p.device == row] for row in range(model.linked.devices)]


@settings(max_examples=150, deadline=None)
@given(
    shapes(4, 6),
    st.integers(1, 2),
    st.sampled_from(synchronisation.names()),
    st.sampled_from(SAVINGS),
    st.lists(st.sampled_from([10, 700, 1000]), min_size=1, max_size=4),
)
def test_what_is_allocated_is_freed_and_the_peak_is_the_curve_s(
    drawn: tuple[str, Shape], replicas: int, agreed: str, saved: dict[str, object], sizes: list[int]
) -> None:
    name, shape = drawn
    plan = plan_of(name, shape, replicas, agreed, saved)
    if plan is None:
        return
    model = model_of(costs_of(shape.stages, sizes), plan)
    peaks = model.peaks()
    for row, points in enumerate(curve(model)):
        assert points[-1] == pytest.approx(points[0], abs=1e-6), "the step ends as it began"
        assert min(min(bytes_) for bytes_ in points) >= -1e-6
        assert peaks[row] == pytest.approx(max(map(sum, points)))
        assert peaks[row] >= model.static[row].sum()


@settings(max_examples=80, deadline=None)
@given(
    shapes(4, 6, only=lambda schedule: schedule.trains),
    st.sampled_from(SAVINGS[1:4]),
    st.lists(st.sampled_from([10, 700, 1000]), min_size=1, max_size=4),
)
def test_recomputing_never_keeps_more(drawn: tuple[str, Shape], saved: dict[str, object], sizes: list[int]) -> None:
    """Between actions; inside one, a micro-batch's layers are there once more, one checkpoint after the other."""
    name, shape = drawn
    plan, bare = plan_of(name, shape, 1, "all-reduce", saved), plan_of(name, shape, 1, "all-reduce", {})
    if plan is None or bare is None:
        return
    costs = costs_of(shape.stages, sizes)
    kind = KINDS.index("activations")
    for with_, without in zip(curve(model_of(costs, plan)), curve(model_of(costs, bare)), strict=True):
        assert max(p[kind] for p in with_) <= max(p[kind] for p in without) + 1e-6


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 4), (4, 2), (4, 8), (6, 6)])
def test_1f1b_holds_as_many_as_are_ahead(p: int, m: int) -> None:
    """Stage s of p holds min(M, p - s) micro-batches (PipeDream-Flush, arXiv 2006.09503): 2 x 1000 bytes each here."""
    costs = profile([1.0] * p, message_bytes=1000)
    plan, _ = pipeline("1f1b", p, m)
    kind = KINDS.index("activations")
    held = [max(point[kind] for point in row) for row in curve(model_of(costs, plan))]
    assert held == [2000 * min(m, p - s) for s in range(p)]


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8)])
def test_gpipe_holds_all(p: int, m: int) -> None:
    costs = profile([1.0] * p, message_bytes=1000)
    kind = KINDS.index("activations")
    held = [max(point[kind] for point in row) for row in curve(model_of(costs, pipeline("gpipe", p, m)[0]))]
    assert held == [2000 * m] * p


@pytest.mark.parametrize("p", [2, 3, 5])
def test_pipedream_keeps_a_version_for_every_micro_batch_ahead(p: int) -> None:
    """Weight stashing (SOSP 2019, section 3.3): stage s of p has p - s versions, the current one among them."""
    costs = profile([1.0] * p, message_bytes=10)
    model = model_of(costs, pipeline("pipedream", p, 8)[0])
    versions = model.static[:, KINDS.index("versions")] + model.static[:, KINDS.index("parameters")]
    assert versions.tolist() == [1000.0 * (p - s) for s in range(p)]


def of_replicas(schedule: str, replicas: tuple[int, ...], m: int) -> Plan:
    names = iter(range(sum(replicas)))
    stages = tuple(
        Stage(layers=(f"layer{s}",), devices=tuple(f"d{next(names)}" for _ in range(r))) for s, r in enumerate(replicas)
    )
    return Plan(strategy="x", schedule=schedule, stages=stages, microbatches=m, batch=m)


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-vertical"])
@pytest.mark.parametrize(
    "replicas", [(1, 7), (7, 1), (3, 1), (1, 3), (2, 3), (3, 2, 1), (1, 3, 2), (2, 1, 4), (1, 2), (3, 1, 1, 3)]
)
def test_uneven_stages_keep_a_version_for_every_update_between(schedule: str, replicas: tuple[int, ...]) -> None:
    """What a row's own order asks for: every version from that of its oldest micro-batch to the newest.

    A micro-batch's backward needs the version of its forward: (1, 7) has 8 micro-batches in flight at stage 0, so 7
    versions beside the newest. With vertical sync it needs that of its forward at the input stage, as far as its own
    stage had that when it came; a stage's versions are one for each turn of its replicas.
    """
    plan = of_replicas(schedule, replicas, 24)
    model = model_of(profile([1.0] * len(replicas), message_bytes=10), plan)
    versions = model.static[:, KINDS.index("versions")] / 1000.0
    rows, stage_of = lower(plan).rows, [s for s, r in enumerate(replicas) for _ in range(r)]
    read: dict[tuple[int, int], int] = {}
    for row in rows:
        for i, a in enumerate(row):
            if a.op == "F":
                read[a.stage, a.microbatch or 0] = sum(before.op == "OPTIMIZER" for before in row[:i])
    most = [0] * len(replicas)
    for row, stage in zip(rows, stage_of, strict=True):
        home = stage if schedule == "pipedream" else 0
        mine = [a.microbatch or 0 for a in row if a.op == "B"]
        needed = {m: read[home, m] * replicas[home] // replicas[stage] for m in mine}
        updates = done = 0
        for a in row:
            updates, done = updates + (a.op == "OPTIMIZER"), done + (a.op == "B")
            if a.op == "F":
                needed[a.microbatch or 0] = min(needed[a.microbatch or 0], updates)
            if a.op == "OPTIMIZER" and done < len(mine):
                most[stage] = max(most[stage], updates - needed[mine[done]])
    assert [plan.versions(stage) - 1 for stage in range(len(replicas))] == most
    assert [versions[own[0]] for own in plan.holders] == most
    assert of_replicas("pipedream", (1, 7), 24).versions(0) == 8


@pytest.mark.parametrize("replicas", [(3, 1), (1, 3), (8, 1), (2, 3), (3, 2, 1), (6, 2, 2, 6)])
@pytest.mark.parametrize("m", [1, 2, 4, 6, 7, 16])
def test_uneven_stages_free_the_gradients_of_an_incomplete_turn(replicas: tuple[int, ...], m: int) -> None:
    """Each backward's gradients are used by an update, those that no whole turn of replicas reduces, too.

    What is reduced beside the next backward is there together with what that one makes.
    """
    plan = of_replicas("pipedream", replicas, m)
    model = model_of(profile([1.0] * len(replicas), message_bytes=10), plan)
    kind = KINDS.index("gradients")
    for row, of in zip(lower(plan).rows, curve(model), strict=True):
        ops = [a.op for a in row]
        both = min(ops.count("B"), 2) if "REDUCE_ASYNC" in ops else 1
        assert of[-1] == of[0]
        assert max(point[kind] for point in of) == 1000 * both
        assert ops.count("B") == ops.count("OPTIMIZER")
    for own in plan.holders:
        reduced = {[a.op for a in lower(plan).rows[row]].count("REDUCE_ASYNC") for row in own}
        assert reduced == {m * windows(plan) // len(own) if len(own) > 1 else 0}


@pytest.mark.parametrize(("schedule", "own"), [("zb-v", [(0, 3), (1, 2)]), ("interleaved", [(0, 2), (1, 3)])])
def test_a_device_has_the_static_bytes_of_its_stages(schedule: str, own: list[tuple[int, ...]]) -> None:
    """A V turns at the last device: the first one has the first and the last stage."""
    sizes = [10, 200, 3000, 40000]
    costs = profile([1.0] * 4, bytes_=sizes, message_bytes=10)
    model = model_of(costs, pipeline(schedule, 2, 4, chunks=2)[0])
    assert model.static[:, KINDS.index("parameters")].tolist() == [sum(sizes[s] for s in held) for held in own]


@pytest.mark.parametrize(
    ("agreed", "parts"),
    [("all-reduce", (1, 1, 1)), ("zero-1", (1, 1, 4)), ("zero-2", (1, 4, 4)), ("zero-3", (4, 4, 4))],
)
def test_zero_s_static_bytes(agreed: str, parts: tuple[int, int, int]) -> None:
    """Parameters, gradients and state of one layer (1000, 1000 and 2000 bytes) over 4 replicas (arXiv 1910.02054)."""
    model = model_of(profile([1.0]), pipeline("1f1b", 1, 4, replicas=4, synchronisation=agreed)[0])
    found = [model.static[:, KINDS.index(kind)].tolist() for kind in ("parameters", "gradients", "optimizer")]
    assert found == [[whole / part] * 4 for whole, part in zip((1000, 1000, 2000), parts, strict=True)]
