"""Clusters written by hand: TOML files whose tables abbreviate hosts, devices, switches and links that are alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from planner.basis import files
from planner.basis.errors import PlanError, unknown
from planner.orders.codes import STAGES
from planner.values.cluster import Cluster, Communication
from planner.values.hardware import Device, Host, Link

T = TypeVar("T", Host, Device, Link)
_Count = Annotated[int, msgspec.Meta(ge=1, le=STAGES + 1)]


class _HostTable(Host, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: _Count = 1


class _DeviceTable(Device, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: _Count = 1


class _SwitchTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    count: _Count = 1


class _LinkTable(Link, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _ClusterFile(Communication, frozen=True, kw_only=True, dict=True, forbid_unknown_fields=True):
    name: str
    hosts: tuple[_HostTable, ...]
    devices: tuple[_DeviceTable, ...]
    switches: tuple[_SwitchTable, ...] = ()
    links: tuple[_LinkTable, ...] = ()

    def cluster(self) -> Cluster:
        """Write out what the tables abbreviate."""
        tables: list[_HostTable | _DeviceTable | _SwitchTable] = [*self.hosts, *self.switches, *self.devices]
        groups = {table.name: _numbered(table.name, table.count) for table in tables}
        return Cluster(
            name=self.name,
            hosts=tuple(_copy(Host, t, name=name) for t in self.hosts for name in _numbered(t.name, t.count)),
            devices=tuple(
                _copy(Device, t, name=name, host=host)
                for t in self.devices
                for name, host in _dealt(_numbered(t.name, t.count), _named(t.host, groups))
            ),
            switches=tuple(name for t in self.switches for name in _numbered(t.name, t.count)),
            links=tuple(
                _copy(Link, t, between=between)
                for t in self.links
                for between in _dealt(_named(t.between[0], groups), _named(t.between[1], groups))
            ),
            **{name: getattr(self, name) for name in Communication.__struct_fields__},
        )


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return (name,) if count == 1 else tuple(f"{name}{index}" for index in range(count))


def _copy(kind: type[T], table: T, **changes: object) -> T:
    return kind(**{f: getattr(table, f) for f in kind.__struct_fields__} | changes)


def _named(name: str, groups: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """The node of that name; `name*` stands for all of a table."""
    if not name.endswith("*"):
        return (name,)
    if name[:-1] not in groups:
        raise ValueError(f"'{name}': there is no table '{name[:-1]}', only {', '.join(groups)}")
    return groups[name[:-1]]


def _dealt(left: Sequence[str], right: Sequence[str]) -> list[tuple[str, str]]:
    """Join every name of the longer list with one of the shorter, in equal blocks.

    >>> _dealt(["d0", "d1", "d2", "d3"], ["h0", "h1"])
    [('d0', 'h0'), ('d1', 'h0'), ('d2', 'h1'), ('d3', 'h1')]
    """
    count = max(len(left), len(right))
    if count % len(left) or count % len(right):
        raise ValueError(f"{len(left)} of '{left[0]}' … and {len(right)} of '{right[0]}' … cannot be dealt out evenly")
    return [(left[i * len(left) // count], right[i * len(right) // count]) for i in range(count)]


def find(given: str, shipped: Mapping[str, Path]) -> Cluster:
    """Read a cluster by the path of its file, or by the name of one in `shipped`.

    Raises `PlanError` (exit 2), for an unknown name with the nearest that is known.
    """
    path = Path(given)
    if path.is_file() or path.suffix == ".toml" or os.sep in given:
        return read(path)
    if given in shipped:
        return read(shipped[given])
    fix = "give one of the known names, or the path of a TOML file such as examples/eight_devices.toml"
    raise unknown("cluster", given, sorted(shipped), where="--cluster", fix=fix)


def read(path: Path) -> Cluster:
    """Read a cluster from TOML.

    `count = 8` in a table of a host, device or switch stands for eight of them, name0 to name7. Where a device names
    its host, or a link its ends, `name*` means all of them, each with the one in whose block it stands: of 16 `gpu*`
    on 2 `node*`, gpu0 to gpu7 are on node0.
    Raises `PlanError` (exit 2) that names the field, also where two devices have no way to each other.
    """
    try:
        cluster = msgspec.toml.decode(files.toml(path), type=_ClusterFile).cluster()
    except OSError as error:
        raise PlanError(
            what="the cluster file cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            fix="give the path of a TOML file, for example --cluster examples/eight_devices.toml",
        ) from error
    except (msgspec.DecodeError, ValueError) as error:
        raise PlanError(
            what="the cluster file is not valid",
            where=str(path),
            why=str(error),
            fix="compare it with examples/eight_devices.toml",
        ) from error
    for one, other in pairwise(cluster.devices):
        cluster.path(one.name, other.name)
    return cluster
