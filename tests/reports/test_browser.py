"""The page in a browser that has no network: what it shows, how it moves, and that it asks for nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.basis.units import seconds
from reports.page import Report, write
from tests.reports import samples

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        why = f"no browser: none of {', '.join(NAMES)} is installed"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


Open = Callable[..., Any]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a report with the network off; at the end, nothing may have been asked for and nothing gone wrong."""
    wrong: list[str] = []
    contexts = []

    def open_(report: Report, *, width: int = 1400, **more: object) -> Any:
        path = tmp_path / "report.html"
        write(report, path)
        context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, **more)
        contexts.append(context)
        page = context.new_page()
        url = path.as_uri()
        page.on("request", lambda r: r.url in (url, "data:,") or wrong.append(f"request {r.url[:200]}"))
        page.on("console", lambda m: m.type != "error" or wrong.append(f"console {m.text}"))
        page.on("pageerror", lambda e: wrong.append(f"error {e}"))
        page.on("dialog", lambda d: (wrong.append(f"dialog {d.message}"), d.dismiss()))
        page.goto(url)
        if more.get("java_script_enabled", True):
            playwright.expect(page.locator(".plot:not([data-drawn])")).to_have_count(0)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def whole() -> Report:
    return samples.report()


def timeline(page: Any) -> dict[str, float]:
    """The canvas's account of itself, after it has drawn."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    data = page.locator("#timeline-canvas").evaluate("canvas => ({...canvas.dataset})")
    return {key: float(value) for key, value in data.items()}


def test_cards_read_back_equal_the_json_and_the_outcome(show: Open, whole: Report) -> None:
    page = show(whole)
    numbers = json.loads(page.locator("#report-data").text_content())["cards"]
    cards = page.locator("[data-card]").evaluate_all("cards => cards.map(card => ({...card.dataset}))")
    assert len(cards) == 11
    for card in cards:
        assert float(card["value"]) == numbers[card["source"]][card["key"]]
    assert whole.measured is not None
    for source, outcome in (("predicted", whole.predicted), ("measured", whole.measured)):
        assert numbers[source]["step_s"] == outcome.step_s
        assert numbers[source]["throughput_samples_per_s"] == outcome.throughput
        assert numbers[source]["peak_bytes"] == outcome.peak_bytes


def test_the_keyboard_zooms_pans_and_resets(show: Open, whole: Report) -> None:
    page = show(whole)
    assert whole.measured is not None
    before = timeline(page)
    assert before["events"] == len(whole.predicted.trace.events) + len(whole.measured.trace.events)
    page.locator("#timeline-canvas").focus()
    page.keyboard.press("+")
    zoomed = timeline(page)
    assert zoomed["visibleTo"] - zoomed["visibleFrom"] < before["visibleTo"] - before["visibleFrom"]
    page.keyboard.press("ArrowRight")
    panned = timeline(page)
    assert panned["visibleFrom"] > zoomed["visibleFrom"]
    page.keyboard.press("Home")
    after = timeline(page)
    assert (after["visibleFrom"], after["visibleTo"]) == (before["visibleFrom"], before["visibleTo"])


def test_wheel_drag_and_buttons_move_too(show: Open, whole: Report) -> None:
    page = show(whole)
    before = timeline(page)
    canvas = page.locator("#timeline-canvas")
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # a wheel that was just scrolling the page goes on scrolling
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(100)
    wheeled = timeline(page)
    assert wheeled["visibleTo"] - wheeled["visibleFrom"] < before["visibleTo"]
    page.mouse.down()
    page.mouse.move(x + 120, y, steps=4)
    page.mouse.up()
    assert timeline(page)["visibleFrom"] < wheeled["visibleFrom"]
    page.get_by_role("button", name="Whole step").click()
    assert timeline(page)["visibleTo"] == before["visibleTo"]
    page.get_by_role("button", name="Zoom in").click()
    assert timeline(page)["visibleTo"] < before["visibleTo"]


def test_rows_can_be_hidden_and_actions_described(show: Open, whole: Report) -> None:
    page = show(whole)
    rows = timeline(page)["rows"]
    page.get_by_role("button", name="measured", exact=True).click()
    assert timeline(page)["rows"] == rows / 2
    page.get_by_role("button", name="links").click()
    assert timeline(page)["rows"] == rows / 4
    page.locator("#timeline-canvas").focus()
    page.keyboard.press("ArrowDown")
    for _ in range(3):
        page.keyboard.press(".")
    said = page.locator("#timeline-detail").inner_text()
    assert "on d0, predicted" in said
    assert "duration" in said
    canvas = page.locator("#timeline-canvas")
    canvas.hover(position={"x": 138, "y": 40})
    tip = page.locator(".tip")
    assert tip.is_visible()
    assert "0F0 on d0, predicted" in tip.inner_text()
    first = next(e for e in whole.predicted.trace.events if e.action == "0F0")
    assert f"duration {seconds(first.work)}" in tip.inner_text()


def test_the_theme_can_be_changed(show: Open, whole: Report) -> None:
    page = show(whole, color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.locator("#theme").click()
    dark = page.evaluate(paper)
    assert light != dark
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.locator("#theme").click()
    assert page.evaluate(paper) == light


def test_plans_are_sorted_by_a_click(show: Open, whole: Report) -> None:
    page = show(whole)
    column = "[...document.querySelectorAll('#plans .sortable tbody tr')].map(row => Number(row.cells[3].dataset.sort))"
    heading = page.locator("#plans").get_by_role("button", name="Step time")
    heading.click()
    assert page.evaluate(column) == sorted(page.evaluate(column))
    heading.click()
    assert page.evaluate(column) == sorted(page.evaluate(column), reverse=True)


def test_hostile_names_stay_text(show: Open) -> None:
    page = show(samples.hostile())
    assert page.locator("img").count() == 0
    assert page.locator("#stages").get_by_text(samples.HOSTILE, exact=True).count() >= 1
    page.locator("#timeline-canvas").hover(position={"x": 160, "y": 40})
    assert samples.HOSTILE in page.locator(".tip").inner_text()
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    plot.hover()
    page.wait_for_timeout(200)
    assert page.locator("img").count() == 0


def test_ten_thousand_events_are_drawn(show: Open) -> None:
    report = samples.crowded(10_000)
    page = show(report)
    whole = timeline(page)
    assert whole["events"] == len(report.predicted.trace.events) >= 10_000
    page.locator("#timeline-canvas").focus()
    for _ in range(6):
        page.keyboard.press("+")
    zoomed = timeline(page)
    assert zoomed["drawMs"] >= 0
    assert zoomed["rectangles"] < whole["rectangles"]


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("light", 1400, "light"), ("dark", 1400, "dark"), ("narrow", 360, "light")]
)
def test_it_can_be_seen(show: Open, whole: Report, tmp_path: Path, name: str, width: int, scheme: str) -> None:
    page = show(whole, width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_without_scripts_the_words_and_tables_stay(show: Open, whole: Report) -> None:
    page = show(whole, java_script_enabled=False)
    assert page.locator(".still rect").count() > 10
    assert page.locator("[data-card]").first.is_visible()
    assert page.locator("#plans table").first.is_visible()
    assert page.locator(".toolbar").is_hidden()
    assert page.locator("#theme").is_hidden()
