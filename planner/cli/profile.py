"""`plan profile`: measure a model file on this machine."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from planner.basis.errors import PlanError
from planner.basis.units import percent, samples_words, seconds, size
from planner.cli import output
from planner.cli.measured import interrupted, notes, timed
from planner.cli.options import JsonOption
from planner.cli.progress import shown
from planner.store import Store
from planner.values.profile import Profile

NOISE_LIMIT = 0.05


def profile(
    model: Annotated[str, typer.Argument(help="The model file, or file.py:name for another function than model().")],
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA when there is any.", metavar="KIND")] = "auto",
    sizes: Annotated[
        str | None,
        typer.Option(help="Micro-batch sizes to measure, such as 1,4,16. Default: powers of two, as curves need them."),
    ] = None,
    sequence: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per sample; may be repeated: a profile of each. Default: the model file's.", min=1),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Seconds that measuring the model may take, for all lengths together.", min=1.0)
    ] = 30,
    estimate: Annotated[
        str | None, typer.Option(help="Measure nothing: compute the times on this hardware.", metavar="HARDWARE")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --estimate: bf16, fp16 or fp32. Default: the model's.", metavar="DTYPE")
    ] = None,
    remeasure_machine: Annotated[
        bool, typer.Option("--remeasure-machine", help="Measure links and overheads again, which are kept otherwise.")
    ] = False,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Hold one layer at a time, as is done where the model does not fit.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure each layer's time and bytes, and this machine's links, on the real device, or estimate them."""
    chosen = _sizes(sizes)
    if dtype is not None and estimate is None:
        raise PlanError(
            what="--dtype needs --estimate",
            where="--dtype",
            why="a measured profile has the model's own dtype",
            fix="plan profile model.py --estimate h100 --dtype bf16",
        )
    store = Store()
    store.check_writable()
    from executor import devices
    from profiles.estimate import estimate as estimated
    from profiles.measure import measure

    kind = devices.kinds()[0] if device == "auto" else device
    if kind not in ("cpu", "cuda"):
        raise PlanError(
            what=f"unknown device '{kind}'", where="--device", why="known: cpu, cuda, auto", fix="--device cpu"
        )
    lengths = tuple(dict.fromkeys(sequence or (0,)))
    made: list[tuple[Path, Profile]] = []
    for tokens in lengths:
        with _progress(tokens) as told, redirect_stdout(sys.stderr):  # what a model file prints is no result
            if estimate is not None:
                found = estimated(model, hardware=estimate, dtype=dtype, sizes=chosen, sequence=tokens, progress=told)
            else:
                found = measure(
                    model,
                    device=kind,
                    sizes=chosen,
                    sequence=tokens,
                    budget_s=budget / len(lengths),
                    progress=told,
                    remeasure_machine=remeasure_machine and tokens == lengths[0],
                    one_by_one=True if one_by_one else None,
                )
        made.append((store.save_profile(found), found))
        if found.measuring and found.measuring.interrupted:
            break
    noise = max(measured.noise for _, measured in made)
    if noise > NOISE_LIMIT:
        output.progress.print(
            f"note: the measurements vary by {percent(noise)}: close other programs, or measure longer with "
            f"--budget {2 * budget:.0f}"
        )
    for note in _notes(made[0][1]):
        output.progress.print(f"note: {note}", markup=False, soft_wrap=True)
    for _, measured in made:
        for note in notes(measured, budget / len(lengths)):
            output.progress.print(f"note: {note}", markup=False, soft_wrap=True)
    for path, measured in made:
        if measured.measuring and measured.measuring.interrupted:
            raise interrupted(measured, str(path))
    if json:
        documents = [{"path": str(path), **summary(measured)} for path, measured in made]
        output.document("profile", documents[0] if len(made) == 1 else {"profiles": documents})
        return
    for path, measured in made:
        _print(measured, str(path))
    if len(made) == 1:
        output.results.print("next: plan simulate --k 2 --m 8")
    else:
        output.results.print(f"next: plan search {' '.join(f'--sequence {tokens}' for tokens in lengths)}")


@contextmanager
def _progress(tokens: int) -> Iterator[Callable[[str, int, int], None]]:
    """Show on stderr how much of what is done; of one of several sequence lengths, which."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with shown(*columns) as bar:
        tasks: dict[str, Any] = {}

        def told(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"{what}, {tokens} tokens" if tokens else what, total=of)
            bar.update(tasks[what], completed=done, total=of)

        yield told


def _notes(measured: Profile) -> Iterator[str]:
    """Say what of the model is not cut, and what nothing reads."""
    for path, why in measured.opaque:
        yield f"{path or 'the model'} stays whole inside a layer, as torch cannot follow it ({why})"
    if measured.unused:
        more = f" and {len(measured.unused) - 3} more" if len(measured.unused) > 3 else ""
        yield f"nothing reads {', '.join(measured.unused[:3])}{more}: no stage trains them"
    if measured.evaluating:
        yield "model() returns the model in evaluation mode, and so it is trained, without dropout: call .train() on it"
    epoch = measured.loading.samples if measured.loading else 0
    if epoch % measured.batch:
        yield (
            f"steps are whole: of the {epoch:,} samples of an epoch the last {epoch % measured.batch} are left out, "
            "others in every epoch where they are shuffled"
        )


def _loading(measured: Profile) -> str:
    """Say what making a batch of the model file's data takes, and who makes it; nothing where there are none."""
    loading = measured.loading
    if loading is None:
        return ""
    ready = measured.load[-1]
    if not loading.workers:
        return f"data(): {ready.samples} samples are made in {seconds(ready.median_s)}, by the rank itself"
    making = loading.making[-1]
    who = "a worker process" if loading.workers == 1 else f"each of {loading.workers} worker processes"
    return (
        f"data(): {making.samples} samples are made in {seconds(making.median_s)} by {who}, while the step before "
        f"computes, and taken in {seconds(ready.median_s)}"
    )


