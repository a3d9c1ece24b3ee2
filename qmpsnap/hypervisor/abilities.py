"""What this QEMU can do, asked of itself instead of guessed from its version, as far as it tells.

Not asked with query-qmp-schema: making its 200 KiB holds QEMU's main loop, and so the guest's
devices, for 60 ms (11.1, measured by the guest's silence), three times a snapshot's pause. What
query-migrate-capabilities and -parameters list came with what we want to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.monitor import Monitor, settle
from qmpsnap.shield import finish

_BACKGROUND = "background-snapshot"
_AT_WORK = {"setup", "active", "device", "cancelling", "failing"}
_LOOKS_ONCE = 8  # the major version from which on that was not tried


class Tracking(StrEnum):
    """How far QEMU can be trusted with what the guest writes while its RAM is saved in passes.

    An emulated guest's TLB goes on writing past a look for the pages that were written: before 9.0
    QEMU does not empty it then, and what is written after its page was saved is lost (decision
    0028). `one pass`: before 8.0 the only look while the guest runs is the first one, if QEMU is
    not told to make more. KVM tracks by itself.
    """

    SOUND = "sound"
    ONE_PASS = "one pass"
    UNSOUND = "unsound"


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the snapshot engine asks of a QEMU, each found by probing.

    file_uri           migrate to `file:` (8.2); before, a regular file goes as `fd:`
    background         write-tracked saving of RAM; *background_trouble* says why not
    background_safe    a failed background save lets the guest go on (8.2; 7.2 hangs it for ever)
    stays_paused       a background save of a paused guest leaves it paused (9.0)
    tracking           of the guest's writes, while its RAM is saved live
    """

    version: str
    package: str
    file_uri: bool
    background: bool
    background_trouble: str
    background_safe: bool
    stays_paused: bool
    tracking: Tracking


class _Number(msgspec.Struct, frozen=True):
    major: int
    minor: int
    micro: int


class _Version(msgspec.Struct, frozen=True):
    qemu: _Number
    package: str = ""


class _Kvm(msgspec.Struct, frozen=True):
    enabled: bool = False


class _Capability(msgspec.Struct, frozen=True):
    capability: str
    state: bool


class _Migration(msgspec.Struct, frozen=True):
    status: str = ""


async def capabilities(monitor: Monitor) -> dict[str, bool]:
    """The migration capabilities that this QEMU has, and which are set. Raises ReplyMalformed."""
    told = await monitor.query("query-migrate-capabilities", list[_Capability])
    return {one.capability: one.state for one in told}


async def version(monitor: Monitor) -> tuple[str, str]:
    """QEMU's version, such as `7.2.22`, and the distribution's name for it."""
    told = await monitor.query("query-version", _Version)
    return f"{told.qemu.major}.{told.qemu.minor}.{told.qemu.micro}", told.package


async def probe(monitor: Monitor) -> Abilities:
    """Ask everything. Sets and resets one migration capability, so no migration may be running.

    For `background-snapshot` setting it is the probe: QEMU then checks the guest's memory, the
    kernel and our privileges (qemu: migration/options.c, migration/ram.c).
    """
    number, package = await version(monitor)
    names = set(await capabilities(monitor))
    # 8.2 brought it together with the `file:` URI, and ends a failed background save well
    mode = "mode" in await monitor.query("query-migrate-parameters", dict[str, Any])
    of_9_0 = "mapped-ram" in names
    emulated = not (await monitor.query("query-kvm", _Kvm)).enabled
    trouble = await _background_trouble(monitor, names)
    return Abilities(
        version=number,
        package=package,
        file_uri=mode,
        background=not trouble,
        background_trouble=trouble,
        background_safe=mode,
        stays_paused=of_9_0,
        tracking=_tracking(number) if emulated and not of_9_0 else Tracking.SOUND,
    )


def _tracking(number: str) -> Tracking:
    """Of a QEMU before 9.0 that emulates. Nothing it tells shows how often it looks."""
    major = int(number.partition(".")[0])
    return Tracking.ONE_PASS if major < _LOOKS_ONCE else Tracking.UNSOUND


async def _background_trouble(monitor: Monitor, capabilities: set[str]) -> str:
    if _BACKGROUND not in capabilities:
        return "this QEMU does not have it"
    try:
        await set_capabilities(monitor, {_BACKGROUND: True})
    except CommandRefused as refused:
        return refused.desc
    finally:
        await finish(settle(monitor, _background_off), within=20)
    return ""


async def broken_off(monitor: Monitor) -> bool:
    """Take back the probe of an engine that died in the middle of it; whether there was one.

    The journal does not tell of it, and need not: every probe ends with that capability off, and
    nobody has a use for it while no migration is under way. Raises MonitorError.
    """
    if not (await capabilities(monitor)).get(_BACKGROUND):
        return False
    if (await monitor.query("query-migrate", _Migration)).status in _AT_WORK:
        return False
    await _background_off(monitor)
    return True


async def _background_off(monitor: Monitor) -> None:
    await set_capabilities(monitor, {_BACKGROUND: False})


async def set_capabilities(monitor: Monitor, wanted: dict[str, bool]) -> None:
    """Set migration capabilities; they stay set until somebody resets them."""
    await monitor.execute(
        "migrate-set-capabilities",
        {
            "capabilities": [
                {"capability": name, "state": state} for name, state in sorted(wanted.items())
            ]
        },
    )
