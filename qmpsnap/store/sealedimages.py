"""Sealed images as manifests name them: the only place that tells what each one has to be for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path

from qmpsnap.errors import BaseChanged
from qmpsnap.store import sealed
from qmpsnap.store.digests import point_of
from qmpsnap.store.envelope import Role
from qmpsnap.store.manifest import Image
from qmpsnap.store.sealed import opened_sealed
from qmpsnap.store.sealedchain import SealedChain
from qmpsnap.store.sealedindex import Index
from qmpsnap.store.secret import Keys


def role(vm: str, path: Path) -> Role:
    """What the image *path* of *vm*, in the folder of its point, is for."""
    return Role(vm, point_of(path.parent), path.name)


def keys_of(images: Iterable[Image]) -> list[str]:
    """The IDs of the keys that it takes to read them, each once."""
    return list(dict.fromkeys(one.key for one in images if one.key is not None))


@contextmanager
def opened_chain(
    vm: str, images: Sequence[Image], beneath: Image | None, keys: Keys
) -> Iterator[SealedChain]:
    """The *images* of *vm*, all sealed, top first, for the block; on *beneath* stands the last.

    That each is what its manifest says, of its place and on the next one, is seen before anything
    is read. Raises KeyMissing, NotAuthentic, ManifestError, BaseChanged, LocalFailed.
    """
    with ExitStack() as stack:
        found = []
        for one, on in zip_longest(images, [*images[1:], *([beneath] if beneath else [])]):
            path = Path(one.path)
            image = stack.enter_context(opened_sealed(path, keys, role(vm, path), one.key))
            _expect(one, on, image.index)
            found.append(image)
        yield SealedChain(found)


def check(
    vm: str,
    one: Image,
    beneath: Image | None,
    keys: Keys,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Open every frame of the image *one*, which stands on *beneath*. Raises as `opened_chain`."""
    path = Path(one.path)
    _expect(one, beneath, sealed.check(path, keys, role(vm, path), one.key, on_bytes))


def _expect(one: Image, beneath: Image | None, index: Index) -> None:
    if index.virtual_size != one.virtual_size_bytes:
        sizes = f"{index.virtual_size} bytes, not {one.virtual_size_bytes}"
        raise BaseChanged(f"{one.path}: is of {sizes}")
    on = point_of(Path(beneath.path).parent) if beneath is not None else ""
    if index.on != on:
        raise BaseChanged(
            f"{one.path}: stands on {index.on or 'nothing'}, not on {on or 'nothing'}"
        )
