"""What the numbers rest on: the assumptions of the prediction, the profile, and where it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from planner.basis.units import percent, seconds, size
from planner.values.profile import Profile
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
    rows += _measuring(profile)
    return tag(
        "div", tag("h3", "The profile"), table(["Fact", "Value"], rows, caption="What was measured, and with what.")
    )


def _measuring(profile: Profile) -> list[list[Cell]]:
    """What of it was not measured, where something was not."""
    how = profile.measuring
    if how is None:
        return []
    sizes = [timing.samples for timing in profile.layers[0].times[0].forward]
    alike = sum(bool(layer.like) for layer in profile.layers)
    count = len(profile.layers)
    facts = [
        ("Rounds", str(how.rounds) + (", then interrupted" if how.interrupted else "")),
        ("Micro-batch sizes", _listed(sizes)),
        ("interpolated", _listed(how.between)),
        ("continued beyond", _listed(how.beyond)),
        ("One for all of its kind", f"{alike} of {count} layers, within {percent(how.unlike)}" if alike else ""),
        ("In memory", "one layer at a time" if how.one_by_one else ""),
        *(("Not run", words) for words in how.derived),
    ]
    return [[name, fact] for name, fact in facts if fact]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(f"{samples:,}" for samples in sizes)


def _environment(report: Report) -> Html:
    rows: list[list[Cell]] = [[label, text] for label, text in report.environment.items()]
    rows.append(["Page made", tag("time", report.created, datetime=report.created)])
    return tag("div", tag("h3", "The environment"), table(["Fact", "Value"], rows, caption="Where the page was made."))
