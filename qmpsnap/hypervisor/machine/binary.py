"""The only place that asks a QEMU binary what it knows, without making a machine."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.errors import Blocked

_WITHIN = 30.0  # seconds for all answers: a binary on a cold disk takes a few
_VERSION = re.compile(r"version (\d+(?:\.\d+)*)")
_NAMED = re.compile(r'^name "([^"]+)"')
_ALIAS = re.compile(r', alias "([^"]+)"')
_MODEL = re.compile(r"^(?:(?:x86|s390|PowerPC)\s+)?(\S+)")  # 7.2 says the architecture first


@dataclass(frozen=True, slots=True)
class Binary:
    """What `-version` and the `help` of an option say; aliases are names like others."""

    path: Path
    version: str
    machines: frozenset[str]
    cpus: frozenset[str]
    devices: frozenset[str]
    accelerators: frozenset[str]


_asked: dict[tuple[str, int, int], Binary] = {}


async def ask(path: Path) -> Binary:
    """What the binary *path* knows; asked once as long as the file stays the same.

    Raises Blocked for what is no QEMU that runs here.
    """
    try:
        status = await asyncio.to_thread(path.stat)
    except OSError as failed:
        raise Blocked(f"{path}: {failed.strerror}") from failed
    key = (str(path), status.st_mtime_ns, status.st_size)
    if key not in _asked:
        _asked[key] = await _ask(path)
    return _asked[key]


async def folders(path: Path) -> list[Path]:
    """Where the binary *path* looks for firmware. Raises Blocked."""
    return [Path(line) for line in (await _said(path, "-L", "help")).splitlines()]


async def _ask(path: Path) -> Binary:
    words = ("-machine", "-cpu", "-device", "-accel")
    try:
        async with asyncio.timeout(_WITHIN):
            version, machines, cpus, devices, accelerators = await asyncio.gather(
                _said(path, "-version"), *(_said(path, word, "help") for word in words)
            )
    except TimeoutError:
        raise Blocked(f"{path}: does not answer within {_WITHIN:g} s") from None
    number = _VERSION.search(version)
    if number is None:
        raise Blocked(f"{path}: does not say which version of QEMU it is")
    return Binary(
        path=path,
        version=number[1],
        machines=_first_words(machines),
        cpus=_models(cpus),
        devices=_drivers(devices),
        accelerators=_first_words(accelerators),
    )


async def _said(path: Path, *words: str) -> str:
    """What the binary prints; nothing where it does not take *words*. Raises Blocked."""
    try:
        process = await asyncio.create_subprocess_exec(
            path, *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except OSError as failed:
        raise Blocked(f"{path}: {failed.strerror}") from failed
    try:
        out, _ = await process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    return out.decode(errors="replace").strip() if process.returncode == 0 else ""


def _first_words(text: str) -> frozenset[str]:
    """Of each line but the heading."""
    return frozenset(line.split()[0] for line in text.splitlines()[1:] if line.strip())


def _models(text: str) -> frozenset[str]:
    lines = text.partition("\n\n")[0].splitlines()[1:]  # CPU flags come behind
    found = (_MODEL.match(line.strip()) for line in lines)
    return frozenset(one[1] for one in found if one)


def _drivers(text: str) -> frozenset[str]:
    names = set()
    for line in text.splitlines():
        if named := _NAMED.match(line):
            names.add(named[1])
            names.update(_ALIAS.findall(line))
    return frozenset(names)
