"""The schedules: in which order the devices of a pipeline compute. The registry is the only list of them.

A schedule returns compute actions only; what has to be sent, recomputed or reduced is added by `planner.lowering`.
"""

from planner.schedules import asynchronous as asynchronous
from planner.schedules import interleaved as interleaved
from planner.schedules import straight as straight
from planner.schedules.registry import Schedule as Schedule
from planner.schedules.registry import Shape as Shape
from planner.schedules.registry import arrange as arrange
from planner.schedules.registry import get as get
from planner.schedules.registry import names as names
from planner.schedules.registry import schedule as schedule
from planner.schedules.registry import why_not as why_not
