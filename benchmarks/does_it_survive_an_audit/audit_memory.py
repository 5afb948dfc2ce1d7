"""What a device holds."""

from __future__ import annotations

from collections.abc import Collection

import gpt
from figure import Found, figure

MIB = 2.0**20
SAMPLES = 16


def _counted(checkpointed: Collection[int]) -> Found:
    """Compare a step's peak with torch's own: parameters and Adam's state, 3 x 4 bytes each, and what is counted."""
    costs = gpt.profile(SAMPLES)
    model = gpt.module()
    parameters = sum(layer.parameter_bytes for layer in costs.layers)
    batch = 2 * 8 * SAMPLES * model.CONTEXT
    counted = gpt.counted(model, SAMPLES, checkpointed)
    peak = gpt.predicted(costs, SAMPLES, checkpointed)
    return Found(peak / MIB, (3 * parameters + batch + counted) / MIB)


@figure("12-block GPT, torch's checkpoint in every block", section="memory", unit="MiB", before="5,650 MiB")
def every_block() -> Found:
    """Width 768, context 512, 12 heads, 128 characters, micro-batch 16, fp32, Adam; one micro-batch in flight.

    327 MiB of parameters and twice that of Adam's state are there from the start: 980 MiB. torch's own forward and
    backward with `torch.utils.checkpoint` in every block, run on tensors without data, add 815 MiB at most: every
    block's input (12 x 24 MiB), one block's repeated activations (360), its gradients in passing, and the gradients of
    the parameters so far. Together 1,796; the issue's 1,820 counts one more output of a block (24 MiB), which torch has
    let go of by then.
    """
    return _counted(range(12))


@figure("12-block GPT, no checkpoint", section="memory", unit="MiB", before="5,751 MiB")
def no_block() -> Found:
    """As above, with nothing repeated: 12 x (360 inside + 24 of output), counted on torch's own run."""
    return _counted(())


@figure("12-block GPT, torch's checkpoint in every second block", section="memory", unit="MiB", before="5,650 MiB")
def every_second_block() -> Found:
    """As above, with six blocks of twelve repeated, counted on torch's own run."""
    return _counted(range(0, 12, 2))
