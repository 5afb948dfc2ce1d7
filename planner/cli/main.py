"""The entry point: the commands, and what becomes of their errors."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.exceptions import TyperException

from planner import __version__
from planner.basis.errors import ARTEFACT, INTERNAL, INTERRUPTED, OK, USAGE, PlanError, nearest
from planner.basis.files import write
from planner.cli import explain, init, profile, report, run, search, show, simulate
from planner.cli.line import LINE
from planner.cli.output import failure
from planner.cli.streams import UnprintableError, end, prepare, unprintable
from planner.store import FOLDER

GLOSSARY = """Start with: plan init, plan profile model.py, plan simulate --k 2 --m 8, plan run best.

Names: gpipe-k2-m8 is the strategy gpipe on K=2 devices with M=8 micro-batches per step; -r4 has 4 replicas of the \
pipeline (-r2.1: 2 of its first stage, 1 of its second), -v2 two stages per device (chunks), -t4 tensors split over 4 \
devices; -zero-1 says how replicas agree where that is not by all-reduce; -recompute repeats forwards, -recompute3 \
those of 3 layers, -offload swaps activations to the host, -host updates there. A search adds \
-b512 where batches differ, -s512 where sequences do, and -stages where a stage's replicas stand side by side, not a \
pipeline's stages.

Actions: 0B1 is stage 0, backward, micro-batch 1. F forward, B backward (I of the input, W of the weights), R recompute.

Columns: bubble is the share of the devices' time in which they do nothing, sync that in which they wait for \
reductions, gathers, pulls and pushes; 10 to 90 % is the throughput if all durations are long, or short."""

app = typer.Typer(
    name="plan",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Plan how to train a PyTorch model: measure its layers, simulate every way of spreading them over devices, "
    "run the best one, and see prediction and measurement side by side.",
    rich_markup_mode="rich",
    epilog=GLOSSARY,
)


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Turn Ctrl-C, and an exit that is not ours, into errors like all others."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise _interrupted(command.__name__) from None
        except SystemExit as error:
            if isinstance(error.__context__, BrokenPipeError):
                raise
            raise PlanError(
                what="the model file ends the program",
                where=f"plan {command.__name__}",
                why=f"something that it calls exits with {error.code}",
                fix="leave sys.exit() and exit() out of what the model file calls; raise an exception instead",
            ) from error

    return guarded


def _interrupted(command: str) -> PlanError:
    return PlanError(
        what="interrupted",
        where=f"plan {command}",
        why="Ctrl-C",
        fix="start the command again; what was saved before is still there",
        code=INTERRUPTED,
    )


_COMMANDS = (
    *(init.init, profile.profile, simulate.simulate, search.search, show.show, explain.explain, run.run),
    report.report,
)
for _command in _COMMANDS:
    app.command(_command.__name__)(_interruptible(_command))


def _version(wanted: bool) -> None:
    if wanted:
        torch = importlib.metadata.version("torch")
        print(f"foreplan {__version__}, torch {torch}, Python {platform.python_version()}")
        raise typer.Exit()


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the versions."),
) -> None:
    pass


def main() -> None:
    """Run the command line and exit with its code."""
    prepare()
    try:
        sys.exit(invoke(sys.argv[1:]))
    finally:
        end()


def invoke(arguments: list[str]) -> int:
    """Run one command and return its exit code; every failure is printed in the same form.

    A reader who has seen enough (`plan ... | head`) is no failure; a stdout that is full is one, told on stderr.
    """
    try:
        code = _answered(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        code = OK
    except UnprintableError as error:
        with contextlib.suppress(OSError):
            failure("", unprintable(error), as_json=False)
        code = ARTEFACT
    return code


def _answered(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    LINE.set(tuple(arguments))
    command = next((a for a in arguments if not a.startswith("-")), "")
    try:
        _check_text(arguments)
        result = app(args=arguments, prog_name="plan", standalone_mode=False)
        if result == INTERRUPTED:  # typer's answer to a Ctrl-C that came before or behind the command itself
            raise KeyboardInterrupt
        return result if isinstance(result, int) else OK
    except PlanError as error:
        failure(command, error, as_json=as_json)
        return error.code
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return USAGE
        failure(command, _usage(error), as_json=as_json)
        return USAGE
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        failure(command, _interrupted(command), as_json=as_json)
        return INTERRUPTED
    except (BrokenPipeError, UnprintableError):
        raise
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich and typer exit where a reader has gone
            raise BrokenPipeError from None
        raise
    except Exception as error:
        failure(command, _bug(command, error), as_json=as_json)
        return INTERNAL


def _check_text(arguments: list[str]) -> None:
    """Raise `PlanError` (exit 2) for a name that is no text: it could neither be saved nor put on a page."""
    for given in arguments:
        try:
            given.encode()
        except UnicodeEncodeError:
            raise PlanError(
                what="an argument is no text",
                where=ascii(given),
                why="its bytes are not UTF-8",
                fix="rename the file, or give the name in UTF-8",
            ) from None


def _bug(command: str, error: Exception) -> PlanError:
    """A failure that nobody foresaw: the traceback goes to a file, not over the screen."""
    text = "".join(traceback.format_exception(error))
    log = Path(FOLDER) / "error.log"
    try:
        write(log, text.encode())
    except PlanError:
        sys.stderr.write(text)
    return PlanError(
        what=f"plan {command} failed for a reason it does not know",
        where=f"{error.__traceback__.tb_frame.f_code.co_name if error.__traceback__ else 'plan'}; traceback in {log}",
        why=f"{type(error).__name__}: {error}",
        fix=f"report it with {log}; if your model file raised it, correct it there",
        code=INTERNAL,
        details={"traceback": text},
    )


def _usage(error: TyperException) -> PlanError:
    """An unknown flag or command, a missing or malformed argument: with the nearest name that exists."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "plan"
    known: list[str] = []
    if context is not None:
        known = [name for parameter in context.command.params for name in parameter.opts]
        known += list(getattr(context.command, "commands", {}))
    message = error.format_message()
    words = [w.strip("'\".:") for w in message.split()]
    wrong = getattr(error, "option_name", None) or next((w for w in reversed(words) if w and w not in known), "")
    close = nearest(str(wrong), known) if "No such" in message else None
    return PlanError(
        what=message.rstrip("."),
        where=path,
        why=f"did you mean '{close}'?" if close else "the command line could not be understood",
        fix=f"{path} --help",
    )


if __name__ == "__main__":
    main()
