"""Links and collectives."""

from __future__ import annotations

from figure import Found, figure
from hardware import FOUR_BY_FOUR

from planner.costs import collectives
from profiles import shipped


@figure("VGG-16 data parallel over 4 x 4: ring", section="links", before="0.83 s")
def vgg_ring() -> Found:
    """Each of 16 devices sends 2 x 15/16 of 553 MB over a 1.25 GB/s NIC: 2 x 15/16 x 0.553 / 1.25 = 0.83 s."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    size = float(sum(layer.gradient_bytes for layer in profile.layers))
    names = tuple(device.name for device in FOUR_BY_FOUR.devices)
    return Found(collectives.all_reduce(FOUR_BY_FOUR, names, size), 2 * 15 / 16 * size / 1.25e9)
