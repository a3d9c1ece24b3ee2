"""The only place that runs qemu-img: one coroutine a subcommand, formats always spelled out."""

from __future__ import annotations

import asyncio
import os
import re
from asyncio.subprocess import PIPE
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from qmpsnap.errors import UNREADABLE, LocalFailed
from qmpsnap.host.filesystem import sync_dir

T = TypeVar("T")
_CORRUPT, _LEAKING, _UNSUPPORTED = 2, 3, 63  # exit codes of `qemu-img check`


class _Bitmap(msgspec.Struct, frozen=True):
    name: str


class _Data(msgspec.Struct, frozen=True):
    corrupt: bool = False
    bitmaps: list[_Bitmap] = []


class _Details(msgspec.Struct, frozen=True):
    data: _Data = _Data()


class ImageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An image as its own header tells it; *filename* is spelled as qemu-img opened it."""

    filename: str
    format: str
    virtual_size_bytes: int = msgspec.field(name="virtual-size")
    file_bytes: int | None = msgspec.field(name="actual-size", default=None)
    backing: str | None = msgspec.field(name="full-backing-filename", default=None)
    backing_as_written: str | None = msgspec.field(name="backing-filename", default=None)
    backing_format: str | None = msgspec.field(name="backing-filename-format", default=None)
    dirty: bool = msgspec.field(name="dirty-flag", default=False)
    encrypted: bool = False
    details: _Details = msgspec.field(name="format-specific", default=_Details())

    @property
    def corrupt(self) -> bool:
        """Whether QEMU has marked the image as corrupt."""
        return self.details.data.corrupt

    @property
    def bitmaps(self) -> list[str]:
        """The names of the dirty bitmaps kept in the image."""
        return [bitmap.name for bitmap in self.details.data.bitmaps]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found; None stands for a format that has nothing to check."""

    corruptions: int | None = 0
    leaks: int | None = 0


async def create_overlay(
    path: Path, backing: Path, backing_format: str, size: int, *, binary: str = "qemu-img"
) -> None:
    """Create the empty qcow2 overlay *path* (mode 0600, durable) of *size* bytes over *backing*.

    The backing file is not opened, since a running QEMU has it locked; it is only looked for.

    Raises LocalFailed, also when *path* exists; nothing new is left behind then.
    """
    beneath = ["-b", _existing(backing), "-F", backing_format]
    arguments = ["create", "-q", "-f", "qcow2", "-u", *beneath, _spelled(path), str(size)]
    await _make(path, arguments, binary=binary)


async def create(path: Path, size: int, *, binary: str = "qemu-img") -> None:
    """Create the empty qcow2 image *path* (mode 0600, durable) of *size* bytes.

    Raises LocalFailed, also when *path* exists; nothing new is left behind then.
    """
    await _make(path, ["create", "-q", "-f", "qcow2", _spelled(path), str(size)], binary=binary)


async def info(
    path: Path,
    format: str | None = None,
    *,
    probe_format: bool = False,
    force_share: bool = True,
    binary: str = "qemu-img",
) -> ImageInfo:
    """What the header of *path* says; its format is given, or guessed with `probe_format=True`.

    A guest that owns a raw image can write any header into it: guess only what is not a guest's.

    Raises LocalFailed, and ValueError when the format is neither given nor to be guessed.
    """
    arguments = ["info", "--output=json", *_format(format, probe=probe_format)]
    arguments += ["-U"] * force_share
    output = await _run([*arguments, _spelled(path)], binary=binary)
    return _decode(output, ImageInfo, path)


async def chain(path: Path, format: str, *, binary: str = "qemu-img") -> list[ImageInfo]:
    """*path* and all images below it, top first; safe on images in use.

    Raises LocalFailed, also for a backing file whose format the header above it does not name:
    its format would have been guessed.
    """
    arguments = ["info", "--output=json", "--backing-chain", "-U", "-f", format]
    output = await _run([*arguments, _spelled(path)], binary=binary)
    images = _decode(output, list[ImageInfo], path)
    for image in images:
        if image.backing_as_written is not None and image.backing_format is None:
            raise LocalFailed(
                f"{image.filename} does not say the format of its backing file",
                hint="`qemu-img rebase -u -b BACKING -F FORMAT IMAGE` writes it down",
            )
    return images


async def check(
    path: Path, format: str, *, force_share: bool = False, binary: str = "qemu-img"
) -> Health:
    """Check the image's own tables. Raises LocalFailed when the check itself cannot be made."""
    arguments = ["check", "--output=json", "-f", format, *["-U"] * force_share]
    output = await _run(
        [*arguments, _spelled(path)],
        binary=binary,
        accept={0, _CORRUPT, _LEAKING, _UNSUPPORTED},
    )
    if not output.strip():
        return Health(corruptions=None, leaks=None)
    return _decode(output, Health, path)


async def convert(
    src: Path,
    fmt: str,
    dst: Path,
    dst_fmt: str,
    on_progress: Callable[[float], None] | None = None,
    *,
    compress: bool = False,
    rate: int | None = None,
    backing: tuple[str, str] | None = None,
    force_share: bool = False,
    binary: str = "qemu-img",
) -> None:
    """Write what a guest would read from *src* into the new file *dst* (mode 0600, durable).

    With *backing*, a name as it is to be written (relative to *dst*'s folder, or absolute) and a
    format, only what *src* itself holds is written: what lies beneath *src* must read as *backing*
    does. *rate* is in bytes a second. *on_progress* is told the part done, 0 to 1.

    Raises LocalFailed, also when *dst* exists; nothing new is left behind then.
    """
    arguments = ["convert", "-p", "-f", fmt, "-O", dst_fmt, *["-U"] * force_share]
    arguments += ["-c"] * compress
    arguments += ["-r", str(rate)] if rate is not None else []
    arguments += ["-B", backing[0], "-F", backing[1]] if backing is not None else []
    await _make(
        dst, [*arguments, _spelled(src), _spelled(dst)], binary=binary, on_progress=on_progress
    )


