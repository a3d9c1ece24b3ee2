"""Our own files, each read by the module that reads it, out of the place where it lies."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap import config
from qmpsnap.engine import arrivals, companion, configuration, dependents, usage
from qmpsnap.engine.half import Glanced
from qmpsnap.engine.tpm import Tpm
from qmpsnap.errors import LocalFailed, VmBusy
from qmpsnap.host import lock
from qmpsnap.hypervisor.machine import registry
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.records import as_json
from qmpsnap.store import (
    box,
    contents,
    hurt,
    keyfile,
    local,
    manifest,
    moved,
    pages,
    ramindex,
    rampack,
    shared,
)
from qmpsnap.store.chunks import Encrypted, chunks_of
from qmpsnap.store.layout import LocalRoot
from qmpsnap.store.pack import content_of, size_of
from qmpsnap.store.secret import Secret, secret_of
from tests.fuzz import mutation, samples
from tests.fuzz.samples import DIGEST, ID, LATER, content
from tests.fuzz.surface import Surface
from tests.rig.halves import manifest as good_manifest
from tests.rig.halves import paired as good_paired
from tests.rig.halves import storage as good_storage
from tests.unit.machine_details import DETAILS

_json = partial(mutation.content, json_too=True)
VM = "web"
_KEY = secret_of(bytes(range(32)))


def _laid(path: Path, given: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(given)
    return path


def _of_kind(kind: type[Any]) -> Callable[[bytes, Path], object]:
    return lambda given, _scratch: manifest.decode(given, kind, Path("/r/web/x.json"))


def _manifests() -> list[bytes]:
    files = [manifest.FileEntry(name="vmstate/ram.index", bytes=7, blake3=DIGEST)]
    plain = manifest.encode(good_manifest([], DIGEST))
    ram = samples.sample(manifest.Ram, file=None, index="vmstate/ram.index")
    whole = samples.sample(
        manifest.Manifest, version=2, ram=ram, encryption=None,
        files=[samples.sample(manifest.FileEntry, name=files[0].name)],
    )  # fmt: skip
    return [plain, msgspec.json.encode(whole)]


def _storages() -> list[bytes]:
    return [manifest.encode(good_storage()), content(manifest.Storage, disks=[_disk()])]


def _disk() -> dict[str, Any]:
    return {**samples.sample(manifest.Disk), "parent": LATER}


def _moved(given: bytes, scratch: Path) -> object:
    pack = _laid(scratch / DIGEST, b"").with_name("cd" * 32)
    _laid(moved.note(pack), given)
    return moved.read(pack, side=LocalFailed), moved.trail(pack, side=LocalFailed)


def _pages(given: bytes, scratch: Path) -> object:
    _laid(scratch / "ram" / pages.NOTE, given)
    (scratch / "ram" / "0.pages").touch()
    return pages.found(scratch / "ram", DIGEST)


def _noted(name: str, read: Callable[[LocalRoot], object]) -> Callable[[bytes, Path], object]:
    def tried(given: bytes, scratch: Path) -> object:
        root = LocalRoot(scratch)
        _laid(root.vm(VM) / name, given)
        return read(root)

    return tried


def _configuration(given: bytes, _scratch: Path) -> object:
    found = configuration.decode(given, "web/machine.json")
    return found, found.command_line() if found.options is not None and found.exe else None


def _machines() -> list[bytes]:
    line = CommandLine("qemu", (Option("m", "64"), Option("drive", "file=a,if=none,id=d0")))
    seen = samples.sample(configuration.Inventory)
    one = samples.sample(
        configuration.Configuration, inventory=seen, options=as_json(line), reconciled=None,
        details=msgspec.to_builtins(DETAILS),
    )  # fmt: skip
    old = {k: v for k, v in one.items() if k not in ("details", "reconciled")} | {"version": 1}
    every = samples.sample(configuration.Configuration)
    return [msgspec.json.encode(value) for value in (one, old, every)]


def _usages() -> list[bytes]:
    from qmpsnap.engine.firstusage import _Usage

    old = {**samples.sample(_Usage), "format": "qmpsnap-usage", "version": 1}
    return [content(usage.Usage, version=2), msgspec.json.encode(old)]


def _arriving(given: bytes, scratch: Path) -> object:
    _laid(scratch / arrivals.STATUS, given)
    one = msgspec.convert(samples.sample(arrivals.Arrival), arrivals.Arrival)
    raise VmBusy(arrivals._in_words(msgspec.structs.replace(one, folder=str(scratch))) or "busy")


def _dependents(given: bytes, scratch: Path) -> object:
    root = LocalRoot(scratch)
    _laid(root.snapshot(VM, ID) / "dependents" / "a.json", given)
    return dependents.in_words(dependents.standing(root, VM, ID))


def _registered(given: bytes, scratch: Path) -> object:
    _laid(scratch / VM / "vm.json", given)
    os.environ["QMPSNAP_RUNTIME_DIR"] = str(scratch)
    return registry.find(VM), registry.names()


def _locked(given: bytes, scratch: Path) -> object:
    path = _laid(scratch / VM / "lock", given)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        return lock.taken(path, "create")


def _tpm(given: bytes, _scratch: Path) -> object:
    class Pair:
        vm, id = VM, ID

    text = given.decode(errors="surrogateescape")
    facts = companion._facts(Pair(), Glanced({"tpm.json": text}, {}))  # type: ignore[arg-type]
    return facts, list(companion._unreadable(facts.keys))


def _config(given: bytes, scratch: Path) -> object:
    found = config.load(_laid(scratch / "qmpsnap.toml", given))

    for path in (found.local, found.store, *(vm.socket for vm in found.vms.values())):
        with suppress(OSError):
            (path or Path("/")).stat()
    assert math.isfinite(found.store_timeout)
    return found


_CONFIG = b"""local = "local"
store = "store"
allow_local_store = true
store_timeout = "30s"
ram_images = 2
ram_images_in = "/dev/shm/x"

