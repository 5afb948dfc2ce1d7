"""Start the ranks of a job through torchrun's elastic agent, wait for them, and say which one failed and why."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from executor import meeting
from executor.parent import LAUNCHER
from planner.basis.errors import RUN_FAILED, PlanError, said

# Long enough for a rank to be scheduled on a loaded machine, short enough that an aborted run ends within 10 s.
_SHUTDOWN_S = "3"
_AGENTS_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask a run to end; what is ignored (nohup) stays so."""


def launch(
    entry: Callable[[str], None],
    argument: str,
    ranks: int,
    logs: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    kept: bool = True,
) -> None:
    """Run `entry(argument)` in `ranks` new processes on this host until all have ended.

    What they print goes to `logs`, which errors name where they are `kept`.
    Raises `PlanError` (exit 6) with the first failing rank's traceback, and
    `KeyboardInterrupt` when interrupted; no process is left either way. `stop` is called at the first interrupt and
    returns whether the ranks will end by themselves, so that they are waited for; the second one ends them at once.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = _SHUTDOWN_S
    os.environ[LAUNCHER] = str(os.getpid())
    logs.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend=meeting.NAME,
        rdzv_endpoint=meeting.LOOPBACK,
        local_addr=meeting.LOOPBACK,
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
        signals_to_handle="SIGQUIT",
    )
    asked = [False]

    def interrupted(number: int, frame: object) -> None:
        if not asked[0] and stop():
            asked[0] = True
            return
        for child in multiprocessing.active_children():  # the agent of torch 2.11 waits 30 s for one that is stopped
            child.kill()
        raise SignalException(f"signal {number}", sigval=signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in _AGENTS_SIGNALS}
    before = logging.root.manager.disable
    errors, temporary = logs / "errors", tempfile.tempdir
    errors.mkdir(exist_ok=True)
    tempfile.tempdir = str(errors)  # torch leaves a pickled exception of every rank that fails among temporary files
    logging.disable(logging.ERROR)  # the agent's own words about ranks that fail; `_failed` says it once
    try:
        for number in _ENDS:
            if handlers[number] is not signal.SIG_IGN:
                signal.signal(number, interrupted)
        elastic_launch(config, entry)(argument)
    except ChildFailedError as error:
        first, failure = error.get_first_failure()
        found = getattr(failure, "error_file_data", None)
        rank, said_first = (_first_words(logs) if found else None) or (first, found)
        raise _failed(rank, said_first, getattr(failure, "exitcode", "?"), logs, kept=kept) from None
    except SignalException as error:
        raise KeyboardInterrupt from error
    finally:
        tempfile.tempdir = temporary
        shutil.rmtree(errors, ignore_errors=True)
        logging.disable(before)
        for number, handler in handlers.items():  # the agent leaves its own behind
            signal.signal(number, handler)


def _first_words(logs: Path) -> tuple[int, object] | None:
    """Return the rank that was the first to write down why it fails, and what it wrote.

    The agent knows those that have ended. Who fails because a peer has gone may end before that peer is seen to have.
    """
    written = sorted(logs.rglob("error.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in written:
        try:
            return int(path.parent.name), json.loads(path.read_text())
        except ValueError:  # killed while it wrote
            continue
    return None


def _failed(rank: int, data: object, exitcode: object, logs: Path, *, kept: bool) -> PlanError:
    message = data.get("message", {}) if isinstance(data, dict) else {}
    printed = last_words(logs, rank)
    if isinstance(message, dict) and message.get("message"):
        why = str(message["message"])
        traceback = str(message.get("extraInfo", {}).get("py_callstack", "")).strip()
    else:
        why = f"it ended with exit code {exitcode}, without an exception (killed?)"
        traceback = ""
    details = {"rank": rank, "traceback": traceback, "printed": printed}
    known = said(why, code=RUN_FAILED, details=details)
    if known is not None:  # the rank's own, which says it better
        known.where = f"rank {rank}, {known.where}"
        return known
    shown = traceback or printed
    return PlanError(
        what=f"rank {rank} failed and the run was stopped",
        where=f"rank {rank}\n{shown}" if shown else f"rank {rank}",
        why=why,
        fix="correct the cause and run again" + (f"; the ranks' output is in {logs}" if kept else ""),
        code=RUN_FAILED,
        details=details,
    )


def last_words(logs: Path, rank: int, lines: int = 12) -> str:
    """Return the last lines that a rank has printed, to stderr or, where it was silent there, to stdout."""
    for name in ("stderr.log", "stdout.log"):
        for path in sorted(logs.rglob(f"{rank}/{name}"), key=lambda path: path.stat().st_mtime, reverse=True):
            text = path.read_text(errors="replace").strip()
            if text:
                return "\n".join(text.splitlines()[-lines:])
    return ""
