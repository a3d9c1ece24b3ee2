"""A VM's paired snapshots without a VM: real images, both halves sealed, and a model of each."""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec
from blake3 import blake3

from qmpsnap import Engine, Machine
from qmpsnap.engine import chains
from qmpsnap.engine.roots import host_id
from qmpsnap.ids import SnapshotId
from qmpsnap.store import digests, increment, local, points, sealed
from qmpsnap.store.image import examine_image
from qmpsnap.store.keyring import Keyring
from qmpsnap.store.layout import SIGNATURE, LocalRoot, StoreRoot
from qmpsnap.store.manifest import Disk, FileEntry, Storage, encode, version_of
from qmpsnap.store.sealedimages import opened_chain, role
from tests.rig.halves import manifest, paired

VM = "web"
CLUSTER = 65536
CLUSTERS = 24
SIZE = CLUSTERS * CLUSTER
Format = Literal["qcow2", "raw", "sealed"]


@dataclass
class Series:
    """Points of the VM `web` under *dir* and *store*; *model*: what each disk of a point reads as.

    One point an hour, the first one long ago. *encrypted*: images that are written from now on are,
    and *compressed*, too.
    """

    dir: Path
    store: Path
    encrypted: bool = False
    compressed: bool = False
    model: dict[tuple[str, str], bytes] = field(default_factory=dict)
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    _taken: datetime = datetime(2026, 1, 1, 12, tzinfo=UTC)

    def __post_init__(self) -> None:
        self.dir.mkdir(exist_ok=True)
        self.store.mkdir(exist_ok=True)

    @property
    def root(self) -> LocalRoot:
        return LocalRoot(self.dir / "local")

    @property
    def engine(self) -> Engine:
        return Engine(self.root.path, self.store, allow_local_store=True)

    @property
    def machine(self) -> Machine:
        return Machine(VM)

    def add(
        self,
        on: dict[str, str | None],
        *,
        revision_of: str | None = None,
        format: Format = "qcow2",
        overlay: bool = False,
    ) -> str:
        """A new point, each of whose disks (by label) stands on the point given, or on nothing.

        Its name. A full is of *format*; *overlay*: its disks are frozen files of the VM's own.
        """
        self._taken += timedelta(hours=1)
        moment = str(SnapshotId.of(self._taken))
        id = revision_of or moment
        name = f"{id}/{moment}" if revision_of else id
        folder = self.root.point(VM, name)
        folder.mkdir(mode=0o700, parents=True)
        disks = [self._disk(name, label, on[label], format, overlay=overlay) for label in on]
        storage = Storage(
            id=id,
            vm=VM,
            host=host_id(),
            taken_at=self._taken.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            revision=1 if revision_of else 0,
            revision_id=moment if revision_of else None,
            level="overlay" if overlay else "inc" if any(on.values()) else "full",
            disks=disks,
            left_out=[],
            version=version_of(image for disk in disks for image in disk.chain),
        )
        digest = local.seal(self.root, VM, storage)
        if not overlay:
            digests.take(folder, name, [Path(one.chain[0].path).name for one in disks])
        if revision_of is None:
            self._pair(id, storage, digest)
        return name

    def chain(self, count: int, **first: Format) -> list[str]:
        """A full and increments, each on the one before."""
        names = [self.add({"vda": None}, **first)]
        for _ in range(count - 1):
            names.append(self.add({"vda": names[-1]}))
        return names

    def read(self, name: str, label: str = "vda") -> bytes:
        """What the disk reads as at a point, with qemu-img alone if it is not encrypted."""
        there = points.read(self.root, VM)
        top, *beneath = there.images(there.by_name[name], label)
        if top.key is not None:
            with opened_chain(VM, [top, *beneath], None, self.engine.secrets) as chain:
                return bytes(chain.read([(0, SIZE)])[0])
        raw = self.dir / "read.raw"
        subprocess.run(
            ["qemu-img", "convert", "-f", top.format, "-O", "raw", top.path, raw], check=True
        )
        content = raw.read_bytes()
        raw.unlink()
        return content

    async def expect(self, *names: str, sound: bool = True) -> None:
        """Each disk of each point reads as the model says; with *sound*, `verify` agrees."""
        there = points.read(self.root, VM)
        for name in names:
            for disk in there.by_name[name].storage.disks:
                assert self.read(name, disk.label) == self.model[name, disk.label], name
            if sound:
                found = await chains.check(
                    self.root, VM, name.split("/")[0], lambda *_: None, self.engine.secrets
                )
                assert found == []

    def _disk(
        self, name: str, label: str, parent: str | None, format: Format, *, overlay: bool
    ) -> Disk:
        before = bytearray(self.model[parent, label] if parent else bytes(SIZE))
        # what was written, and may be as it was; what was written and is zeros; what is no more
        dirty = self.chance.sample(range(CLUSTERS), 4 if parent else 9)
        for number, cluster in enumerate(dirty):
            size = (CLUSTER, CLUSTER, 512, 4096)[number % 4]
            old = before[cluster * CLUSTER : cluster * CLUSTER + size]
            new = (bytes(size), self.chance.randbytes(size), old)[number % 3]
            before[cluster * CLUSTER : cluster * CLUSTER + size] = new
        content = self.model[name, label] = bytes(before)
        key = None
        if self.encrypted:
            secret, format = self.engine.secrets.current(), "sealed"
            path, key = self.root.image(VM, name, label, format), secret.key
            sealed.write(
                path,
                secret=secret,
                role=role(VM, path),
                virtual_size=SIZE,
                on=parent or "",
                extents=[(at * CLUSTER, CLUSTER) for at in dirty] if parent else [(0, SIZE)],
                read=lambda pieces: [content[at : at + length] for at, length in pieces],
                compress=self.compressed,
                reserve=0,
                limit=None,
                cancelled=lambda: False,
                on_progress=None,
            )
        elif parent is None:
            path = self.root.image(VM, name, label, format)
            if overlay:
                path = self.dir / f"{label}.{format}"
            raw = path.with_suffix(".source")
            raw.write_bytes(content)
            subprocess.run(
                ["qemu-img", "convert", "-f", "raw", "-O", format, raw, path], check=True
            )
            raw.unlink()
        else:
            format = "qcow2"
            path = self.root.image(VM, name, label, format)
            beneath = points.read(self.root, VM).by_name[parent].disk(label)
            assert beneath is not None
            image = beneath.chain[0]
            backing = f"{'../' * (1 + name.count('/'))}{parent}/{Path(image.path).name}"
            increment.write(
                path,
                virtual_size=SIZE,
                backing=image.path if beneath.level == "overlay" else backing,
                backing_format=image.format,
                extents=[(cluster * CLUSTER, CLUSTER) for cluster in dirty],
                read=lambda pieces: [content[at : at + length] for at, length in pieces],
                reserve=0,
                limit=None,
                cancelled=lambda: False,
                on_progress=None,
            )
        return Disk(
            label=label,
            device=label,
            qdev=None,
            origin=label,
            node=label,
            role="disk",
            level="overlay" if overlay else "inc" if parent else "full",
            virtual_size_bytes=SIZE,
            chain=[examine_image(path, format, SIZE, key=key)],
            overlay=None,
            parent=parent,
        )

    def _pair(self, id: str, storage: Storage, storage_blake3: str) -> None:
        text = b'{"cpus": 2}\n'
        entry = FileEntry(name="machine.json", bytes=len(text), blake3=blake3(text).hexdigest())
        half = manifest([entry], storage_blake3, id=id, vm=VM, host=host_id())
        sealed = encode(msgspec.structs.replace(half, taken_at=storage.taken_at))
        path = StoreRoot(self.store).manifest(VM, id)
        path.parent.mkdir(parents=True)
        (path.parent / "machine.json").write_bytes(text)
        path.with_name(SIGNATURE).write_bytes(Keyring(self.root.keys, host_id()).sign(sealed))
        path.write_bytes(sealed)
        local.mark_paired(self.root, VM, paired(blake3(sealed).hexdigest(), id=id))
