"""What the fault tests share: a small running VM behind a faulty wire, and what must hold of it."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import AsyncIterator
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
    _listed: set[str] = field(default_factory=set)

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
        assert on_root - {"journal", "layers"} == ids
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
            subprocess.run(["qemu-img", "create", "-q", "-f", kind, disk, "16M"], check=True)
        line += [
            "-blockdev",
            f"driver={kind},node-name={disk.stem},file.driver=file,file.filename={disk}",
            *("-device", f"virtio-blk-pci,drive={disk.stem},id=v{disk.stem}"),
        ]
    return line, disks


@contextlib.asynccontextmanager
async def bench(qemu: Path, folder: Path, store: Path) -> AsyncIterator[Bench]:
    """A bench on *qemu*, its roots *folder*/local and *store*."""
    line, images = options(folder)
    async with running(qemu, *line, directory=folder) as process:
        with wired(folder / "wire", process.qmp) as wire, witness(process.witness) as eye:
            eye.until_running(within=10)
            yield Bench(process, wire, eye, folder / "local", store, images)
