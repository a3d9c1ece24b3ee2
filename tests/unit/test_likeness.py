"""The verdicts on CPUs, firmware and huge pages, from facts that no test machine has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from qmpsnap.engine.details import Details
from qmpsnap.engine.firmware import FirmwareFile
from qmpsnap.engine.here import Here
from qmpsnap.engine.verdict import Row
from tests.unit.machine_details import DETAILS, GIB
from tests.unit.test_comparison import HERE, machine, odd
from tests.unit.test_comparison import rows as compared

MIB = 1 << 20


def rows(here: Here, *, cold: bool = False, **other: Any) -> dict[str, Row]:
    details: Details = msgspec.structs.replace(DETAILS, **other)
    return compared(machine(details=details), here, cold=cold)


def fw(name: str, size: int, digest: str = "ab", path: str | None = "/fw/x") -> FirmwareFile:
    where = path if path is None else f"{path}/{name}"
    return FirmwareFile(name=name, path=where, size_bytes=size, blake3=digest * 32)


def test_nothing_is_said_of_what_is_not_known() -> None:
    whole = set(rows(HERE))
    assert whole == set(compared(machine(details=None)))
    assert not any(what.startswith(("firmware", "huge", "CPU features")) for what in whole)


@pytest.mark.parametrize(
    ("accelerator", "cold", "verdict"),
    [("kvm", False, "blocks"), ("kvm", True, "differs"), ("tcg", False, "differs")],
)
def test_features_that_the_guest_would_miss(accelerator: str, cold: bool, verdict: str) -> None:
    here = replace(HERE, accelerator=accelerator, cpu_features=frozenset({"sse2", "avx512f"}))
    found = rows(here, cold=cold)
    assert odd(found) == {"CPU features": verdict}
    assert "the guest aes with" in found["CPU features"].why
    full = replace(here, cpu_features=frozenset({"sse2", "aes"}))
    assert rows(full, cold=cold)["CPU features"].verdict == "ok"


FILES = [
    # captured, here, with RAM, cold
    (fw("bios", MIB), fw("bios", MIB), "ok", "ok"),
    (fw("bios", MIB), fw("bios", MIB, "cd"), "differs", "differs"),
    (fw("bios", MIB), fw("bios", 2 * MIB, "cd"), "blocks", "differs"),
    # a card's ROM takes a power of two, and it is that which has to fit
    (fw("efi.rom", MIB - 4096), fw("efi.rom", MIB, "cd"), "differs", "differs"),
    (fw("/x/flash", MIB - 4096), fw("/x/flash", MIB, "cd"), "blocks", "differs"),
    (fw("bios", MIB), fw("bios", 0, "cd", None), "differs", "differs"),
]


@pytest.mark.parametrize(("was", "now", "warm", "cold"), FILES)
def test_firmware(was: FirmwareFile, now: FirmwareFile, warm: str, cold: str) -> None:
    here = replace(HERE, firmware={now.name: now})
    for boots, verdict in ((False, warm), (True, cold)):
        found = rows(here, cold=boots, firmware=[was])
        name = "firmware" if verdict == "ok" else f"firmware {was.name}"
        assert found[name].verdict == verdict


def test_a_file_that_the_command_line_names_is_told_once() -> None:
    gone = fw("/x/flash", 0, path=None)
    assert odd(rows(replace(HERE, firmware={gone.name: gone}), firmware=[fw(gone.name, 1)])) == {}


@pytest.mark.parametrize(
    ("free", "verdict"), [({2 * MIB: 2 * GIB}, "ok"), ({2 * MIB: GIB}, "blocks"), ({}, "blocks")]
)
def test_huge_pages(free: dict[int, int], verdict: str) -> None:
    (backend,) = DETAILS.memory_backends or []
    huge = msgspec.structs.replace(backend, huge_page_bytes=2 * MIB)
    found = rows(replace(HERE, huge_free_bytes=free), memory_backends=[huge])
    assert found["huge pages of 2.0 MiB"].verdict == verdict
