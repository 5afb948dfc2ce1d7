"""The page: one HTML file that opens from disk, with the network off, now and in ten years.

    write(Report(predicted=outcome, ...), Path("report.html"))

Scripts, styles and data are inside the file, and its content policy forbids every request. The sections are in
`reports.sections`; this file only puts them together.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template

from planner.basis import files
from reports import sections
from reports.markup import Html, join, tag
from reports.plots import MARK
from reports.registry import all_sections
from reports.report import Report

__all__ = ["Report", "render", "write"]


def render(report: Report) -> str:
    """Return the whole page as HTML. Two renderings of one report differ in `created` only."""
    shown = [(entry, Html(html)) for entry in all_sections() if (html := entry.body(report))]
    body = join(
        *(
            tag(
                "section",
                tag("h2", entry.title, id=f"{entry.id}-title"),
                html,
                id=entry.id,
                aria_labelledby=f"{entry.id}-title",
            )
            for entry, html in shown
        )
    )
    return Template(_asset("page.html")).substitute(
        title=tag("title", f"{report.predicted.plan} · foreplan"),
        style=_asset("page.css"),
        links=join(*(tag("a", entry.title, href=f"#{entry.id}") for entry, _ in shown)),
        header=sections.verdict.header(report),
        body=body,
        scripts=join(*(tag("script", Html(script)) for script in _scripts(plots=MARK in body))),
    )


def write(report: Report, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises `PlanError` (exit 4) when it cannot be written."""
    files.write(path, render(report).encode())


def _scripts(*, plots: bool) -> list[str]:
    """The timeline first: it is ready while plotly.js, some 5 MB, is still being read."""
    scripts = [_asset("page.js"), _asset("timeline.js")]
    if plots:
        from plotly.offline import get_plotlyjs

        scripts += [get_plotlyjs(), _asset("plot.js")]
    return scripts


def _asset(name: str) -> str:
    return resources.files("reports").joinpath("assets", name).read_text(encoding="utf-8")
