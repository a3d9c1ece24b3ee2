"""How like the captured machine's CPUs, firmware and pages this host's are: rows, from facts."""

from __future__ import annotations

from collections.abc import Iterator

from qmpsnap.engine.details import Details
from qmpsnap.engine.firmware import FirmwareFile
from qmpsnap.engine.here import Here
from qmpsnap.engine.verdict import Row, row
from qmpsnap.units import in_bytes

_SHOWN = 6  # names in a row


def compare(details: Details | None, here: Here, *, cold: bool) -> Iterator[Row]:
    """Nothing for a machine that was recorded without details, or of which they are not known."""
    if details is None:
        return
    yield from _features(details, here, cold)
    yield from _firmware(details, here, cold)
    yield from _huge_pages(details, here)


def _features(details: Details, here: Here, cold: bool) -> Iterator[Row]:
    if details.cpu is None or here.cpu_features is None:
        return
    count = f"{len(details.cpu.features)} of {details.cpu.name}"
    lacking = sorted(set(details.cpu.features) - here.cpu_features)
    if not lacking:
        yield row("CPU features", count, "all of them")
        return
    told = ", ".join(lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
    why = f"this host's QEMU does not give the guest {told} with {here.accelerator}"
    missing = f"{len(lacking)} missing"
    if here.accelerator == "kvm" and not cold:
        # what has found them when it booted goes on to use them
        yield row("CPU features", count, missing, blocks=why)
    else:
        yield row("CPU features", count, missing, differs=why)


def _firmware(details: Details, here: Here, cold: bool) -> Iterator[Row]:
    same = 0
    for was in details.firmware or []:
        now = here.firmware.get(was.name)
        if now is None or (now.path is None and "/" in now.name):
            continue  # a file that the command line names has a row of its own
        if now.path is not None and (now.size_bytes, now.blake3) == (was.size_bytes, was.blake3):
            same += 1
            continue
        yield _other(was, now, cold)
    if same:
        yield row("firmware", f"{same} files", "the same")


def _other(was: FirmwareFile, now: FirmwareFile, cold: bool) -> Row:
    what, told = f"firmware {was.name}", in_bytes(was.size_bytes)
    if now.path is None:
        return row(what, told, "none", differs=f"{was.name} is in none of QEMU's folders")
    size = in_bytes(now.size_bytes)
    if not cold and _in_ram(was) != _in_ram(now):
        why = f"{now.path} is of another size: the captured RAM has no room for it, or too much"
        return row(what, told, size, blocks=why)
    later = "the guest boots with it" if cold else "the guest has its own until it boots anew"
    return row(what, told, size, differs=f"{now.path} is another one than it was: {later}")


def _in_ram(one: FirmwareFile) -> int:
    """What it takes of the guest's RAM: a flash image its size, a ROM up to a power of two."""
    size = one.size_bytes or 0
    return size if "/" in one.name else 1 << max(0, size - 1).bit_length()


def _huge_pages(details: Details, here: Here) -> Iterator[Row]:
    needed: dict[int, int] = {}
    for one in details.memory_backends or []:
        if one.huge_page_bytes:
            size = one.huge_page_bytes
            needed[size] = needed.get(size, 0) + one.size_bytes
    for size, count in sorted(needed.items()):
        free = here.huge_free_bytes.get(size, 0)
        why = f"the guest's RAM is made of {in_bytes(count)} of them, and {in_bytes(free)} are free"
        told = f"{in_bytes(free)} free"
        blocks = why if count > free else ""
        yield row(f"huge pages of {in_bytes(size)}", in_bytes(count), told, blocks=blocks)
