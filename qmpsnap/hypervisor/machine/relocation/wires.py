"""The only place that decides which networks, screens and loudspeakers a restored machine is on."""

from __future__ import annotations

from dataclasses import replace

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine.cmdline import Option
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import Netdev, fields_of, option_of
from qmpsnap.hypervisor.machine.relocation.parts import refuse_descriptors
from qmpsnap.hypervisor.machine.relocation.scene import Scene

_TO_THE_HOST = ("hostfwd", "guestfwd", "tftp", "tftp-server-name", "bootfile", "smb", "smbserver")
_KEPT = frozenset({"none", "nic", "hubport"})
_PEERS = frozenset({"socket", "stream", "dgram", "l2tpv3", "vde"})
_OTHER_PROCESSES = frozenset({"vhost-user", "vhost-vdpa"})
_HANDED = ("fd", "fds", "vhostfd", "vhostfds")
_OF_A_NIC = ("id", "mac", "macaddr", "model", "name", "addr", "vectors")
KEEPS_MAC = "joins the bridge with the MAC address of the original"
_FIRST_HUB = 1000  # beside those that anybody numbers by hand
_SPICE_NET = ("port", "tls-port", "x509-dir", "x509-key-file", "x509-key-password",
              "x509-cert-file", "x509-cacert-file", "x509-dh-key-file", "tls-ciphers",
              "tls-channel", "plaintext-channel", "ipv4", "ipv6", "addr", "unix")  # fmt: skip


def network(scene: Scene, index: int, option: Option) -> list[Option]:
    """-netdev, -nic, -net: the guest keeps its card, the cable is pulled or made private.

    Raises Blocked for a back end with state outside of QEMU, where that would be loaded, or one
    that was handed to it open.
    """
    fields = Netdev.of(option).fields if option.name == "netdev" else fields_of(option)
    name = f"{option.name} {fields.get('id') or fields.get('type')}"
    kind = fields.get("type")
    if kind == "tap":
        # it gets a fresh one anyway, with as many queues
        queues = str(len((fields.get("fds") or "").split(":")))
        fields = fields.set("queues", queues) if fields.has("fds") else fields
        fields = fields.without(*_HANDED)
    refuse_descriptors(fields, name)
    if kind in _KEPT:
        return [option]
    if scene.isolated and kind in ("user", "tap", "bridge"):
        return [option_of(option.name, _isolated(scene, fields, name))]
    if kind == "user":
        left = fields.without(*_TO_THE_HOST)
        if left.pairs == fields.pairs:
            return [option]
        scene.note(f"{name}: left out {', '.join(key for key in _TO_THE_HOST if fields.has(key))}")
        return [option_of(option.name, left)]
    if kind == "tap":
        return [option_of(option.name, _fresh_tap(scene, fields, name))]
    if kind == "bridge":
        scene.note(f"{name}: {KEEPS_MAC}")
        if not fields.has("helper"):
            return [option]
        # QEMU runs it, and a command line from elsewhere is not to say what runs here
        scene.note(f"{name}: left out helper; QEMU's own is run")
        return [option_of(option.name, fields.without("helper"))]
    if kind not in _PEERS and (scene.incoming or kind not in _OTHER_PROCESSES):
        raise Blocked(f"{name}: a network of type {kind} cannot be given to a second machine")
    scene.note(f"{name}: was of type {kind}, now not connected")
    if option.name == "net":
        return []
    return [option_of(option.name, _unplugged(fields, index))]


def unspoken(scene: Scene) -> list[Option]:
    """The network that QEMU gives a machine whose command line says nothing of one."""
    if not scene.isolated or scene.line.has("nodefaults", "net", "nic", "netdev"):
        return []
    return [Option("net", "nic"), Option("net", "user,restrict=on")]


def display(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-display: no window; `egl-headless` where the guest's card draws with OpenGL."""
    fields = fields_of(option)
    kind = fields.get("type")
    if kind in ("none", "egl-headless"):
        return [option]
    if kind is None and fields.has("vnc"):
        return vnc(scene, _index, Option("vnc", (option.value or "").removeprefix("vnc=")))
    scene.note(f"{option}: no window is opened")
    drawn = (fields.get("gl") or "off") != "off"
    return [Option("display", "egl-headless")] if drawn else []


def sound(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-audiodev, -audio: the guest keeps its sound card, which nobody hears."""
    fields = fields_of(option)
    driver = fields.get("driver")
    if driver == "wav":
        moved = scene.move(fields.get("path") or fields.get("out.path") or "qemu.wav")
        return [option_of(option.name, fields.set("path", moved))]
    if driver in (None, "none", "spice", "dbus"):
        return [option]
    scene.note(f"{option}: sound is not played")
    kept = fields.keep(lambda key: key in ("driver", "id", "model"))
    return [option_of(option.name, kept.set("driver", "none"))]


def vnc(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-vnc: kept on a unix socket, which moves; left out on the network."""
    fields = fields_of(option)
    where = fields.get("vnc") or ""
    if where == "none":
        return [option]
    if not where.startswith("unix:"):
        scene.note(f"{option}: the display is no longer served on the network")
        return []
    moved = scene.move_socket(where.removeprefix("unix:"))
    kept = fields.without("websocket", "to").set("vnc", f"unix:{moved}")
    return [option_of("vnc", kept)]


def spice(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-spice: on a unix socket under the new directory, so that its channels stay as they are."""
    fields = fields_of(option)
    if fields.on("unix"):
        address = scene.move_socket(fields.get("addr") or "spice.sock")
    else:
        address = scene.move_socket("spice.sock")
        scene.note(f"{option}: served on {address} instead of the network")
    kept = fields.without(*_SPICE_NET)
    return [option_of("spice", replace(kept, pairs=(("unix", "on"), ("addr", address), *kept)))]


def _isolated(scene: Scene, fields: Fields, name: str) -> Fields:
    """A network of the card's own, which answers to DHCP, so that no boot waits for that."""
    restrict = True if fields.json else "on"
    if fields.get("type") == "user":
        return fields.without(*_TO_THE_HOST).set("restrict", restrict)
    if scene.incoming:
        return _fresh_tap(scene, fields.set("type", "tap"), name)
    scene.note(f"{name}: was of type {fields.get('type')}, now not connected")
    kept = fields.keep(lambda key: key in _OF_A_NIC)
    return replace(kept, pairs=(("type", "user"), *kept)).set("restrict", restrict)


def _fresh_tap(scene: Scene, fields: Fields, name: str) -> Fields:
    # a card's offloads are in its state and need a tap: another back end would not load
    scene.note(f"{name}: a fresh tap interface, on no bridge; no script is run")
    fresh = fields.without("ifname", "br", "helper", "script", "downscript")
    return fresh.set("script", "no").set("downscript", "no")


def _unplugged(fields: Fields, index: int) -> Fields:
    kept = fields.keep(lambda key: key in _OF_A_NIC)
    hub: int | str = _FIRST_HUB + index if fields.json else str(_FIRST_HUB + index)
    return replace(kept, pairs=(("type", "hubport"), ("hubid", hub), *kept))
