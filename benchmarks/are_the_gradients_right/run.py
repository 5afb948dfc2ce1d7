"""Are the gradients of a plan those of one process? Every synchronous schedule x savings x models x devices."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.executor.proof import NAMES, PRECISIONS, SAVINGS, Found, matrix, prove, some

AT_ONCE = 200
"""Cases that one launch of ranks runs."""


def main() -> int:
    """Run the matrix, or with --quick the part that is in the tests; return 7 where a case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--models", nargs="*", default=[name + kind for kind in PRECISIONS for name in NAMES])
    parser.add_argument("--savings", nargs="*", default=list(SAVINGS))
    parser.add_argument("--quick", action="store_true", help="The part that is in the tests.")
    parser.add_argument("--json", action="store_true", help="Print one document.")
    chosen = parser.parse_args()
    began, found = time.monotonic(), list[Found]()
    for k in chosen.k:
        cases = some(k) if chosen.quick else list(matrix(k, tuple(chosen.models), tuple(chosen.savings)))
        for at in range(0, len(cases), AT_ONCE):
            with tempfile.TemporaryDirectory() as folder:
                found += prove(cases[at : at + AT_ONCE], k, Path(folder))
    wrong = [one for one in found if not one.right]
    if chosen.json:
        cases_of = {one.case.name: {"equal": one.equal, "difference": one.difference} for one in found}
        print(json.dumps({"cases": cases_of, "wrong": [one.case.name for one in wrong]}))
        return 7 if wrong else 0
    print("| schedule | cases | equal to the last bit | largest relative difference of the others |")
    print("|---|---|---|---|")
    by_schedule = defaultdict[str, list[Found]](list)
    for one in found:
        by_schedule[one.case.plan.schedule].append(one)
    for schedule, own in by_schedule.items():
        largest = max((one.difference for one in own if not one.equal), default=0.0)
        print(f"| {schedule} | {len(own)} | {sum(one.equal for one in own)} | {largest:.1e} |")
    for one in wrong:
        print(f"WRONG: {one.case.name}: {one.difference:.1e} {one.why}")
    print(f"{len(found)} cases, {len(wrong)} wrong (target: 0), {time.monotonic() - began:.0f} s")
    return 7 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