[vm.web]
socket = "qmp.sock"
agent_socket = "~/agent.sock"
ram_from = ["db"]
"""


def _index() -> ramindex.Index:
    from array import array

    places = (array("I", [0, 1]), array("Q", [16, 16]), array("I", [100, 200]))
    blocks = [manifest.RamImage(block="pc.ram", bytes=1 << 20, stored_pages=8)]
    named = [ramindex.Named(blake3=one * 32, bytes=4096) for one in ("ab", "cd")]
    return ramindex.Index(65536, blocks, named, array("I", [0, 5]), bytes(range(64)), places)


def _indexes() -> list[bytes]:
    whole = _index().encode()
    return [content_of(whole, size_of(whole)), whole]


def _spoilt_index(dice: Any, seed: bytes) -> bytes:
    from qmpsnap.store.pack import frame_of_all

    if seed.startswith(b"{"):
        head, _, rest = seed.partition(b"\n")
        if dice.random() < 0.5:
            head = _json(dice, head)
        else:
            rest = mutation.content(dice, rest)
        return bytes(frame_of_all([head + b"\n" + rest]))
    return mutation.content(dice, seed)


def _read_index(given: bytes, scratch: Path) -> object:
    found = ramindex.read(_laid(scratch / "ram.index", given), side=LocalFailed)
    for row in range(len(found)):
        block = found.block_of(row)
        found.span(block, row), found.pack(row), found.digest(row)
    return found.used(), found.total, [list(found.rows(n)) for n in range(len(found.blocks))]


def _packs() -> list[bytes]:
    import tempfile

    from qmpsnap.store.pack import frame_of_all

    with tempfile.TemporaryDirectory() as name:
        writer = rampack.Writer(Path(name))
        for one in range(3):
            writer.add(bytes([one]) * 32, frame_of_all([bytes(4096)]), 4096)
        found = [(Path(name) / writer.close().blake3).read_bytes()]
        chunks = Encrypted(_KEY)
        writer = rampack.Writer(Path(name), key=_KEY.key)
        digest = chunks.digest(bytes(4096))
        writer.add(digest, chunks.frame(bytes(4096), digest), 4096)
        return [*found, (Path(name) / writer.close().blake3).read_bytes()]


def _read_pack(given: bytes, scratch: Path) -> object:
    path = _laid(scratch / DIGEST, given)
    found = rampack.table(path, side=LocalFailed)
    for digest, frame in found.items():
        with path.open("rb") as file:
            content = os.pread(file.fileno(), frame.length, frame.offset)
        chunks = chunks_of(rampack.key_of(path, side=LocalFailed), _keys)
        try:
            chunks.content(content, digest, frame.raw)
        except Exception as odd:
            if type(odd).__name__ != "DigestMismatch":
                raise
    return found


def _keys(key: str) -> Secret:
    """Any ID that a header says leads to the one key there is."""
    return Secret(key, _KEY.content)


def _boxes() -> list[bytes]:
    big = bytes(2 * box.FRAME + 1)
    return [box.sealed_bytes(one, _KEY, box.Role(VM, ID, "x")) for one in (b"", b"{}", big)]


def _read_box(given: bytes, scratch: Path) -> object:
    path = _laid(scratch / "x", given)
    with path.open("rb", buffering=0) as file:
        return box.Reader(file, _keys, path, role=None).read()


def _sealed_index(given: bytes, scratch: Path) -> object:
    return ramindex.Index.decode(given, scratch / "ram.index", _keys).encode()


def _sealed_indexes() -> list[bytes]:
    plain = _index()
    made = ramindex.Index(
        plain.chunk_bytes, plain.blocks, plain.packs, plain.numbers, plain.digests,
        (plain.pack_numbers, plain.offsets, plain.lengths), Encrypted(_KEY),
    )  # fmt: skip
    return [box.sealed_bytes(made.encode(), _KEY, box.Role(VM, ID, "vmstate/ram.index"))]


def _sealed_manifests() -> list[bytes]:
    return [msgspec.json.encode(contents.sealed(good_manifest([], DIGEST), _KEY))]


def _unsealed(given: bytes, scratch: Path) -> object:
    path = scratch / "x.json"
    return contents.unsealed(manifest.decode(given, manifest.Manifest, path), _keys, path)


def _secret_keys() -> list[bytes]:
    key = keyfile.Encryption(
        key=_KEY.key, host="h", created_at="2026", secret_key=_KEY.content.hex()
    )
    return [keyfile.encode(key)]


def _read_key(given: bytes, scratch: Path) -> object:
    return keyfile.decode(given, keyfile.Encryption, scratch / "k")


def _json_file(
    name: str, seeds: Callable[[], Sequence[bytes]], tried: Callable[[bytes, Path], object],
    named: str = "",
) -> Surface:  # fmt: skip
    return Surface(name, seeds, tried, _json, named)


def _kinds(kind: Any, **other: object) -> Callable[[], list[bytes]]:
    return lambda: [content(kind, **other)]


ALL = [
    _json_file("manifest", _manifests, _of_kind(manifest.Manifest), "x.json"),
    _json_file("storage", _storages, _of_kind(manifest.Storage), "x.json"),
    _json_file("paired", lambda: [manifest.encode(good_paired(DIGEST))],
               _of_kind(manifest.Paired), "x.json"),
    _json_file("merged", _kinds(manifest.Merged), _of_kind(manifest.Merged), "x.json"),
    _json_file("digests", _kinds(manifest.Digests), _of_kind(manifest.Digests), "x.json"),
    _json_file("identity", _kinds(manifest.Identity), _of_kind(manifest.Identity), "x.json"),
    _json_file("moved", _kinds(moved.Moved, old="cd" * 32), _moved, "moved"),
    _json_file("pages", _kinds(pages.Pages, index_blake3=DIGEST), _pages),
    _json_file("hurt", _kinds(hurt.Hurt), _noted("hurt.json", lambda r: hurt.packs(r, VM))),
    _json_file("shared", _kinds(shared.Notes),
               _noted("shared.json", lambda r: (shared.sweep_local(r, VM), shared._noted(r, VM)))),
    _json_file("usage", _usages, lambda given, _: usage.decode(given, "web/usage.json"),
               "usage.json"),
    _json_file("last-usage", _usages, _noted("usage.json", lambda r: usage.last(r, VM))),
    _json_file("machine", _machines, _configuration),
    _json_file("arrival", _kinds(arrivals.Arrival),
               lambda given, scratch: arrivals.read(_laid(scratch / "a.json", given)), "a.json"),
    _json_file("arriving", _kinds(arrivals.Arriving), _arriving),
    _json_file("dependents", _kinds(dependents.Dependent), _dependents),
    _json_file("registered", _kinds(registry.Registered, format="qmpsnap-registered-vm"),
               _registered, "vm.json"),
    _json_file("lock", _kinds(lock.Holder), _locked),
    _json_file("tpm", _kinds(Tpm, version=1), _tpm),
    Surface("last", lambda: [f"{ID}\n".encode()],
            _noted("last", lambda r: local.last_id(r, VM))),
    Surface("config", lambda: [_CONFIG], _config, named="qmpsnap.toml"),
    Surface("ram-index", _indexes, _read_index, _spoilt_index, "ram.index"),
    Surface("pack", _packs, _read_pack),
    Surface("encrypted", _boxes, _read_box),
    Surface("encrypted-index", _sealed_indexes, _sealed_index, named="ram.index"),
    _json_file("encrypted-manifest", _sealed_manifests, _unsealed, "x.json"),
    _json_file("encryption-key", _secret_keys, _read_key, "k"),
]  # fmt: skip
