"""The description at the end of a stream: the one place that knows how long a device's section is.

QEMU writes JSON there that lists the devices in the order of their sections, each with its fields
and what they took. It came last, so a section is only understood once the whole stream is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, NoReturn

import msgspec

from qmpsnap.errors import UNREADABLE, StreamUnknown
from qmpsnap.hypervisor.vmstate import records
from qmpsnap.hypervisor.vmstate.records import damaged

_STEP = 1 << 20  # bytes that are looked through at a time
_MOST = 64 << 20  # bytes; some hundreds of KiB are usual
_HEADER = 1 + 4 + 1 + 255 + 4 + 4  # bytes of a section's header at most


@dataclass(frozen=True, slots=True)
class Section:
    """A device's section: *bytes* is what the device wrote, without header and footer."""

    name: str
    instance: int
    version: int
    bytes: int


_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class _Field(msgspec.Struct):
    size: _Count
    array_len: _Count = 1  # the size is then that of one


class _Subsection(msgspec.Struct):
    vmsd_name: str
    fields: list[_Field] = []
    subsections: list[_Subsection] = []

    @property
    def size(self) -> int:
        """With its header: type, length, name, version."""
        return 1 + 1 + len(self.vmsd_name.encode()) + 4 + _size(self.fields, self.subsections)


class _Device(msgspec.Struct):
    name: str
    instance_id: _Count
    fields: list[_Field] = []
    subsections: list[_Subsection] = []

    @property
    def size(self) -> int:
        return _size(self.fields, self.subsections)

    @property
    def header(self) -> int:
        """Bytes in front: type, number, length, name, instance, version."""
        return 1 + 4 + 1 + len(self.name.encode()) + 4 + 4

    @property
    def whole(self) -> int:
        """Bytes with header and footer."""
        return self.header + self.size + 1 + 4

    def begins(self, data: bytes) -> bool:
        """Whether *data* is the beginning of its section."""
        name = self.name.encode()
        word = records.number(len(name), 8)[7:] + name + records.number(self.instance_id, 4)
        return data[:1] == bytes([records.FULL]) and data[5 : 5 + len(word)] == word


class _Description(msgspec.Struct):
    devices: list[_Device]
    page_size: int


def _size(fields: list[_Field], subsections: list[_Subsection]) -> int:
    # a field's size has all that is nested in it
    return sum(one.size * one.array_len for one in fields) + sum(one.size for one in subsections)


@dataclass(frozen=True, slots=True)
class Tail:
    """What follows the RAM in the open file *fd*, up to the byte at *last* that ends the sections.

    *shift* is added to the offsets in complaints.
    """

    fd: int
    last: int
    devices: list[_Device]
    shift: int

    @property
    def start(self) -> int:
        """Where the first device's section begins, if all are described rightly."""
        return self.last - sum(device.whole for device in self.devices)

    def sections(self, start: int) -> Iterator[Section]:
        """The sections from *start* on, each checked: header, length and footer.

        Raises StreamUnknown, DamagedData, OSError.
        """
        at = start
        for device, follower in zip_longest(self.devices, self.devices[1:]):
            section, at = self._section(at, device, follower)
            yield section
        if at != self.last:
            self._refuse(at, "the end")

    def _section(self, at: int, device: _Device, follower: _Device | None) -> tuple[Section, int]:
        head = os.pread(self.fd, _HEADER, at)
        if not device.begins(head):
            self._refuse(at, f"the section of {device.name}")
        length = device.header
        body, footer = at + length, records.footer(int.from_bytes(head[1:5], "big"))
        end = body + device.size
        if end > self.last or os.pread(self.fd, len(footer), end) != footer:
            end = self._found(body, footer, device, follower)
        version = int.from_bytes(head[length - 4 : length], "big")
        section = Section(device.name, device.instance_id, version, end - body)
        return section, end + len(footer)

    def _found(self, body: int, footer: bytes, device: _Device, follower: _Device | None) -> int:
        """Where the section ends whose fields are described wrongly, as some are.

        Before 10.0 an array of pointers is told as so many times its first element, also when
        others of it are null and take a byte each. The footer with the header behind it is nothing
        that a device's own data would look like.
        """
        for at in range(body, self.last, _STEP):
            data = os.pread(self.fd, min(_STEP + _HEADER, self.last - at), at)
            place = data.find(footer)
            while 0 <= place < _STEP:
                behind = place + len(footer)
                if follower is None and at + behind == self.last:
                    return at + place
                if follower is not None and follower.begins(data[behind : behind + _HEADER]):
                    return at + place
                place = data.find(footer, place + 1)
        raise damaged(f"the section of {device.name} does not end", self.shift + body)

    def _refuse(self, at: int, what: str) -> NoReturn:
        kind = os.pread(self.fd, 1, at)
        if kind and kind[0] not in {records.FULL, records.END_OF_STREAM}:
            records.refuse_type(kind[0], self.shift + at)
        raise damaged(f"{what} is not there", self.shift + at)


def read(fd: int, shift: int = 0) -> Tail:
    """The description at the end of the open file *fd*.

    Raises StreamUnknown (there is none, or it tells of another world), DamagedData, OSError.
    """
    size = os.fstat(fd).st_size
    place = _place(fd, size)
    if place is None:
        # the byte that ends the sections may be the last one: `-machine suppress-vmdesc=on`
        end = os.pread(fd, 6, max(0, size - 6))
        if len(end) == 6 and end[0] == records.FOOTER and end[5] == records.END_OF_STREAM:
            raise StreamUnknown("the migration stream has no description of its devices at its end")
        raise damaged("it ends there", shift + size)
    text = os.pread(fd, size - place, place)
    try:
        found = msgspec.json.decode(text, type=_Description)
    except UNREADABLE as odd:
        raise damaged(f"its description cannot be read: {odd}", shift + place) from odd
    if found.page_size != records.PAGE:
        raise StreamUnknown(f"the guest has pages of {found.page_size} bytes")
    return Tail(fd, place - 6, found.devices, shift)


def _place(fd: int, size: int) -> int | None:
    """Where the JSON begins. Of zero bytes it has none, and in front of it there is one."""
    at = size
    while at > max(0, size - _MOST):
        start = max(0, at - _STEP)
        zero = os.pread(fd, at - start, start).rfind(b"\0")
        if zero >= 0:
            break
        at = start
    else:
        return None
    # the zero byte ends the sections, or is one of the four of the length
    begin = max(0, start + zero - 5)
    data = os.pread(fd, 16, begin)
    for place in range(len(data) - 6):
        length = records.number(max(0, size - begin - place - 6), 8)[4:]
        if data[place : place + 6] == b"%c%c%b" % (
            records.END_OF_STREAM,
            records.DESCRIPTION,
            length,
        ):
            return begin + place + 6
    return None
