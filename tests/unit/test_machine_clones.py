"""What makes a command line that of one clone of several."""

from __future__ import annotations

import re

from qmpsnap.hypervisor.machine.clones import Clone, clone
from qmpsnap.hypervisor.machine.cmdline import parse

LOCAL = re.compile(r"02(:[0-9a-f]{2}){5}")
GUID = "0b8d3f9c-8d3b-4f4c-9a53-8e6d3a1c5b11"


def made(
    text: str,
    number: int = 1,
    *,
    notices: tuple[str, ...] = (),
    keep: bool = False,
    cold: bool = False,
) -> Clone:
    line = parse(["qemu", *text.split()])
    return clone(line, notices, of="web/20261123", number=number, keep_macs=keep, cold=cold)


def told(one: Clone) -> str:
    return " ".join(one.cmdline.argv()[1:])


def with_macs(text: str, one: Clone) -> str:
    """*text* with the clone's address in the place of each of the original's."""
    for old, new in one.macs.items():
        text = text.replace(f"<{old}>", new)
    return text


def test_each_card_has_an_address_of_its_own() -> None:
    """Those that say none have QEMU's: the board's cards come first, what is taken is left out."""
    one = made(
        "-nodefaults -netdev user,id=n0 -device virtio-net-pci,id=v0,mac=52:54:0:12:34:57 "
        "-device e1000,netdev=n0 "
        "-net nic,macaddr=52-54-00-AA-BB-CC -nic user,model=rtl8139 -nic none -net user "
        '-device {"driver":"tulip","netdev":"n1"}'
    )
    assert list(one.macs) == [
        "52:54:00:12:34:57",
        "52:54:00:12:34:58",
        "52:54:00:aa:bb:cc",
        "52:54:00:12:34:56",
        "52:54:00:12:34:59",
    ]
    assert told(one) == with_macs(
        "-nodefaults -netdev user,id=n0 -device virtio-net-pci,id=v0,mac=<52:54:00:12:34:57> "
        "-device e1000,netdev=n0,mac=<52:54:00:12:34:58> "
        "-net nic,macaddr=<52:54:00:aa:bb:cc> -nic user,model=rtl8139,mac=<52:54:00:12:34:56> "
        "-nic none -net user "
        '-device {"driver":"tulip","netdev":"n1","mac":"<52:54:00:12:34:59>"}',
        one,
    )
    assert len(set(one.macs.values())) == 5
    assert all(map(LOCAL.fullmatch, one.macs.values()))


def test_addresses_are_the_same_again_and_others_in_another_clone() -> None:
    text = "-nodefaults -device e1000 -device e1000"
    assert made(text).macs == made(text).macs
    assert not set(made(text).macs.values()) & set(made(text, 2).macs.values())


def test_the_card_that_nobody_asked_for() -> None:
    """It is there by default, with the first address."""
    one = made("-m 64")
    assert told(one) == with_macs("-m 64 -net nic,macaddr=<52:54:00:12:34:56> -net user", one)
    assert told(made("-m 64 -net none")) == "-m 64 -net none"


def test_cards_that_load_their_own_address_only() -> None:
    """It is spelled out, since what QEMU gives them depends on the other cards."""
    text = "-nodefaults -device e1000,id=a -device e1000e,id=b -device vmxnet3"
    one = made(text)
    b, c = "52:54:00:12:34:57", "52:54:00:12:34:58"
    new = one.macs["52:54:00:12:34:56"]
    assert told(one) == (
        f"-nodefaults -device e1000,id=a,mac={new} -device e1000e,id=b,mac={b} "
        f"-device vmxnet3,mac={c}"
    )
    assert all(LOCAL.fullmatch(one.macs[mac]) for mac in (b, c))
    assert [notice.split(":")[0] for notice in one.notices] == ["card b", "card vmxnet3"]
    cold = made(text, cold=True)
    assert cold.macs == one.macs
    assert cold.notices == []
    assert told(cold).endswith(f"-device vmxnet3,mac={one.macs[c]}")
    board = made("-M q35 -m 64")
    assert told(board) == "-M q35 -m 64 -net nic,macaddr=52:54:00:12:34:56 -net user"
    assert len(board.notices) == 1
    assert made("-M q35 -nic user,model=virtio-net-pci").notices == []


def test_addresses_can_be_kept() -> None:
    text = "-nodefaults -device e1000,mac=52:54:00:00:00:01"
    one = made(text, keep=True)
    assert (told(one), one.macs) == (text, {})
    assert one.notices == ["all clones have the MAC addresses of the original"]
    assert made("-nodefaults", keep=True).notices == []


def test_what_two_guests_of_a_host_cannot_share() -> None:
    """Generation IDs and vsock addresses are fresh ones, and nothing says otherwise any more."""
    text = f"-nodefaults -device vmgenid,guid={GUID} -device vhost-vsock-pci,guest-cid=3"
    stale = "device vhost-vsock-pci: keeps its guest CID, which the original must not use any more"
    bridge = "netdev n0: joins the bridge with the MAC address of the original"
    one = made(text, notices=(stale, bridge, "another"))
    seen = re.fullmatch(
        r"-nodefaults -device vmgenid,guid=(\S{36}) -device vhost-vsock-pci,guest-cid=(\d+)",
        told(one),
    )
    assert seen is not None
    assert seen[1] != GUID
    assert int(seen[2]) >= 1 << 30
    assert told(made(text)) != told(one)
    assert one.notices == ["another"]
