"""What a rehearsal knows of a model: for how long each action waits instead of computing, and what it holds meanwhile.

It is made from a profile by what also predicts the plan (`planner.costs.rehearsed`), so the ranks of a rehearsal need
neither the model nor its file.
"""

from __future__ import annotations

import msgspec


class Passed(msgspec.Struct, frozen=True, kw_only=True):
    """A value that goes from stage to stage with a micro-batch: its bytes, and whether as many come back."""

    name: str
    bytes: int
    gradient: bool


class Shadow(msgspec.Struct, frozen=True, kw_only=True):
    """A stage without its layers.

    `taken` goes into it and `made` comes out of it, per micro-batch; what is in both is passed on. `inside` are the
    bytes that an action needs while it runs, by operation, `first` the same where it has to allocate the stage's
    `gradients`; `kept` are those that it leaves behind for the micro-batch's backward. `reduced` are the bytes of each
    collective among the stage's holders, `tied` those added up with other stages, `gathered` those of each gather of
    parameters of which the holders have shards.
    """

    taken: tuple[Passed, ...]
    made: tuple[Passed, ...]
    inside: dict[str, int]
    first: dict[str, int]
    kept: dict[str, int]
    batch: int
    gradients: int
    reduced: tuple[int, ...]
    tied: int
    gathered: tuple[int, ...] = ()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A rank of a rehearsal: the bytes that it has from the first action to the last, by kind, and its waits.

    Those are the seconds of every operation of each of its stages ("0F"), at the percentiles of `quantiles`.
    """

    static: dict[str, int]
    seconds: dict[str, tuple[float, ...]]


class Rehearsal(msgspec.Struct, frozen=True, kw_only=True):
    """All stages and rows of a plan. With `jitter` waits are drawn from their percentiles, else they are medians.

    `message_scale` is what part of the profiled bytes the messages and collectives have: it is in `Shadow` already.
    """

    stages: tuple[Shadow, ...]
    rows: tuple[Row, ...]
    quantiles: tuple[float, ...]
    jitter: bool = False
    message_scale: float = 1.0
