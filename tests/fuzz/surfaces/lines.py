"""Command lines of a QEMU: as they are captured, as they are recorded, and their words."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from qmpsnap import config, ids
from qmpsnap.engine import configuration, firmware
from qmpsnap.engine.chains import _file
from qmpsnap.engine.survey import _plain
from qmpsnap.errors import SnapError
from qmpsnap.host.journal import Journal
from qmpsnap.hypervisor.block import bitmap
from qmpsnap.hypervisor.machine import (
    attach,
    board,
    changes,
    clones,
    cmdline,
    direct,
    drives,
    keyval,
    mapping,
    memory,
    network,
    processor,
    readconfig,
    records,
    relocate,
    secrecy,
    sizes,
    tpm,
    tree,
)  # fmt: skip
from qmpsnap.hypervisor.machine.cmdline import CommandLine
from qmpsnap.hypervisor.machine.inventory import Inventory
from qmpsnap.hypervisor.machine.options import DRIVES, accelerators, applied_sets, guest_name
from qmpsnap.store.layout import LocalRoot
from tests.fuzz import mutation, samples
from tests.fuzz.samples import ID
from tests.fuzz.surface import Surface
from tests.unit.machine_lines import CAPTURED

_WORDS = (
    ",", ",,", "=", "=on", "no", "id=", "id=d0", "if=", "if=virtio", "index=", "index=1", "bus=",
    "unit=", "unit=9999999999", "file=", "file=json:{", "driver=", ".", "..", "0.1", "[0]", "{",
    "}", "[", "]", '"', "'", "\\", "/", ":", "::", "-1", "0x", "9" * 30, "9" * 5000, "1" * 400,
    "1e400", "1e400G", "9" * 400 + "E", "\0", "\n", "\ud800", "\udcff", "\u202e", "٣", "²", "node",
    "dist", "type=node,nodeid=", "nodeid=x", "cpus=", "mem=", "size=", "json:[]", "type=", "fd=",
    "fd:", "path=", "unix:", "tcp:", "stdio", "mon:", "chardev:", "secret", "data=", "mac=",
    "mac=52:54:00:12:34", "mac=x:y:z", "+x", "-x", "share=on", "mem-path=/x/0.pages", "share",
)  # fmt: skip
_MORE = (
    ["qemu-system-x86_64", "-machine", "q35,accel=kvm:tcg,kernel=vmlinuz", "-cpu",
     "Haswell,+aes,-pcid,level=13", "-smp", "2,maxcpus=4,sockets=2", "-m",
     "size=1G,slots=2,maxmem=4G", "-numa", "node,nodeid=0,memdev=m0", "-numa",
     "dist,src=0,dst=1,val=20", "-object",
     "memory-backend-file,id=m0,size=1G,mem-path=/x/0.pages,share=off", "-object",
     "secret,id=s0,data=hush", "-drive", "file=a.qcow2,if=virtio,index=1,id=d0,format=qcow2",
     "-drive", "if=pflash,unit=0,file=f.fd,readonly=on", "-netdev",
     "user,id=n0,hostfwd=tcp::2222-:22", "-device", "e1000,netdev=n0,mac=52:54:00:12:34:56",
     "-nic", "tap,ifname=tap0,model=virtio", "-set", "device.d0.x=y", "-fw_cfg",
     "name=opt/x,string=y", "-smbios", "type=1,manufacturer=x", "-rtc", "base=utc", "-uuid",
     "11111111-2222-3333-4444-555555555555", "-serial", "file:console.log", "-vnc",
     ":1,password=on", "-spice", "port=1,password=x", "-tpmdev", "emulator,id=t0,chardev=c0",
     "-chardev", "socket,id=c0,path=swtpm.sock", "-append", "console=ttyS0", "-S", "-daemonize"],
    ["qemu", "-M", "pc", "-hda", "a", "-hdb", "b", "-cdrom", "c", "-fda", "d", "-drive",
     "file=json:{\"driver\":\"qcow2\"},if=scsi,bus=1,unit=2", "-device", "vfio-pci,host=01:00.0",
     "-virtfs", "local,path=/x,mount_tag=t,security_model=none", "-fsdev", "local,id=f,path=y",
     "-incoming", "exec:cat x", "-mem-path", "/dev/hugepages", "-net", "nic", "-net", "user",
     "-monitor", "unix:m,server,nowait", "-audiodev", "none,id=a", "-device", "vmgenid,guid=auto",
     "-device", "vhost-vsock-pci,guest-cid=3", "-kernel", "k", "-initrd", "i", "-L", "roms",
     "-display", "gtk", "-parallel", "none", "-sandbox", "on", "-run-with", "chroot=/x"],
)  # fmt: skip


_NO_DISKS = relocate.RULES.keys() - {*DRIVES, "blockdev"}


def _spoil_line(dice: Random, seed: list[str]) -> list[str]:
    """Words odd, gone, twice, or out of other lines."""
    words = list(seed)
    for _ in range(dice.choice((1, 1, 2, 3))):
        at = dice.randrange(len(words))
        match dice.randrange(8):
            case 0 if len(words) > 1:
                del words[at]
            case 1:
                words[at:at] = [dice.choice(dice.choice(_lines()))]
            case 2:
                words.append(f"-{dice.choice(sorted(relocate.RULES))}")
                words.append(mutation.text(dice, dice.choice(seed), _WORDS))
            case _:
                words[at] = mutation.text(dice, words[at], _WORDS)
    # what /proc tells has no NUL within a word, and is bytes that Python spells
    said = (word.replace("\0", "").encode("utf-8", "surrogatepass") for word in words)
    return [word.decode("utf-8", "surrogateescape") for word in said]


def _lines() -> list[list[str]]:
    return [*CAPTURED.values(), *_MORE]


def _captured(given: list[str], scratch: Path) -> object:
    found = attach.facts(given, scratch)
    _each(found.line, scratch)
    return found


def _each(line: CommandLine, scratch: Path) -> None:
    """All that is done with a line, each by itself."""
    seen = msgspec.convert(samples.sample(Inventory), Inventory)
    plain = secrecy.without(line)[0]
    steps: tuple[Callable[[], object], ...] = (
        lambda: records.from_json("qemu", json.loads(json.dumps(records.as_json(plain)))),
        lambda: (guest_name(line), accelerators(line), applied_sets(line)),
        lambda: drives.slots(line), lambda: relocate.refusals(line, scratch),
        lambda: [relocate.refusal(line, one) for one in line.options if one.name in _NO_DISKS],
        lambda: _cloned(line, scratch), lambda: direct.files(line, scratch),
        lambda: mapping.unmapped(line), lambda: mapping.images(line),
        lambda: mapping.mapped(line, {"pc.ram": (scratch / "0.pages", 1 << 30)}, version="8.2.1"),
        lambda: tpm.emulator(line, scratch), lambda: board.board(line),
        lambda: network._given(line),
        lambda: memory.nodes(line, {0: 0}, {"m0": 1}), lambda: processor._wanted(line, "x-cpu"),
        lambda: changes.changes(seen, line), lambda: firmware.places(line, scratch, []),
        lambda: msgspec.json.encode(records.as_json(plain)) if _is_text(plain) else None,
    )  # fmt: skip
    for step in steps:
        with suppress(SnapError):
            step()


def _is_text(line: CommandLine) -> bool:
    return not any("\udc80" <= one <= "\udcff" for word in line.argv() for one in word)


def _cloned(line: CommandLine, scratch: Path) -> object:
    disks = {slot.key: scratch / "disk.qcow2" for slot in drives.slots(line)}
    new = relocate.relocate(
        line, cwd=scratch, into=scratch / "back", machine_type="pc-q35-7.2", disks=disks,
        incoming=True, paused=True, qmp=scratch / "qmp",
    )  # fmt: skip
    return clones.clone(new.cmdline, new.notices, of="web", number=1)


def _records() -> list[Any]:
    found = []
    for argv in _lines():
        with suppress(SnapError):
            line = cmdline.parse(argv)
            found.append({"options": records.as_json(secrecy.without(line)[0])})
    return found


def _recorded(given: Any, scratch: Path) -> object:
    whole = {**samples.sample(configuration.Configuration), "version": 1, "reconciled": None}
    del whole["details"]
    try:
        text = mutation.dumped(Random(0), whole | (given if isinstance(given, dict) else {}))
    except RecursionError:
        return None  # no JSON can say that
    line, cwd = configuration.decode(text, "web/machine.json").command_line()
    _each(line, scratch)
    return _cloned(line, cwd)


_READCONFIG = """# qemu config file
[drive "d0"]
  file = "a.qcow2"
  if = "none"

