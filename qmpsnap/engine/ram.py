"""The RAM modes that will do for a VM, decided from facts alone."""

from __future__ import annotations

from pathlib import Path

from qmpsnap.engine.survey import Survey
from qmpsnap.engine.wishes import RamChoice
from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.abilities import Tracking
from qmpsnap.hypervisor.guest.runstate import RunState
from qmpsnap.hypervisor.machine.mapping import images
from qmpsnap.hypervisor.vmstate.session import RamMode
from qmpsnap.units import in_bytes

_NO_RAM = "`--ram none` leaves the RAM out"
_NOT_MAPPED = (
    "`--ram live` does not need it; a machine restored with --eager, or from page images in memory "
    "(`--ram-in`, `ram_images_in`), can be saved in the background"
)
_LOSES = "loses writes of a guest that it emulates"
_OF_MEMORY = "guest memory configuration"  # what QEMU 7.2 to 11.1 say of files on a disk


def ram_modes(facts: Survey, asked: RamChoice) -> tuple[tuple[RamMode, ...], str]:
    """The modes to try, in this order, and why these. Raises Blocked with the reason."""
    if asked is RamChoice.NONE:
        return (RamMode.NONE,), "asked for"
    if facts.attached is None:
        raise Blocked(f"the RAM could not be restored later: {facts.problem}", hint=_NO_RAM)
    if facts.reconciled is not None and facts.reconciled.troubles:
        told = "; ".join(facts.reconciled.troubles)
        raise Blocked(f"the RAM could not be restored later: {told}", hint=_NO_RAM)
    if facts.blocked_reasons:
        reasons = "; ".join([*facts.blocked_reasons, *facts.tied])
        raise Blocked(f"QEMU cannot save its state: {reasons}", hint=_NO_RAM)
    if facts.tied:
        raise Blocked(f"the RAM could not be restored later: {'; '.join(facts.tied)}", hint=_NO_RAM)
    if short := no_memory(facts):
        raise Blocked(f"saving all RAM would end the guest: {short[0]}", hint=_NO_RAM)
    trouble = background_trouble(facts)
    if facts.state is RunState.PAUSED:
        return _ram_of_paused(facts, asked, trouble)
    if asked is RamChoice.BACKGROUND:
        if trouble:
            told = f"background saving of RAM is not possible: {trouble}"
            raise Blocked(told, hint=_NOT_MAPPED if _on_disk(facts) else "")
        return (RamMode.BACKGROUND,), "asked for"
    tracking = facts.abilities.tracking
    if tracking is Tracking.UNSOUND:
        return _without_live(facts, asked, trouble)
    if asked is not RamChoice.AUTO:
        return (RamMode(asked.value),), "asked for"
    if tracking is Tracking.ONE_PASS:
        why = f"live, in one pass: in more, QEMU {facts.abilities.version} {_LOSES}"
        return (RamMode.LIVE,), f"{why}; background would not do: {trouble}" if trouble else why
    if trouble:
        return (RamMode.LIVE,), f"background would not do: {trouble}"
    if not facts.abilities.background_safe:
        why = f"background is not failure-safe on QEMU {facts.abilities.version}"
        return (RamMode.LIVE,), why
    return (RamMode.LIVE, RamMode.BACKGROUND), "live; background if that does not converge"


def _without_live(facts: Survey, asked: RamChoice, trouble: str) -> tuple[tuple[RamMode, ...], str]:
    """Where passes over the RAM of a guest that runs do not come to a whole."""
    why = f"in passes, QEMU {facts.abilities.version} {_LOSES}"
    if asked is RamChoice.LIVE:
        raise Blocked(f"no live saving of RAM: {why}", hint="`--ram paused`, or QEMU 9.0 and later")
    if asked is RamChoice.PAUSED:
        return (RamMode.PAUSED,), "asked for"
    if not trouble and facts.abilities.background_safe:
        return (RamMode.BACKGROUND,), f"background: {why}"
    return (RamMode.PAUSED,), f"paused: {why}"


def _ram_of_paused(
    facts: Survey, asked: RamChoice, trouble: str
) -> tuple[tuple[RamMode, ...], str]:
    """Any other way ends in `postmigrate`, which only a run of the guest leaves."""
    if asked not in {RamChoice.AUTO, RamChoice.BACKGROUND}:
        raise Blocked(f"the guest is paused, and `{asked}` would have to let it run", hint=_NO_RAM)
    if not facts.abilities.stays_paused:
        raise Blocked(
            f"the guest is paused, and QEMU {facts.abilities.version} cannot save a paused guest "
            "without letting it run",
            hint=_NO_RAM,
        )
    if trouble:
        raise Blocked(f"the guest is paused: only background could save it, and {trouble}")
    return (RamMode.BACKGROUND,), "the guest is paused, and stays so"


def no_memory(facts: Survey) -> list[str]:
    """File systems in memory that have no room for all the guest's RAM that lies there.

    To save it is to read it, and QEMU is killed when a page of it cannot be made then.
    """
    return [
        f"{one.place}: {in_bytes(one.untouched_bytes)} of its RAM are not there before they are "
        f"read, and {in_bytes(one.free_bytes)} are free"
        for one in facts.untouched
        if one.untouched_bytes > one.free_bytes
    ]


def _on_disk(facts: Survey) -> list[Path]:
    """The page images that QEMU cannot write-protect, if that is the trouble with this machine."""
    if facts.attached is None or _OF_MEMORY not in facts.abilities.background_trouble:
        return []
    return images(facts.attached.line)


def background_trouble(facts: Survey) -> str:
    """Why RAM cannot be saved in the background; empty if it can."""
    if not facts.abilities.background:
        trouble, mapped = facts.abilities.background_trouble, _on_disk(facts)
        return f"its RAM is mapped from {mapped[0]}, on a disk: {trouble}" if mapped else trouble
    for device in facts.inventory.devices or []:
        # they write RAM from another process, or past the CPU: write protection misses that
        if device.type.startswith(("vhost-user", "vfio-")):
            return f"device {device.id or device.type} ({device.type}) writes RAM unseen"
    return ""
