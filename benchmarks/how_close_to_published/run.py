"""How close does the program come to what others have published?

    python benchmarks/how_close_to_published/run.py [--json] [--quick] [--only A,B,C,D]

Prints published figures, ours and the errors, and the targets beside the figures. Exit code 7 when one is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import gpipe
import megatron_seqpar
import torchgpipe_speed
import zero_bubble
from by_hand import Result

PARTS = {"A": zero_bubble.run, "B": megatron_seqpar.run, "C": gpipe.run, "D": torchgpipe_speed.run}


def shown(result: Result) -> str:
    """The tables and figures as Markdown."""
    parts = []
    for table in result.tables:
        lines = [f"### {table.title}", "", " | ".join(("", *table.columns, "")).strip()]
        lines.append("|" + "---|" * len(table.columns))
        lines += [" | ".join(("", *map(str, row), "")).strip() for row in table.rows]
        parts.append("\n".join(lines))
    lines = ["| figure | reached | target | |", "|---|---|---|---|"]
    for figure in result.figures:
        asked = math.isfinite(figure.target)
        target = f"at most {figure.target:g} {figure.unit}".strip() if asked else ""
        value = f"{figure.value:.2f} %" if figure.unit == "%" else f"{figure.value:.4f} {figure.unit}".strip()
        lines.append(f"| {figure.name} | {value} | {target} | {('met' if figure.met else 'MISSED') if asked else ''} |")
    return "\n\n".join([*parts, "\n".join(lines)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--quick", action="store_true", help="a few rows of each part")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by letter")
    options = parser.parse_args()
    results = {letter: PARTS[letter](quick=options.quick) for letter in options.only.split(",")}
    if options.json:
        document = {
            letter: {
                "tables": [dataclasses.asdict(table) for table in result.tables],
                "figures": [
                    {
                        "name": figure.name,
                        "value": figure.value,
                        "target": figure.target if math.isfinite(figure.target) else None,
                        "met": figure.met,
                    }
                    for figure in result.figures
                ],
            }
            for letter, result in results.items()
        }
        print(json.dumps(document, indent=1, sort_keys=True))
    else:
        print("\n\n".join(map(shown, results.values())))
    return 0 if all(figure.met for result in results.values() for figure in result.figures) else 7


if __name__ == "__main__":
    sys.exit(main())
