"""What a QEMU says of itself, on each of them."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import time
from pathlib import Path

import pytest

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine import binary, features
from tests.rig.qemu import binaries


async def test_each_qemu_tells_what_it_knows(qemu: Path) -> None:
    known = await binary.ask(qemu)
    version = next(one for one, path in binaries().items() if path == qemu)
    assert known.version.startswith(f"{version}.")
    assert {"pc", "q35", "pc-i440fx-7.2", "none"} <= known.machines
    assert not {"Supported", "pc-i440fx-99.0"} & known.machines
    assert {"qemu64", "host", "max", "Haswell-v4"} <= known.cpus
    assert not {"x86", "Available", "Recognized", "fpu"} & known.cpus
    # a driver, and one by its alias
    assert {"virtio-blk-pci", "virtio-blk", "isa-serial"} <= known.devices
    assert "tcg" in known.accelerators
    assert any((folder / "bios-256k.bin").exists() for folder in await binary.folders(qemu))


async def test_a_binary_is_asked_once(qemu72: Path, tmp_path: Path) -> None:
    counted, calls = tmp_path / "qemu", tmp_path / "calls"
    counted.write_text(f'#!/bin/sh\necho "$1" >> {calls}\nexec {qemu72} "$@"\n')
    counted.chmod(0o755)
    first = await binary.ask(counted)
    asked = calls.read_text().splitlines()
    assert len(asked) == len(set(asked))
    assert await binary.ask(counted) is first
    assert calls.read_text().splitlines() == asked
    os.utime(counted, ns=(0, time.time_ns() + 1_000_000_000))  # a new one was installed
    assert await binary.ask(counted) == first
    assert len(calls.read_text().splitlines()) == 2 * len(asked)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (None, "No such file"),
        ("#!/nosuch/interpreter\n", "No such file"),
        ("#!/bin/sh\necho hello\n", "does not say which version"),
        ("#!/bin/sh\nexit 1\n", "does not say which version"),
    ],
)
async def test_what_is_no_qemu(tmp_path: Path, script: str | None, told: str) -> None:
    path = tmp_path / "qemu"
    if script is not None:
        path.write_text(script)
        path.chmod(0o755)
    with pytest.raises(Blocked, match=told) as refused:
        await binary.ask(path)
    assert str(path) in str(refused.value)


async def test_a_file_that_may_not_be_run(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.touch(mode=0o644)
    with pytest.raises(Blocked, match="Permission denied"):
        await binary.ask(path)


async def test_nobody_is_left_behind_when_the_question_is_called_off(tmp_path: Path) -> None:
    path, pids = tmp_path / "qemu", tmp_path / "pids"
    os.mkfifo(pids)
    # more than a pipe holds: who gets past it is being read
    much, rest = "head -c 300000 /dev/zero", f"exec {shutil.which('sleep')} 600"
    path.write_text(f"#!/bin/sh\n{much}\necho $$ > {pids}\n{rest}\n")
    path.chmod(0o755)
    asking = asyncio.create_task(binary.ask(path))
    started = await asyncio.to_thread(_lines, pids, 5)
    handles = [os.pidfd_open(int(pid)) for pid in started]
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    for handle in handles:
        ended, _, _ = select.select([handle], [], [], 10)
        assert ended
        os.close(handle)


def _lines(path: Path, count: int) -> list[str]:
    with path.open("r+b", buffering=0) as file:  # stays open between two writers
        return [file.readline().decode() for _ in range(count)]


async def test_features_that_a_guest_can_have_here(qemu: Path) -> None:
    known = await features.available(qemu, "tcg", "Haswell")
    assert known is not None
    assert {"sse2", "avx2", "rdtscp"} <= known
    assert not {"pcid", "tsc-deadline", "vmx"} & known  # which TCG has not got
    most = await features.available(qemu, "tcg", "max")
    assert most is not None
    assert most <= known  # a model of its own adds to what the host has
    nobody = await features.available(qemu, "tcg", "nosuch")
    assert nobody == most
    assert await features.available(qemu, "nosuch", "Haswell") is None


async def test_features_are_asked_for_once(qemu72: Path, tmp_path: Path) -> None:
    counted, calls = tmp_path / "qemu", tmp_path / "calls"
    counted.write_text(f'#!/bin/sh\necho x >> {calls}\nexec {qemu72} "$@"\n')
    counted.chmod(0o755)
    assert await features.available(counted, "tcg", "max") is not None
    assert await features.available(counted, "tcg", "max") is not None
    assert calls.read_text().split() == ["x"]
    assert await features.available(tmp_path / "none", "tcg", "max") is None
