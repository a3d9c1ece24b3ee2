"""The only place that looks up a section in a migration stream that was written."""

from __future__ import annotations

import re
from pathlib import Path

from qmpsnap.errors import LocalFailed

_TAIL = 64 << 20  # bytes; devices come behind the RAM, and take a few MiB
_FULL = 4  # migration/savevm.c: QEMU_VM_SECTION_FULL
_MOST = 64  # more of one kind no machine has: it is a guest's page that looks like it


def numbers(stream: Path, name: str) -> set[int]:
    """The instance numbers of the device *name* in *stream*.

    A page of RAM that looks like a section may count as one. Raises LocalFailed.
    """
    word = name.encode()
    # its type, the section's number, its name behind a length, then instance and version
    section = re.compile(
        rb"%b.{4}%b%b(.{4})\0\0\0[^\0]" % (bytes([_FULL]), bytes([len(word)]), re.escape(word)),
        re.DOTALL,
    )
    try:
        with stream.open("rb") as file:
            file.seek(max(0, stream.stat().st_size - _TAIL))
            tail = file.read()
    except OSError as failed:
        raise LocalFailed(f"{stream}: {failed.strerror}") from failed
    found = {int.from_bytes(match[1], "big") for match in section.finditer(tail)}
    return {number for number in found if number < _MOST}
