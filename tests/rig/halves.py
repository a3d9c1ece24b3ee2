"""Snapshot halves for tests: small, well-formed, and easily spoilt."""

from __future__ import annotations

from pathlib import Path

import msgspec
from blake3 import blake3

from qmpsnap.store.files import digest_file
from qmpsnap.store.layout import LocalRoot
from qmpsnap.store.local import seal
from qmpsnap.store.manifest import (
    Binding,
    Disk,
    FileEntry,
    Image,
    Manifest,
    Paired,
    Ram,
    Storage,
    encode,
)
from qmpsnap.store.pack import compress

ID = "20261122T165057123Z"
LATER = "20261122T165058000Z"
HOST = "0123456789abcdef0123456789abcdef"
MOMENT = "2026-11-22T16:50:57.123Z"
FILES = {"machine.json": b'{"cpus": 2}\n', "nvram/vars.fd": b"\0" * 5000}
RAM = b"ram " * 300_000 + bytes(1 << 20)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def image(path: str = "/images/base.qcow2") -> Image:
    return Image(
        path=path,
        format="qcow2",
        virtual_size_bytes=1 << 30,
        file_bytes=196616,
        device=1,
        inode=2,
        mtime_ns=3,
        header_blake3="ab" * 32,
    )


def storage(vm: str = "web", id: str = ID, **other: object) -> Storage:
    disk = Disk(
        label="vda",
        device="virtio0",
        qdev="/machine/peripheral/virtio0/virtio-backend",
        origin="/images/base.qcow2",
        node="d0",
        role="disk",
        level="overlay",
        virtual_size_bytes=1 << 30,
        chain=[image()],
        overlay="/local/web/layers/vda.qcow2",
        parent=None,
    )
    whole = Storage(
        id=id,
        vm=vm,
        host=HOST,
        taken_at=MOMENT,
        revision=0,
        level="overlay",
        disks=[disk],
        left_out=[],
    )
    return msgspec.structs.replace(whole, **other)


def manifest(files: list[FileEntry], storage_blake3: str, **other: object) -> Manifest:
    packed = [file.name for file in files if file.name.startswith("vmstate/")]
    whole = Manifest(
        id=ID,
        vm="web",
        host=HOST,
        identity=Binding(uuid=None, disks=["/images/base.qcow2"]),
        taken_at=MOMENT,
        qemu_version="7.2.22",
        ram=Ram(
            mode="live" if packed else "none",
            asked="auto",
            reason="it converges",
            raw_bytes=len(RAM) if packed else 0,
            file=packed[0] if packed else None,
            raw_blake3=blake3(RAM).hexdigest() if packed else None,
            compression="zstd" if packed else "none",
        ),
        quiesce="none",
        frozen=False,
        pause_ms=19.25,
        frozen_ms=None,
        was="running",
        files=files,
        storage_blake3=storage_blake3,
        note="before the upgrade",
        trial_store=False,
    )
    return msgspec.structs.replace(whole, **other)


def paired(manifest_blake3: str, **other: object) -> Paired:
    note = Paired(id=ID, manifest_blake3=manifest_blake3, store="/mnt/nfs", shipped_at=MOMENT)
    return msgspec.structs.replace(note, **other)


def spooled(root: LocalRoot, vm: str = "web", id: str = ID) -> Path:
    """A sealed local half and its sealed spool, both on disk; the spool's folder."""
    root.path.mkdir(exist_ok=True)
    digest = seal(root, vm, storage(vm, id))
    spool = root.spool(vm, id)
    for name, content in FILES.items():
        (spool / name).parent.mkdir(parents=True, exist_ok=True)
        (spool / name).write_bytes(content)
    (spool / "vmstate").mkdir()
    raw = root.path / "raw"
    raw.write_bytes(RAM)
    compress(raw, spool / "vmstate/ram.zst")
    raw.unlink()
    entries = []
    for name in [*FILES, "vmstate/ram.zst"]:
        size, hexdigest = digest_file(spool / name)
        entries.append(FileEntry(name=name, bytes=size, blake3=hexdigest))
    sealed = manifest(entries, digest, vm=vm, id=id)
    (spool / "manifest.json").write_bytes(encode(sealed))
    return spool
