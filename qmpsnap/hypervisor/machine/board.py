"""The only place that takes down what a machine tells its guest of itself: clock, UUID, tables."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from qmpsnap.hypervisor.machine.asking import Asking
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import fields_of


class Clock(msgspec.Struct, frozen=True, kw_only=True):
    """`-rtc`, None where it says nothing, and what the clock said.

    *guest_time* is the machine's clock, ISO 8601, in the zone that *base* says; *host_time* the
    host's at that moment, in UTC.
    """

    base: str | None
    clock: str | None
    driftfix: str | None
    guest_time: str | None
    host_time: str


class FwCfg(msgspec.Struct, frozen=True, kw_only=True):
    """A -fw_cfg item: its content is *string*, or that of the *file*, or of the object *gen_id*."""

    name: str
    file: str | None
    string: str | None
    gen_id: str | None


class Smbios(msgspec.Struct, frozen=True, kw_only=True):
    """A -smbios table: a *file*, or the *fields* of the structure *type*."""

    type: int | None
    file: str | None
    fields: dict[str, list[str]]


class Board(msgspec.Struct, frozen=True, kw_only=True):
    """*uuid* is that of -uuid, None without one: QEMU's own is then all zeros."""

    uuid: str | None
    fw_cfg: list[FwCfg]
    smbios: list[Smbios]


class _Time(msgspec.Struct):
    tm_year: int
    tm_mon: int
    tm_mday: int
    tm_hour: int
    tm_min: int
    tm_sec: int


async def clock(asking: Asking, line: CommandLine | None) -> Clock:
    raw = await asking.value("/machine", "rtc-time")
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = Fields()
    for option in line.all("rtc") if line else []:
        fields = fields.merged(fields_of(option))
    return Clock(
        base=fields.get("base"),
        clock=fields.get("clock"),
        driftfix=fields.get("driftfix"),
        guest_time=None if raw is None else _iso(msgspec.convert(raw, _Time)),
        host_time=now,
    )


def board(line: CommandLine) -> Board:
    """What the command line says. Raises UsageError for one that QEMU would not take."""
    uuids = [option.value for option in line.all("uuid")]
    return Board(
        uuid=uuids[-1] if uuids else None,
        fw_cfg=[_item(fields_of(option)) for option in line.all("fw_cfg")],
        smbios=[_table(fields_of(option)) for option in line.all("smbios")],
    )


def _item(fields: Fields) -> FwCfg:
    return FwCfg(
        name=fields.get("name") or "",
        file=fields.get("file"),
        string=fields.get("string"),
        gen_id=fields.get("gen_id"),
    )


def _table(fields: Fields) -> Smbios:
    number, rest = fields.get("type"), fields.without("type", "file")
    kept: dict[str, list[str]] = {}
    for key, _ in rest:  # a string of type 11 comes as often as one likes
        kept[key] = [str(value) for name, value in rest if name == key]
    return Smbios(
        type=int(number) if number and number.isdigit() else None,
        file=fields.get("file"),
        fields=kept,
    )


def _iso(time: _Time) -> str:
    day = f"{time.tm_year + 1900:04}-{time.tm_mon + 1:02}-{time.tm_mday:02}"
    return f"{day}T{time.tm_hour:02}:{time.tm_min:02}:{time.tm_sec:02}"
