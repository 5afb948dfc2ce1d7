"""The schedules: in which order the devices of a pipeline compute. The registry is the only list of them.

A schedule returns compute actions only; what has to be sent, recomputed or reduced is added by `planner.lowering`.
"""

from planner.schedules import asynchronous, both_ways, controllable, interleaved, straight, vee, zero_bubble
from planner.schedules.registry import Schedule, Shape, arrange, get, names, schedule, why_not

__all__ = [
    "Schedule",
    "Shape",
    "arrange",
    "asynchronous",
    "both_ways",
    "controllable",
    "get",
    "interleaved",
    "names",
    "schedule",
    "straight",
    "vee",
    "why_not",
    "zero_bubble",
]
