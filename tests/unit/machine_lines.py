"""Command lines as they are met in the field, and what they are known by."""

_JSON_DISK = (
    '{"driver":"qcow2","node-name":"d0","file":"f0","cache":{"direct":true},"backing":null,'
    '"discard":"unmap"}'
)
CAPTURED = {
    "empty": ["qemu"],
    "agent": [
        "qemu", "-name", "guest=web,debug-threads=on", "-nodefaults", "-m", "256",
        "-chardev", "socket,path=qga.sock,server,nowait,id=qga0", "-device", "virtio-serial-pci",
        "-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        "-chardev", "socket,id=mon,path=mon,,1.sock,server=on,wait=off",
        "-mon", "chardev=mon,mode=control", "-qmp", "unix:old.sock,server,nowait",
    ],
    "json": [
        "qemu", "-nodefaults", "-object", '{"qom-type":"iothread","id":"io0"}',
        "-blockdev", '{"driver":"file","filename":"a.qcow2","node-name":"f0","aio":"native"}',
        "-blockdev", _JSON_DISK,
        "-device", '{"driver":"virtio-blk-pci","drive":"d0","id":"vda","addr":"0x5"}',
    ],
    "short": ["qemu", "-hda", "a,b.img", "-cdrom", "x.iso", "-serial", "mon:stdio", "-nographic"],
    "odd": ["qemu", "-device", "x,,y", "-device", "id=1,", "-boot", "cd", "-name", "a=b"],
}  # fmt: skip