def _sizes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise PlanError(
            what="the sizes are not whole numbers", where="--sizes", why=f"'{text}'", fix="--sizes 1,4,16"
        ) from error


def summary(measured: Profile) -> dict[str, Any]:
    """The profile's main figures, with units in their names."""
    samples, threads = _representative(measured)
    return {
        "model": measured.key.model,
        "device": measured.key.device,
        "estimated": measured.estimated,
        "dtype": measured.key.dtype,
        "precision": measured.key.precision,
        "compiled": measured.key.compiled,
        "noise_fraction": measured.noise,
        "action_overhead_s": measured.action_s,
        "samples": samples,
        "tokens_per_sample": measured.sequence,
        "threads": threads,
        "layers": [
            {
                "name": layer.name,
                "forward_s": _seconds(layer, "forward", samples, threads),
                "backward_s": _seconds(layer, "backward", samples, threads),
                "parameter_bytes": layer.parameter_bytes,
                "saved_bytes": next(s.saved_bytes for s in layer.sizes if s.samples == samples),
                "output_bytes": next(s.output_bytes for s in layer.sizes if s.samples == samples),
                "forward_flop": next(s.flop for s in layer.sizes if s.samples == samples),
            }
            for layer in (*measured.layers, measured.loss)
        ],
        "machine_created": measured.machine_created,
        "measuring": msgspec.to_builtins(measured.measuring),
        "loading": _loading_data(measured),
        "links": [
            {"latency_s": link.latency_s, "bandwidth_bytes_per_s": link.bandwidth_bytes_per_s}
            for link in measured.machine.links
        ],
        "slowdown": [[n, factor] for n, factor in measured.machine.hosts[0].slowdown],
    }


def _loading_data(measured: Profile) -> dict[str, Any] | None:
    loading = measured.loading
    if loading is None:
        return None
    return {
        "samples": measured.load[-1].samples,
        "load_s": measured.load[-1].median_s,
        "workers": loading.workers,
        "making_s": loading.making[-1].median_s if loading.making else None,
        "epoch_samples": loading.samples or None,
    }


def _representative(measured: Profile) -> tuple[int, int]:
    sizes = timed(measured)
    return sizes[len(sizes) // 2], measured.layers[0].times[-1].threads


def _seconds(layer: Any, kind: str, samples: int, threads: int) -> float:
    times = next(t for t in layer.times if t.threads == threads)
    return float(next(t.median_s for t in getattr(times, kind) if t.samples == samples))


def _machine_age(measured: Profile) -> str:
    """When the machine's own part was measured, in words."""
    created, found = (datetime.datetime.fromisoformat(at) for at in (measured.created, measured.machine_created))
    days = (created - found).days
    if days < 1:
        return "links and overheads measured today"
    again = "--remeasure-machine measures them again"
    return f"links and overheads measured {days} day{'s'[: days - 1]} ago ({again})"


def _print(measured: Profile, path: str) -> None:
    from rich.table import Table

    samples, threads = _representative(measured)
    title = samples_words([samples], [measured.sequence])
    title += ", estimated: nothing was measured" if measured.estimated else f", {threads} thread{'s'[: threads - 1]}"
    table = Table(box=None, pad_edge=False, title_justify="left", title=title)
    table.add_column("layer")
    for name in ("forward", "backward", "parameters", "saved", "output"):
        table.add_column(name, justify="right")
    for layer in (*measured.layers, measured.loss):
        sizes = next(s for s in layer.sizes if s.samples == samples)
        table.add_row(
            layer.name.replace("[", "\\["),
            seconds(_seconds(layer, "forward", samples, threads)),
            seconds(_seconds(layer, "backward", samples, threads)),
            size(layer.parameter_bytes),
            size(sizes.saved_bytes),
            size(sizes.output_bytes),
        )
    output.results.print(table)
    parameters = sum(layer.parameter_bytes for layer in measured.layers)
    output.results.print(
        f"{measured.key.model} on {measured.key.device}, {measured.key.cores} cores, torch {measured.key.torch}: "
        f"{size(parameters)} of parameters, noise {percent(measured.noise)}"
    )
    for whole in (w for w in measured.whole if (w.samples, w.threads) == (samples, threads)):
        layers_s, whole_s = whole.layers_forward_s + whole.layers_backward_s, whole.forward_s + whole.backward_s
        output.results.print(
            f"unsplit model {seconds(whole_s)} beside the sum of its layers {seconds(layers_s)}; "
            f"{seconds(measured.action_s)} of framework per action"
        )
    if measured.machine_created:
        output.results.print(f"machine: {_machine_age(measured)}")
    if measured.loading is not None:
        output.results.print(_loading(measured))
    for link in measured.machine.links:
        output.results.print(
            f"link: latency {seconds(link.latency_s)}, bandwidth {link.bandwidth_bytes_per_s / 1e9:.3g} GB/s"
        )
    output.results.print(f"saved {path}")
