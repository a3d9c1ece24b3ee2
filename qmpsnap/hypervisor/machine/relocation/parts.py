"""The only place that decides which devices, objects and files may come along unchanged."""

from __future__ import annotations

import secrets
from pathlib import Path

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine.cmdline import Option
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import Device, Object, fields_of, option_of
from qmpsnap.hypervisor.machine.relocation.scene import Scene

_DESCRIPTORS = frozenset({"fd", "fds", "vhostfd", "vhostfds", "sock_fd", "sock-fd"})
_OUTSIDE = ("vhost-user-", "vhost-scsi", "vfio-", "usb-host", "usb-redir", "scsi-block",
            "scsi-generic", "virtio-input-host", "x-pci-proxy", "ivshmem-doorbell",
            "vhost-vdpa-device", "u2f-", "canokey", "ccid-card-emulated")  # fmt: skip
_PERSISTENT = ("nvdimm", "virtio-pmem-pci")
_OUTSIDE_OBJECTS = ("cryptodev-vhost-user", "x-remote-object", "x-vfio-user-server", "input-linux",
                    "dbus-vmstate", "vhost-user-backend", "input-barrier")  # fmt: skip

_FIRST_CID = 1 << 30  # beside those that anybody numbers by hand
KEEPS_CID = "keeps its guest CID, which the original must not use any more"


