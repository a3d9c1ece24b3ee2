"""The words of a migration stream: the only place that spells QEMU's numbers in it.

All numbers in a stream are big-endian. Facts: QEMU's migration/savevm.c and migration/ram.c.
"""

from __future__ import annotations

from typing import Final, NoReturn

from qmpsnap.errors import DamagedData, StreamUnknown

MAGIC: Final = b"QEVM\0\0\0\3"  # and the one version there has been since 2009
PAGE: Final = 4096  # bytes of a page of the guest, on all targets that we start

# what stands at the beginning of a section
END_OF_STREAM: Final = 0x00
START: Final = 0x01
PART: Final = 0x02
END: Final = 0x03
FULL: Final = 0x04
SUBSECTION: Final = 0x05
DESCRIPTION: Final = 0x06
CONFIGURATION: Final = 0x07
COMMAND: Final = 0x08
FOOTER: Final = 0x7E

SWITCHOVER: Final = b"\x08\x00\x0b\x00\x00"  # a command, of 10.0 and later, before the last of RAM

# the low twelve bits of a RAM record's address
ZERO: Final = 0x02
SIZES: Final = 0x04
CONTENT: Final = 0x08
EOS: Final = 0x10
CONTINUE: Final = 0x20
RAM_VERSION: Final = 4

_FLAGS = {
    0x01: "FULL",
    0x40: "XBZRLE",
    0x80: "HOOK",
    0x100: "COMPRESS_PAGE",
    0x200: "MULTIFD_FLUSH",
    0x400: "of bit 10",
    0x800: "of bit 11",
}
_OURS = ZERO | SIZES | CONTENT | EOS | CONTINUE
_TYPES = {
    START: "SECTION_START",
    PART: "SECTION_PART",
    END: "SECTION_END",
    FULL: "SECTION_FULL",
    SUBSECTION: "SUBSECTION",
    DESCRIPTION: "VMDESCRIPTION",
    CONFIGURATION: "CONFIGURATION",
    COMMAND: "COMMAND",
    FOOTER: "SECTION_FOOTER",
}


def number(value: int, size: int) -> bytes:
    """*value* in *size* bytes."""
    return value.to_bytes(size, "big")


def footer(section: int) -> bytes:
    """What stands behind the section of that number."""
    return b"%c%b" % (FOOTER, number(section, 4))


def record(address: int, flags: int, block: str) -> bytes:
    """The head of a RAM record that names its block."""
    name = block.encode()
    return b"%b%c%b" % (number(address | flags, 8), len(name), name)


def refuse_flags(flags: int, offset: int) -> NoReturn:
    """A RAM record that is none of ours. Raises StreamUnknown, DamagedData."""
    if strange := flags & ~_OURS:
        names = " and ".join(name for bit, name in _FLAGS.items() if strange & bit)
        raise StreamUnknown(f"a RAM record at {offset} has the flag {names}")
    raise damaged(f"no RAM record has the flags {flags:#x}", offset)


def refuse_type(kind: int, offset: int) -> NoReturn:
    """A section of that type has no place here. Raises StreamUnknown."""
    name = _TYPES.get(kind, f"of type {kind:#04x}")
    raise StreamUnknown(f"a section {name} at {offset} is not expected there")


def damaged(what: str, offset: int) -> DamagedData:
    """What is wrong with the stream, and where."""
    return DamagedData(f"the migration stream is damaged at {offset}: {what}")
