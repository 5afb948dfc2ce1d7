"""`plan report`: one HTML page about a run, or about the last simulation's best plan."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from planner import __version__
from planner.basis.errors import PlanError
from planner.cli import output
from planner.cli.comparison import compared
from planner.cli.complete import plans
from planner.cli.opened import is_of_own_machine, meant
from planner.cli.options import JsonOption
from planner.search.ranking import Ranking
from planner.simulate.predict import simulate as predict
from planner.store import Run, Store
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.profile import Profile


def report(
    run: Annotated[
        str | None, typer.Argument(help="The name of a run under .plan/runs. Default: the last one.")
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Show the last simulation's best plan, without a run.")
    ] = False,
    plan: Annotated[
        str | None, typer.Option(help="With --simulated: another plan than the best.", autocompletion=plans)
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    json: JsonOption = False,
) -> None:
    """Write one HTML page, which opens without a network: timelines, memory, plans, prediction beside measurement."""
    from profiles import shipped

    if run is not None and (simulated or plan is not None):
        raise PlanError(
            what="a page shows a run or a simulation",
            where="plan report",
            why=f"the run '{run}' is named beside {'--simulated' if simulated else '--plan'}",
            fix="leave one of them out",
        )
    store = Store(catalogue=shipped)
    if simulated or plan is not None:
        question = meant(plan or "best", None, None)
        ranking, profile = store.load_ranking(), question.profile
        known = {str(outcome.plan): outcome for outcome in ranking.outcomes}.get(str(question.plan))
        if known is None or known.plan != question.plan:
            known = predict(profile, question.plan, question.cluster)
        named = f" --plan {shlex.quote(plan)}" if plan else ""
        made = f"{ranking.asked} && " if ranking.asked else ""
        command = f"{made}plan report --simulated{named} --out {shlex.quote(out.name)}"
        page = _write(None, known, profile, with_outcome(ranking, known), question.cluster, out, command)
    else:
        folder, result = store.load_run(run)
        profile = store.load_profile(Path(result.profile))
        page = write_page(store, folder, result, profile, out)
    if json:
        output.document("report", {"report": str(page), "bytes": page.stat().st_size})
    else:
        output.results.print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser")


def write_page(store: Store, folder: Path, result: Run, profile: Profile, out: Path) -> Path:
    """Write the page of a run."""
    try:
        ranking = store.load_ranking()
        same = is_of_own_machine(store, ranking) and ranking.batch == result.measured.plan.batch
    except PlanError:
        same = False
    compared_with = with_outcome(ranking, result.predicted) if same else None
    own = f"{result.asked} && plan report" if result.asked else f"plan report {folder.name}"
    command = f"{own} --out {shlex.quote(out.name)}"
    return _write(result, result.predicted, profile, compared_with, result.cluster or profile.machine, out, command)


def with_outcome(ranking: Ranking, shown: Outcome) -> Ranking:
    """Return a ranking in which the plan of a page has the figures of the page."""
    others = [outcome for outcome in ranking.outcomes if str(outcome.plan) != str(shown.plan)]
    every = sorted((*others, shown), key=lambda o: (not o.fits, -o.throughput if o.fits else o.tightest.lack))
    return msgspec.structs.replace(ranking, outcomes=tuple(every))


def _write(
    result: Run | None,
    predicted: Outcome,
    profile: Profile,
    ranking: Ranking | None,
    cluster: Cluster,
    out: Path,
    command: str,
) -> Path:
    from reports.page import Report, write

    write(
        Report(
            predicted=predicted,
            measured=result.measured if result else None,
            comparison=compared(result, profile) if result else None,
            ranking=ranking,
            profile=profile,
            cluster=cluster,
            environment=environment(profile),
            assumptions=assumptions(predicted, profile, cluster),
            command=command,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ),
        out,
    )
    return out


def environment(profile: Profile) -> dict[str, str]:
    """What the figures depend on, without names of hosts, people or folders."""
    return {
        "foreplan": __version__,
        "model file": profile.key.model,
        "device": profile.key.device,
        **({"cores": str(profile.key.cores)} if profile.key.cores else {}),
        "dtype": profile.key.numbers,
        "torch": profile.key.torch,
        "Python": profile.key.python,
        "profiled": profile.created,
        "noise of the profile": f"{100 * profile.noise:.1f} %",
    }


def assumptions(predicted: Outcome, profile: Profile, cluster: Cluster) -> tuple[str, ...]:
    """What the prediction takes for granted, in sentences."""
    machine = cluster.take(len(predicted.plan.device_names)) if cluster.elastic else cluster
    sentences = [
        "Layer times are estimated from counted operations and data sheets: nothing was measured."
        if profile.estimated
        else "Layer times are medians of the profile, interpolated between measured micro-batch sizes.",
        "A send completes when its receive is posted; transfers on one link share it fairly.",
        "The step includes input, loss, gradient synchronisation, optimizer and the framework's own time per action.",
        "Memory counts tensors as torch's allocator hands them out, not the process's code and libraries.",
        "The interval is the step simulated at the 10th and at the 90th percentile of all measured times.",
    ]
    if machine.devices[0].waits:
        sentences.append(
            "A rehearsal: processes, messages and collectives are real and pass this machine's own links; layers, "
            "updates and batches are waits of the profile's seconds, which need no core. Nothing is trained."
        )
        if machine.message_scale != 1:
            sentences.append(
                f"Messages and collectives have {100 * machine.message_scale:g} % of their bytes, in the rehearsal and "
                "in the prediction beside it: what they take here says nothing of the hardware that the plan is for."
            )
    elif len(machine.devices) > 1 and machine.devices[0].shares_cores:
        host = machine.hosts[0]
        crowded = ", ".join(f"{n} busy ones are each {f:.2f} times slower" for n, f in host.slowdown if n > 1)
        sentences.append(
            f"{len(machine.devices)} processes share {host.cores} cores; beyond their share of them, {crowded}."
        )
    return tuple(sentences)
