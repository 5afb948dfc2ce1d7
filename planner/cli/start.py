"""The program's begin and end: a Ctrl-C is answered as ever while Python still imports, and not at all behind the end.

What is imported here is next to nothing: until the commands are there, nobody else would answer.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from planner.cli.main import main as command

        command()
    except KeyboardInterrupt:
        _say()
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said
        # A Ctrl-C in code that is compiled from text (importing a dataclass runs some) is kept in mind by CPython as
        # one that nobody handled: `python -m` then ends by the signal (-2) whatever our code is. More text forgets it.
        exec("")


def _say() -> None:
    from planner.basis.errors import INTERRUPTED, PlanError

    error = PlanError(
        what="interrupted",
        where="plan",
        why="Ctrl-C",
        fix="start the command again; what was saved before is still there",
        code=INTERRUPTED,
    )
    print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