async def strip_bitmaps(path: Path, *, binary: str = "qemu-img") -> list[str]:
    """Remove every dirty bitmap from the qcow2 *path*, durably, and give their names.

    Also one that is marked inconsistent, or as in use by whoever had the image when it was copied.
    Nobody may use *path*: there is no way around the lock, as the header is written.

    Raises LocalFailed; some of the bitmaps may be gone then.
    """
    names = (await info(path, "qcow2", force_share=False, binary=binary)).bitmaps
    for name in names:
        await _run(["bitmap", "--remove", "-f", "qcow2", "--", _spelled(path), name], binary=binary)
    if names:
        await asyncio.to_thread(_sync, path)
    return names


async def rebase(
    path: Path,
    backing: str,
    format: str,
    on_progress: Callable[[float], None] | None = None,
    *,
    binary: str = "qemu-img",
) -> None:
    """Put the qcow2 *path* on another image, durably, without a change of what it reads as.

    What the images between the two hold is written into *path*; they are only read. *backing* is
    written as it is given: relative to *path*'s folder, or absolute. Nobody may use *path*.

    Raises LocalFailed: *path* reads as before then, and may hold a part of it.
    """
    arguments = ["rebase", "-p", "-f", "qcow2", "-b", backing, "-F", format]
    await _run([*arguments, _spelled(path)], binary=binary, on_progress=on_progress)
    await asyncio.to_thread(_sync, path)


async def same(
    one: Path,
    other: Path,
    format: str,
    other_format: str | None = None,
    *,
    binary: str = "qemu-img",
) -> bool:
    """Whether a guest would read the same from both. Raises LocalFailed."""
    formats = ["-f", format, "-F", other_format or format]
    arguments = ["compare", *formats, _spelled(one), _spelled(other)]
    said = await _run(arguments, binary=binary, accept={0, 1})
    return b"Images are identical." in said


class _Extent(msgspec.Struct, frozen=True):
    start: int
    length: int
    depth: int
    present: bool = True


async def allocated(
    path: Path, format: str, layers: int, *, binary: str = "qemu-img"
) -> list[tuple[int, int]]:
    """The ranges (offset, length) of *path* that its top *layers* images hold, zeros too.

    Raises LocalFailed.
    """
    arguments = ["map", "--output=json", "-U", "-f", format, _spelled(path)]
    extents = _decode(await _run(arguments, binary=binary), list[_Extent], path)
    return [(one.start, one.length) for one in extents if one.present and one.depth < layers]


async def commit(path: Path, format: str, *, binary: str = "qemu-img") -> None:
    """Write what the overlay *path* holds into its backing file, durably; *path* is kept as it is.

    Raises LocalFailed; the backing file may hold a part of it then, and can be committed again.
    """
    await _run(["commit", "-q", "-d", "-f", format, _spelled(path)], binary=binary)


def _format(format: str | None, *, probe: bool) -> list[str]:
    if (format is None) != probe:
        raise ValueError("give a format, or probe_format=True, and not both")
    return ["-f", format] if format is not None else []


def _spelled(path: Path) -> str:
    # absolute: never an option, never a `protocol:`, and the same from any folder
    return str(path.absolute())


def _existing(path: Path) -> str:
    if not path.exists():
        raise LocalFailed(f"{path}: the backing file does not exist")
    return _spelled(path)


@contextmanager
def _new(path: Path) -> Iterator[None]:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


async def _make(
    path: Path,
    arguments: list[str],
    *,
    binary: str,
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Run qemu-img to fill *path*, which is ours from its first moment, or is gone again."""
    with _new(path):
        await _run(arguments, binary=binary, on_progress=on_progress)
        await asyncio.to_thread(_sync, path)


async def _run(
    arguments: list[str],
    *,
    binary: str,
    accept: frozenset[int] | set[int] = frozenset({0}),
    on_progress: Callable[[float], None] | None = None,
) -> bytes:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        process = await asyncio.create_subprocess_exec(
            binary, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=PIPE, stderr=PIPE,
            env=environment,
        )  # fmt: skip
    except OSError as failed:
        hint = "qemu-img comes with QEMU (Debian: qemu-utils)"
        raise LocalFailed(f"{binary}: {failed.strerror}", hint=hint) from failed
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        output, complaint = await asyncio.gather(
            _drain(process.stdout, on_progress), process.stderr.read()
        )
        code = await process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if code not in accept:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:]
        said = last[0].removeprefix("qemu-img: ") if last else f"ended with code {code}"
        raise LocalFailed(f"qemu-img {arguments[0]}: {said}")
    return output


async def _drain(stream: asyncio.StreamReader, told: Callable[[float], None] | None) -> bytes:
    whole = bytearray()
    while chunk := await stream.read(65536):
        whole += chunk
        shares = re.findall(rb"\(([0-9.]+)/100%\)", bytes(whole[-200:])) if told else []
        if told and shares:
            told(float(shares[-1]) / 100)
    return bytes(whole)


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as failed:
        raise LocalFailed(f"{path}: {failed.strerror}") from failed
    sync_dir(path.parent)


def _decode(output: bytes, kind: type[T], path: Path) -> T:
    try:
        return msgspec.json.decode(output, type=kind)
    except UNREADABLE as failed:
        raise LocalFailed(f"qemu-img says of {path} what we cannot read: {failed}") from failed
