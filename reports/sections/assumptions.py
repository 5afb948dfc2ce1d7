"""What the numbers rest on: the assumptions of the prediction, the profile, and where it was measured."""

from __future__ import annotations

from pathlib import PurePath

from planner.basis.units import percent, seconds, size
from reports.markup import Cell, Html, join, table, tag
from reports.registry import section
from reports.report import Report


@section("assumptions", "Assumptions and environment")
def assumptions(report: Report) -> str:
    """The assumptions as a list, the rest as tables. Of paths only the last part is written."""
    sentences = tag("ol", *(tag("li", sentence) for sentence in report.assumptions), cls="assumptions")
    return join(
        join(tag("h3", "What the prediction takes for granted"), sentences) if report.assumptions else "",
        tag("div", _profile(report), _environment(report), cls="columns"),
    )


def _profile(report: Report) -> Html:
    profile, key = report.profile, report.profile.key
    parameters = sum(layer.parameter_bytes for layer in profile.layers)
    rows: list[list[Cell]] = [
        ["Model", PurePath(key.model).name],
        ["Layers", str(len(profile.layers))],
        ["Parameters", size(parameters)],
        ["Measured", profile.created],
        ["Device", key.device],
        ["Type of numbers", key.numbers],
        ["Torch", key.torch],
        ["Python", key.python],
        ["Noise of the profile", f"± {percent(profile.noise)}"],
        ["Added per action", seconds(profile.action_s)],
        ["Source, SHA-256", f"{key.source_sha256[:12]}…"],
    ]
    if key.cores:
        rows.insert(6, ["Cores", str(key.cores)])
    return tag(
        "div", tag("h3", "The profile"), table(["Fact", "Value"], rows, caption="What was measured, and with what.")
    )


def _environment(report: Report) -> Html:
    rows: list[list[Cell]] = [[label, text] for label, text in report.environment.items()]
    rows.append(["Page made", tag("time", report.created, datetime=report.created)])
    return tag("div", tag("h3", "The environment"), table(["Fact", "Value"], rows, caption="Where the page was made."))
