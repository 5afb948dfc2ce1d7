"""How a profile was measured, and how far what is asked of it lies from that, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from planner.basis.errors import INTERRUPTED, PlanError
from planner.basis.units import percent, samples_words
from planner.cli import output
from planner.values.profile import Profile

WAITING_LIMIT = 0.15
"""The share of a profile's time without a core from which on its times say more about other programs than the model."""


def timed(profile: Profile) -> list[int]:
    """The micro-batch sizes whose times were measured, or estimated."""
    return [timing.samples for timing in profile.layers[0].times[0].forward]


def notes(profile: Profile, budget: float) -> Iterator[str]:
    """Say what of a profile was not measured, within a budget of seconds."""
    how = profile.measuring
    if how is None:
        return
    sizes = timed(profile)
    if how.waiting > WAITING_LIMIT:
        yield (
            f"other programs kept the cores busy: for {percent(how.waiting)} of the time the model had none, and what "
            "several threads take is longer still than that, as they wait for each other; profile again when they rest"
        )
    if how.one_by_one:
        yield (
            "measured one layer at a time, as the whole does not fit into memory: that the layers compute what the "
            "model computes was not checked"
        )
    alike = [layer for layer in profile.layers if layer.like]
    if alike:
        first = next(layer.name for layer in profile.layers if layer.name == alike[0].like)
        more = f" and {len(alike) - 3} more" if len(alike) > 3 else ""
        names = ", ".join(layer.name for layer in alike[:3])
        yield (
            f"measured once per kind of layer: {first} stands for {names}{more}; "
            f"layers of one kind differ by {percent(how.unlike)} at most"
        )
    if how.between:
        yield (
            f"{samples_words(how.between, [profile.sequence])} are interpolated between "
            f"{', '.join(map(str, sizes))}, where times and bytes are lines"
        )
    if how.beyond:
        enough = 2 * budget * max(how.beyond) / max(sizes)
        yield (
            f"{budget:g} s are too short for times of {samples_words(how.beyond, [profile.sequence])}: they continue "
            f"those of fewer; --budget {enough:.0f} measures them, or choose among --sizes"
        )
    for words in how.derived:
        yield f"{budget:g} s are too short for all: {words}"


def beyond(profile: Profile, samples: Iterable[int]) -> str:
    """Say which micro-batch sizes lie outside what was measured; "" where none does."""
    sizes = timed(profile)
    outside = sorted({n for n in samples if not sizes[0] <= n <= sizes[-1]})
    if not outside or profile.estimated:
        return ""
    known = f"{sizes[0]} to {sizes[-1]} samples" if len(sizes) > 1 else f"{sizes[0]} sample{'s'[: sizes[0] - 1]}"
    return (
        f"micro-batches of {_listed(outside)} lie outside of what was measured, {known}: their times and bytes "
        f"continue the line; plan profile --sizes measures others"
    )


def warn_beyond(profile: Profile, samples: Iterable[int]) -> None:
    """Say so on stderr, if any does."""
    words = beyond(profile, samples)
    if words:
        output.progress.print(f"note: {words}", markup=False, soft_wrap=True)


def _listed(sizes: Sequence[int]) -> str:
    words = [f"{n:,}" for n in (sizes if len(sizes) < 4 else [*sizes[:2], sizes[-1]])]
    between = " … " if len(sizes) > 3 else " and "
    return f"{', '.join(words[:-1])}{between}{words[-1]} samples" if len(words) > 1 else f"{words[0]} samples"


def interrupted(profile: Profile, path: str) -> PlanError:
    """The end of a measuring that a person has asked to end."""
    rounds = profile.measuring.rounds if profile.measuring else 0
    return PlanError(
        what=f"interrupted: the profile is saved, from {rounds} round{'s'[: rounds != 1]} of measurements",
        where="plan profile",
        why="Ctrl-C, or a signal that asks for the end",
        fix=f"use it as it is, or start the command again; it is in {path}",
        code=INTERRUPTED,
    )
