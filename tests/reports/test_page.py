"""The page as text: numbers, escaping, determinism and the odd inputs. Nothing here needs a browser."""

from __future__ import annotations

import getpass
import html
import json
import math
import re
import socket
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from planner.basis.errors import ARTEFACT, PlanError
from planner.simulate.limits import bounded_by
from planner.simulate.predict import simulate
from planner.values.evaluation import Evaluation
from planner.values.outcome import Comparison, Error, Outcome, compare
from planner.values.plan import Stage
from planner.values.profile import Measuring
from planner.values.trace import MemoryPoint
from reports import registry
from reports.figures import figures
from reports.markup import Html, Number, json_text, table, tag
from reports.page import Report, render, write
from reports.sections.accuracy import largest_cause
from reports.sections.memory import thinned
from reports.timeline import encode, still
from tests.reports import samples
from tests.reports.samples import HOSTILE, hostile


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, texts, and the contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] and self.elements[-1][0] == "script" and self.scripts and not self.scripts[-1][1]:
            self.scripts[-1] = (self.scripts[-1][0], data)
        else:
            self.texts.append(data)

    def script(self, id: str) -> dict[str, object]:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == id))

    def cards(self) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if "data-card" in attributes]


@pytest.fixture(scope="module")
def whole() -> Report:
    return samples.report()


@pytest.fixture(scope="module")
def page(whole: Report) -> Page:
    return Page(render(whole))


def text_of(report: Report) -> str:
    """The page without plotly.js, which is not ours to judge."""
    from plotly.offline import get_plotlyjs

    return render(report).replace(get_plotlyjs(), "")


# ---- numbers


def test_every_card_shows_the_outcomes_figure(whole: Report, page: Page) -> None:
    assert whole.measured is not None
    assert whole.comparison is not None
    expected: dict[tuple[str, str], float] = {}
    for source, outcome in (("predicted", whole.predicted), ("measured", whole.measured)):
        expected["throughput", source] = outcome.throughput
        expected["step", source] = outcome.step_s
        expected["bubble", source] = outcome.bubble
        expected["synchronising", source] = outcome.synchronising
        expected["peak", source] = outcome.peak_bytes
    expected["error", "measured"] = whole.comparison.total.relative
    shown = {(c["data-card"], c["data-source"]): float(c["data-value"] or "nan") for c in page.cards()}
    assert shown == expected


def test_the_cards_are_in_the_json(page: Page) -> None:
    cards = page.script("report-data")["cards"]
    assert len(page.cards()) == 11
    for card in page.cards():
        assert cards[card["data-source"]][card["data-key"]] == float(card["data-value"] or "nan")  # type: ignore[index]


def test_without_a_measurement_the_page_says_so() -> None:
    page = Page(render(samples.report(run=False)))
    assert {c["data-source"] for c in page.cards()} == {"predicted"}
    assert page.script("report-data")["cards"]["measured"] is None  # type: ignore[index]
    assert "not measured" in page.texts
    assert "accuracy" not in {a.get("id") for tag, a in page.elements if tag == "section"}


def test_a_measurement_without_comparison_still_has_its_error(whole: Report) -> None:
    page = Page(render(msgspec.structs.replace(whole, comparison=None)))
    error = next(c for c in page.cards() if c["data-card"] == "error")
    assert whole.measured is not None
    measured = whole.measured.step_s
    assert float(error["data-value"] or "nan") == pytest.approx((whole.predicted.step_s - measured) / measured)


def test_numbers_that_are_not_known_are_not_invented(whole: Report) -> None:
    trace = msgspec.structs.replace(whole.predicted.trace, memory=())
    outcome = msgspec.structs.replace(
        whole.predicted, steps=(trace,), step_times_s=(math.nan,), interval_s=(math.nan, math.nan)
    )
    page = Page(render(msgspec.structs.replace(whole, predicted=outcome, measured=outcome, comparison=None)))
    shown = {(c["data-card"], c["data-source"]): c.get("data-value") for c in page.cards()}
    assert shown["peak", "predicted"] is shown["step", "measured"] is shown["error", "measured"] is None
    assert "NaN" not in json.dumps(page.script("report-data"))


def test_a_plan_that_does_not_fit_is_called_so() -> None:
    text = text_of(samples.report(memory_bytes=20_000, run=False))
    assert "✗ does not fit" in text
    assert "it does not fit on 4 devices, by up to" in text
    assert "No plan fits into memory" in text


# ---- safety


def test_names_stay_text() -> None:
    text = text_of(hostile())
    page = Page(text)
    assert "<img" not in text
    assert "<b>" not in text
    assert {tag for tag, _ in page.elements} & {"img", "b"} == set()
    assert any(HOSTILE in t for t in page.texts)
    assert page.script("timeline-data")["devices"][0]["name"] == f"<b>d0</b>{HOSTILE}"  # type: ignore[index]


def test_labels_for_plotly_hold_no_markup() -> None:
    for attributes, text in Page(text_of(hostile())).scripts:
        if attributes.get("class") == "plot-data":
            assert "<" not in json.dumps(json.loads(text))


