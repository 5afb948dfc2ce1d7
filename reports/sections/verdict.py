"""The first screen: the verdict in a sentence or two, and the six numbers people compare, as cards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import NamedTuple

from planner.basis.units import percent, rate, seconds, size
from planner.simulate.limits import bounded_by
from planner.values.outcome import Error, Outcome
from planner.values.plan import Plan
from reports.figures import (
    Figures,
    capacity,
    figures,
    interval_text,
    known,
    longest_wait,
    of_capacity,
    relative,
    share,
    signed,
    worst,
)
from reports.markup import Html, data_script, join, tag, unbroken
from reports.registry import section
from reports.report import Report


class _Card(NamedTuple):
    """A card: its name, heading, key in the page's JSON, unit, and a remark on an outcome."""

    name: str
    title: str
    key: str
    unit: Callable[[float], str]
    remark: Callable[[Outcome], str]


def _throughput_remark(outcome: Outcome) -> str:
    return interval_text(outcome)


def _step_remark(outcome: Outcome) -> str:
    low, high = outcome.interval_s
    return f"{seconds(low)} to {seconds(high)}" if 0 < low < high else ""


def _bubble_remark(outcome: Outcome) -> str:
    wait = longest_wait(outcome.trace)
    return f"longest wait {seconds(wait.ready - wait.start)}" if wait else "no action waits"


def _synchronising_remark(outcome: Outcome) -> str:
    return "reductions, pulls and pushes" if outcome.synchronising else "nothing to agree on"


def _peak_remark(outcome: Outcome) -> str:
    most = worst(outcome)
    if most is None:
        return ""
    return f"on {most.device}" + (
        f", {share(most.point.total / most.capacity)} of {size(most.capacity)}" if most.capacity else ""
    )


_CARDS = (
    _Card("throughput", "Throughput", "throughput_samples_per_s", rate, _throughput_remark),
    _Card("step", "Step time", "step_s", seconds, _step_remark),
    _Card("bubble", "Bubble", "bubble_fraction", percent, _bubble_remark),
    _Card("synchronising", "Synchronising", "synchronising_fraction", percent, _synchronising_remark),
    _Card("peak", "Peak memory, worst device", "peak_bytes", size, _peak_remark),
)


def header(report: Report) -> Html:
    """Write the page's title and what the plan is, in one line."""
    plan = report.predicted.plan
    return join(
        tag("h1", plan),
        tag("ul", *(tag("li", unbroken(fact)) for fact in (*about(report), *_facts(plan))), cls="facts"),
    )


def about(report: Report) -> list[str]:
    """Say for which model and which hardware the page is: its devices, and what joins those that the plan takes."""
    profile, cluster = report.profile, report.cluster
    parameters = sum(layer.parameter_bytes for layer in profile.layers)
    taken = [d for d in cluster.devices if d.name in report.predicted.plan.device_names]
    kind = "processes" if cluster.elastic else " and ".join(sorted({d.kind or "devices" for d in taken})) or "devices"
    hosts = _count(len({d.host for d in taken}) or 1, "host")
    memory = sorted({d.memory_bytes for d in taken}) or [cluster.hosts[0].memory_bytes]
    room = size(memory[0]) if len(memory) == 1 else f"{size(memory[0])} to {size(memory[-1])}"
    model = f"model {PurePath(profile.key.model).name}: {_count(len(profile.layers), 'layer')}, {size(parameters)}"
    each = "shared" if cluster.elastic else "each"
    return [model, f"on {cluster.name}: {kind} of {room} {each} on {hosts}", *_links(report, {d.host for d in taken})]


def _links(report: Report, hosts: set[str]) -> list[str]:
    """The bandwidths of the links that the plan's devices and their hosts have, the widest first."""
    ends = {*report.predicted.plan.device_names, *hosts}
    links = [link for link in report.cluster.links if report.cluster.elastic or ends & set(link.between)]
    widths = sorted({link.bandwidth_bytes_per_s for link in links}, reverse=True)
    if len(report.predicted.plan.device_names) == 1 or not widths:
        return []
    shown = ", ".join(f"{width / 1e9:.3g} GB/s" for width in widths[:4])
    return [f"links of {shown}{' and less' if len(widths) > 4 else ''}"]


def _facts(plan: Plan) -> list[str]:
    devices, samples = _count(len(plan.devices), "device"), _count(plan.samples, "sample")
    facts = [
        f"strategy {plan.strategy}, schedule {plan.schedule}",
        f"K = {devices}: {_count(len(plan.stages), 'stage')} × {_count(plan.replicas, 'replica')}",
        f"M = {_count(plan.microbatches, 'micro-batch', 'es')} of {samples}, batch {plan.batch}",
        f"{_count(plan.threads, 'thread')} per device",
    ]
    return [*facts, "with recompute"] if plan.recomputes else facts


def _count(count: int, word: str, plural: str = "s") -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}{plural}"


@section("verdict", "Verdict")
def verdict(report: Report) -> str:
    """The verdict, the cards, their numbers as JSON, and the command."""
    fits = report.predicted.fits
    chip = tag("span", "✓ fits" if fits else "✗ does not fit", cls=f"chip {'good' if fits else 'bad'}")
    return join(
        tag("p", chip, " ", unbroken(" ".join(_sentences(report))), cls="verdict"),
        tag("div", *(_card(card, report) for card in _CARDS), _error_card(report), cls="cards"),
        data_script(_numbers(report), id="report-data"),
        _command(report.command),
    )


