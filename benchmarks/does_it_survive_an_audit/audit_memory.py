"""What a device holds."""

from __future__ import annotations

from collections.abc import Collection

import gpt
import msgspec
from figure import Found, figure
from hardware import hosts_of

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.orders import operations
from planner.placement import strategies
from planner.placement.question import Question
from planner.programs.lowering import unroll
from planner.programs.waits import Linked

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


def _per_parameter(strategy: str, dtype: str, devices: int) -> float:
    """Bytes per parameter that are always there on one of so many data-parallel devices."""
    costs, cluster = gpt.profile(1, dtype, BLOCKS=2), hosts_of(devices // 8, 8, nic=1e9)
    plan = strategies.get(strategy).spread(Question(costs, cluster, devices, devices, devices))
    model = MemoryModel(Placed(costs, plan, cluster), Linked(unroll(plan, replicas=1)))
    return float(model.static[0].sum()) / sum(layer.parameter_bytes / 2 for layer in costs.layers)


@figure("fp16 and Adam, data parallel over 64", section="memory", unit="bytes per parameter")
def replicated() -> Found:
    """ZeRO (arXiv 1910.02054, figure 1): 2 + 2 + K bytes with K = 12; 120 GB of 7.5 billion parameters."""
    return Found(_per_parameter("data-parallel", "fp16", 64), 16.0)


@figure("fp16 and Adam, ZeRO-1 over 64", section="memory", unit="bytes per parameter")
def sharded_state() -> Found:
    """2 + 2 + 12 / 64: 31.4 GB of 7.5 billion parameters in ZeRO's figure 1."""
    return Found(_per_parameter("zero-1", "fp16", 64), 4 + 12 / 64)


@figure("fp16 and Adam, ZeRO-2 over 64", section="memory", unit="bytes per parameter")
def sharded_gradients() -> Found:
    """2 + (2 + 12) / 64: 16.6 GB of 7.5 billion parameters in ZeRO's figure 1."""
    return Found(_per_parameter("zero-2", "fp16", 64), 2 + 14 / 64)


@figure("fp16 and Adam, ZeRO-3 over 64", section="memory", unit="bytes per parameter")
def sharded_parameters() -> Found:
    """(2 + 2 + 12) / 64: 1.9 GB of 7.5 billion parameters in ZeRO's figure 1."""
    return Found(_per_parameter("zero-3", "fp16", 64), 16 / 64)


@figure("bf16 and Adam, float32 gradients", section="memory", unit="bytes per parameter", before="16")
def main_gradients() -> Found:
    """Beside bfloat16 weights gradients are added up and reduced in float32: 2 + 4 + (4 + 4 + 4) = 18.

    Megatron-LM sets `accumulate_allreduce_grads_in_fp32` for bf16 (megatron/training/arguments.py), DeepSpeed's
    BF16_Optimizer keeps float32 gradients; the copy of the parameters and Adam's two moments are float32 as well.
    """
    return Found(_per_parameter("data-parallel", "bf16", 8), 18.0)


def _served(row: int) -> float:
    """Bytes per parameter that are always there on a device of 8, with a central server on the first, in float32."""
    costs, cluster = gpt.profile(1, BLOCKS=2), hosts_of(1, 8, nic=1e9)
    plan = strategies.get("parameter-server").spread(Question(costs, cluster, 8, 8, 8))
    plan = msgspec.structs.replace(plan, servers=(plan.device_names[0],))
    model = MemoryModel(Placed(costs, plan, cluster), Linked(unroll(plan)))
    return float(model.static[row].sum()) / sum(layer.parameter_bytes / 4 for layer in costs.layers)


@figure("central server and worker on one device", section="memory", unit="bytes per parameter", before="4")
def central_server() -> Found:
    """What it computes with (4), its copy of the parameters (4) and Adam's two moments (8), all in float32: 16."""
    return Found(_served(0), 16.0)


@figure("worker of a central server", section="memory", unit="bytes per parameter", before="4")
def worker() -> Found:
    """Parameters only (4): its gradients come with the first backward and go with the push, state it has none."""
    return Found(_served(1), 4.0)


@figure("inputs that each of 64 replicas loads", section="memory", unit="samples", before="64")
def loaded() -> Found:
    """A batch of 64 over 64 replicas: one sample each, not all of them (a DistributedSampler's share)."""
    costs, cluster = gpt.profile(1, BLOCKS=2), hosts_of(8, 8, nic=1e9)
    plan = strategies.get("data-parallel").spread(Question(costs, cluster, 64, 64, 64))
    model = MemoryModel(Placed(costs, plan, cluster), Linked(unroll(plan, replicas=1)))
    inputs, targets = costs.batch_bytes[0][1:]
    load = operations.NUMBER[operations.LOAD]
    return Found(float(model.change[load].sum()) / (inputs + targets), 1.0)
