"""Snapshots of VMs that share RAM, on a store of files: made, shipped, removed, looked at."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from qmpsnap.errors import LocalFailed, PacksMissing
from qmpsnap.store import box, chunking, contents, half, removal, shared, shipping, wire
from qmpsnap.store.box import Role
from qmpsnap.store.chunks import PLAIN, Encrypted
from qmpsnap.store.files import digest_file
from qmpsnap.store.layout import LocalRoot, StoreRoot
from qmpsnap.store.manifest import FileEntry, Manifest, decode, encode
from qmpsnap.store.ramindex import Index, Named
from qmpsnap.store.remaking import remade
from qmpsnap.store.secret import Keys, Secret, none
from tests.rig.halves import spooled
from tests.rig.ram import PAGE, page, write_image

IDS = [f"2026112{day}T165057123Z" for day in range(1, 6)]
SIZE = 64 * PAGE
CHUNK = 4 * PAGE


def quiet(_done: int, _total: int, _what: str) -> None:
    """Progress that nobody is told of."""


class Series:
    """A VM's snapshots on a store, made one after the other; each RAM is kept to be compared."""

    def __init__(
        self,
        path: Path,
        vm: str = "web",
        store: StoreRoot | None = None,
        secret: Secret | None = None,
    ) -> None:
        self.path, self.local, self.vm = path, LocalRoot(path / "local"), vm
        self.store = store or StoreRoot(path / "store")
        self.store.path.mkdir(exist_ok=True)
        self.known: dict[str, Index] = {}
        self.secret = secret
        """What the next ones are encrypted with."""
        self.keys: Keys = none if secret is None else {secret.key: secret}.__getitem__

    def spool(
        self,
        id: str,
        pages: dict[int, bytes],
        *known: str,
        lent: Sequence[tuple[str, Index]] = (),
        pack_bytes: int = chunking.PACK,
    ) -> Manifest:
        """A sealed spool, whose packs lie in the folder that snapshots share."""
        spool = spooled(self.local, self.vm, id)
        self.local.shared(self.vm).mkdir(exist_ok=True)
        kept = chunking.keep(
            [write_image(self.path / id / "pc.ram", pages, SIZE)],
            self.local.shared(self.vm),
            [self.known[one] for one in known],
            stored_pages=[len(pages)],
            lent=lent,
            chunk_bytes=CHUNK,
            pack_bytes=pack_bytes,
            chunks=PLAIN if self.secret is None else Encrypted(self.secret),
        )
        self.known[id] = kept.known
        (spool / "vmstate/ram.index").write_bytes(kept.index)
        size, digest = digest_file(spool / "vmstate/ram.index")
        entry = FileEntry(name="vmstate/ram.index", bytes=size, blake3=digest)
        path = spool / "manifest.json"
        sealed = decode(path.read_bytes(), Manifest, path)
        ram = msgspec.structs.replace(sealed.ram, index=entry.name, images=list(kept.images))
        made = msgspec.structs.replace(
            sealed, version=2, files=[*sealed.files, entry], ram=ram, packs=list(kept.packs)
        )
        if self.secret is not None:
            made = contents.sealed(encrypted(spool, made, self.secret), self.secret)
        path.write_bytes(encode(made))
        return made

    def ship(self, id: str, instead: Mapping[str, Named] | None = None) -> wire.Shipped:
        """As the engine: shipped, the spool removed, and the copies that went with it."""
        spool = self.local.spool(self.vm, id)
        request = wire.Ship(
            root=str(self.store.path), vm=self.vm, id=id, spool=str(spool), device=None,
            shared=str(self.local.shared(self.vm)), instead=dict(instead or {}),
        )  # fmt: skip
        shipped = shipping.ship(self.store, request, quiet, keys=self.keys)
        for path in sorted(spool.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        spool.rmdir()
        shared.sweep_local(self.local, self.vm)
        return shipped

    def remove(self, id: str) -> None:
        waiting = shared.awaited(self.local, self.vm)
        assert waiting is not None
        request = wire.Remove(root=str(self.store.path), vm=self.vm, id=id, waiting=sorted(waiting))
        removal.remove(self.store, request, quiet, keys=self.keys)

    def remade(self, id: str, lost: PacksMissing) -> dict[str, Named]:
        """As the engine: what is lost is made again from the page images of *id*."""
        near = self.path / f"near-{id}"
        near.mkdir(exist_ok=True)
        shutil.copy(self.path / id / "pc.ram", near / "0.pages")
        (near / "ram.index").write_bytes(self.known[id].encode())
        to = self.local.shared(self.vm)
        return remade(self.known[id], lost.packs, [near], to, keys=self.keys)

    def verify(self, id: str) -> list[wire.Problem]:
        request = wire.Verify(root=str(self.store.path), vm=self.vm, id=id, seal=None)
        return half.verify(self.store, request, quiet, keys=self.keys)

    def whole(self, *ids: str) -> None:
        """Each is as it was taken, to the last byte, by all that looks at it."""
        for id in ids:
            assert self.verify(id) == []
            glance = wire.Glance(root=str(self.store.path), vm=self.vm, id=id, seal=None, texts=[])
            assert half.glance(self.store, glance, quiet, keys=self.keys).troubles == {}
            to = self.path / "back" / id
            to.mkdir(parents=True, exist_ok=True)
            fill = wire.Fill(
                root=str(self.store.path), vm=self.vm, id=id, seal=None, to=str(to), near=[]
            )
            half.fill(self.store, fill, quiet, keys=self.keys)
            assert (to / "0.pages").read_bytes() == (self.path / id / "pc.ram").read_bytes()


def encrypted(spool: Path, plain: Manifest, secret: Secret) -> Manifest:
    """*plain* with the files in *spool*, each in its place encrypted with *secret*."""
    entries = []
    for one in plain.files:
        role = Role(plain.vm, plain.id, one.name)
        size, digest = box.seal_over(spool / one.name, secret, role, side=LocalFailed)
        entries.append(FileEntry(name=one.name, bytes=size, blake3=digest))
    return msgspec.structs.replace(plain, files=entries)


def changing(step: int) -> dict[int, bytes]:
    """RAM of which much changes from snapshot to snapshot, some never, some comes again."""
    return {at: page((at, min(step, at // 16), at // 4 % 5 == step)) for at in range(64)}


def taken(series: Series, count: int = 5) -> None:
    for step, id in enumerate(IDS[:count]):
        series.spool(id, changing(step), *IDS[max(0, step - 1) : step])
        series.ship(id)


def sparse(series: Series) -> tuple[str, ...]:
    """Three snapshots; once the first goes, little of its pack is needed."""
    series.spool(IDS[0], {at: page(at) for at in range(64)})
    series.ship(IDS[0])
    for step, id in enumerate(IDS[1:3]):
        own = {at: page((at, step)) for at in range(32, 48)}
        series.spool(id, {at: page(at) for at in range(8)} | own, IDS[0])
        series.ship(id)
    return tuple(IDS[1:3])


class Cut(BaseException):
    """The process ends here."""
