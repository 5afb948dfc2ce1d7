"""The table of operations: what a device can do, described once.

Codes, proof, linking, prices, memory, limits, drawings, the executor and the page's legend, script and styles derive
from it. A new kind of action is an entry here, and what it costs (`planner.costs`) or does (`executor.rank`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

# The letters are those of torch.distributed.pipelining as far as it has them.
FORWARD, BACKWARD = "F", "B"
BACKWARD_INPUT, BACKWARD_WEIGHT = "I", "W"
RECOMPUTE = "R"
SEND_FORWARD, RECV_FORWARD = "SEND_F", "RECV_F"
SEND_BACKWARD, RECV_BACKWARD = "SEND_B", "RECV_B"
OFFLOAD, RELEASE, FETCH = "OFFLOAD", "RELEASE", "FETCH"
UNSHARD_FORWARD, RESHARD_FORWARD = "UNSHARD_F", "RESHARD_F"
UNSHARD_BACKWARD, RESHARD_BACKWARD = "UNSHARD_B", "RESHARD_B"
REDUCE_GRAD, REDUCE_TIED = "REDUCE_GRAD", "REDUCE_TIED"
REDUCE_ASYNC = "REDUCE_ASYNC"
NORM_GRAD, REDUCE_NORM = "NORM_GRAD", "REDUCE_NORM"
PULL, PUSH = "PULL", "PUSH"
OPTIMIZER = "OPTIMIZER"
LOAD = "LOAD"

Lane = Literal["compute", "link"]
Group = Literal["", "pair", "holders", "tied", "server", "host", "all"]
"""Who joins a transfer: the two ends of an edge; every holder of a stage, the n-th action of each; of each replica of
the pipeline the holders of the stages that share a parameter; a device with a server, or with its host; all devices."""


class Role(NamedTuple):
    """What operations look like: a letter in a drawing of text, a colour on the page (`--role-NAME` in its styles)."""

    name: str
    letter: str
    words: str


ROLES = {
    role.name: role
    for role in (
        Role("forward", "F", "forward"),
        Role("backward", "B", "backward"),
        Role("backward-input", "I", "of input"),
        Role("backward-weight", "W", "of weights"),
        Role("recompute", "R", "recompute"),
        Role("update", "O", "optimizer"),
        Role("input", "L", "load"),
        Role("message", "", "send, receive"),
        Role("collective", "A", "all-reduce"),
        Role("served", "P", "push and pull"),
        Role("copy", "", "copy to and from the host"),
    )
}


class Operation(NamedTuple):
    """One kind of action.

    `words` are for people, `short` what is written into its bar on the page (its name unless said), `role` how it
    looks, `lane` where what it begins is drawn. `computes` marks what a schedule may contain; everything else is added
    by `planner.programs.lowering`. `busy` marks what keeps a device computing: a receive may be posted one such action
    early.

    Transfers are named by one of their operations. `posts` is the transfer it is a party of, `end` which end of a
    message, `side` which edges of its stage a message takes, `group` who else joins. `awaits` tells whether it waits
    for that transfer itself: always, or when it has no micro-batch. Besides, it waits for the messages `takes`, the
    copy `needs` and the gather or reduction `wants` of its stage and micro-batch, where they exist. `makes` is the
    operation that sends on what it makes.

    `gradients` tells whether it adds to its stage's gradients, hands them to a reduction that goes on beside computing
    (the next backward then begins others), or uses them up.
    """

    name: str
    words: str
    role: str
    short: str | None = None
    lane: Lane = "compute"
    computes: bool = False
    busy: bool = False
    posts: str = ""
    end: Literal["", "source", "target"] = ""
    side: Literal["", "leaving", "reaching"] = ""
    group: Group = ""
    awaits: Literal["", "always", "alone"] = ""
    takes: str = ""
    needs: str = ""
    wants: str = ""
    makes: str = ""
    gradients: Literal["", "adds", "hands over", "uses"] = ""

    @property
    def colour(self) -> str:
        """Name of its colour on the page."""
        return f"role-{self.role}"


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            FORWARD, "forward", "forward", takes=RECV_FORWARD, wants=UNSHARD_FORWARD, makes=SEND_FORWARD,
            computes=True, busy=True,
        ),
        Operation(
            BACKWARD, "backward", "backward", takes=RECV_BACKWARD, needs=FETCH, wants=UNSHARD_BACKWARD,
            makes=SEND_BACKWARD, computes=True, busy=True, gradients="adds",
        ),
        Operation(
            BACKWARD_INPUT, "backward of the input", "backward-input", takes=RECV_BACKWARD, needs=FETCH,
            wants=UNSHARD_BACKWARD, makes=SEND_BACKWARD, computes=True, busy=True,
        ),
        Operation(
            BACKWARD_WEIGHT, "backward of the weights", "backward-weight", computes=True, busy=True, gradients="adds"
        ),
        # torch's checkpoint starts inside the backward, so a recompute waits for the gradient too.
        Operation(
            RECOMPUTE, "recompute", "recompute", takes=RECV_BACKWARD, needs=FETCH, wants=UNSHARD_BACKWARD, busy=True
        ),
        Operation(
            SEND_FORWARD, "sending activations", "message", "", posts=RECV_FORWARD, end="source", side="leaving",
            group="pair",
        ),
        Operation(
            RECV_FORWARD, "receiving activations", "message", "", "link", posts=RECV_FORWARD, end="target",
            side="reaching", group="pair",
        ),
        Operation(
            SEND_BACKWARD, "sending gradients", "message", "", posts=RECV_BACKWARD, end="source", side="reaching",
            group="pair",
        ),
        Operation(
            RECV_BACKWARD, "receiving gradients", "message", "", "link", posts=RECV_BACKWARD, end="target",
            side="leaving", group="pair",
        ),
        Operation(OFFLOAD, "copying to the host", "copy", lane="link", posts=OFFLOAD, group="host"),
        Operation(RELEASE, "waiting for the copy to the host", "copy", needs=OFFLOAD),
        Operation(FETCH, "copying from the host", "copy", lane="link", posts=FETCH, group="host"),
        Operation(
            UNSHARD_FORWARD, "gathering parameters", "collective", lane="link", posts=UNSHARD_FORWARD, group="holders",
            awaits="alone",
        ),
        Operation(
            UNSHARD_BACKWARD, "gathering parameters", "collective", lane="link", posts=UNSHARD_BACKWARD,
            group="holders", awaits="alone",
        ),
        Operation(RESHARD_FORWARD, "freeing gathered parameters", "collective"),
        Operation(RESHARD_BACKWARD, "freeing gathered parameters", "collective"),
        Operation(
            REDUCE_GRAD, "reducing gradients", "collective", "REDUCE", posts=REDUCE_GRAD, group="holders",
            awaits="always",
        ),
        Operation(
            REDUCE_ASYNC, "reducing gradients beside computing", "collective", "REDUCE", "link", posts=REDUCE_ASYNC,
            group="holders", gradients="hands over",
        ),
        Operation(
            REDUCE_TIED, "adding up gradients of shared parameters", "collective", "TIED", posts=REDUCE_TIED,
            group="tied", awaits="always",
        ),
        Operation(NORM_GRAD, "taking the norm of gradients", "update", "NORM"),
        Operation(
            REDUCE_NORM, "agreeing on the norm of all gradients", "collective", "NORM", posts=REDUCE_NORM, group="all",
            awaits="always",
        ),
        Operation(PULL, "pulling parameters", "served", posts=PULL, group="server", awaits="always"),
        Operation(PUSH, "pushing gradients", "served", posts=PUSH, group="server", awaits="always", gradients="uses"),
        Operation(OPTIMIZER, "the optimizer", "update", "OPT", wants=REDUCE_ASYNC, gradients="uses"),
        Operation(LOAD, "loading the batch", "input"),
    )
}  # fmt: skip
"""Every operation, by name."""

OPS = tuple(OPERATIONS)
NUMBER = {op: number for number, op in enumerate(OPS)}
COMPUTES = tuple(op for op, operation in OPERATIONS.items() if operation.computes)
"""What a schedule may contain; everything else is added by `planner.programs.lowering`."""

REDUCTIONS = tuple(op for op, o in OPERATIONS.items() if o.group == "holders" and (o.awaits == "always" or o.gradients))
"""What reduces a stage's gradients among its holders; all of them join, each time."""

