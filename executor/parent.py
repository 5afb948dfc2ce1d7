"""A process's bond with the one that has started it: it ends when that does, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal

LAUNCHER = "FOREPLAN_LAUNCHER"
"""The environment variable with the id of the process that starts ranks."""


def die_with_parent(parent: str | None = None) -> None:
    """Let the kernel kill this process when its parent ends; end now where `parent`, by its id, has ended already."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
