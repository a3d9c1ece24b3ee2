"""What the fault tests share: a small running VM behind a faulty wire, and what must hold of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpsnap.engine.engine import Engine
from qmpsnap.engine.machine import Machine
from qmpsnap.engine.wishes import Level, RamChoice, Wishes
from qmpsnap.host import journal
from tests.rig.qemu import Running, running
from tests.rig.wire import Wire, Witness, wired, witness

_OURS = re.compile(r"-(\d{8}T\d{9}Z)$")
_DEFAULTS = {"max-bandwidth": 128 << 20, "downtime-limit": 300}
_SIZE = 16 << 20  # of each disk
CLUSTER = 65536


def wishes(ram: RamChoice, **other: Any) -> Wishes:
    """A snapshot with a pause that no busy machine makes too long."""
    return Wishes(ram=ram, **{"max_pause": 20, "level": Level.OVERLAY, **other})


@dataclass(slots=True)
class Bench:
    """A firmware-only VM that is `running`, with two disks, behind *wire*."""

    qemu: Running
    wire: Wire
    witness: Witness
    local: Path
    store: Path
    disks: list[Path]
    model: dict[str, bytearray] = field(default_factory=dict, repr=False)
    """What the guest has written, by the disk's device."""
    _listed: set[str] = field(default_factory=set)
    _writes: int = 0

    def engine(self) -> Engine:
        return Engine(self.local, self.store, allow_local_store=True)

    @property
    def wired(self) -> Machine:
        return Machine("vm", self.wire.path)

    @property
    def clean(self) -> Machine:
        return Machine("vm", self.qemu.qmp)

    def owes(self) -> list[str]:
        return [record.id for record in journal.pending(self.local / "vm/journal")]

    def chains(self) -> list[list[str]]:
        """The files of each disk, the one that takes the writes first."""
        found = []
        for item in self.witness.ask("query-block"):
            image, files = item["inserted"]["image"], []
            while image is not None:
                files.append(Path(image["filename"]).name)
                image = image.get("backing-image")
            found.append(files)
        return found

    def guest_writes(self, *clusters: int) -> None:
        """The guest fills these clusters of both disks, each time with other bytes."""
        for device, content in self.model.items():
            for cluster in clusters:
                self._writes += 1
                pattern, at = self._writes % 255 + 1, cluster * CLUSTER
                backend = f"/machine/peripheral/{device}/virtio-backend"
                line = f'qemu-io -d {backend} "write -P {pattern} {at} {CLUSTER}"'
                said = self.witness.ask("human-monitor-command", **{"command-line": line})
                assert "error" not in said.lower(), said
                content[at : at + CLUSTER] = bytes([pattern]) * CLUSTER

    @contextlib.contextmanager
    def busy_guest(self) -> Iterator[list[float]]:
        """The guest writes all the while, a cluster at a time; the seconds that each one took.

        Nobody else may use the witness meanwhile. A write that fails is raised at the end.
        """
        took: list[float] = []
        over = threading.Event()

        def write() -> None:
            for cluster in itertools.cycle(range(10, 60)):
                if over.is_set():
                    return
                begun = time.monotonic()
                self.guest_writes(cluster)
                took.append(time.monotonic() - begun)
                over.wait(0.01)

        with ThreadPoolExecutor(1) as writer:
            writing = writer.submit(write)
            try:
                yield took
            finally:
                over.set()
            writing.result()

    def disks_now(self) -> dict[str, bytes]:
        """What the guest would read now, had it read it all; to be compared with a point."""
        return {device: bytes(content) for device, content in self.model.items()}

    def points(self) -> dict[str, Any]:
        """Every sealed point of the local half: its name, and what its `storage.json` says."""
        vm = self.local / "vm"
        found = {
            str(path.parent.relative_to(vm)): json.loads(path.read_bytes())
            for path in (*vm.glob("*/storage.json"), *vm.glob("*/*/storage.json"))
        }
        return dict(sorted(found.items(), key=lambda one: one[1]["revision_id"] or one[1]["id"]))

    def holds(self, point: str) -> dict[str, bytes]:
        """The disks at *point*, as qemu-img reads them off its images."""
        found = {}
        for disk in self.points()[point]["disks"]:
            top = disk["chain"][0]
            flat = self.local.parent / "flat"
            convert = ["qemu-img", "convert", "-U", "-f", top["format"], "-O", "raw"]
            subprocess.run([*convert, top["path"], flat], check=True)
            found[disk["device"]] = flat.read_bytes()
            flat.unlink()
        return found

    def levels(self, point: str) -> set[str]:
        """What the disks became at *point*."""
        return {disk["level"] for disk in self.points()[point]["disks"]}

    async def copying(self) -> Path:
        """Wait until a copy is under way; the file that it writes, which has yet to grow."""
        async with asyncio.timeout(30):
            while True:
                for path in (self.local / "vm").glob("*/*.partial*"):
                    with contextlib.suppress(FileNotFoundError):
                        if path.stat().st_blocks:
                            return path
                await asyncio.sleep(0.01)

    def nothing_of_a_copy_is_left(self) -> None:
        """No export, server or scratch overlay, and of bitmaps those of the newest copies."""
        look = self.witness.ask
        assert look("query-block-exports") == []
        probe = {"type": "unix", "data": {"path": str(self.local.parent / "probe")}}
        look("nbd-server-start", addr=probe)  # refused, were there a server
        look("nbd-server-stop")
        assert [path.name for path in self.disks[0].parent.glob(".qmpsnap-*")] == []
        assert [path.name for path in self.local.rglob("*.partial*")] == []
        needed = {
            disk["label"]: disk["bitmap"]
            for point in self.points().values()
            for disk in point["disks"]
            if disk["level"] != "overlay"
        }
        bitmaps = [
            one
            for node in look("query-named-block-nodes", flat=True)
            for one in node.get("dirty-bitmaps", ())
        ]
        assert {one["name"] for one in bitmaps} == set(needed.values())
        assert all(one["recording"] and not one["busy"] for one in bitmaps), bitmaps

    def halves(self) -> set[str]:
        """The IDs of whole snapshots, as a plain look at the two roots tells them."""
        local, store = (
            {found.parent.name for found in (root / "vm").glob(f"*/{seal}.json")}
            for root, seal in ((self.local, "paired"), (self.store, "manifest"))
        )
        assert local == store
        return local

    def guest_is_free(self) -> None:
        """What holds after any failure, whatever the journal still owes."""
        assert self.witness.status == "running"

    async def all_is_well(self) -> set[str]:
        """Every promise, with nothing owed; the IDs of the snapshots that there are."""
        assert self.owes() == []
        self.guest_is_free()
        look = self.witness.ask
        assert look("query-jobs") == []
        assert look("query-migrate").get("status", "none") in {
            "none", "completed", "failed", "cancelled",
        }  # fmt: skip
        on = [one["capability"] for one in look("query-migrate-capabilities") if one["state"]]
        assert on == []
        parameters = look("query-migrate-parameters")
        assert {name: parameters[name] for name in _DEFAULTS} == _DEFAULTS
        assert look("query-fdsets") == []
        self.nothing_of_a_copy_is_left()
        ids = self.halves()
        if ids != self._listed:
            entries = await self.engine().list("vm")
            assert {entry.state for entry in entries} <= {"paired"}, entries
            assert {entry.id for entry in entries} == ids
            self._listed = ids
        used = {name for chain in self.chains() for name in chain}
        for node in look("query-named-block-nodes", flat=True):
            if found := _OURS.search(node["node-name"]):
                assert found[1] in ids, f"{node['node-name']} is nobody's"
                assert f"{node['node-name']}.qcow2" in used, f"{node['node-name']} is unused"
        layers = {path.name for path in (self.local / "vm/layers").glob("*")}
        assert {
            name for name in layers if _OURS.search(name.removesuffix(".qcow2"))[1] not in ids
        } == set()  # type: ignore[index]
        on_root = {path.name for path in (self.local / "vm").iterdir() if path.is_dir()}
        assert on_root - {"arrivals", "journal", "layers", "ram", "shared"} == ids
        assert [*(self.local / "vm/arrivals").glob("*")] == []
        # RAM is kept of snapshots only, and what has been shipped does not wait to be
        assert {path.name for path in (self.local / "vm/ram").glob("*")} <= ids
        assert [*(self.local / "vm/shared").glob("*")] == []
        return ids


