"""What our files say: the only place that knows the words of the manifests of both halves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from qmpsnap.dialect import schema
from qmpsnap.ids import is_snapshot_id, is_vm_name
from qmpsnap.store import head
from qmpsnap.store.head import readable
from qmpsnap.store.layout import MANIFEST, PARTIAL, SHARED, SIGNATURE
from qmpsnap.store.signature import KeyId

Size = Annotated[int, Meta(ge=0)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Level = Literal["overlay", "full", "inc", "diff"]
Version = Annotated[int, Meta(ge=1, le=1)]
_LONGEST = 255 - len(PARTIAL)  # NAME_MAX: what is written has this behind it first
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
RAM_STORED_ONCE = 2
"""The version of a manifest whose RAM lies in packs; without, it is 1, which older readers know."""
ENCRYPTED = 3
"""The version of one whose files are encrypted."""
SEALED = "sealed"
"""The format of an image that is encrypted (`store.sealed`), and the end of its name."""
SEALED_DISKS = 2
"""The version of a local half, and of its merges, that has such images."""


class FileEntry(Struct, frozen=True, kw_only=True):
    """A file of the store half; *name* is relative to the manifest's folder, with `/` in it."""

    name: str
    bytes: Size
    blake3: Digest

    def __post_init__(self) -> None:
        parts = self.name.split("/")
        if any(len(part.encode(errors="replace")) > _LONGEST for part in parts):
            raise ValueError(f"a file name of more than {_LONGEST} bytes: {self.name[:40]!r}...")
        if any(part in ("", ".", "..") for part in parts) or not self.name.isprintable():
            raise ValueError(f"not a relative file name: {self.name!r}")
        if self.name in {MANIFEST, SIGNATURE} or self.name.endswith(PARTIAL):
            raise ValueError(f"not a name for a listed file: {self.name!r}")


class Plain(Struct, frozen=True, kw_only=True):
    """A file as it is before it is encrypted."""

    bytes: Size
    blake3: Digest


class Shared(Struct, frozen=True, kw_only=True):
    """A file that the snapshots of a VM share: `shared/BLAKE3` in the VM's folder of the store.

    QEMU was given it with *option*, as *path*. *as_started* is false when it was changed after QEMU
    had read it: then it is not what the guest was booted from.

    Of one that is encrypted *bytes* and *blake3* are those of the encrypted file; the path is empty
    and *plain* None until they were taken out of what the manifest has sealed.
    """

    option: Literal["kernel", "initrd", "dtb", "shim"]
    path: str
    bytes: Size
    blake3: Digest
    as_started: bool = True
    plain: Plain | None = None

    @property
    def entry(self) -> FileEntry:
        return FileEntry(name=f"{SHARED}/{self.blake3}", bytes=self.bytes, blake3=self.blake3)

    @property
    def content(self) -> FileEntry:
        """As `entry`, of the file that QEMU was given."""
        own = self.plain or self
        return FileEntry(name=f"{SHARED}/{self.blake3}", bytes=own.bytes, blake3=own.blake3)


class Pack(Struct, frozen=True, kw_only=True):
    """A file of RAM chunks that snapshots share; or one that was moved (`shared/BLAKE3.moved`).

    *used_bytes* of it are what the snapshot needs, as stored. *fresh*: the snapshot brought it.
    *origin*: the VM of the store whose pack it was, when this one needed it for the first time.
    """

    blake3: Digest
    bytes: Size
    used_bytes: Size = 0
    fresh: bool = False
    origin: str | None = None

    def __post_init__(self) -> None:
        if self.origin is not None:
            _check_names(self.origin)

    @property
    def entry(self) -> FileEntry:
        return FileEntry(name=f"{SHARED}/{self.blake3}", bytes=self.bytes, blake3=self.blake3)


class Image(Struct, frozen=True, kw_only=True):
    """An image file as it was when it was frozen; *header_blake3* is of its first 64 KiB.

    *key*: the ID of the key that it is encrypted with, None if it is not; its format is `sealed`.
    """

    path: str
    format: str
    virtual_size_bytes: Size
    file_bytes: Size
    device: int
    inode: int
    mtime_ns: int
    header_blake3: Digest
    key: KeyId | None = None

    def __post_init__(self) -> None:
        if (self.format == SEALED) != (self.key is not None):
            raise ValueError(f"what is {SEALED} has a key, and nothing else has")


