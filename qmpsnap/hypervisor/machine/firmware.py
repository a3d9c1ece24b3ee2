"""The only place that knows which firmware files a running QEMU has loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.options import fields_of
from qmpsnap.hypervisor.machine.tree import Found

# "/rom@etc/acpi/tables" and its kin were made by QEMU itself, and have no file
_ROM = re.compile(r'(?!/rom@).*size=0x[0-9a-f]+ .*name="(?P<name>[^"]+)"')


async def loaded(
    asking: Asking, line: CommandLine | None, devices: Iterable[Found], flash: Sequence[str]
) -> list[str] | None:
    """Their names, as QEMU looks for them, each once; *flash* are the images of read-only pflash.

    None when QEMU does not tell. The kernel and what goes with it is no firmware.
    """
    said = await asking.human("info roms")
    if said is None:
        return None
    given = [option.value or "" for option in (line.all("bios") if line else [])]
    given += [
        name
        for option in (line.all("option-rom") if line else [])
        if (name := fields_of(option).get("romfile"))
    ]
    roms = [match["name"] for row in said if (match := _ROM.fullmatch(row.strip()))]
    of_cards = [one.romfile for one in devices if one.romfile]
    # `info roms` has those that were given without their folder
    given = given[-1:] if not said else given
    known = {name.rpartition("/")[2] for name in (*given, *flash) if "/" in name}
    shown = [name for name in roms if "/" in name or name not in known]
    return list(dict.fromkeys([*given, *flash, *shown, *of_cards]))
