"""The command line that is being answered, so that what it makes can say how to make it again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path

LINE: ContextVar[tuple[str, ...]] = ContextVar("line", default=())
"""The arguments behind `plan`."""
LOOKS = ("--json", "--all", "--restart")
"""Options that say how an answer is shown, or what is forgotten, not what is asked."""
SHOWN_BY = ("--sort", "--filter")
"""The same with a value."""


def again(arguments: Sequence[str], profile: str, plan: str = "") -> str:
    """Return the command that asks the same again, with the profile named; of paths only the last part is said.

    A `plan` stands for best, said or not.

    >>> again(["simulate", "--k", "2", "--json", "--sort", "memory"], "vgg16")
    'plan simulate --k 2 --profile vgg16'
    >>> again(["simulate", "--profile=some/where/mine.json"], "vgg16")
    'plan simulate --profile=mine.json'
    >>> again(["run", "best", "--steps", "5"], "gpt", plan="gpipe-k2-m8"), again(["run"], "gpt", plan="gpipe-k2-m8")
    ('plan run gpipe-k2-m8 --steps 5 --profile gpt', 'plan run gpipe-k2-m8 --profile gpt')
    """
    kept, skipped = [], False
    for word in arguments:
        if skipped or word in (*LOOKS, *SHOWN_BY):
            skipped = not skipped and word in SHOWN_BY
        elif not word.startswith(tuple(f"{option}=" for option in SHOWN_BY)):
            kept.append(_named(word))
    if plan:
        kept = [kept[0], plan, *(word for word in kept[1:] if word != "best")] if kept else ["run", plan]
    told = any(word.partition("=")[0] == "--profile" for word in kept)
    return shlex.join(["plan", *kept, *([] if told else ["--profile", _named(profile)])])


def _named(word: str) -> str:
    option, equals, value = word.partition("=")
    if word.startswith("--") and equals and os.sep in value:
        return f"{option}={Path(value).name}"
    return Path(word).name if os.sep in word else word
