"""Compression of what goes to the store: the only place that speaks zstd."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Protocol

import msgspec
import zstandard
from blake3 import blake3

from qmpsnap.errors import DigestMismatch, LocalFailed, StoreError
from qmpsnap.store.files import CHUNK, Progress, Side, opened, partial, told, write_all

_WINDOW_LIMIT = 128 << 20
_HEADER_MAX = 18  # bytes, RFC 8878 section 3.1.1
Content = bytes | bytearray | memoryview


class Source(Protocol):
    """What compressed bytes are read from."""

    def read(self, size: int, /) -> bytes | None: ...


class _Mine(threading.local):
    """zstd's contexts, which no two threads may use at once."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1)
        self.unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT)


_mine = _Mine()


class Packed(msgspec.Struct, frozen=True, kw_only=True):
    """Size and BLAKE3 of a file, as it was (*raw*) and compressed."""

    bytes_raw: int
    blake3_raw: str
    bytes: int
    blake3: str


def compress(
    src: Path,
    dst: Path,
    *,
    level: int = 1,
    threads: int = 2,
    on_progress: Progress | None = None,
) -> Packed:
    """Publish *src* at *dst*, compressed; memory is bounded whatever the size. Both are local.

    Raises LocalFailed, also when *dst* exists.
    """
    raw = blake3()
    with opened(src, LocalFailed) as reading, partial(dst, LocalFailed) as writing:
        total, done = os.fstat(reading).st_size, 0
        sink = _Sink(writing)
        packer = zstandard.ZstdCompressor(level=level, threads=threads).compressobj(size=total)
        try:
            while chunk := os.read(reading, CHUNK):
                raw.update(chunk)
                sink.write(packer.compress(chunk))
                done += len(chunk)
                if on_progress is not None:
                    on_progress(done, total, f"packing {src.name}")
            sink.write(packer.flush())
        except zstandard.ZstdError as failed:
            # it was told the size beforehand: another size is the one thing that can go wrong
            raise LocalFailed(f"{src}: changed while it was packed: {failed}") from failed
    return Packed(
        bytes_raw=done,
        blake3_raw=raw.hexdigest(),
        bytes=sink.bytes,
        blake3=sink.hasher.hexdigest(),
    )


def unpack_to_fd(
    path: Path,
    fd: int,
    *,
    raw_bytes: int | None = None,
    raw_blake3: str | None = None,
    side: Side = StoreError,
    decrypted: Callable[[FileIO], Source] = lambda file: file,
    on_progress: Progress | None = None,
) -> int:
    """Write what *path* was before it was compressed into *fd*; the bytes written are returned.

    *fd* may be a pipe, and is left open. It never gets more bytes than the stream's header, and
    *raw_bytes*, announce. *decrypted* gives what is in the file where that is encrypted.

    Raises DigestMismatch when *path* is no whole zstd stream, or not of the size and digest that
    were given (the last is known only at the end); LocalFailed when *fd* takes no more; *side*
    when *path* cannot be read.
    """
    hasher, done = blake3(), 0
    with (
        opened(path, side) as reading,
        os.fdopen(reading, "rb", buffering=0, closefd=False) as file,
    ):
        with told(path, side):
            source = decrypted(file)
        size, begun = _promised(source, path, side)
        if raw_bytes is not None and size != raw_bytes:
            raise DigestMismatch(f"{path}: unpacks to {size} bytes, not {raw_bytes}")
        unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT)
        stream = unpacker.stream_reader(begun, read_size=CHUNK)  # type: ignore[arg-type]
        while chunk := _next(stream, path, side):
            hasher.update(chunk)
            done += len(chunk)
            if done > size:
                break
            with told(Path(f"/proc/self/fd/{fd}"), LocalFailed):
                write_all(fd, chunk)
            if on_progress is not None:
                on_progress(done, size, f"unpacking {path.name}")
    # zstandard's reader takes a stream that is cut short for one that ends
    if done != size:
        raise DigestMismatch(f"{path}: unpacks to {done} bytes, not {size}")
    if raw_blake3 is not None and hasher.hexdigest() != raw_blake3:
        raise DigestMismatch(f"{path}: does not unpack to what the manifest says (BLAKE3)")
    return done


def frame_of(content: Content) -> bytes:
    """*content* as one zstd frame, which tells its size. Any number of threads at once."""
    return _mine.compressor.compress(content)


def frame_of_all(parts: Sequence[Content]) -> bytes:
    """As `frame_of`, of *parts* one behind the other: they need not be put together for it."""
    packing = _mine.compressor.compressobj(size=sum(len(one) for one in parts))
    return b"".join([*map(packing.compress, parts), packing.flush()])


def size_of(frame: Content) -> int:
    """The bytes that *frame* says it unpacks to. Raises DigestMismatch when it does not say."""
    try:
        size = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as failed:
        raise DigestMismatch("is not compressed with zstd") from failed
    if size < 0:
        raise DigestMismatch("does not say what size it unpacks to")
    return size


def content_of(frame: Content, size: int) -> bytes:
    """What *frame* was, of *size* bytes. Raises DigestMismatch when it is not such a frame."""
    if size_of(frame) != size:
        raise DigestMismatch(f"does not unpack to {size} bytes")
    try:
        content = _mine.unpacker.decompress(frame, max_output_size=size)
    except zstandard.ZstdError as failed:
        raise DigestMismatch(f"cannot be unpacked: {failed}") from failed
    if len(content) != size:
        raise DigestMismatch(f"unpacks to {len(content)} bytes, not {size}")
    return content


class _Begun:
    """A source of which the *first* bytes were read, from these on."""

    def __init__(self, first: bytes, source: Source) -> None:
        self._first, self._source = first, source

    def read(self, size: int) -> bytes | None:
        if self._first:
            given, self._first = self._first[:size], self._first[size:]
            return given
        return self._source.read(size)


def _promised(source: Source, path: Path, side: Side) -> tuple[int, _Begun]:
    """The size that the frame's header gives (what we pack always has one), and all of *source*."""
    with told(path, side):
        head = source.read(_HEADER_MAX) or b""
    try:
        return size_of(head), _Begun(head, source)
    except DigestMismatch as odd:
        raise DigestMismatch(f"{path}: {odd}") from odd


def _next(stream: zstandard.ZstdDecompressionReader, path: Path, side: Side) -> bytes:
    with told(path, side):
        try:
            return stream.read(CHUNK)
        except zstandard.ZstdError as failed:
            raise DigestMismatch(f"{path}: cannot be unpacked: {failed}") from failed


class _Sink:
    """Writes to a file, and digests what it writes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.hasher, self.bytes = blake3(), 0

    def write(self, content: bytes) -> None:
        self.hasher.update(content)
        self.bytes += len(content)
        write_all(self._descriptor, content)
