"""Versions of weights along whole runs: as many as the planner says, and each micro-batch reads one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from executor.course import Course
from executor.versions import Versions
from planner.orders.operations import BACKWARD, FORWARD, OPTIMIZER
from planner.values.plan import Plan
from tests.planner.test_rolling import PLANS

SOME = [plan for plan in PLANS if plan.microbatches in (1, 2, 4, 6)]


@pytest.mark.parametrize("plan", SOME, ids=str)
def test_no_more_versions_are_kept_than_planned_and_none_is_overwritten_too_early(plan: Plan) -> None:
    for device in range(len(plan.groups)):
        course, (stage,) = Course(plan, device, "per pair"), plan.stages_of[device]
        parameter = nn.Parameter(torch.zeros(1))
        versions = Versions([parameter], plan.versions(stage))
        versions.following = lambda m, course=course, stage=stage: course.following(stage, m)
        value = 0.0

        def step(versions: Versions = versions) -> None:
            versions.own[0].data += 1

        for steps in (9, 1, 3):  # runs behind each other, each from an empty pipeline
            course.begin(steps)
            versions.begin()
            versions.reads = course.reads(stage)
            read: dict[int, float] = {}
            for _ in range(steps):
                for action in map(course.named, course.next()):
                    if action.op == FORWARD:
                        versions.forward(action.microbatch)
                        read[action.microbatch] = float(parameter.detach())
                    elif action.op == BACKWARD:
                        versions.backward(action.microbatch)
                        assert float(parameter.detach()) == read.pop(action.microbatch), action
                    elif action.op == OPTIMIZER:
                        versions.renew(step, {})
                        value += 1
                        assert float(parameter.detach()) == value
                course.done += 1
            assert not read
        assert len(versions.slots) + len(versions.spare) <= plan.versions(stage)
