"""The only place that turns a captured command line into one for a restore: a rule an option."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qmpsnap.errors import Blocked, UsageError
from qmpsnap.hypervisor.machine import direct
from qmpsnap.hypervisor.machine.attach import agent_chardev
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.mapping import unmapped
from qmpsnap.hypervisor.machine.options import (
    DRIVES,
    Blockdev,
    Chardev,
    Machine,
    Object,
    applied_sets,
    option_of,
)
from qmpsnap.hypervisor.machine.relocation import characters, parts, wires
from qmpsnap.hypervisor.machine.relocation import disks as images
from qmpsnap.hypervisor.machine.relocation.scene import Scene

Rule = Callable[[Scene, int, Option], list[Option]]

QMP_ID = "qmpsnap-qmp"


@dataclass(frozen=True, slots=True)
class Relocated:
    """A command line that shares nothing with the original's, and what was decided for it.

    *moved* has the new path of each file and socket by its old, absolute one. *reads* are the
    files and folders of the host that stay where they are, *roms* the firmware that QEMU looks for
    in its own folders.
    """

    cmdline: CommandLine
    notices: list[str]
    moved: dict[str, str]
    agent: Path | None
    reads: tuple[str, ...] = ()
    roms: tuple[str, ...] = ()


def relocate(
    cmdline: CommandLine,
    *,
    cwd: Path,
    into: Path,
    machine_type: str | None,
    disks: Mapping[str, Path],
    incoming: bool,
    paused: bool,
    qmp: Path,
    agent: Path | None = None,
    isolated: bool = False,
    secrets: Mapping[str, Path] | None = None,
    fetched: Collection[str] = (),
) -> Relocated:
    """The command line of a restore of *cmdline*, which was started in *cwd*.

    *disks* has the new qcow2 image of each disk, by node name (-blockdev), or by id or
    `drive:INDEX` (-drive and its short forms: see `drives.slots`). What the machine writes goes
    under *into*; QMP listens on *qmp*, the guest agent's socket is *agent* or under *into*.
    Nothing is opened; only firmware named without a folder is looked for in *cwd*. An *isolated*
    machine keeps its network cards, and no packet of theirs goes anywhere. *secrets* has the file
    that each -object secret is to be read from, by its id: for those that are in no file yet. Of
    the files that it is booted from, those in *fetched* (absolute paths) will be under *into* too.

    Raises Blocked, naming the option, for what no second machine can have, and UsageError for a
    command line that QEMU would not take.
    """
    line = unmapped(direct.spelled_out(applied_sets(cmdline)))
    taken = {str(path) for path in (*disks.values(), qmp, agent) if path is not None}
    scene = Scene(line, cwd, into, disks, agent, taken, isolated=isolated, incoming=incoming)
    scene.secrets = _known(line, secrets or {})
    scene.fetched = frozenset(fetched)
    rules = RULES | {"blockdev": _blockdevs(scene)}
    unknown = sorted({option.name for option in line.options} - rules.keys())
    if unknown:
        raise Blocked(f"-{unknown[0]}: it is not known what a restore may do with it")
    _know_all(scene)
    new = line.replace(lambda index, option: rules[option.name](scene, index, option))
    new = _with_machine(new, line, machine_type)
    new = new.append(*_ending(scene, new, incoming, paused), *wires.unspoken(scene), *control(qmp))
    return Relocated(
        new,
        scene.notices,
        scene.moved,
        _moved_agent(new),
        tuple(dict.fromkeys(scene.reads)),
        tuple(dict.fromkeys(scene.roms)),
    )


def refusal(line: CommandLine, option: Option) -> str:
    """Why *option*, one of *line* and none of its disks, could not be restored; empty if it can."""
    scene = Scene(line, Path("/"), Path("/"), {}, None, set(), isolated=False, incoming=True)
    try:
        RULES[option.name](scene, 0, option)
    except Blocked as refused:
        return str(refused)
    return ""


def refusals(line: CommandLine, cwd: Path) -> list[str]:
    """Why a captured state of *line* could not be loaded anywhere, whatever its disks are."""
    line = direct.spelled_out(line)
    scene = Scene(line, cwd, Path("/"), {}, None, set(), incoming=True)
    found = []
    for index, option in enumerate(line.options):
        if option.name in (*DRIVES, "blockdev"):
            continue  # the survey of the disks tells
        if option.name not in RULES:
            found.append(f"-{option.name}: it is not known what a restore may do with it")
            continue
        try:
            RULES[option.name](scene, index, option)
        except Blocked as refused:
            found.append(str(refused))
    return found


def control(qmp: Path) -> tuple[Option, Option]:
    """The options that give a machine our QMP monitor, listening on *qmp*."""
    where = (("backend", "socket"), ("id", QMP_ID), ("path", str(qmp)))
    socket = Fields((*where, ("server", "on"), ("wait", "off")))
    monitor = Fields((("chardev", QMP_ID), ("mode", "control")))
    return option_of("chardev", socket), option_of("mon", monitor)


def _keep(_scene: Scene, _index: int, option: Option) -> list[Option]:
    return [option]


def _drop(_scene: Scene, _index: int, _option: Option) -> list[Option]:
    return []


def _leave_out(scene: Scene, _index: int, option: Option) -> list[Option]:
    scene.note(f"{option}: left out")
    return []


def _block(_scene: Scene, _index: int, option: Option) -> list[Option]:
    raise Blocked(f"{option}: a machine with it cannot be restored")


def _blockdevs(scene: Scene) -> Rule:
    graph = images.planned(scene.line, scene.disks, scene.notices)
    rule = partial(images.blockdev, graph)
    return lambda scene, _index, option: rule(scene, option)


def _know_all(scene: Scene) -> None:
    # a disk that no option takes would be lost without a word
    drives = {slot.key for slot in slots(scene.line)}
    nodes = {Blockdev.of(option).node_name for option in scene.line.all("blockdev")}
    strange = sorted(set(scene.disks) - drives - nodes)
    if strange:
        raise Blocked(f"disk {strange[0]}: the command line has no such node or drive")


def _known(line: CommandLine, secrets: Mapping[str, Path]) -> Mapping[str, Path]:
    """*secrets*. Raises UsageError for one that *line* has no object for."""
    objects = map(Object.of, line.all("object"))
    there = {one.id for one in objects if one.qom_type == "secret"}
    if strange := sorted(secrets.keys() - there):
        raise UsageError(f"secret {strange[0]}: the machine has no -object secret of that id")
    return secrets


def _with_machine(new: CommandLine, line: CommandLine, resolved: str | None) -> CommandLine:
    fields = Fields()
    for option in line.all("machine", "M"):
        fields = fields.merged(Machine.of(option).fields)
    if resolved is not None:
        rest = fields.without("type")
        fields = Fields((("type", resolved), *rest.pairs))
    if not fields.pairs:
        return new
    first = option_of("machine", fields)
    return CommandLine(new.binary, (first, *new.options))


def _ending(scene: Scene, new: CommandLine, incoming: bool, paused: bool) -> list[Option]:
    ending = []
    if scene.line.has("nographic") and characters.default_serial(scene.line):
        # -nographic alone would put the first serial port on our own stdio
        ending += characters.line(scene, 0, Option("serial", "stdio"))
    if not new.has("display"):
        ending.append(Option("display", "none"))
    if incoming:
        ending.append(Option("incoming", "defer"))
    if incoming or paused:
        ending.append(Option("S"))
    return ending


def _moved_agent(new: CommandLine) -> Path | None:
    wanted = agent_chardev(new)
    views = map(Chardev.of, new.all("chardev"))
    return next((Path(v.path) for v in views if v.id == wanted and v.path and v.server), None)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("accel", "action", "append", "async-teardown", "boot", "compat",
         "cpu", "d", "dfilter", "echr", "enable-kvm", "enable-sync-profile", "global", "iscsi",
         "k", "m", "mem-prealloc", "msg", "name", "no-acpi", "no-fd-bootchk", "no-hpet",
         "no-reboot", "no-shutdown", "no-user-config", "nodefaults", "nographic", "numa",
         "old-param", "one-insn-per-tb", "only-migratable", "overcommit", "portrait", "prom-env",
         "rotate", "rtc", "sandbox", "seed", "semihosting", "semihosting-config", "singlestep",
         "smp", "usb", "usbdevice", "uuid", "vga", "watchdog-action", "win2k-hack"), _keep),
    # ours take their place, or a restore has its own idea of them
    **dict.fromkeys(("machine", "M", "qmp", "qmp-pretty", "S", "incoming", "loadvm", "daemonize",
                     "full-screen", "preconfig"), _drop),
    **dict.fromkeys(("runas", "chroot", "gdb", "s", "qtest", "qtest-log", "dump-vmstate",
                     "jitdump", "perfmap"), _leave_out),
    "plugin": _leave_out,  # code that QEMU would load, and no part of the machine
    **dict.fromkeys(("snapshot", "add-fd", "xen-domid", "xen-attach", "xen-domid-restrict", "h",
                     "help", "version", "audio-help"), _block),
    **dict.fromkeys(direct.OPTIONS, parts.path),
    **dict.fromkeys(("smbios", "acpitable", "fw_cfg", "trace", "option-rom"),
                    parts.fields_with_paths),
    **dict.fromkeys(("pidfile", "D"), parts.written),
    **dict.fromkeys(("serial", "parallel", "debugcon"), characters.line),
    **dict.fromkeys(("netdev", "nic", "net"), wires.network),
    **dict.fromkeys(("fsdev", "virtfs"), parts.shared_folder),
    **dict.fromkeys(("audio", "audiodev"), wires.sound),
    **dict.fromkeys(DRIVES, images.drive),
    "L": parts.firmware_folder, "mem-path": parts.memory_path,
    "bios": parts.rom, "chardev": characters.chardev, "device": parts.device,
    "display": wires.display, "icount": parts.clock, "mon": characters.mon,
    "monitor": characters.monitor, "object": parts.object_, "run-with": parts.process,
    "spice": wires.spice, "tpmdev": parts.tpm, "vnc": wires.vnc,
}  # fmt: skip