Means = Literal["frozen", "reflink", "copy", "convert", "increment"]


class Disk(Struct, frozen=True, kw_only=True):
    """A disk of the local half, made as *level* says, for the *reason* given.

    Level `overlay`: *chain* is what the point in time consists of, frozen, top first, and
    *overlay* is the file that has taken the guest's writes since. The other levels: *chain* is
    the one image that was written, by *means*, of *bytes_written*; what lies beneath it is that of
    *parent* (a point: `ID`, or `ID/REVISION`); *bitmap* is the name of the dirty bitmap that
    records what the guest has changed since.
    """

    label: str
    device: str
    qdev: str | None
    origin: str
    node: str
    role: Literal["disk", "pflash"]
    level: Level
    virtual_size_bytes: Size
    chain: list[Image]
    overlay: str | None
    parent: str | None
    reason: str = ""
    bitmap: str | None = None
    means: Means = "frozen"
    bytes_written: Size = 0

    def __post_init__(self) -> None:
        _check_label(self.label)
        for image in self.chain:
            _check_label(image.format)  # it is what follows the dot
        if self.parent is not None:
            _check_point(self.parent)


class LeftOut(Struct, frozen=True, kw_only=True):
    """A device whose data is in no half, and why.

    *virtual_size_bytes* is that of a disk that the guest writes: a restore gives it an empty one.
    """

    device: str
    reason: str
    origin: str = ""
    virtual_size_bytes: Size | None = None


class Storage(Struct, frozen=True, kw_only=True):
    """`storage.json`: seals the local half. *taken_at* is ISO 8601, UTC, with milliseconds.

    *revision* is 0 for the storage of the vmstate's instant; a refreshed one is in the folder
    *revision_id* of the snapshot.
    """

    format: Literal["qmpsnap-storage"] = "qmpsnap-storage"
    version: Annotated[int, Meta(ge=1, le=SEALED_DISKS)] = 1
    id: str
    vm: str
    host: str
    taken_at: str
    revision: Size
    level: Level
    disks: list[Disk]
    left_out: list[LeftOut]
    revision_id: str | None = None

    def __post_init__(self) -> None:
        _check_names(self.vm, self.id)
        _check_moment(self.taken_at)
        if (self.revision == 0) != (self.revision_id is None):
            raise ValueError("a revision has an ID of its own, and revision 0 has none")
        if self.revision_id is not None:
            _check_names(None, self.revision_id)
        _check_sealed(self.version, (one for disk in self.disks for one in disk.chain))

    @property
    def keys(self) -> list[str]:
        """The IDs of the keys that images of its own are encrypted with, each once."""
        found = (one.key for disk in self.disks for one in disk.chain)
        return list(dict.fromkeys(key for key in found if key is not None))

    @property
    def point(self) -> str:
        """What an increment that stands on this names as its parent."""
        return self.id if self.revision_id is None else f"{self.id}/{self.revision_id}"


class Replacement(Struct, frozen=True, kw_only=True):
    """The image *image* replaces that of the inode *instead_of*; it stands on *parent*.

    *before*: what was so of the replaced one, where that had come from a merge itself.
    """

    image: Image
    instead_of: int
    parent: str | None
    before: Replacement | None = None


class Merged(Struct, frozen=True, kw_only=True):
    """`merged.json`: of a point whose images have taken in what lay beneath them.

    *disks*, by label: the image that takes the old one's place, and the point that it stands on.
    """

    format: Literal["qmpsnap-merged"] = "qmpsnap-merged"
    version: Annotated[int, Meta(ge=1, le=SEALED_DISKS)] = 1
    point: str
    disks: dict[str, Replacement]

    def __post_init__(self) -> None:
        _check_point(self.point)
        _check_sealed(self.version, (one.image for one in self.disks.values()))
        for label in self.disks:
            _check_label(label)