def options(folder: Path, *, memory: int = 64, images: bool = True) -> tuple[list[str], list[Path]]:
    """A VM without an operating system: its firmware runs, so STOP and RESUME mean something.

    *images*: make its disks, which are there already when it is started again.
    """
    disks = [folder / "d0.qcow2", folder / "d1.raw"]
    line = ["-M", "pc", "-m", str(memory), "-nodefaults"]
    for disk in disks:
        kind = disk.suffix[1:]
        if images:
            subprocess.run(["qemu-img", "create", "-q", "-f", kind, disk, str(_SIZE)], check=True)
        line += [
            "-blockdev",
            f"driver={kind},node-name={disk.stem},file.driver=file,file.filename={disk}",
            *("-device", f"virtio-blk-pci,drive={disk.stem},id=v{disk.stem}"),
        ]
    return line, disks


@contextlib.asynccontextmanager
async def bench(
    qemu: Path, folder: Path, store: Path, *, disks: Path | None = None
) -> AsyncIterator[Bench]:
    """A bench on *qemu*, its roots *folder*/local and *store*; its *disks* are in *folder* too."""
    line, images = options(disks or folder)
    async with running(qemu, *line, directory=folder) as process:
        with wired(folder / "wire", process.qmp) as wire, witness(process.witness) as eye:
            eye.until_running(within=10)
            content = {f"v{image.stem}": bytearray(_SIZE) for image in images}
            yield Bench(process, wire, eye, folder / "local", store, images, content)
