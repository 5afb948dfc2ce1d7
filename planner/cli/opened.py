"""What a question is about: the profile and the hardware that the options of several commands mean."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from planner.basis.errors import ARTEFACT, PlanError
from planner.store import Store
from planner.values import cluster_file
from planner.values.cluster import Cluster
from planner.values.profile import Profile, ProfileKey


def opened(profile: str | None, cluster: str | None) -> tuple[Store, Path, Profile, Cluster]:
    """Return the store, the profile with its path, and the cluster; by default the last profile and its own machine.

    Raises `PlanError` when one of them cannot be read, or (exit 4) when the last profile is stale.
    """
    from profiles import shipped

    store = Store(catalogue=shipped)
    path = store.profile_path(profile)
    measured = store.load_profile(path)
    if profile is None:
        check_fresh(measured, path)
    return store, path, measured, cluster_file.find(cluster, shipped.clusters()) if cluster else measured.machine


def check_fresh(measured: Profile, path: Path) -> None:
    """Raise `PlanError` (exit 4) when the model file or torch have changed since the profile, saying what."""
    source = Path(measured.model_path.partition(":")[0])
    current: dict[str, Any] = {"torch": importlib.metadata.version("torch")}
    if source.is_file():
        import hashlib

        current["source_sha256"] = hashlib.sha256(source.read_bytes()).hexdigest()
    key = measured.key
    fields = {f: current.get(f, getattr(key, f)) for f in key.__struct_fields__}
    require_same(measured, ProfileKey(**fields), path)


def require_same(measured: Profile, now: ProfileKey, path: Path) -> None:
    """Raise `PlanError` (exit 4) with every field in which a profile's key differs from what it would be now."""
    changed = measured.key.differences(now)
    if changed:
        again = f" --estimate {measured.key.device.partition(' ')[0]}" if measured.estimated else ""
        raise PlanError(
            what="the profile is stale",
            where=str(path),
            why="changed since it was measured: " + "; ".join(changed),
            fix=f"plan profile {measured.model_path}" + again,
            code=ARTEFACT,
        )
