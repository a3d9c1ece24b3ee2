"""The guest's writes, and what a bitmap says of them, by QEMU's own tools and no code of ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.rig.wire import Witness

CLUSTER = 65536


def write(eye: Witness, device: str, offset: int, length: int = CLUSTER) -> None:
    """Write bytes as the guest's device *device* (a virtio-blk) does."""
    line = f'qemu-io -d /machine/peripheral/{device}/virtio-backend "write {offset} {length}"'
    said = eye.ask("human-monitor-command", **{"command-line": line})
    assert "error" not in said.lower(), said


def dirty(eye: Witness, folder: Path, node: str, name: str) -> set[int]:
    """The clusters that the bitmap *name* on *node* says have changed."""
    socket = folder / "dirty"
    address = {"type": "unix", "data": {"path": str(socket)}}
    export = {"type": "nbd", "id": "dirty", "node-name": node, "name": "it"}
    eye.ask("nbd-server-start", addr=address)
    try:
        eye.ask("block-export-add", **export, bitmaps=[{"node": node, "name": name}])
        image = {
            "driver": "nbd",
            "server": {"type": "unix", "path": str(socket)},
            "export": "it",
            "x-dirty-bitmap": f"qemu:dirty-bitmap:{name}",
        }
        mapped = ["qemu-img", "map", "--output=json", f"json:{json.dumps(image)}"]
        told = subprocess.run(mapped, capture_output=True, text=True, check=True).stdout
        eye.ask("block-export-del", id="dirty", mode="hard")
        eye.until(lambda: eye.ask("query-block-exports") == [], within=10)
    finally:
        eye.ask("nbd-server-stop")
    return {
        cluster
        for extent in json.loads(told)
        if not extent["data"]  # qemu-img's way to say: dirty
        for cluster in range(
            extent["start"] // CLUSTER, -(-(extent["start"] + extent["length"]) // CLUSTER)
        )
    }
