"""Images of disks: their headers, as qemu-img reads them for us, and what it says of them."""

from __future__ import annotations

import json
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random

from qmpsnap.engine import chains
from qmpsnap.errors import SnapError
from qmpsnap.host import qemu_img
from qmpsnap.hypervisor.machine import features
from tests.fuzz import mutation
from tests.fuzz.surface import Surface
from tests.fuzz.surfaces.replies import driven


def _imaged(given: bytes, _scratch: Path) -> object:
    path = Path("/images/a.qcow2")
    with suppress(SnapError):
        found = qemu_img._decode(given, qemu_img.ImageInfo, path)
        return found.corrupt, found.bitmaps, found.virtual_size_bytes + 1
    with suppress(SnapError):
        return qemu_img._decode(given, qemu_img.Health, path)
    with suppress(SnapError):
        return qemu_img._decode(given, list[qemu_img._Extent], path)
    return features._answers(given.decode(errors="replace"), 3)


def _images() -> list[bytes]:
    """The beginnings of images: a qcow2 that stands on another, with a bitmap; other formats'."""
    made = []
    with tempfile.TemporaryDirectory() as name:
        beneath, path = Path(name, "b"), Path(name, "a")
        beneath.write_bytes(bytes(1 << 20))
        named = ["-b", str(beneath), "-F", "raw"]
        for words in (["qcow2", *named], ["qcow2", "-o", "compat=0.10"], ["vmdk"], ["qed", *named]):
            run = ["qemu-img", "create", "-q", "-f", *words, str(path), "1M"]
            subprocess.run(run, check=True)
            made.append(path.read_bytes()[:262144])
            path.unlink()
    return made


def _header(dice: Random, seed: bytes) -> bytes:
    """Odd bytes in the header and what lies behind it, where all of its fields are."""
    head = mutation.content(dice, seed[:1024])
    return head[:1024].ljust(1024, b"\0") + seed[1024:] if dice.random() < 0.8 else head


async def _examined(given: bytes, scratch: Path) -> object:
    path = scratch / "a.img"
    path.write_bytes(given)
    with suppress(SnapError):
        found = await qemu_img.info(path, "qcow2")
        return chains._file(found.backing or ""), found.bitmaps, found.corrupt
    return await qemu_img.info(path, probe_format=True)


_INFO = {
    "filename": "/images/a.qcow2", "format": "qcow2", "virtual-size": 1 << 30, "actual-size": 4096,
    "full-backing-filename": "/images/b", "backing-filename": "b", "dirty-flag": False,
    "format-specific": {"type": "qcow2", "data": {
        "compat": "1.1", "corrupt": False, "bitmaps": [{"name": "x", "flags": []}],
    }},
}  # fmt: skip


ALL = [
    Surface("image-header", _images,
            lambda given, scratch: driven(_examined(given, scratch)), _header, slow=True),
    Surface("image-facts", lambda: [json.dumps(_INFO).encode(), b'{"corruptions":1,"leaks":2}',
                                    b'[{"start":0,"length":5,"depth":0,"present":true}]',
                                    b'{"return":{"model":{"props":{"aes":true}}},"id":0}'],
            _imaged, lambda d, s: mutation.content(d, s, json_too=True)),
]  # fmt: skip
