"""The only place that makes one of several machines out of a relocated command line."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import Device, Machine, fields_of, option_of
from qmpsnap.hypervisor.machine.relocation.parts import KEEPS_CID, fresh_cid
from qmpsnap.hypervisor.machine.relocation.wires import KEEPS_MAC

# the cards of 7.2 to 11.1, by how their names begin; another one has a netdev= or a mac=
_CARDS = ("virtio-net", "e1000", "rtl8139", "ne2k_", "pcnet", "i8255", "i8256", "i82801", "vmxnet3",
          "tulip", "igb", "usb-net", "sungem", "sunhme", "spapr-vlan")  # fmt: skip
# what they saved has their address, and loads into a card with another one no more (7.2 to 11.1)
_INSISTING = ("e1000e", "vmxnet3")
_DEFAULT = "52:54:00:12:34:"  # and 56 for the first: net/net.c, qemu_macaddr_default_if_unset
_DEFAULTS = range(0x56, 0x100)
_MAC = re.compile(r"([0-9a-f]{1,2}[:-]){5}[0-9a-f]{1,2}", re.I)


@dataclass(frozen=True, slots=True)
class Clone:
    """A command line of its own. *macs*: the cards' new addresses by those that they had."""

    cmdline: CommandLine
    notices: Sequence[str]
    macs: Mapping[str, str] = field(default_factory=dict)


def clone(
    line: CommandLine,
    notices: Collection[str],
    *,
    of: str,
    number: int,
    keep_macs: bool = False,
    cold: bool = False,
) -> Clone:
    """Clone *number* of the machine of *line*, which `relocate` made, telling *notices*.

    Its network cards get addresses that are the same whenever it is made of *of* again, a word
    that stands for one snapshot; its generation ID and vsock address are fresh ones. A card that
    has no address on the command line has the one that QEMU gives it. Not *cold*: it goes on with
    a saved state, and a card that takes that with its own address only has it until the guest
    changes it, and after each reset.
    """
    told = [one for one in notices if not one.endswith((KEEPS_CID, KEEPS_MAC))]
    line = line.replace(_identified)
    if keep_macs:
        if any(map(_is_card, line.options)) or _has_default(line):
            told.append("all clones have the MAC addresses of the original")
        return Clone(line, told)
    if _has_default(line):
        line = line.append(Option("net", "nic"), Option("net", "user"))
    macs: dict[str, str] = {}
    given: dict[int, str] = {}
    for index, old in _addresses(line).items():
        new = given[index] = _address(of, number, len(given))
        macs[old] = new
        if not cold and _model(line, option := line.options[index]).startswith(_INSISTING):
            given[index] = old
            name = fields_of(option).get("id") or _model(line, option)
            told.append(f"card {name}: each reset gives it the original's MAC address again")
    changed = line.replace(
        lambda index, option: [_with_mac(option, given[index]) if index in given else option]
    )
    return Clone(changed, told, macs)


def _identified(_index: int, option: Option) -> list[Option]:
    """What tells two guests on a host apart, where the guest is told that it has changed."""
    if option.name != "device":
        return [option]
    fields, driver = Device.of(option).fields, Device.of(option).driver or ""
    if driver == "vmgenid":
        return [option_of("device", fields.set("guid", str(uuid.uuid4())))]
    if driver.startswith("vhost-vsock"):
        return [option_of("device", fresh_cid(fields))]
    return [option]


def _addresses(line: CommandLine) -> dict[int, str]:
    """The MAC address of each card of *line*, by the option's index, as QEMU gives them."""
    cards = [(index, one) for index, one in enumerate(line.options) if _is_card(one)]
    # the board makes its own cards before any -device
    cards.sort(key=lambda card: card[1].name == "device")
    found: dict[int, str] = {}
    for index, option in cards:
        mac = _mac(fields_of(option))
        if mac is None:
            free = (f"{_DEFAULT}{last:02x}" for last in _DEFAULTS)
            mac = next((one for one in free if one not in found.values()), None)
        if mac is not None:
            found[index] = mac
    return dict(sorted(found.items()))


def _is_card(option: Option) -> bool:
    if option.name not in ("device", "nic", "net"):
        return False
    fields = fields_of(option)
    if option.name == "nic":
        return fields.get("type") != "none"
    if option.name == "net":
        return fields.get("type") == "nic"
    driver = fields.get("driver") or ""
    return driver.startswith(_CARDS) or fields.has("netdev") or fields.has("mac")


def _model(line: CommandLine, option: Option) -> str:
    fields = fields_of(option)
    if option.name == "device":
        return fields.get("driver") or ""
    types = [Machine.of(one).type or "" for one in line.all("machine", "M")]
    by_default = "e1000e" if any("q35" in one for one in types) else ""
    return fields.get("model") or by_default


def _has_default(line: CommandLine) -> bool:
    """Whether QEMU gives the machine a card that the command line does not speak of."""
    return not line.has("nodefaults", "net", "nic", "netdev")


def _mac(fields: Fields) -> str | None:
    """In the spelling of the guest's agent."""
    text = fields.get("mac", "macaddr")
    if text is None or not _MAC.fullmatch(text):
        return None
    return ":".join(f"{int(part, 16):02x}" for part in re.split("[:-]", text))


def _with_mac(option: Option, mac: str) -> Option:
    key = "macaddr" if option.name == "net" else "mac"
    return option_of(option.name, fields_of(option).set(key, mac))


def _address(of: str, number: int, card: int) -> str:
    """Locally administered, of one card."""
    digest = hashlib.sha256(f"{of}\n{number}\n{card}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))
