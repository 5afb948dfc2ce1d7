"""The schedules: in which order the devices of a pipeline compute. The registry is the only list of them.

A schedule returns compute actions only; what has to be sent, recomputed or reduced is added by
`planner.programs.lowering`.
"""

from planner.orders.schedules import straight as straight  # the order of these is the order of the registry

from planner.orders.schedules import interleaved as interleaved  # isort: skip
from planner.orders.schedules import zero_bubble as zero_bubble  # isort: skip
from planner.orders.schedules import vee as vee  # isort: skip
from planner.orders.schedules import controllable as controllable  # isort: skip
from planner.orders.schedules import both_ways as both_ways  # isort: skip
from planner.orders.schedules import asynchronous as asynchronous  # isort: skip
from planner.orders.schedules.registry import Schedule as Schedule  # isort: skip
from planner.orders.schedules.registry import Shape as Shape  # isort: skip
from planner.orders.schedules.registry import arrange as arrange  # isort: skip
from planner.orders.schedules.registry import get as get  # isort: skip
from planner.orders.schedules.registry import names as names  # isort: skip
from planner.orders.schedules.registry import schedule as schedule  # isort: skip
from planner.orders.schedules.registry import why_not as why_not  # isort: skip
