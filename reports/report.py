"""What one page shows: values only, so a page can be rendered anywhere from a file."""

from __future__ import annotations

import msgspec

from planner.search.ranking import Ranking
from planner.values.cluster import Cluster
from planner.values.outcome import Comparison, Outcome
from planner.values.profile import Profile


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One plan's prediction and what belongs beside it.

    `cluster` is the hardware that it is for.
    `measured` and `comparison` are there once the plan was run, `ranking` when it was compared with others.
    `environment` maps a label to a text that is already free of host names and paths; `assumptions` are sentences.
    `command` reproduces the page: it asks the question again, then writes the page of its answer. `created`, an ISO
    time, is all that differs between two renderings of one report.
    """

    predicted: Outcome
    measured: Outcome | None = None
    comparison: Comparison | None = None
    ranking: Ranking | None = None
    profile: Profile
    cluster: Cluster
    environment: dict[str, str]
    assumptions: tuple[str, ...]
    command: str
    created: str