def device(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-device: kept, unless it is a door to something outside of the machine.

    Such a one is left out of a boot from the disks; raises Blocked where its state would be loaded.
    """
    view = Device.of(option)
    name = f"device {view.id or view.driver}"
    driver = view.driver or ""
    if driver.startswith(_OUTSIDE) and not scene.incoming:
        scene.note(f"{name}: {driver} is of the original's host: left out")
        return []
    refuse_descriptors(view.fields, name)
    if driver.startswith(_OUTSIDE):
        raise Blocked(f"{name}: {driver} is of this host, its state is not in the snapshot")
    fields = view.fields
    if driver.startswith("vhost-vsock") and scene.isolated:
        fields = fresh_cid(fields)
    elif driver.startswith("vhost-vsock"):
        scene.note(f"{name}: {KEEPS_CID}")
    if rom := fields.get("romfile"):
        fields = fields.set("romfile", scene.rom(rom))
    for key in ("file", "kernel", "initrd") if driver in ("loader", "guest-loader") else ():
        if path := fields.get(key):
            fields = fields.set(key, scene.absolute(path))
    if driver == "usb-mtp" and not fields.on("readonly"):
        scene.note(f"{name}: the shared folder is opened read-only")
        fields = fields.set("readonly", True if fields.json else "on")
    return [_changed(option, view.fields, fields)]


def fresh_cid(fields: Fields) -> Fields:
    """A vsock device with an address of its own: the guest is told of it when it is loaded."""
    cid = _FIRST_CID + secrets.randbelow(1 << 30)
    return fields.set("guest-cid", cid if fields.json else str(cid))


def object_(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-object: kept, with what it writes moved.

    Raises Blocked for memory that outlives its machine in a file, and for a secret that is in no
    file.
    """
    view = Object.of(option)
    kind, fields = view.qom_type or "", view.fields
    name = f"object {view.id or kind}"
    refuse_descriptors(fields, name)
    if kind in _OUTSIDE_OBJECTS:
        raise Blocked(f"{name}: {kind} is tied to something outside of the machine")
    if kind == "monitor-qmp":
        return []
    if kind == "secret":
        fields = _secret(scene, fields, name)
    if path := fields.get("mem-path"):
        shared = fields.on("share") and not fields.on("readonly")
        fields = fields.set(
            "mem-path", _shared_memory(scene, view, path) if shared else scene.made(path)
        )
    for key in ("dir", "filename", "path"):
        if path := fields.get(key):
            fields = fields.set(key, scene.absolute(path))
    if (file := fields.get("file")) is not None:
        moved = scene.move(file) if kind == "filter-dump" else scene.absolute(file)
        fields = fields.set("file", moved)
    return [_changed(option, view.fields, fields)]


def _shared_memory(scene: Scene, view: Object, path: str) -> str:
    """The folder of the original's file: in a folder, QEMU makes a nameless file of its own."""
    for option in scene.line.all("device"):
        device = Device.of(option)
        if device.driver in _PERSISTENT and device.fields.get("memdev") == view.id:
            raise Blocked(
                f"object {view.id}: it is the storage of a {device.driver}, and in no snapshot"
            )
    if Path(scene.spelled(path)).is_dir():
        return scene.absolute(path)
    folder = str(Path(scene.spelled(path)).parent)
    scene.note(f"object {view.id}: its memory is in a nameless file of {folder}, and not in {path}")
    return scene.absolute(folder)


def _secret(scene: Scene, fields: Fields, name: str) -> Fields:
    given = scene.secrets.get(fields.get("id") or "")
    if given is not None:
        return fields.without("data").set("file", str(given))
    if not fields.has("file") and not fields.has("data"):
        raise Blocked(
            f"{name}: it was given on the command line, and secrets are in no snapshot",
            hint=f"`restore --secret {fields.get('id')}=FILE` has it read from a file",
        )
    return fields


def shared_folder(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-fsdev, -virtfs: the host's folder can be read from the restored machine, not written."""
    fields = fields_of(option)
    name = f"-{option.name} {fields.get('id') or fields.get('mount_tag')}"
    refuse_descriptors(fields, name)
    if fields.get("fsdriver") == "proxy":
        raise Blocked(f"{name}: a 9p proxy serves one machine")
    if path := fields.get("path"):
        fields = fields.set("path", scene.absolute(path))
    if fields.get("fsdriver") == "local" and not fields.on("readonly"):
        scene.note(f"{name}: the shared folder is opened read-only")
        fields = fields.set("readonly", "on")
    return [option_of(option.name, fields)]


def tpm(_scene: Scene, _index: int, option: Option) -> list[Option]:
    """-tpmdev: kept over an emulator, whose chardev moves. Raises Blocked for the host's TPM."""
    if fields_of(option).get("type") == "passthrough":
        raise Blocked(f"{option}: the host's TPM cannot be in two machines")
    return [option]


def path(scene: Scene, _index: int, option: Option) -> list[Option]:
    """An option that is the name of a file which is read."""
    if option.value and scene.spelled(option.value) in scene.fetched:
        return [Option(option.name, scene.move(option.value))]
    return [Option(option.name, scene.absolute(option.value or ""))]


def firmware_folder(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-L: one of several folders, of which QEMU passes over those that are not there."""
    return [Option(option.name, scene.spelled(option.value or ""))]


def memory_path(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-mem-path: a folder, or a file that is made if need be."""
    return [Option(option.name, scene.made(option.value or ""))]


def rom(scene: Scene, _index: int, option: Option) -> list[Option]:
    """An option that is the name of a firmware file."""
    return [Option(option.name, scene.rom(option.value or ""))]


def fields_with_paths(scene: Scene, _index: int, option: Option) -> list[Option]:
    """An option some of whose fields name files which are read."""
    before = after = fields_of(option)
    for key in ("file", "path", "events", "data"):
        if option.name == "trace" and key == "file":
            continue  # the log, which is written
        if names := before.get(key):
            # -acpitable takes several, with colons between them
            parts = names.split(":") if option.name == "acpitable" else [names]
            after = after.set(key, ":".join(scene.absolute(part) for part in parts))
    if option.name == "trace" and (log := before.get("file")):
        after = after.set("file", scene.move(log))
    if name := before.get("romfile"):
        after = after.set("romfile", scene.rom(name))
    return [_changed(option, before, after)]


def written(scene: Scene, _index: int, option: Option) -> list[Option]:
    """An option that is the name of a file which is written."""
    return [Option(option.name, scene.move(option.value or ""))]


def clock(_scene: Scene, _index: int, option: Option) -> list[Option]:
    """-icount: kept. Raises Blocked for a recording, which is a file that goes on being written."""
    if fields_of(option).has("rr"):
        raise Blocked(f"{option}: a recorded machine cannot be restored")
    return [option]


def process(scene: Scene, _index: int, option: Option) -> list[Option]:
    """-run-with: without what needs the original's surroundings."""
    before = fields_of(option)
    after = before.without("chroot", "user", "exit-with-parent")
    if after.pairs != before.pairs:
        scene.note(f"{option}: chroot, user and exit-with-parent are left out")
    return [_changed(option, before, after)] if after.pairs else []


def refuse_descriptors(fields: Fields, name: str) -> None:
    """Raises Blocked when *fields* refer to a descriptor that QEMU was handed."""
    for key, value in fields:
        kind_of_address = fields.get(f"{key.rpartition('.')[0]}.type") or ""
        is_descriptor = key in _DESCRIPTORS or (key.endswith(".str") and kind_of_address == "fd")
        if is_descriptor or str(value).startswith("/dev/fdset/"):
            raise Blocked(
                f"{name}: {key}={value} is an open descriptor, which a restore cannot give"
            )


def _changed(option: Option, before: Fields, after: Fields) -> Option:
    # what did not change keeps its spelling too
    return option if before.pairs == after.pairs else option_of(option.name, after)
