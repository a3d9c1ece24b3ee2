"""The only place that decides what a character device of a relocated machine talks to."""

from __future__ import annotations

from collections.abc import Iterable

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine import character
from qmpsnap.hypervisor.machine.attach import agent_chardev
from qmpsnap.hypervisor.machine.character import Word
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import (
    IMPLIED,
    Chardev,
    Device,
    fields_of,
    option_of,
)
from qmpsnap.hypervisor.machine.relocation.scene import Scene

OURS = "qmpsnap-"  # what the ids of our own chardevs begin with
_WORDS = ("serial", "parallel", "debugcon", "monitor", "gdb")
_PRIVATE = frozenset(
    {"null", "vc", "pty", "ringbuf", "memory", "msmouse", "wctablet", "testdev", "hub"}
    | {"spicevmc", "spiceport", "qemu-vdagent", "dbus"}
)
_HOST_DEVICES = frozenset({"serial", "tty", "parallel", "parport", "braille"})
_TALKS = frozenset({"socket", "pty", "vc", "null", "ringbuf"})


def chardev(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-chardev: gone with the QMP monitor that it was for, else on a file or socket of its own."""
    view = Chardev.of(option)
    if view.id is None or (view.id or "").startswith(OURS):
        return []
    if not scene.incoming and _vhost_user(scene.line, view.id):
        return []  # what it is for is left out, too
    gone = [
        mon for mon in scene.line.all("mon", "object", "qmp", "qmp-pretty") if _ends(scene, mon)
    ]
    if _users(scene.line, view.id) and not _users(scene.line, view.id, but=gone):
        return []
    return [option_of("chardev", settled(scene, view.fields, view.id))]


def mon(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-mon: QMP makes way for ours; a human monitor stays where somebody can reach it."""
    if not _ends(scene, option):
        return [option]
    name = fields_of(option).get("chardev") or ""
    if not name.startswith(OURS):
        scene.note(f"{option}: this monitor is left out")
    return []


def monitor(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-monitor: kept on a unix socket, which moves; left out on anything else."""
    word = character.parse(option.value or "")
    if word.none or word.chardev is not None:
        return [option]
    if word.fields.get("backend") == "socket" and word.fields.has("path"):
        new = settled(scene, word.fields, "monitor")
        if new.get("backend") == "socket":
            return [Option(option.name, character.format(Word(new)))]
    elif word.fields.get("backend") in _PRIVATE:
        return [option]
    scene.note(f"{option}: this monitor is left out")
    return []


def line(scene: Scene, index: int, option: Option) -> list[Option]:
    """-serial, -parallel, -debugcon: the same device in the guest, with another other end."""
    word = character.parse(option.value or "")
    if word.multiplexed:
        scene.note(f"{option}: no human monitor on this line any more")
    if word.none or word.chardev is not None:
        return [Option(option.name, character.format(Word(word.fields, word.chardev)))]
    before = scene.line.options[:index]
    number = sum(other.name == option.name for other in before)
    new = settled(scene, word.fields, f"{option.name}{number}")
    return [Option(option.name, character.format(Word(new)))]


def settled(scene: Scene, fields: Fields, name: str) -> Fields:
    """The chardev *fields*, called *name*, without a tie to the original's.

    Raises Blocked where it is an open descriptor, or a back end that we do not know.
    """
    if log := fields.get("logfile"):
        fields = fields.set("logfile", scene.move(log))
    backend = fields.get("backend")
    path = fields.get("path")
    if fields.has("fd") or (path or "").startswith("/dev/fdset/"):
        raise Blocked(f"chardev {name}: was given an open descriptor, which a restore cannot give")
    match backend:
        case "socket" if path is not None:
            return _socket(scene, fields, name, path)
        case "socket" | "udp":
            scene.note(f"chardev {name}: was on the network, now null")
            return _instead(fields, "null")
        case "file":
            moved = fields.set("path", scene.move(path or name))
            given = moved.get("input-path")
            return moved.set("input-path", scene.absolute(given)) if given else moved
        case "pipe":
            scene.note(f"chardev {name}: was a pipe, now a file that takes what is written")
            return _instead(fields, "file", scene.move(path or name))
        case "stdio":
            log = scene.fresh(f"{name}.log")
            scene.note(f"chardev {name}: was stdio, now the file {log}")
            return _instead(fields, "file", log)
        case _ if backend in _HOST_DEVICES:
            scene.note(f"chardev {name}: was a device of the host ({path or backend}), now null")
            return _instead(fields, "null")
        case "pty" if path is not None:
            return fields.set("path", scene.move(path))
        case _ if backend in _PRIVATE:
            return fields
    raise Blocked(f"chardev {name}: back end {backend} is not known to be safe to restore")


def default_serial(line: CommandLine) -> bool:
    """Whether QEMU gives the machine a serial port that the command line does not mention."""
    if line.has("nodefaults", "serial"):
        return False
    # vl.c: default_list; an isa-serial of the user's, by -device or by -global, replaces it
    devices = (Device.of(option).driver for option in line.all("device"))
    globals_ = ((option.value or "") for option in line.all("global"))
    return "isa-serial" not in devices and not any(
        text.startswith("isa-serial.") or "driver=isa-serial," in f"{text}," for text in globals_
    )


def _socket(scene: Scene, fields: Fields, name: str, path: str) -> Fields:
    users = _users(scene.line, name)
    if _vhost_user(scene.line, name):
        raise Blocked(f"chardev {name}: a vhost-user back end keeps state outside of QEMU")
    if fields.on("server"):
        agent = scene.agent if name == agent_chardev(scene.line) else None
        plain = fields.without("abstract", "tight")
        return plain.set("path", scene.move_socket(path, to=agent))
    if any(user.name == "tpmdev" for user in users):
        moved = scene.move_socket(path)
        scene.note(f"chardev {name}: the TPM is a swtpm of its own, which listens at {moved}")
        return fields.set("path", moved)
    scene.note(f"chardev {name}: was connected to {path}, now null")
    return _instead(fields, "null")


def _vhost_user(line: CommandLine, name: str) -> bool:
    """Whether another process is a device of the machine over the chardev *name*."""
    return any("vhost-user" in (user.value or "") for user in _users(line, name))


def _instead(fields: Fields, backend: str, path: str | None = None) -> Fields:
    """Another back end under the same id, with what every back end takes."""
    common = fields.keep(lambda key: key in ("id", "mux", "logfile", "logappend"))
    pairs = (("backend", backend), *common.pairs)
    return Fields((*pairs, ("path", path)) if path else pairs)


def _ends(scene: Scene, option: Option) -> bool:
    """Whether this monitor is not taken along."""
    if option.name in ("qmp", "qmp-pretty"):
        return True
    fields = fields_of(option)
    if option.name == "object":
        return fields.get("qom-type") == "monitor-qmp"
    if fields.get("mode") == "control":
        return True
    return not any(
        one.id == fields.get("chardev") and _reachable(one)
        for one in map(Chardev.of, scene.line.all("chardev"))
    )


def _reachable(one: Chardev) -> bool:
    if one.backend == "socket":
        return one.path is not None and one.server
    return one.backend in _TALKS


def _users(line: CommandLine, name: str, *, but: Iterable[Option] = ()) -> list[Option]:
    """The options, without those of *but*, that refer to the chardev *name*."""
    rest = list(line.options)
    for option in but:
        rest.remove(option)
    return [option for option in rest if option.name != "chardev" and refers(option, name)]


def refers(option: Option, name: str) -> bool:
    """Whether *option* speaks of the back end *name*; its own id is no such word."""
    if option.name in (*_WORDS, "qmp", "qmp-pretty"):
        return character.parse(option.value or "").chardev == name
    if option.name not in IMPLIED or option.value is None:
        return False
    return any(value == name for key, value in fields_of(option) if key not in ("id", "name"))