[device]
  driver = "virtio-blk-pci"
  drive = "d0"
[machine]
  type = "q35"
[memory]
  size = "64"
[smp-opts]
  cpus = "2"
"""


def _readconfig(given: str, _scratch: Path) -> object:
    text = given.encode(errors="replace").decode()  # it is read as UTF-8
    return list(readconfig.parse(text, "/etc/vm.cfg"))


def _keyval(given: str, _scratch: Path) -> object:
    for implied in (None, "driver"):
        for json_too in (False, True):
            with suppress(SnapError):
                fields = keyval.parse(given, implied, json_too=json_too)
                keyval.format(fields, implied), keyval.nested(fields)
    return secrecy.of_image(given), _plain(given), _file(given)


def _names(given: str, scratch: Path) -> object:
    ids.is_vm_name(given), ids.is_snapshot_id(given), bitmap.parse(given), sizes.in_bytes(given)
    (label,) = ids.disk_labels([given])
    assert len(label) <= 11 and label.isidentifier() and label.islower()  # noqa: PT018
    root = LocalRoot(scratch)
    asked: tuple[Callable[[], object], ...] = (
        lambda: config.duration(given), lambda: config.size(given), lambda: root.vm(given),
        lambda: root.point("web", given), lambda: root.snapshot("web", given),
        lambda: root.image("web", ID, "vda", "qcow2"), lambda: ids.SnapshotId(given).taken(),
        lambda: ids.SnapshotId.after(ids.SnapshotId(given), ids.SnapshotId(ID).taken()),
        lambda: Journal(scratch)._path(given),
    )  # fmt: skip
    for ask in asked:
        try:
            found = ask()
        except SnapError:
            continue
        except ValueError as refused:
            # a foreign ID is an error of whoever calls
            assert str(refused).startswith("not a snapshot id")  # noqa: PT017
            continue
        assert not isinstance(found, Path) or found.resolve().is_relative_to(scratch), found
    return label


def _printed(given: str, _scratch: Path) -> object:
    return tree.parsed(given.splitlines()), network.parsed(given.splitlines())


_QTREE = """bus: main-system-bus
  type System
  dev: q35-pcihost, id ""
    bus: pcie.0
      type PCIE
      dev: e1000, id "nic0"
        mac = "52:54:00:12:34:56"
        netdev = "n0"
        addr = 05.0
        romfile = "efi-e1000.rom"
        rombar = 1 (0x1)
      dev: lsi, id ""
        channel = 0 (0x0)
        scsi-id = 1 (0x1)
        lun = 2 (0x2)
      dev: usb-tablet, id ""
        addr 0.1, port 1, speed 12, name QEMU
