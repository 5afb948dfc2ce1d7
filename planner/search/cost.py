"""What training costs to rent: hosts are rented whole, by the hour, for as many samples as are to be trained on."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import msgspec

from planner.basis.errors import USAGE, PlanError
from planner.basis.memo import memoised
from planner.values.cluster import Cluster

HOUR_S = 3600.0
ROUNDING = 1e-9
"""Relative differences up to this one are those of adding floats in another order."""
Amount: TypeAlias = Any
"""A number, or an array of them: bounds of many points are reckoned at once."""


class Terms(NamedTuple):
    """What a person asks of a plan beside its objective.

    `units` are the samples of an epoch, or of all the training, or its tokens where lengths are compared; within
    `deadline_s` seconds they must be done, for at most `budget` in the currency of the cluster's prices. Without them
    nothing is ruled out. The methods are given the units of a step.
    """

    units: int
    deadline_s: float | None = None
    budget: float | None = None

    def seconds(self, step_s: Amount, units: int) -> Amount:
        """Seconds for all of them; the last step is a whole one."""
        return step_s * -(-self.units // units)

    def money(self, step_s: Amount, units: int, price_per_hour: float) -> Amount:
        """Price of all of them."""
        return price_per_hour * self.seconds(step_s, units) / HOUR_S

    def met(self, step_s: Amount, units: int, price_per_hour: float) -> Amount:
        """Whether a plan is done in time, and within the budget; with lower bounds of steps, whether each may be."""
        in_time = self.deadline_s is None or self.seconds(step_s, units) <= self.deadline_s * (1 + ROUNDING)
        affordable = self.budget is None or self.money(step_s, units, price_per_hour) <= self.budget * (1 + ROUNDING)
        return in_time & affordable


def with_prices(cluster: Cluster, *, device: float | None = None, host: float | None = None) -> Cluster:
    """Return the cluster with other prices per hour: of every device, of every host, each where it is given.

    Raises `PlanError` (exit 2) for a price below 0.
    """
    for flag, price in (("device", device), ("host", host)):
        if price is not None and not 0 <= price < float("inf"):
            raise PlanError(
                what=f"a price of {price:g} makes no sense",
                where=f"the price per hour of a {flag}",
                why="prices are finite and not below 0",
                fix="give a price from 0, in any currency",
                code=USAGE,
            )
    changed = cluster
    if device is not None:
        own = tuple(msgspec.structs.replace(d, price_per_hour=device) for d in cluster.devices)
        changed = msgspec.structs.replace(changed, devices=own)
    if host is not None:
        hosts = tuple(msgspec.structs.replace(h, price_per_hour=host) for h in cluster.hosts)
        changed = msgspec.structs.replace(changed, hosts=hosts)
    return changed


def priced(cluster: Cluster) -> bool:
    """Whether the cluster says what anything costs."""
    return any(price > 0 for _, price in _hosts(cluster).values())


def price_per_hour(cluster: Cluster, devices: tuple[str, ...]) -> float:
    """Return what the hosts of these devices cost per hour, each with all its devices: it is rented whole."""
    if not priced(cluster):
        return 0.0
    home = memoised(cluster, "host of", lambda: {device.name: device.host for device in cluster.devices})
    hosts = _hosts(cluster)
    rented = {home[name] for name in devices} if home else hosts.keys()  # an elastic host is its own
    return sum(hosts[name][1] for name in rented)


def least_price_per_hour(cluster: Cluster, count: int) -> float:
    """Return what `count` devices cost per hour at least, whichever they are."""
    if not priced(cluster):
        return 0.0
    return memoised(cluster, ("least price", count), lambda: _least(cluster, count))


def _least(cluster: Cluster, count: int) -> float:
    hosts = [(devices, price) for devices, price in _hosts(cluster).values() if devices]
    fewest, left = 0, count
    for devices in sorted((devices for devices, _ in hosts), reverse=True):
        if left <= 0:
            break
        fewest, left = fewest + 1, left - devices
    return sum(sorted(price for _, price in hosts)[: max(1, fewest)])


def _hosts(cluster: Cluster) -> dict[str, tuple[int, float]]:
    """Every host's number of devices, and its price with them."""

    def make() -> dict[str, tuple[int, float]]:
        found = {host.name: (host.cores if cluster.elastic else 0, host.price_per_hour) for host in cluster.hosts}
        for device in cluster.devices:
            count, price = found[device.host]
            found[device.host] = count + 1, price + device.price_per_hour
        return found

    return memoised(cluster, "prices of hosts", make)
