"""Local halves of real images that stand on one another, made by hand, with their store halves."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qmpsnap.store import digests
from qmpsnap.store.files import digest_bytes, digest_file
from qmpsnap.store.image import examine_image
from qmpsnap.store.layout import LocalRoot
from qmpsnap.store.manifest import (
    Disk,
    FileEntry,
    Level,
    Merged,
    Replacement,
    Storage,
    encode,
)
from tests.rig.halves import HOST, manifest

GONE = "20261122T100000000Z"
MERGED = "20261122T110000000Z"
KEPT = "20261122T120000000Z"
INC = "20261122T130000000Z"
REVISION = "20261122T140000000Z"
SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Chain:
    """`INC/REVISION` stands on INC, that on KEPT, that on MERGED, which stood on GONE."""

    root: LocalRoot
    vm: str = "web"

    def folder(self, point: str) -> Path:
        return self.root.point(self.vm, point)

    def image(self, point: str) -> Path:
        return self.root.image(self.vm, point, "vda", "qcow2")

    def make(self) -> None:
        """All of it, with the store half of INC still in the spool."""
        self.written(MERGED, None)
        self.sealed(MERGED, GONE)
        self.merged(MERGED, None)
        self.written(KEPT, MERGED)
        self.sealed(KEPT, MERGED)
        (self.folder(KEPT) / "storage.json").rename(self.folder(KEPT) / "kept.json")
        self.written(INC, KEPT)
        self.sealed(INC, KEPT)
        self.spooled(INC)
        self.written(f"{INC}/{REVISION}", INC)
        self.sealed(f"{INC}/{REVISION}", INC)
        for point in (MERGED, KEPT, INC, f"{INC}/{REVISION}"):
            digests.take(self.folder(point), point, ["vda.qcow2"])

    def written(self, point: str, beneath: str | None, size: int = SIZE) -> Path:
        """The image of *point*, with some data, on that of the point *beneath*."""
        path = self.image(point)
        path.parent.mkdir(parents=True)
        on = []
        if beneath is not None:
            up = "../" * len(Path(point).parts)
            on = ["-b", f"{up}{beneath}/vda.qcow2", "-F", "qcow2"]
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", *on, path, str(size)], check=True
        )
        pattern = len(list(self.root.vm(self.vm).rglob("*.qcow2")))
        write = f"write -q -P {pattern} {pattern * 65536} 65536"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, path], check=True)
        return path

    def sealed(self, point: str, parent: str | None, size: int = SIZE) -> None:
        """`storage.json` of *point*: its one disk stands on *parent*."""
        id, _, revision = point.partition("/")
        path = self.image(point)
        level: Level = "full" if parent is None else "inc"
        disk = Disk(
            label="vda",
            device="virtio0",
            qdev=None,
            origin="vda",
            node="vda",
            role="disk",
            level=level,
            virtual_size_bytes=size,
            chain=[examine_image(path, "qcow2", size)],
            overlay=None,
            parent=parent,
            reason="made by hand",
        )
        storage = Storage(
            id=id,
            vm=self.vm,
            host=HOST,
            taken_at=f"2026-11-22T{id[9:11]}:00:00.000Z",
            revision=1 if revision else 0,
            revision_id=revision or None,
            level=level,
            disks=[disk],
            left_out=[],
        )
        (self.folder(point) / "storage.json").write_bytes(encode(storage))

    def merged(self, point: str, parent: str | None) -> None:
        image = examine_image(self.image(point), "qcow2", SIZE)
        new = Replacement(image=image, instead_of=image.inode + 1, parent=parent)
        merged = Merged(point=point, disks={"vda": new})
        (self.folder(point) / "merged.json").write_bytes(encode(merged))

    def spooled(self, id: str) -> None:
        """The store half of *id*, without RAM, ready to be shipped."""
        spool = self.root.spool(self.vm, id)
        spool.mkdir()
        entries = []
        for name, content in {"machine.json": b"{}\n", "usage.json": b"{ }\n"}.items():
            (spool / name).write_bytes(content)
            size, hexdigest = digest_file(spool / name)
            entries.append(FileEntry(name=name, bytes=size, blake3=hexdigest))
        sealed = (self.folder(id) / "storage.json").read_bytes()
        whole = manifest(entries, digest_bytes(sealed), vm=self.vm, id=id)
        moment = f"2026-11-22T{id[9:11]}:00:00.000Z"
        whole = msgspec.structs.replace(whole, taken_at=moment)
        (spool / "manifest.json").write_bytes(encode(whole))