class Digests(Struct, frozen=True, kw_only=True):
    """`digests.json`: the BLAKE3 of each image that a point has written, by its file's name.

    `storage.json` (as `kept.json`, too) and `merged.json` beside them are among the *images*.
    """

    format: Literal["qmpsnap-digests"] = "qmpsnap-digests"
    version: Version = 1
    point: str
    images: dict[str, Digest]

    def __post_init__(self) -> None:
        _check_point(self.point)


class Identity(Struct, frozen=True, kw_only=True):
    """`identity.json`: binds the name of a VM to QEMU's UUID, or without one to its disks."""

    format: Literal["qmpsnap-identity"] = "qmpsnap-identity"
    version: Version = 1
    vm: str
    uuid: str | None
    disks: list[str]

    def __post_init__(self) -> None:
        _check_names(self.vm)


class Binding(Struct, frozen=True, kw_only=True):
    """The VM's identity as the store half repeats it."""

    uuid: str | None
    disks: list[str]


class RamImage(Struct, frozen=True, kw_only=True):
    """The pages of a RAM block, which are not in the stream; of 4096 bytes, without the zero ones.

    *block* is its name in the stream, *bytes* its size in the guest.
    """

    block: str
    bytes: Size
    stored_pages: Size


class Ram(Struct, frozen=True, kw_only=True):
    """How the vmstate was taken, what had been asked for, and why it came to be this *mode*.

    *index*: the file that tells where the chunks of the *images* are, in packs; *file* is then the
    stream without the pages of these blocks.
    """

    mode: Literal["background", "live", "paused", "none"]
    asked: str
    reason: str
    raw_bytes: Size
    file: str | None
    raw_blake3: Digest | None
    compression: Literal["zstd", "none"]
    index: str | None = None
    images: list[RamImage] = []


class Encryption(Struct, frozen=True, kw_only=True):
    """All files of the store half, and its packs, are encrypted with the key called *key*.

    *sealed* is what the manifest does not say in the clear (`private`), encrypted, in base64.
    """

    key: KeyId
    sealed: str


class Manifest(Struct, frozen=True, kw_only=True):
    """`manifest.json`: seals the store half, and names the local half by its digest.

    *files* lie beside it, *shared* and *packs* in the VM's folder, where other snapshots may need
    them too. *packs* are all that the index of the RAM names, whoever brought them. All entries are
    of what lies there: where there is an *encryption*, of encrypted files.
    """

    format: Literal["qmpsnap-manifest"] = "qmpsnap-manifest"
    version: Annotated[int, Meta(ge=1, le=ENCRYPTED)] = 1
    id: str
    vm: str
    host: str
    identity: Binding
    taken_at: str
    qemu_version: str
    ram: Ram
    quiesce: Literal["agent", "none"]
    frozen: bool
    pause_ms: float
    frozen_ms: float | None
    was: Literal["running", "paused"]
    files: list[FileEntry]
    storage_blake3: Digest
    note: str
    trial_store: bool
    shared: list[Shared] = []
    packs: list[Pack] = []
    encryption: Encryption | None = None

    def __post_init__(self) -> None:
        _check_names(self.vm, self.id)
        _check_moment(self.taken_at)
        names = [file.name for file in self.files]
        if any(name.split("/")[0] == SHARED for name in names):
            raise ValueError("a file of its own is listed as one that is shared")
        if len(set(names)) != len(names):
            raise ValueError("a file is listed twice")
        if self.ram.file is not None and self.ram.file not in names:
            raise ValueError(f"the vmstate is not among the files: {self.ram.file!r}")
        if self.ram.index is not None and self.ram.index not in names:
            raise ValueError(f"the RAM's index is not among the files: {self.ram.index!r}")
        if self.ram.index is None and (self.packs or self.ram.images):
            raise ValueError("RAM is kept in packs, and no index tells where")
        if self.ram.index is not None and self.version < RAM_STORED_ONCE:
            # who knows version 1 only would take the stream for all of the state
            raise ValueError(f"RAM is kept in packs: that is version {RAM_STORED_ONCE}")
        if (self.encryption is not None) != (self.version == ENCRYPTED):
            # who knows version 2 only would take what is encrypted for what it was
            raise ValueError(f"what is encrypted is version {ENCRYPTED}, and that is encrypted")
        if len({pack.blake3 for pack in self.packs}) != len(self.packs):
            raise ValueError("a pack is listed twice")

    @property
    def listed(self) -> list[FileEntry]:
        """All that the store half consists of, the shared files too, each once."""
        entries = [*(one.entry for one in self.shared), *(one.entry for one in self.packs)]
        return [*self.files, *{one.blake3: one for one in entries}.values()]

    @property
    def needed(self) -> set[str]:
        """The digests of all that it shares with other snapshots."""
        return {one.blake3 for one in self.shared} | {one.blake3 for one in self.packs}

    @property
    def key(self) -> str | None:
        """The ID of the key that its files are encrypted with; None: they are not."""
        return self.encryption.key if self.encryption is not None else None

    def entry(self, name: str) -> FileEntry | None:
        """What is listed under *name*."""
        return next((file for file in self.listed if file.name == name), None)