AGREEMENTS = (*REDUCTIONS, *(op for op, o in OPERATIONS.items() if o.group in ("tied", "all")))
"""What nobody works on alone: it begins when the last of its parties has come, and is the transfer itself."""

SYNCHRONISING = tuple(
    op for op, operation in OPERATIONS.items() if operation.group in ("holders", "tied", "server", "all")
)
"""What a device does to agree with others on gradients and parameters: it computes nothing while it waits for that."""

PAIR, HOLDERS, TIED, SERVER, HOST, ALL = 1, 2, 3, 4, 5, 6
ALONE, ALWAYS = 1, 2
_GROUPS = ("", "pair", "holders", "tied", "server", "host", "all")

Numbers = npt.NDArray[np.int64]


class Table(NamedTuple):
    """The same for loops: one entry per operation's number; operations and transfers by number, -1 for none.

    `group` is one of PAIR to ALL (0: none), `source` and `target` whether it is that end of a message, `leaving`
    whether a message takes the edges that leave its stage. `awaits` is ALWAYS where it waits for its own transfer,
    ALONE where it does so without a micro-batch. `adds` marks what adds to gradients, `renews` that behind which
    the next of these begins others.
    """

    posts: Numbers
    group: Numbers
    source: Numbers
    target: Numbers
    leaving: Numbers
    awaits: Numbers
    takes: Numbers
    needs: Numbers
    wants: Numbers
    makes: Numbers
    computes: Numbers
    busy: Numbers
    adds: Numbers
    renews: Numbers


def _table() -> Table:
    every = OPERATIONS.values()

    def numbers(field: str) -> Numbers:
        return np.array([NUMBER[found] if (found := getattr(o, field)) else -1 for o in every], np.int64)

    def marks(found: list[bool]) -> Numbers:
        return np.array(found, np.int64)

    return Table(
        posts=numbers("posts"),
        group=np.array([_GROUPS.index(o.group) for o in every], np.int64),
        source=marks([o.end == "source" for o in every]),
        target=marks([o.end == "target" for o in every]),
        leaving=marks([o.side == "leaving" for o in every]),
        awaits=np.array([("", "alone", "always").index(o.awaits) for o in every], np.int64),
        takes=numbers("takes"),
        needs=numbers("needs"),
        wants=numbers("wants"),
        makes=numbers("makes"),
        computes=marks([o.computes for o in every]),
        busy=marks([o.busy for o in every]),
        adds=marks([o.gradients == "adds" for o in every]),
        renews=marks([o.gradients in ("hands over", "uses") for o in every]),
    )


TABLE = _table()
for _column in TABLE:
    _column.flags.writeable = False


def named(**wanted: object) -> tuple[str, ...]:
    """Return the operations whose fields are `wanted`.

    >>> named(gradients="uses"), named(end="source")
    (('PUSH', 'OPTIMIZER'), ('SEND_F', 'SEND_B'))
    """
    return tuple(
        op for op, operation in OPERATIONS.items() if all(getattr(operation, k) == v for k, v in wanted.items())
    )