"""
_NETWORK = """n0: index=0,type=user,net=10.0.2.0,restrict=off
 \\ nic0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56
hub 0
 \\ hub0port1: nic1: index=0,type=nic,model=ne2k_pci,macaddr=52:54:00:12:34:57
"""


def _odd_text(dice: Random, seed: str) -> str:
    return mutation.text(dice, seed, (*_WORDS, *mutation.TEXTS))


ALL = [
    Surface("command-line", _lines, _captured, _spoil_line, slow=True),
    Surface("records", _records, _recorded, mutation.tree, slow=True),
    Surface("readconfig", lambda: [_READCONFIG], _readconfig, _odd_text, "/etc/vm.cfg"),
    Surface("keyval",
            lambda: [*(word for line in _lines() for word in line if "=" in word or "{" in word),
                     "json:{\"driver\":\"qcow2\",\"file\":{\"filename\":\"a\"}}",
                     "https://me:secret@host/x?token=y", "rbd:pool/x:id=a:key=b"],
            _keyval, _odd_text),
    Surface("names",
            lambda: ["web", ID, f"{ID}/{ID}", "virtio0", f"qmpsnap:web:vda:{ID}", "200ms", "1.5G",
                     "64m"],
            _names, _odd_text),
    Surface("printed", lambda: [_QTREE, _NETWORK], _printed, _odd_text),
]  # fmt: skip
