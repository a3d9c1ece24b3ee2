"""All surfaces, by their names."""

from __future__ import annotations

from tests.fuzz.surface import Surface
from tests.fuzz.surfaces import disks, files, host, images, lines, replies, stores, wires

SURFACES: dict[str, Surface] = {
    one.name: one
    for some in (
        replies.ALL,
        files.ALL,
        stores.ALL,
        lines.ALL,
        host.ALL,
        images.ALL,
        disks.ALL,
        wires.ALL,
    )
    for one in some
}
