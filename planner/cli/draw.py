"""A trace as a few lines of text."""

from __future__ import annotations

from planner.orders.operations import OPERATIONS, ROLES
from planner.values.trace import COMPUTE, Trace

LETTERS = {op: ROLES[operation.role].letter for op, operation in OPERATIONS.items() if ROLES[operation.role].letter}
NAMES = {role.letter: role.words for role in ROLES.values() if role.letter}


def ascii_timeline(trace: Trace, width: int = 80) -> str:
    """Draw one line per device: the letter of what it mostly did in each slice of time, a dot where it waited.

    At most eight devices are drawn.
    """
    if not trace.events:
        return "(too many actions to be drawn)"
    shown = range(min(8, len(trace.devices)))
    label = max(len(trace.devices[d]) for d in shown)
    columns = max(10, width - label - 1)
    slot = trace.end / columns
    lines = []
    for d in shown:
        shares: list[dict[str, float]] = [{} for _ in range(columns)]
        for event in trace.events:
            if event.device != d or event.lane != COMPUTE or event.op not in LETTERS:
                continue
            first, last = int(event.ready / slot), min(columns - 1, int(event.end / slot))
            for i in range(first, last + 1):
                inside = min(event.end, (i + 1) * slot) - max(event.ready, i * slot)
                letter = LETTERS[event.op]
                shares[i][letter] = shares[i].get(letter, 0.0) + inside
        line = "".join(
            max(share, key=lambda k: share[k]) if sum(share.values()) > slot / 2 else "." for share in shares
        )
        lines.append(f"{trace.devices[d]:<{label}} {line}")
    if len(trace.devices) > len(shown):
        lines.append(f"... and {len(trace.devices) - len(shown)} more devices")
    drawn = {c for line in lines for c in line[label + 1 :]}
    legend = "  ".join(f"{letter} {name}" for letter, name in NAMES.items() if letter in drawn)
    lines.append(" " * (label + 1) + f"{legend}  . waiting")
    return "\n".join(lines)
