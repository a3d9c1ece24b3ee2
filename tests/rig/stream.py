"""Migration streams for tests: written and read one byte after the other, with no code of ours."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.rig.ram import page

PAGE = 4096
RAM = 2  # the number of its section
BLOCKS = {"pc.ram": 300, "vga.vram": 40, "/rom@etc/acpi/tables": 9, "/rom@etc/no": 3}  # in pages
SWITCHOVER = bytes.fromhex("08000b0000")
Content = int | bytes
"""Of a page: what a record of zeros is told to be full of, or all of it."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device's section, its body as it is *told* in the description, field by field."""

    name: str
    instance: int
    body: bytes
    told: tuple[tuple[int, int], ...]  # bytes of one, and how many
    below: tuple[tuple[str, int], ...] = ()  # subsections, and bytes of each

    def written(self, number: int) -> bytes:
        name = self.name.encode()
        head = struct.pack(">BIB", 4, number, len(name)) + name
        body = self.body + b"".join(
            b"\5" + bytes([len(below)]) + below.encode() + bytes(3) + b"\1" + b"s" * size
            for below, size in self.below
        )
        return head + struct.pack(">II", self.instance, 3) + body + struct.pack(">BI", 0x7E, number)

    @property
    def bytes(self) -> int:
        return len(self.body) + sum(6 + len(name) + size for name, size in self.below)

    def described(self) -> dict[str, object]:
        fields = [
            {"name": "x", "type": "y", "size": size, **({"array_len": many} if many > 1 else {})}
            for size, many in self.told
        ]
        below = [
            {"vmsd_name": name, "version": 1, "fields": [{"name": "s", "size": size}]}
            for name, size in self.below
        ]
        more: dict[str, object] = {"subsections": below} if below else {}
        return {"name": self.name, "instance_id": self.instance, "fields": fields, **more}


DEVICES = (
    Device("timer", 0, b"t" * 24, ((8, 3),)),
    Device("0000:00:02.0/vga", 0, b"v" * 70, ((6, 1), (32, 2)), (("vga/pci", 9), ("vga/x", 0))),
    # an array of pointers, the last of them null: it is told as four of the first one
    Device("apic", 1, b"a" * 12 + b"0", ((4, 4),)),
    Device("slirp", 0, b"", ()),
)


@dataclass(slots=True)
class Made:
    """A stream as it grows: its bytes, what its RAM holds by now, and where there is no page."""

    blocks: dict[str, int] = field(default_factory=lambda: dict(BLOCKS))
    raw: bytearray = field(default_factory=bytearray)
    pages: dict[tuple[str, int], bytes] = field(default_factory=dict)
    inside: list[range] = field(default_factory=list)  # content of pages
    tail: int = 0
    _last: str | None = None

    def begin(self, *, uuid: bool = True, machine: bytes = b"pc-q35-7.2") -> None:
        self.raw += b"QEVM\0\0\0\3\7" + struct.pack(">I", len(machine)) + machine
        if uuid:
            self.raw += b"\5\x12configuration/uuid\0\0\0\1" + b"u" * 16
        self.raw += struct.pack(">BIB", 1, RAM, 3) + b"ram" + struct.pack(">II", 0, 4)
        self.raw += struct.pack(">Q", sum(self.blocks.values()) * PAGE | 4)
        for name, count in self.blocks.items():
            self.raw += bytes([len(name)]) + name.encode() + struct.pack(">Q", count * PAGE)
        self._over()

    def section(
        self, records: Sequence[tuple[str, int, Content]], *, end: bool = False, named: bool = False
    ) -> None:
        """PART or END with these records; *named*: each tells its block, needed or not."""
        self.raw += struct.pack(">BI", 3 if end else 2, RAM)
        for block, number, content in records:
            self.record(block, number, content, named=named)
        self._over()

    def record(self, block: str, number: int, content: Content, *, named: bool = False) -> None:
        flags = 2 if isinstance(content, int) else 8
        if block == self._last and not named:
            self.raw += struct.pack(">Q", number * PAGE | flags | 0x20)
        else:
            self.raw += struct.pack(">QB", number * PAGE | flags, len(block)) + block.encode()
        self._last = block
        if isinstance(content, int):
            self.raw.append(content)
            self.pages[block, number] = bytes([content]) * PAGE
        else:
            self.inside.append(range(len(self.raw) + 1, len(self.raw) + PAGE - 1))
            self.raw += content
            self.pages[block, number] = content

    def switchover(self) -> None:
        self.raw += SWITCHOVER

    def finish(self, devices: Sequence[Device] = DEVICES) -> bytes:
        self.tail = len(self.raw)
        for number, device in enumerate(devices, RAM + 1):
            self.raw += device.written(number)
        text = {"page_size": PAGE, "devices": [device.described() for device in devices]}
        told = json.dumps({"configuration": {"vmsd_name": "configuration"}, **text}).encode()
        self.raw += struct.pack(">BBI", 0, 6, len(told)) + told
        return bytes(self.raw)

    def _over(self) -> None:
        self.raw += struct.pack(">QBI", 0x10, 0x7E, RAM)

    def block(self, name: str) -> bytes:
        """What the block holds in the end."""
        zero = bytes(PAGE)
        return b"".join(self.pages.get((name, n), zero) for n in range(self.blocks[name]))

    def stored(self, name: str) -> set[int]:
        """Its pages with content."""
        return {n for (block, n), held in self.pages.items() if block == name and any(held)}

    def seams(self) -> list[int]:
        """All places that are not within a page."""
        within = {at for span in self.inside for at in span}
        return [at for at in range(len(self.raw)) if at not in within]


def small() -> Made:
    """A stream with one of everything: its passes, its kinds of record, and devices."""
    made = Made({"pc.ram": 20, "rom": 2, "no": 1})
    made.begin()
    made.section([("pc.ram", 0, page(0)), ("pc.ram", 1, 0), ("pc.ram", 2, 7), ("rom", 0, page(1))])
    made.section([("pc.ram", 2, page(2)), ("pc.ram", 0, 0), ("rom", 0, page(3)), ("no", 0, 0)])
    made.switchover()
    made.section([("pc.ram", 19, page(4)), ("pc.ram", 1, page(5))], end=True)
    made.finish()
    return made


@dataclass(frozen=True, slots=True)
class Read:
    """A stream as it was read: the kinds of its sections, and how often it has each page."""

    head: bytes
    kinds: list[int]
    pages: dict[tuple[str, int], bytes]
    records: list[tuple[str, int]]
    tail: bytes


def read(raw: bytes) -> Read:
    """One record after the other."""
    at = raw.index(b"\1" + struct.pack(">IB", RAM, 3) + b"ram") + 17
    (total,), at = struct.unpack_from(">Q", raw, at), at + 8
    left = total - 4
    while left:
        at += 1 + raw[at]
        left -= struct.unpack_from(">Q", raw, at)[0]
        at += 8
    at += 13
    found = Read(raw[:at], [], {}, [], b"")
    block = ""
    while raw[at] in {2, 3, 8}:
        found.kinds.append(raw[at])
        at += 5
        while found.kinds[-1] != 8:
            (word,), at = struct.unpack_from(">Q", raw, at), at + 8
            if word & 0x10:
                at += 5
                break
            if not word & 0x20:
                block, at = raw[at + 1 : at + 1 + raw[at]].decode(), at + 1 + raw[at]
            size = PAGE if word & 8 else 1
            held = raw[at : at + size]
            at += size
            found.records.append((block, word >> 12))
            found.pages[block, word >> 12] = held if word & 8 else held * PAGE
    return Read(found.head, found.kinds, found.pages, found.records, raw[at:])
