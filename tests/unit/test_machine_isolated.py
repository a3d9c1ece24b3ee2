"""A machine that is only tried: no packet of its network cards goes anywhere."""

import pytest

from tests.unit.test_machine_relocate import moved, words

USER = "-netdev user,id=n,restrict=on"
ALONE = {
    "-netdev user,id=n,hostfwd=a,net=10.0.0.0/8,tftp=/x": (
        "-netdev user,id=n,net=10.0.0.0/8,restrict=on"
    ),
    "-netdev user,id=n,restrict=off": USER,
    '-netdev {"type":"user","id":"n","hostfwd":[{"str":"x"}]}': (
        '-netdev {"type":"user","id":"n","restrict":true}'
    ),
    "-netdev tap,id=n,ifname=t0,script=/x,vhost=on,queues=2": USER,
    "-netdev bridge,id=n,br=b": USER,
    '-netdev {"type":"tap","id":"n","ifname":"t"}': (
        '-netdev {"type":"user","id":"n","restrict":true}'
    ),
    "-nic tap,model=e1000,mac=52:54:00:12:34:56,ifname=t": (
        "-nic user,model=e1000,mac=52:54:00:12:34:56,restrict=on"
    ),
    "-net nic,model=e1000 -net user,hostfwd=a": "-net nic,model=e1000 -net user,restrict=on",
    "-netdev socket,id=n,listen=:1": "-netdev hubport,hubid=1001,id=n",
    "-nic none": "-nic none",
    "-netdev hubport,id=n,hubid=1": "-netdev hubport,id=n,hubid=1",
}


@pytest.mark.parametrize("given", ALONE)
def test_each_kind_of_network(given: str) -> None:
    expected = ALONE[given].split()
    assert words(f"-nodefaults {given}", isolated=True) == ["-nodefaults", *expected]


@pytest.mark.parametrize("given", ["-netdev tap,id=n,ifname=t0,vhost=on", "-netdev bridge,id=n"])
def test_a_card_with_state_keeps_a_tap(given: str) -> None:
    """Its offloads are in the state, and no other back end has them; the tap is on no bridge."""
    (tap,) = [
        word
        for word in words(f"-nodefaults {given}", isolated=True, incoming=True)
        if "id=n" in word
    ]
    assert tap.startswith("tap,")
    assert "script=no,downscript=no" in tap
    assert "ifname" not in tap
    assert "br" not in tap


def test_the_network_that_qemu_gives_unasked() -> None:
    unspoken = ["-net", "nic", "-net", "user,restrict=on"]
    assert words("-m 64", isolated=True) == ["-m", "64", "-display", "none", *unspoken]
    assert words("-m 64") == ["-m", "64"]
    for own in ("-nodefaults", "-nic none", "-net none", "-netdev hubport,id=n,hubid=1"):
        assert words(own, isolated=True) == own.split()


def test_a_vsock_of_its_own() -> None:
    given = "-device vhost-vsock-pci,id=v,guest-cid=3"
    (device,) = [one for one in words(given, isolated=True) if one.startswith("vhost")]
    cid = int(device.rpartition("=")[2])
    assert (1 << 30) <= cid < (1 << 31)
    assert words(given) == given.split()
    assert any("guest CID" in notice for notice in moved(given).notices)