def test_no_path_host_or_user_is_added(whole: Report) -> None:
    text = text_of(
        msgspec.structs.replace(whole, profile=msgspec.structs.replace(whole.profile, model_path="/etc/m.py"))
    )
    page = Page(text)
    words = [*page.texts, *(value for _, attributes in page.elements for value in attributes.values() if value)]
    assert not re.search(r"(/home/|/root/|/tmp/|/etc/|[A-Z]:\\\\)", text)
    assert str(Path.cwd()) not in text
    for name in {socket.gethostname(), getpass.getuser()} - {"root"}:  # :root is the style sheet's
        assert not any(re.search(rf"\b{re.escape(name)}\b", word) for word in words)


def test_the_page_asks_for_nothing(page: Page) -> None:
    for name, attributes in page.elements:
        for key in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), (name, key, value)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


# ---- the page as a whole


def test_two_renderings_differ_in_the_time_only(whole: Report) -> None:
    assert render(whole) == render(samples.report())
    later = msgspec.structs.replace(whole, created="2027-07-07T07:07:07+00:00")
    assert render(whole).replace(whole.created, "") == render(later).replace(later.created, "")


def test_sections_are_in_page_order(page: Page) -> None:
    known = [entry.id for entry in registry.all_sections()]
    assert known == ["verdict", "timeline", "memory", "accuracy", "plans", "stages", "assumptions"]
    assert [a["id"] for tag, a in page.elements if tag == "section"] == known


def test_every_figure_says_what_it_shows_and_ids_are_unique(page: Page) -> None:
    figures_ = [a for tag, a in page.elements if tag == "figure"]
    assert len(figures_) >= 6
    assert all(a.get("aria-label") for a in figures_)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_plotly_is_there_once_and_only_if_needed(whole: Report) -> None:
    assert render(whole).count("plotly.js v") == 1
    bare = msgspec.structs.replace(whole.predicted.trace, memory=())
    predicted = msgspec.structs.replace(whole.predicted, steps=(bare,))
    text = render(msgspec.structs.replace(whole, predicted=predicted, measured=None, comparison=None, ranking=None))
    assert "plotly.js v" not in text
    assert len(text) < 200_000


