"""What a question is about: the profile and the hardware that the options of several commands mean."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from planner.basis.errors import ARTEFACT, DEVICE, PlanError, unknown
from planner.basis.sources import digest
from planner.cli import output
from planner.search.ranking import Ranking, check_least
from planner.store import Store, is_table, no_length
from planner.values import cluster_file
from planner.values.cluster import Cluster
from planner.values.plan import Plan
from planner.values.profile import SCHEMA, Profile, ProfileKey


class Opened(NamedTuple):
    """The profile that is meant, with its path, the cluster, and profiles of all lengths that are to be compared."""

    store: Store
    path: Path
    profile: Profile
    cluster: Cluster
    lengths: tuple[Profile, ...]


def opened(profile: str | None, cluster: str | None, sequences: Sequence[int] = ()) -> Opened:
    """Return what a question is about; by default the last profile and its own machine.

    Of one sequence length that is asked for, the profile is of that length; of several there is a profile of each, and
    the machine is that of the first. Raises `PlanError` when one of them cannot be read, or (exit 4) when the last
    profile is stale, or there is none of a length.
    """
    from profiles import shipped

    store = Store(catalogue=shipped)
    path = store.profile_path(profile)
    measured = store.load_profile(path)
    if profile is None:
        check_fresh(measured, path)
    every = [of_length(store, path, measured, tokens) for tokens in dict.fromkeys(sequences)]
    if every and measured.sequence not in sequences:
        path, measured = every[0]
    several = tuple(own for _, own in every) if len(every) > 1 else ()
    return Opened(store, path, measured, hardware_of(measured, cluster), several)


def of_length(store: Store, path: Path, profile: Profile, sequence: int) -> tuple[Path, Profile]:
    """Return the profile, with its path, of the same model on the same device with sequences of so many tokens.

    Raises `PlanError` (exit 4) where there is none, with the command that makes it, and (exit 2) where there can be
    none.
    """
    if sequence == profile.sequence:
        return path, profile
    if is_table(path) or not profile.sequence or sequence < 1:
        measured = f"the samples that were measured are {profile.sequence} tokens"
        raise no_length(
            profile.key.model,
            sequence,
            where=path,
            why=measured if profile.sequence else "its samples are no sequences of tokens",
            fix="leave --sequence out, or profile a model of your own: plan profile model.py --sequence 512",
        )
    found = store.of_length(path, profile.key, sequence, fix=profiling(profile, sequence))
    return found, store.load_profile(found)


def profiling(profile: Profile, sequence: int) -> str:
    """Return the command that makes a profile like this one, with sequences of so many tokens."""
    estimated = f" --estimate {profile.key.device.partition(' ')[0]}" if profile.estimated else ""
    return f"plan profile {profile.model_path}" + (f" --sequence {sequence}" if sequence else "") + estimated


def _pairs(tied: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(" and ".join(map(str, group)) for group in tied) or "none"


def of_plan(store: Store, path: Path, profile: Profile, plan: Plan, given: str | None) -> tuple[Path, Profile]:
    """Return the profile of a plan's sequence length; one that a person has `given` must be of it.

    Raises `PlanError` (exit 4) where there is none, or the plan is for another model.
    """
    shared = profile.ties(plan.layer_ranges([layer.name for layer in profile.layers]))
    if shared != plan.tied:
        raise PlanError(
            what="the plan says of other stages that they share parameters",
            where=f"plan {plan}, tied",
            why=f"it says {_pairs(plan.tied)}, and by the profile it is {_pairs(shared)}",
            fix=f"tied = {[list(group) for group in shared]}",
            code=ARTEFACT,
        )
    if plan.norm != profile.norm:
        clips = "clips or scales all gradients together" if profile.norm else "neither clips nor scales its gradients"
        raise PlanError(
            what="the plan is for a model that treats its gradients otherwise",
            where=f"plan {plan}, norm",
            why=f"it says {str(plan.norm).lower()}, and by the profile the model {clips}",
            fix=f"norm = {str(profile.norm).lower()}",
            code=ARTEFACT,
        )
    fewer = plan.batch // profile.least
    check_least(profile, plan.samples, f"plan {plan}, microbatches", f"microbatches = {max(1, fewer)}, or fewer")
    if not plan.sequence or plan.sequence == profile.sequence:
        return path, profile
    if given is not None:
        raise PlanError(
            what=f"the plan is for sequences of {plan.sequence} tokens",
            where=f"plan {plan}, --profile {given}",
            why=f"that profile is of {profile.sequence} tokens, and nothing is scaled from one length to another",
            fix="leave --profile out, or give the profile of that length",
            code=ARTEFACT,
        )
    return of_length(store, path, profile, plan.sequence)


def hardware_of(profile: Profile, cluster: str | None) -> Cluster:
    """Return the cluster of that name or file, its devices' speeds relative to the profile's; by default its machine.

    Says on stderr where what a speed is relative to is not what was profiled, and no table knows both.
    """
    from profiles import shipped

    if cluster is None:
        return profile.machine
    found, unsure = compared_with(cluster_file.find(cluster, shipped.clusters()), profile)
    for note in unsure:
        output.progress.print(f"note: {note}", markup=False)
    return found


def compared_with(cluster: Cluster, profile: Profile) -> tuple[Cluster, list[str]]:
    """Return a cluster with its devices' speeds relative to the profiled device; and what is not known about that.

    A device of the profile's own kind has speed 1. A speed that the file gives relative to the profile's kind holds.
    Else it is the ratio of peaks, where `profiles/data/hardware.toml` has both kinds; or the file's, times that of what
    it is relative to; or, where nobody knows, it stays as it is.
    """
    from profiles.hardware import relative_speed

    own, dtype = profile.device_kind, profile.key.computing
    devices, unsure = [], dict[str, None]()
    for device in cluster.devices:
        kinds = relative_speed(device.kind, own, dtype)
        other = relative_speed(device.speed_of, own, dtype)
        if device.kind and device.kind == own:
            device = msgspec.structs.replace(device, speed=1.0, speed_of=own)
        elif device.speed_of and other == 1.0:
            device = msgspec.structs.replace(device, speed_of=own)
        elif device.speed_of and kinds is not None:
            device = msgspec.structs.replace(device, speed=kinds, speed_of=own)
        elif device.speed_of and other is not None:
            device = msgspec.structs.replace(device, speed=device.speed * other, speed_of=own)
        elif device.speed_of and device.speed_of != own:
            unsure[
                f"the profile is of {own or profile.key.device}, and {cluster.name} says how fast its devices are "
                f"relative to a {device.speed_of}: their speed of {device.speed:g} is taken as it is"
            ] = None
        devices.append(device)
    return msgspec.structs.replace(cluster, devices=tuple(devices)), list(unsure)


class Meant(NamedTuple):
    """A plan, and the profile and the cluster that it is looked at with. `ranking` is the simulation it comes from."""

    plan: Plan
    profile: Profile
    path: Path
    cluster: Cluster
    ranking: Ranking | None


def is_file(reference: str) -> bool:
    """Whether a plan is meant by its file."""
    return reference.endswith(".toml") or os.sep in reference


def anything(plan: Plan) -> bool:
    """Whether a plan can be looked at: each can."""
    return True


def meant(reference: str, profile: str | None, cluster: str | None, able: Callable[[Plan], bool] = anything) -> Meant:
    """Return the plan that a name or a file means, with what the last simulation was about where nothing else is said.

    The best is the best of those that are `able`.

    Raises `PlanError` when there is no such plan, or it is for another model or for more devices than there are.
    """
    from profiles import shipped

    store = Store(catalogue=shipped)
    plan = store.plan(reference, able)
    known = not is_file(reference) or (profile is None and (store.root / "simulation.json").exists())
    ranking = store.load_ranking() if known else None
    path = store.profile_path(profile or (ranking.profile if ranking else None))
    path, measured = of_plan(store, path, store.load_profile(path), plan, profile)
    hardware = ranking.cluster if ranking and profile is None and cluster is None else hardware_of(measured, cluster)
    return Meant(on_devices_of(plan, hardware), measured, path, hardware, None if is_file(reference) else ranking)


def is_of_own_machine(store: Store, ranking: Ranking) -> bool:
    """Whether a simulation was for the machine that its profile was measured on."""
    return ranking.cluster == store.load_profile(store.profile_path(ranking.profile)).machine


def on_devices_of(plan: Plan, cluster: Cluster, *, mapped: bool = True) -> Plan:
    """Return the plan on a cluster's own devices; where it is for other hardware, on the first ones in their order.

    That is said on stderr, or, where nothing is to be `mapped`, refused (exit 5). Raises `PlanError` (exit 5) when the
    cluster has fewer, and (exit 2) with the nearest name for a device that it does not have beside others that it has,
    and for an unknown host as a server.
    """
    taken = cluster.take(len(plan.device_names)).devices
    where = f"plan {plan}, cluster '{cluster.name}'"
    hosts = [host.name for host in cluster.hosts]
    for name in plan.servers:
        if name not in plan.device_names and name not in hosts:
            raise unknown("server", name, [*hosts, *plan.device_names], where=where, fix="correct servers in the plan")
    known = {device.name: device for device in (cluster.devices or taken)}
    if set(plan.device_names) <= known.keys():
        return msgspec.structs.replace(plan, threads=known[plan.device_names[0]].threads)
    every = set(known)
    if cluster.elastic:  # it makes as many devices as are asked for
        every |= {device.name for device in cluster.take(cluster.hosts[0].cores).devices}
    strangers = [name for name in plan.device_names if name not in every]
    if 0 < len(strangers) < len(plan.device_names):
        raise unknown("device", strangers[0], sorted(every), where=where, fix="name the cluster's devices in the plan")
    if strangers and not mapped:
        fix = "name its devices in the plan, or see what another machine would do: plan run --rehearse"
        raise unknown("device", strangers[0], sorted(every), where=where, fix=fix, code=DEVICE)
    renamed = dict(zip(plan.device_names, (device.name for device in taken), strict=True))
    stages = tuple(
        msgspec.structs.replace(stage, devices=tuple(renamed[name] for name in stage.devices)) for stage in plan.stages
    )
    moved = [f"{old} to {new}" for old, new in renamed.items() if old != new]
    more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
    output.progress.print(f"note: {where}: devices mapped, {', '.join(moved[:3])}{more}", markup=False, soft_wrap=True)
    servers = tuple(renamed.get(name, name) for name in plan.servers)
    return msgspec.structs.replace(plan, stages=stages, servers=servers, threads=taken[0].threads)


def check_fresh(measured: Profile, path: Path) -> None:
    """Raise `PlanError` (exit 4) when the model file or torch have changed since the profile, saying what."""
    source = Path(measured.model_path.partition(":")[0])
    current: dict[str, Any] = {"torch": _installed(measured.key.torch), "schema": SCHEMA}
    if source.is_file():
        current["source_sha256"] = digest(source, measured.sources)
    key = measured.key
    fields = {f: current.get(f, getattr(key, f)) for f in key.__struct_fields__}
    require_same(measured, ProfileKey(**fields), path)


def _installed(measured: str) -> str:
    """The version of torch that is installed, read without loading it (seconds).

    torch calls itself 2.15.0+cu132 where its package is called 2.15.0: that is no difference.
    """
    found = importlib.metadata.version("torch")
    return measured if measured.partition("+")[0] == found else found


def require_same(measured: Profile, now: ProfileKey, path: Path) -> None:
    """Raise `PlanError` (exit 4) with every field in which a profile's key differs from what it would be now."""
    changed = measured.key.differences(now)
    if changed:
        raise PlanError(
            what="the profile is stale",
            where=str(path),
            why="changed since it was measured: " + "; ".join(changed),
            fix=profiling(measured, measured.sequence),
            code=ARTEFACT,
        )
