"""HTML from values. What is not `Html` already is text and is escaped, so a layer's name can never become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

_VOID = {"rect"}
_UNIT = re.compile(r"(?<=\d) (?=(?:s|ms|µs|ns|[KMGT]iB|B|%|samples/s)(?:\W|$))")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


class Number(NamedTuple):
    """A table cell that is read as `text` and sorted by `value` (SI; None is unknown and sorts last)."""

    text: str
    value: float | None


Cell = str | Html | Number


def escaped(value: object) -> Html:
    """Escape a value unless it is markup.

    >>> escaped("<b>"), escaped(Html("<b>"))
    ('&lt;b&gt;', '<b>')
    """
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def unbroken(text: str) -> str:
    """Keep numbers and their units on one line.

    >>> unbroken("12 ms of 3 steps")
    '12\\xa0ms of 3 steps'
    """
    return _UNIT.sub("\u00a0", text)


def join(*parts: object) -> Html:
    """Put parts after each other, escaping what is not markup."""
    return Html("".join(escaped(part) for part in parts))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """Write an element. `cls` is class, `_` in a name is `-`; None and False leave an attribute out.

    >>> tag("p", "a < b", cls="note", data_value=1.5, hidden=True)
    '<p class="note" data-value="1.5" hidden>a &lt; b</p>'
    """
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
        written += f" {label}" if value is True else f' {label}="{escaped(value)}"'
    if name in _VOID:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def json_text(value: object) -> Html:
    """Write a value as JSON that cannot leave a script element; numbers that are not finite become null.

    >>> json_text({"name": "</script>"})
    '{"name":"\\\\u003c/script\\\\u003e"}'
    """
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(text)


def data_script(value: object, **attributes: object) -> Html:
    """Embed a value for a script to read."""
    return tag("script", json_text(value), type="application/json", **attributes)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    caption: str,
    limit: int | None = None,
    sortable: bool = False,
) -> Html:
    """Write a table; with `limit`, the first rows only, and a line that says so.

    A column is set to the right when its cells are numbers. `sortable` lets the reader sort by a heading.
    """
    shown = rows[:limit] if limit is not None else rows
    numeric = [any(isinstance(row[i], Number) for row in shown) for i in range(len(head))]
    heads = [
        tag(
            "th",
            tag("button", title, type="button") if sortable else title,
            scope="col",
            cls="number" if right else None,
        )
        for title, right in zip(head, numeric, strict=True)
    ]
    body = [tag("tr", *(_cell(cell, right) for cell, right in zip(row, numeric, strict=True))) for row in shown]
    if len(shown) < len(rows):
        caption += f" The first {len(shown)} of {len(rows)} rows are shown; the rest is left out of this page."
    element = tag(
        "table",
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
        cls="sortable" if sortable else None,
    )
    scroll = tag("div", element, cls="scroll", tabindex=0, role="region", aria_label=caption)
    return tag("div", tag("p", caption, cls="note"), scroll, cls="table")


def _cell(cell: Cell, right: bool) -> Html:
    css = "number" if right else None
    if isinstance(cell, Number):
        return tag("td", cell.text, cls=css, data_sort="" if cell.value is None else repr(float(cell.value)))
    return tag("td", cell, cls=css)


def figure(*, title: str, caption: str, body: object, twin: object | None, id: str | None = None) -> Html:
    """Frame a chart: a title that states the finding, how to read it, and its data as a table.

    `twin` is None where the body is a table already.
    """
    return tag(
        "figure",
        tag("figcaption", tag("h3", unbroken(title)), tag("p", unbroken(caption))),
        body,
        "" if twin is None else tag("details", tag("summary", "Data table"), twin),
        id=id,
        aria_label=f"{title}. {caption}",
    )