def _sentences(report: Report) -> list[str]:
    outcome = report.predicted
    numbers = figures(outcome)
    interval = interval_text(outcome)
    speed = f"{outcome.plan} should train {known(numbers.throughput_samples_per_s, rate)}"
    speed += f" ({interval})" if interval else ""
    speed += f" at {known(numbers.step_s, seconds)} per step."
    sentences = [speed, _memory_sentence(outcome), f"Limited by {bounded_by(outcome, report.cluster)}."]
    if report.measured is not None:
        error = relative(_error(report, report.measured))
        found = figures(report.measured)
        if report.measured.stopped:
            done = f"{len(report.measured.losses)} of {report.measured.asked_steps} steps"
            sentences.append(f"The run was stopped after {done}: what is measured is of these.")
        sentences.append(
            f"{report.measured.source.capitalize()}: {known(found.throughput_samples_per_s, rate)} at "
            f"{known(found.step_s, seconds)} per step"
            + (
                f"; the predicted step is {percent(abs(error))} too {'long' if error > 0 else 'short'}."
                if error is not None
                else "."
            )
        )
    return sentences


def _memory_sentence(outcome: Outcome) -> str:
    most = worst(outcome)
    if most is None:
        return "Its memory was not predicted."
    text = f"{most.device} needs most memory, {of_capacity(most.point.total, most.capacity)}"
    if outcome.fits:
        return f"{text}: every device fits."
    full = [host for host in outcome.hosts if host.lack > 1]
    if full:
        kept = of_capacity(full[0].need_bytes, full[0].has_bytes)
        return f"{text}; the memory of the host {full[0].name} {kept}: it does not fit."
    names = outcome.memory_trace.devices
    lacking = [p for p in outcome.peak if p.total > (capacity(outcome, p.device) or float("inf"))]
    lack = max((p.total - (capacity(outcome, p.device) or 0.0) for p in lacking), default=0.0)
    where = names[lacking[0].device] if len(lacking) == 1 else f"{len(lacking)} devices"
    return f"{text}: it does not fit on {where}, by up to {size(lack)}."


def _card(card: _Card, report: Report) -> Html:
    provenance = "estimated" if report.predicted.estimated else "predicted"
    rows = [_row(card, "predicted", provenance, report.predicted)]
    if report.measured is not None:
        rows.append(_row(card, "measured", report.measured.source, report.measured))
    else:
        rows.append(tag("p", "not measured", cls="absent"))
    return tag("article", tag("h3", card.title), *rows, cls="card")


def _row(card: _Card, source: str, provenance: str, outcome: Outcome) -> Html:
    value: float | None = getattr(figures(outcome), card.key)
    number = tag(
        "span",
        *_split(known(value, card.unit)),
        cls="value",
        data_card=card.name,
        data_source=source,
        data_key=card.key,
        data_value=None if value is None else repr(float(value)),
    )
    remark = card.remark(outcome)
    return tag(
        "p",
        tag("span", provenance, cls=f"chip {source}"),
        number,
        tag("span", unbroken(remark), cls="remark") if remark else "",
        cls="reading",
    )


def _split(text: str) -> tuple[str, Html | str]:
    """Set a number's unit apart, to be written smaller."""
    number, space, unit = text.partition(" ")
    return (number + space, tag("span", unit, cls="unit")) if number[-1:].isdigit() else (text, "")


def _error(report: Report, measured: Outcome) -> Error:
    if report.comparison is not None:
        return report.comparison.total
    return Error(name="step", predicted=report.predicted.step_s, measured=measured.step_s)


def _error_card(report: Report) -> Html:
    heading = tag("h3", "Error of the predicted step")
    if report.measured is None:
        return tag("article", heading, tag("p", "not measured", cls="absent"), cls="card")
    error = relative(_error(report, report.measured))
    number = tag(
        "span",
        *_split(known(error, signed)),
        cls="value",
        data_card="error",
        data_source="measured",
        data_key="step_error_fraction",
        data_value=None if error is None else repr(float(error)),
    )
    remark = f"noise floor {percent(report.comparison.noise)}" if report.comparison else "predicted less measured"
    row = tag(
        "p",
        tag("span", report.measured.source, cls="chip measured"),
        number,
        tag("span", unbroken(remark), cls="remark"),
        cls="reading",
    )
    return tag("article", heading, row, cls="card")


def _numbers(report: Report) -> dict[str, object]:
    """The cards' numbers, unformatted, with their units in the keys."""
    cards: dict[str, object] = {"predicted": _numbers_of(report.predicted), "measured": None}
    if report.measured is not None:
        error = relative(_error(report, report.measured))
        cards["measured"] = _numbers_of(report.measured) | {"step_error_fraction": error}
    return {
        "schema": "foreplan.report/1",
        "plan": str(report.predicted.plan),
        "fits": report.predicted.fits,
        "cards": cards,
    }


def _numbers_of(outcome: Outcome) -> dict[str, object]:
    numbers: Figures = figures(outcome)
    return numbers._asdict() | {"interval_s": outcome.interval_s}


def _command(command: str) -> Html:
    copy = tag("button", "Copy", type="button", cls="copy", hidden=True)
    return tag("p", tag("span", "Reproduce with", cls="muted"), tag("code", command), copy, cls="command")
