"""The only place that knows how -serial and its kin spell a character device in one word."""

from __future__ import annotations

from dataclasses import dataclass

from qmpsnap.hypervisor.machine import keyval
from qmpsnap.hypervisor.machine.keyval import Fields

_HOST_PORT = ("tcp", "telnet", "tn3270", "websocket")
_PLAIN = frozenset({"null", "pty", "stdio", "msmouse", "wctablet", "braille", "testdev", "vc"})


@dataclass(frozen=True, slots=True)
class Word:
    """What -serial, -parallel, -monitor, -qmp or -debugcon are given.

    *chardev* is the id of a -chardev it names, else None; *fields* are those of the chardev that
    QEMU makes of it. *multiplexed* is the `mon:` before it: a human monitor shares the line.
    `none` has neither chardev nor fields.
    """

    fields: Fields
    chardev: str | None = None
    multiplexed: bool = False

    @property
    def none(self) -> bool:
        return self.chardev is None and not self.fields.pairs


def parse(text: str) -> Word:
    """The character device that *text* means (chardev/char.c: qemu_chr_parse_compat)."""
    multiplexed = text.startswith("mon:")
    rest = text[4:] if multiplexed else text
    kind, colon, tail = rest.partition(":")
    if kind == "chardev" and colon:
        return Word(Fields(), chardev=tail, multiplexed=multiplexed)
    return Word(_fields(rest, kind, tail), multiplexed=multiplexed)


def format(word: Word) -> str:
    """The text for *word*: for `none`, a -chardev, and the backends that stay on a host's disk."""
    mon = "mon:" if word.multiplexed else ""
    if word.chardev is not None:
        return f"{mon}chardev:{word.chardev}"
    fields = word.fields
    path = fields.get("path") or ""
    match fields.get("backend"):
        case None:
            return "none"
        case "socket":
            return f"{mon}unix:{keyval.format(fields.without('backend'), 'path')}"
        case "file" | "pipe" as backend:
            return f"{mon}{backend}:{path}"
        case "vc" if size := fields.get("size"):
            return f"{mon}vc:{size}"
        case backend:
            return f"{mon}{backend}"


def _fields(rest: str, kind: str, tail: str) -> Fields:
    if rest == "none":
        return Fields()
    if kind == "vc" and tail:
        return Fields((("backend", "vc"), ("size", tail)))
    if rest in _PLAIN:
        return Fields((("backend", rest),))
    if kind in ("file", "pipe"):  # taken as it stands, commas and all
        return Fields((("backend", kind), ("path", tail)))
    if kind == "unix":
        return Fields((("backend", "socket"), *keyval.parse(tail, "path").pairs))
    if kind in _HOST_PORT:
        return Fields((("backend", "socket"), *keyval.parse(tail, "host").pairs))
    if kind == "udp":
        return Fields((("backend", "udp"), ("host", tail)))
    if rest.startswith("/dev/"):
        return Fields((("backend", "serial"), ("path", rest)))
    return Fields((("backend", kind),))
