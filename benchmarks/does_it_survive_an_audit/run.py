"""Does the simulator survive an audit? Figures derived by hand, on hardware that nobody tuned, beside the predictions.

    python benchmarks/does_it_survive_an_audit/run.py [--json] [--quick] [--section links,memory] [--why]

Prints a table; `--why` adds the derivations. Exit code 7 when a prediction is not what was derived.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from figure import FIGURES  # noqa: E402

for _file in sorted(HERE.glob("audit_*.py")):
    importlib.import_module(_file.stem)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--quick", action="store_true", help="the first three figures of each section")
    parser.add_argument("--section", default="", help="sections, by name; default: all")
    parser.add_argument("--why", action="store_true", help="print the derivations, too")
    options = parser.parse_args()
    wanted = set(filter(None, options.section.split(",")))
    rows, seen = [], dict[str, int]()
    for one in FIGURES:
        seen[one.section] = seen.get(one.section, 0) + 1
        if (wanted and one.section not in wanted) or (options.quick and seen[one.section] > 3):
            continue
        found = one.compute()
        rows.append((one, found, one.met(found)))
    if options.json:
        document = [
            {
                "section": one.section,
                "figure": one.name,
                "unit": one.unit,
                "derived": found.derived,
                "predicted": found.predicted,
                "before": one.before,
                "met": met,
            }
            for one, found, met in rows
        ]
        print(json.dumps(document, indent=1))
    else:
        print("| section | figure | derived | predicted | before | |\n|---|---|---|---|---|---|")
        for one, found, met in rows:
            verdict = "met" if met else "MISSED"
            values = f"{found.derived:.4g} {one.unit} | {found.predicted:.4g} {one.unit} | {one.before}"
            print(f"| {one.section} | {one.name} | {values} | {verdict} |")
            if options.why:
                print(f"\n{one.derivation}\n")
    return 0 if all(met for *_, met in rows) else 7


if __name__ == "__main__":
    sys.exit(main())
