"""`plan explain`: why a plan is the best, what bounds it, and what would change the answer."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from planner.basis.errors import ARTEFACT, PlanError, nearest
from planner.cli import output
from planner.cli.answer import nothing_fits
from planner.cli.complete import plans
from planner.cli.opened import of_length
from planner.cli.options import JsonOption
from planner.cli.searching import asking
from planner.search.explain import explain as sentences
from planner.simulate.predict import simulate
from planner.store import Store


def explain(
    plan: Annotated[
        str, typer.Argument(help="best, or a plan that the last search evaluated.", autocompletion=plans)
    ] = "best",
    json: JsonOption = False,
) -> None:
    """Say in a few sentences why this plan, what bounds it, what the next best is and what would change the answer."""
    from profiles import shipped

    store = Store(catalogue=shipped)
    searched = store.load_search()
    path = store.profile_path(searched.profile)
    profile = store.load_profile(path)
    lengths = [of_length(store, path, profile, tokens)[1] for tokens in searched.space.sequences if tokens]
    profiles = (profile, *lengths)
    searching = asking(profiles, searched.cluster, searched.space, searched.objective, searched.terms, searched.stale)
    if searching.state.question != searched.question:
        raise PlanError(
            what="the search is stale",
            where=str(store.root / "search.json"),
            why=f"the profile {searched.profile} has been measured again since",
            fix="plan search",
            code=ARTEFACT,
        )
    searching.state.done = searched.done
    answer = searched.answer
    if not answer.leaders:
        raise nothing_fits(searching, answer)
    chosen = answer.leaders[0]
    if plan != "best":
        ranked = {found.label: found for found in answer.leaders}
        known = {found.label: found for found in searched.done.values() if found.label} | ranked
        if plan not in known:
            close = nearest(plan, ["best", *known])
            raise PlanError(
                what=f"unknown plan '{plan}'",
                where="the last search",
                why=(f"did you mean '{close}'? " if close else "")
                + f"{len(known)} plans were evaluated, the best are {', '.join(ranked)}",
                fix="plan explain best",
            )
        chosen = known[plan]
    shown = searching.plan(chosen)
    outcome = simulate(searching.profile_of(shown), shown, searched.cluster)
    before = len(searched.done)
    text = sentences(searching, answer, outcome, of=chosen)
    if len(searching.state.done) > before:  # what a sentence names can be asked about, too
        with contextlib.suppress(PlanError):  # but for a folder that may only be read
            store.save_search(searched)
    if json:
        output.document("explain", {"plan": str(outcome.plan), "sentences": text})
    else:
        for sentence in text:
            output.results.print(sentence, markup=False)