def test_it_is_written_whole(whole: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write(whole, path)
    assert path.read_text(encoding="utf-8") == render(whole)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to(whole: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError) as caught:
        write(whole, tmp_path / "file" / "report.html")
    assert caught.value.code == ARTEFACT
    assert caught.value.where == str(tmp_path / "file" / "report.html")
    assert caught.value.why
    assert caught.value.fix


# ---- odd inputs


@pytest.mark.parametrize("run", [True, False])
@pytest.mark.parametrize("stages", [1, 2, 12])
def test_any_number_of_devices(stages: int, run: bool) -> None:
    text = text_of(samples.report(stages, run=run, ranked=False, microbatches=4))
    assert text.count('class="plot"') == min(stages, 8) + run
    assert ("The 8 fullest of 12 devices are drawn" in text) == (stages == 12)


def test_replicas_are_rows_of_their_own() -> None:
    profile, plan, cluster = samples.pieces(2)
    one = Stage(layers=tuple(n for s in plan.stages for n in s.layers), devices=("d0", "d1"))
    plan = msgspec.structs.replace(plan, strategy="data-parallel", schedule="1f1b", stages=(one,))
    predicted = simulate(profile, plan, cluster)
    report = msgspec.structs.replace(samples.report(2), predicted=predicted, measured=None, comparison=None)
    text = text_of(report)
    assert "K = 2 devices: 1 stage × 2 replicas" in text
    assert "One stage holds all 4 layers" in text


def test_ten_thousand_events_stay_small() -> None:
    report = samples.crowded(10_000)
    trace = report.predicted.trace
    text = text_of(report)
    assert len(trace.events) >= 10_000
    assert len(text) < 3_000_000
    assert str(still(trace)).count("<rect") <= 2 * 800
    assert f"the first 200 of {len(trace.events)}" in text


def test_a_loss_that_stops_being_finite_is_named(whole: Report) -> None:
    assert whole.measured is not None
    lost = msgspec.structs.replace(whole.measured, losses=(2.0, 1.5, math.nan, math.nan, math.nan))
    assert "The loss stops being finite at step 3 of 5" in text_of(msgspec.structs.replace(whole, measured=lost))


def test_evaluations_are_drawn_beside_the_loss_and_listed(whole: Report) -> None:
    assert whole.measured is not None
    found = tuple(
        Evaluation(step=step, loss=loss, metrics={"accuracy": 0.5}, samples=100, seconds=0.25)
        for step, loss in ((10, 1.0), (20, 0.5), (30, 0.75))
    )
    judged = msgspec.structs.replace(whole.measured, losses=(2.0,) * 30, evaluations=found)
    predicted = msgspec.structs.replace(whole.predicted, evaluation_rate=500.0)
    text = text_of(msgspec.structs.replace(whole, measured=judged, predicted=predicted))
    assert "The validation loss is 0.75 at step 30, and was least (0.5) at step 20" in text
    assert "accuracy" in text
    assert "200 ms" in text, "what 100 samples take as predicted"
    assert '"name":"validation"' in text.replace(": ", ":")


def test_a_run_that_was_stopped_says_so(whole: Report) -> None:
    """It has recorded no memory: that would have been behind its last step."""
    assert whole.measured is not None
    bare = tuple(msgspec.structs.replace(step, memory=()) for step in whole.measured.steps)
    done = len(whole.measured.losses)
    stopped = msgspec.structs.replace(whole.measured, asked_steps=10 * done, steps=bare, memory_step=None)
    comparison = compare(whole.predicted, stopped)
    text = text_of(msgspec.structs.replace(whole, measured=stopped, comparison=comparison))
    assert f"The run was stopped after {done} of {10 * done} steps: what is measured is of these." in text
    assert "The run recorded no memory, so the peaks cannot be compared." in text
    finished = msgspec.structs.replace(whole.measured, asked_steps=done)
    assert "was stopped" not in text_of(msgspec.structs.replace(whole, measured=finished))


def test_a_long_run_is_drawn_by_means(whole: Report) -> None:
    assert whole.measured is not None
    long = msgspec.structs.replace(whole.measured, losses=tuple(1 / (1 + i) for i in range(10_001)))
    text = text_of(msgspec.structs.replace(whole, measured=long))
    assert "The loss falls from 1 to 9.999e-05 over 10001 steps" in text
    assert "Every point is the mean of 21 steps" in text


# ---- parts


def test_the_timelines_columns_come_back(whole: Report) -> None:
    import base64
    from array import array

    trace = whole.predicted.trace
    data = encode(trace)
    starts = array("d", base64.b64decode(str(data["start"])))
    offsets = data["offsets"]
    assert isinstance(offsets, list)
    assert len(starts) == len(trace.events) == offsets[-1]
    assert len(offsets) == 2 * len(trace.devices) + 1
    assert sorted(starts) == sorted(e.start for e in trace.events)
    for low, high in pairwise(offsets):
        assert list(starts[low:high]) == sorted(starts[low:high])


def test_a_thinned_curve_keeps_its_peak() -> None:
    points = [MemoryPoint(0, float(i), (float((i * 7919) % 1000),)) for i in range(10_000)]
    points[5003] = MemoryPoint(0, 5003.0, (99_999.0,))
    thin = thinned(points, 500)
    assert len(thin) <= 504
    assert max(p.total for p in thin) == 99_999.0
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert [p.time for p in thin] == sorted(p.time for p in thin)


def test_the_verdict_says_what_limits_the_plan(whole: Report) -> None:
    bound = bounded_by(whole.predicted, whole.ranking.cluster if whole.ranking else whole.profile.machine)
    assert f"Limited by {html.escape(bound)}." in text_of(whole).replace("\xa0", " ")


def comparison(total: float, replay: float | None, noise: float = 0.01) -> Comparison:
    def step(relative: float) -> Error:
        return Error(name="step", predicted=1 + relative, measured=1.0)

    costs = (Error(name="0F", predicted=0.02, measured=0.01), Error(name="1OPTIMIZER", predicted=0.2, measured=0.18))
    replayed = None if replay is None else step(replay)
    return Comparison(
        total=step(total), replay=replayed, costs=costs, memory=(), memory_kinds=(), inside=1.0, noise=noise
    )


def test_the_largest_cause_is_named() -> None:
    _, plan, _ = samples.pieces()
    assert "within the noise" in largest_cause(comparison(0.005, 0.0), plan)
    assert "from schedule and communication" in largest_cause(comparison(0.1, 0.09), plan)
    said = largest_cause(comparison(0.1, 0.01), plan)
    assert "from the costs" in said
    assert "forward of stage 0, +100.0 %" in said
    assert "was not replayed" in largest_cause(comparison(0.1, None), plan)


def test_markup_escapes_unless_told_otherwise() -> None:
    assert tag("p", "<b>", Html("<i></i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i></i></p>'
    assert "<" not in json_text({"a": HOSTILE, "b": math.inf})
    assert json.loads(json_text({"a": HOSTILE, "b": math.inf})) == {"a": HOSTILE, "b": None}


def test_a_long_table_says_what_it_leaves_out() -> None:
    text = table(["N"], [[Number(str(i), i)] for i in range(5)], caption="Numbers.", limit=2)
    assert text.count("<tr>") == 3
    assert "The first 2 of 5 rows are shown" in text


def test_figures_are_the_outcomes(whole: Report) -> None:
    outcome: Outcome = whole.predicted
    shares = outcome.bubble, outcome.synchronising
    assert figures(outcome) == (outcome.throughput, outcome.step_s, *shares, outcome.peak_bytes)


def test_what_was_not_measured_is_on_the_page(whole: Report) -> None:
    assert "continued beyond" not in render(whole)
    how = Measuring(rounds=3, between=(2, 8), beyond=(32, 1024), unlike=0.04, derived=("halves were not run",))
    page = render(msgspec.structs.replace(whole, profile=msgspec.structs.replace(whole.profile, measuring=how)))
    for fact in ("2, 8", "32, 1,024", "halves were not run"):
        assert fact in page
