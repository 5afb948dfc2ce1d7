"""What a run does not leave behind and whom it does not let in, each part alone."""

from __future__ import annotations

import datetime
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from executor.groups import group_of
from executor.meeting import Meeting


def test_the_ranks_meet_on_loopback_alone() -> None:
    """A store of torch's own listens on all interfaces."""
    meeting = Meeting("run")
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{meeting.port:04X}")]
    assert listening == [f"0100007F:{meeting.port:04X}"]
    found = meeting.next_rendezvous()
    found.store.set("a", "b")
    other = TCPStore("127.0.0.1", meeting.port, is_master=False)
    assert PrefixStore("run", other).get("a") == b"b"


def test_groups_have_the_patience_of_the_run(tmp_path: Path) -> None:
    patience = datetime.timedelta(seconds=77)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=patience)
    try:
        assert group_of([0])._get_backend(torch.device("cpu")).options._timeout == patience
    finally:
        dist.destroy_process_group()


def test_a_rank_whose_launcher_has_gone_ends_at_once() -> None:
    code = "from executor.parent import die_with_parent; die_with_parent('1'); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