class Paired(Struct, frozen=True, kw_only=True):
    """`paired.json`: the local half's note that the store half is sealed on *store*."""

    format: Literal["qmpsnap-paired"] = "qmpsnap-paired"
    version: Version = 1
    id: str
    manifest_blake3: Digest
    store: str
    shipped_at: str

    def __post_init__(self) -> None:
        _check_names(None, self.id)
        _check_moment(self.shipped_at)


KINDS: Mapping[str, tuple[type[Struct], int]] = {
    "qmpsnap-storage": (Storage, SEALED_DISKS),
    "qmpsnap-identity": (Identity, 1),
    "qmpsnap-manifest": (Manifest, ENCRYPTED),
    "qmpsnap-paired": (Paired, 1),
    "qmpsnap-merged": (Merged, SEALED_DISKS),
    "qmpsnap-digests": (Digests, 1),
}
T = TypeVar("T", bound=Struct)


def encode(value: Storage | Identity | Manifest | Paired | Merged | Digests) -> bytes:
    """*value* as a file's content: indented, keys in order, a newline at the end.

    Raises ManifestError for a value that `decode` would refuse: it would be found out too late.
    """
    content = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    decode(content, type(value), Path(value.format))
    return content


def decode(content: bytes, kind: type[T], path: Path) -> T:
    """The value that the file *path* holds. Raises ManifestError, naming *path* and `$.key`."""
    wanted, newest = next((word, new) for word, (one, new) in KINDS.items() if one is kind)
    head.version_of(content, wanted, newest, path)
    with readable(content, path):
        return msgspec.json.decode(content, type=kind)


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of each format, by the format's word."""
    return {word: schema(kind) for word, (kind, _) in KINDS.items()}


def _check_names(vm: str | None, id: str | None = None) -> None:
    if vm is not None and not is_vm_name(vm):
        raise ValueError(f"not a name for a VM: {vm!r}")
    if id is not None and not is_snapshot_id(id):
        raise ValueError(f"not a snapshot id: {id!r}")


def _check_sealed(version: int, images: Iterable[Image]) -> None:
    """Who knows version 1 only would take what is encrypted for an image of QEMU's."""
    if any(image.key is not None for image in images) != (version == SEALED_DISKS):
        raise ValueError(f"with encrypted disks it is version {SEALED_DISKS}, and only then")


def version_of(images: Iterable[Image]) -> int:
    """The version of a local half, or of merges, with these *images*."""
    return SEALED_DISKS if any(image.key is not None for image in images) else 1


def _check_label(text: str) -> None:
    """It becomes the name of a file."""
    if _LABEL.fullmatch(text) is None:
        raise ValueError(f"not a word for a disk: {text!r}")


def _check_point(text: str) -> None:
    parts = text.split("/")
    if not 1 <= len(parts) <= 2 or not all(map(is_snapshot_id, parts)):
        raise ValueError(f"not the name of a point: {text!r}")


def _check_moment(text: str) -> None:
    # Python 3.11 reads the Z that we write
    if not text.endswith("Z") or datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"not a moment in UTC: {text!r}")
