import json
from pathlib import Path

import pytest

from qmpsnap.errors import Blocked, UsageError
from qmpsnap.hypervisor.machine.cmdline import parse
from qmpsnap.hypervisor.machine.relocate import RULES, Relocated, refusals, relocate
from tests.unit.machine_lines import CAPTURED

CWD, INTO = Path("/was/here"), Path("/new")
OURS = [
    "-chardev", "socket,id=qmpsnap-qmp,path=/new/q.sock,server=on,wait=off",
    "-mon", "qmpsnap-qmp,mode=control",
]  # fmt: skip


def moved(text: str | list[str], **how: object) -> Relocated:
    words = text.split() if isinstance(text, str) else text
    given: dict[str, object] = {
        "cwd": CWD, "into": INTO, "machine_type": None, "disks": {}, "incoming": False,
        "paused": False, "qmp": INTO / "q.sock", "agent": None, **how,
    }  # fmt: skip
    return relocate(parse(["qemu", *words]), **given)  # type: ignore[arg-type]


def words(text: str | list[str], **how: object) -> list[str]:
    """The new options, without those that every restore has."""
    argv = moved(text, **how).cmdline.argv()
    assert argv[-4:] == OURS
    rest = argv[1:-4]
    return rest[:-2] if rest[-2:] == ["-display", "none"] else rest


SAME = [
    "-nodefaults -no-shutdown -sandbox on -uuid 1 -smp 2 -name guest=x -display none -k de",
    "-serial null -parallel none -device pvpanic,id=p -global a.b=c -netdev user,id=n",
    "-display egl-headless -object secret,id=s,data=x -object iothread,id=i -net none",
    "-chardev ringbuf,id=r -device isa-serial,chardev=r -drive if=none,id=cd,media=cdrom",
    "-fw_cfg name=opt/x,string=y -kernel /k -append root=/dev/vda -L /usr/share -monitor none",
]
RULE_BY_RULE = {
    # what the machine writes keeps its base name, in the new place
    "-pidfile run/vm.pid -D /var/log/vm.pid": "-pidfile /new/vm.pid -D /new/vm.pid.1",
    "-serial file:con.log -parallel file:/x/con.log": (
        "-serial file:/new/con.log -parallel file:/new/con.log.1"
    ),
    "-serial unix:a.sock,server=on,wait=off": "-serial unix:/new/a.sock,server=on,wait=off",
    "-serial stdio -serial stdio": "-serial file:/new/serial0.log -serial file:/new/serial1.log",
    "-serial mon:stdio": "-serial file:/new/serial0.log",
    "-serial tcp::4444,server=on": "-serial null",
    "-serial /dev/ttyS0 -serial pty -serial vc:80x24": "-serial null -serial pty -serial vc:80x24",
    "-serial chardev:c -chardev file,id=c,path=o,logfile=l": (
        "-serial chardev:c -chardev file,id=c,path=/new/o,logfile=/new/l"
    ),
    "-device x,chardev=c -chardev stdio,id=c,mux=on": (
        "-device x,chardev=c -chardev file,id=c,mux=on,path=/new/c.log"
    ),
    "-device x,chardev=c -chardev socket,id=c,path=s": "-device x,chardev=c -chardev null,id=c",
    "-device x,chardev=c -chardev socket,id=c,host=h,port=1": (
        "-device x,chardev=c -chardev null,id=c"
    ),
    "-device x,chardev=c -chardev socket,id=c,path=s,server=on,abstract=on": (
        "-device x,chardev=c -chardev socket,id=c,path=/new/s,server=on"
    ),
    # monitors
    "-qmp unix:q,server=on -monitor stdio -qmp-pretty stdio": "",
    "-monitor unix:/m.sock,server=on": "-monitor unix:/new/m.sock,server=on",
    "-chardev socket,id=c,path=s,server=on -mon chardev=c,mode=control": "",
    "-chardev stdio,id=c -mon c": "",
    "-chardev stdio,id=c,mux=on -mon c -serial chardev:c": (
        "-chardev file,id=c,mux=on,path=/new/c.log -serial chardev:c"
    ),
    "-chardev socket,id=c,path=s,server=on -mon c": (
        "-chardev socket,id=c,path=/new/s,server=on -mon c"
    ),
    "-chardev socket,id=qmpsnap-qmp,fd=7,server=on -mon chardev=qmpsnap-qmp,mode=control": "",
    "-chardev null,id=c -object monitor-qmp,id=m,chardev=c": "",
    # faces
    "-display gtk": "",
    "-display sdl,gl=on": "-display egl-headless",
    "-vnc :1 -display vnc=:2": "",
    "-vnc unix:/v.sock,websocket=1": "-vnc unix:/new/v.sock",
    "-spice port=5900,disable-ticketing=on": (
        "-spice unix=on,addr=/new/spice.sock,disable-ticketing=on"
    ),
    "-audiodev pa,id=a,server=x -audiodev wav,id=w,path=o.wav": (
        "-audiodev none,id=a -audiodev wav,id=w,path=/new/o.wav"
    ),
    # the process
    "-daemonize -S -incoming defer -loadvm x -runas u -chroot / -gdb tcp::1 -s": "",
    "-run-with chroot=/x,async-teardown=on": "-run-with async-teardown=on",
    "-run-with user=x": "",
    # networks
    "-netdev user,id=n,hostfwd=a,hostfwd=b,net=10.0.0.0/8,smb=x": (
        "-netdev user,id=n,net=10.0.0.0/8"
    ),
    '-netdev {"type":"user","id":"n","hostfwd":[{"str":"x"}]}': (
        '-netdev {"type":"user","id":"n"}'
    ),
    "-netdev tap,id=n,ifname=t0,script=/x,vhost=on": (
        "-netdev tap,id=n,vhost=on,script=no,downscript=no"
    ),
    "-netdev bridge,id=n,br=b": "-netdev bridge,id=n,br=b",
    # no program of the snapshot's choice is run, no code of its choice is loaded
    "-netdev bridge,id=n,br=b,helper=/x": "-netdev bridge,id=n,br=b",
    "-nic bridge,br=b,helper=/x -plugin file=/x.so": "-nic bridge,br=b",
    "-netdev socket,id=n,listen=:1": "-netdev hubport,hubid=1000,id=n",
    "-nic socket,listen=:1,model=e1000,mac=x": "-nic hubport,hubid=1000,model=e1000,mac=x",
    "-net nic -net socket,listen=:1": "-net nic",
    # files that are read
    "-kernel k -initrd i -dtb d -mem-path m": (
        "-kernel /was/here/k -initrd /was/here/i -dtb /was/here/d -mem-path /was/here/m"
    ),
    "-bios fw/b.bin": "-bios /was/here/fw/b.bin",
    "-bios bios-256k.bin": "-bios bios-256k.bin",
    "-fw_cfg name=a,file=b -acpitable file=a:/b -smbios file=c": (
        "-fw_cfg a,file=/was/here/b -acpitable file=/was/here/a:/b -smbios file=/was/here/c"
    ),
    "-device loader,file=x -device e1000,romfile=r/x": (
        "-device loader,file=/was/here/x -device e1000,romfile=/was/here/r/x"
    ),
    "-object memory-backend-file,id=m,mem-path=x,size=1": (
        "-object memory-backend-file,id=m,mem-path=/was/here/x,size=1"
    ),
    "-object memory-backend-file,id=m,mem-path=x/y,share=on,size=1": (
        "-object memory-backend-file,id=m,mem-path=/was/here/x,share=on,size=1"
    ),
    "-object memory-backend-file,id=m,mem-path=/tmp,share=on,size=1": (
        "-object memory-backend-file,id=m,mem-path=/tmp,share=on,size=1"
    ),
    "-object filter-dump,id=f,netdev=n,file=x.pcap": (
        "-object filter-dump,id=f,netdev=n,file=/new/x.pcap"
    ),
    "-trace enable=x,file=t,events=e": "-trace x,file=/new/t,events=/was/here/e",
    "-virtfs local,path=s,mount_tag=t": "-virtfs local,path=/was/here/s,mount_tag=t,readonly=on",
    "-cdrom x.iso": "-drive index=2,media=cdrom,file=/was/here/x.iso",
    "-drive file=file:x,if=none,readonly=on": "-drive file=/was/here/x,if=none,readonly=on",
    "-drive file=nbd:h:1,if=none,readonly=on": "-drive file=nbd:h:1,if=none,readonly=on",
}
BLOCKED = {
    "-snapshot": "-snapshot",
    "-add-fd fd=3,set=1": "-add-fd",
    "-drive file=x,id=a": r"drive a \(x\)",
    "-hda x": r"drive ide0-hd0 \(x\)",
    "-drive file=/dev/fdset/1,readonly=on": "drive ide0-hd0",
    "-blockdev file,filename=/dev/fdset/1,node-name=n,read-only=on": "node n",
    "-blockdev file,filename=x,node-name=n -device virtio-blk,drive=n,id=v": "device v",
    "-blockdev file,filename=x,node-name=n -machine pflash0=n": "-machine",
    '-netdev {"type":"stream","id":"n","addr":{"type":"fd","str":"3"}}': "netdev n",
    "-netdev vhost-user,id=n,chardev=c": "netdev n",
    "-chardev socket,id=c,fd=3": "chardev c",
    "-chardev file,id=c,path=/dev/fdset/2": "chardev c",
    "-device vhost-vsock-pci,id=v,vhostfd=3": "device v: vhostfd",
    "-device vfio-pci,host=1,id=v": "device v",
    "-object memory-backend-file,id=m,mem-path=x,share=on -device nvdimm,memdev=m": (
        "object m: it is the storage of a nvdimm"
    ),
    "-tpmdev passthrough,id=t": "-tpmdev",
    "-icount shift=1,rr=record,rrfile=x": "-icount",
    "-blockdevs x": "-blockdevs",
    f"-serial unix:{'x' * 120},server=on": "107 bytes",
}


@pytest.mark.parametrize("text", SAME)
def test_relocate_keeps(text):
    found = moved(text)
    new = found.cmdline.argv()[1:-4]
    assert new == text.split() or new == [*text.split(), "-display", "none"]
    assert (found.notices, found.moved) == ([], {})


@pytest.mark.parametrize("text", RULE_BY_RULE)
def test_relocate_rule(text):
    assert words(text) == RULE_BY_RULE[text].split()


@pytest.mark.parametrize("text", BLOCKED)
def test_relocate_blocks_and_names(text):
    with pytest.raises(Blocked, match=BLOCKED[text]):
        moved(text, incoming=True)


def test_relocate_gives_a_tap_of_its_own_for_one_that_was_handed_over():
    fresh = "script=no,downscript=no"
    assert words("-netdev tap,id=n,fd=3,vhostfd=4") == ["-netdev", f"tap,id=n,{fresh}"]
    assert words("-nic tap,fds=3:4") == ["-nic", f"tap,queues=2,{fresh}"]


def test_relocate_boots_without_what_is_of_the_host():
    text = (
        "-chardev socket,id=c,path=v.sock -device vhost-user-fs-pci,chardev=c,tag=x,id=fs "
        "-chardev socket,id=n,path=n.sock -netdev vhost-user,id=n0,chardev=n "
        "-device virtio-net-pci,netdev=n0 -device vfio-pci,host=1,id=v -m 64"
    )
    found = moved(text)
    assert words(text) == (
        ["-netdev", "hubport,hubid=1003,id=n0", "-device", "virtio-net-pci,netdev=n0", "-m", "64"]
    )
    assert [note.split(":")[0] for note in found.notices] == ["device fs", "netdev n0", "device v"]
    told = refusals(parse(["qemu", *text.split()]), CWD)
    assert [why.split(":")[0] for why in told] == [
        "chardev c", "device fs", "chardev n", "netdev n0", "device v",
    ]  # fmt: skip


def test_relocate_machine_is_merged_and_resolved():
    text = "-M pc,accel=kvm -S -machine vmport=off,accel=tcg"
    assert words(text, machine_type="pc-i440fx-7.2") == [
        "-machine", "pc-i440fx-7.2,accel=tcg,vmport=off",
    ]  # fmt: skip
    assert words("-m 1", machine_type="q") == ["-machine", "q", "-m", "1"]
    assert words("-m 1") == ["-m", "1"]


def test_relocate_incoming_and_paused():
    argv = moved("-m 1", incoming=True).cmdline.argv()
    assert argv[1:-4] == ["-m", "1", "-display", "none", "-incoming", "defer", "-S"]
    assert moved("-m 1", paused=True).cmdline.argv()[1:-4] == ["-m", "1", "-display", "none", "-S"]


def test_relocate_default_serial_of_nographic_does_not_take_our_stdio():
    log = ["-serial", "file:/new/serial0.log"]
    assert words("-nographic") == ["-nographic", *log]
    for same in (
        "-nographic -nodefaults",
        "-nographic -device isa-serial,chardev=c -chardev null,id=c",
        "-nographic -serial none",
        "-nographic -global isa-serial.x=1",
    ):
        assert words(same) == same.split()
    assert words("-m 1") == ["-m", "1"]  # on a vc of its own


def test_relocate_disks_of_blockdev():
    argv = CAPTURED["json"][1:]
    found = moved(argv, disks={"d0": Path("/new/d0.qcow2")})
    (node,) = [json.loads(o.value or "") for o in found.cmdline.all("blockdev")]
    assert node == {
        "driver": "qcow2", "node-name": "d0", "cache": {"direct": True}, "discard": "unmap",
        "file": {"driver": "file", "filename": "/new/d0.qcow2", "aio": "native"},
    }  # fmt: skip
    assert found.cmdline.all("device")[0].value == argv[-1]
    assert found.notices == []


@pytest.mark.parametrize(
    ("text", "new"),
    [
        # the protocol node itself is the disk
        (
            "-blockdev file,filename=x,node-name=d,aio=native -device b,drive=d",
            "-blockdev qcow2,node-name=d,file.driver=file,file.filename=/o,file.aio=native "
            "-device b,drive=d",
        ),
        # a filter above stays, the file and the explicit backing chain go
        (
            "-blockdev file,filename=x,node-name=f -blockdev file,filename=b,node-name=g "
            "-blockdev qcow2,file=g,node-name=base,read-only=on "
            "-blockdev qcow2,file=f,backing=base,node-name=d,l2-cache-size=1 "
            "-blockdev copy-on-read,file=d,node-name=c -device b,drive=c,serial=f",
            "-blockdev qcow2,node-name=d,file.driver=file,file.filename=/o,l2-cache-size=1 "
            "-blockdev copy-on-read,file=d,node-name=c -device b,drive=c,serial=f",
        ),
        # another disk is only read: down to its file
        (
            "-blockdev qcow2,file.driver=file,file.filename=x,node-name=d -device b,drive=d "
            "-blockdev file,filename=i,node-name=f "
            "-blockdev raw,file=f,node-name=iso,read-only=on -device ide-cd,drive=iso",
            "-blockdev qcow2,node-name=d,file.driver=file,file.filename=/o -device b,drive=d "
            "-blockdev file,filename=/was/here/i,node-name=f,read-only=on "
            "-blockdev raw,file=f,node-name=iso,read-only=on -device ide-cd,drive=iso",
        ),
        # pflash by node name, the code beside it
        (
            "-blockdev file,filename=/c,node-name=code,read-only=on "
            "-blockdev file,filename=v,node-name=d -machine q35,pflash0=code,pflash1=d",
            "-machine q35,pflash0=code,pflash1=d "
            "-blockdev file,filename=/c,node-name=code,read-only=on "
            "-blockdev qcow2,node-name=d,file.driver=file,file.filename=/o",
        ),
    ],
)
def test_relocate_disks_of_graphs(text, new):
    assert words(text, disks={"d": Path("/o")}) == new.split()


def test_relocate_seals_a_cdrom_that_was_opened_for_writing():
    found = moved("-blockdev file,filename=i,node-name=f -device ide-cd,drive=f")
    assert found.cmdline.all("blockdev")[0].value == (
        "file,filename=/was/here/i,node-name=f,read-only=on"
    )
    assert "node f: opened read-only" in found.notices[0]


@pytest.mark.parametrize(
    ("key", "text", "new"),
    [
        (
            "a",
            "-drive file=x,format=raw,id=a,if=none,cache=none,snapshot=on,throttling.iops-total=5",
            "file=/o,id=a,if=none,cache=none,throttling.iops-total=5,format=qcow2",
        ),
        ("drive:1", "-m 1 -hdb x", "index=1,media=disk,file=/o,format=qcow2"),
        ("drive:0", "-pflash x", "if=pflash,file=/o,format=qcow2"),
        ("drive:0", "-drive file=x,if=pflash,format=raw,unit=1", "file=/o,if=pflash,unit=1"),
        (
            "a",
            "-drive if=none,id=a -set drive.a.file=x -set drive.a.size=1",
            "if=none,id=a,file=/o,format=qcow2",
        ),
    ],
)
def test_relocate_disks_of_drive(key, text, new):
    found = moved(text, disks={key: Path("/o")})
    (drive,) = found.cmdline.all("drive")
    fields = dict(pair.split("=") for pair in (drive.value or "").split(","))
    assert fields == {"format": "qcow2"} | dict(pair.split("=") for pair in new.split(","))
    assert not found.cmdline.has("set")


def test_relocate_disk_that_nothing_takes_is_blocked():
    with pytest.raises(Blocked, match="disk d9"):
        moved("-m 1", disks={"d9": Path("/o")})


def test_relocate_agent_is_told_where_it_is():
    argv = CAPTURED["agent"][1:]
    found = moved(argv)
    assert found.agent == INTO / "qga.sock"
    assert found.moved == {"/was/here/qga.sock": "/new/qga.sock"}
    chosen = moved(argv, agent=Path("/run/a.sock"))
    assert chosen.agent == Path("/run/a.sock")
    assert chosen.moved == {"/was/here/qga.sock": "/run/a.sock"}
    assert moved("-m 1").agent is None


def test_relocate_tells_every_change():
    noted = "\n".join(moved("-serial stdio -netdev socket,id=n,listen=:1 -gdb tcp::1").notices)
    assert all(word in noted for word in ("serial0.log", "netdev n", "-gdb tcp::1"))


def test_relocate_leaves_our_own_paths_alone():
    assert words("-serial file:q.sock") == ["-serial", "file:/new/q.sock.1"]


def test_relocate_twice_shares_nothing_either():
    first = moved(CAPTURED["agent"][1:]).cmdline
    again = relocate(
        first, cwd=INTO, into=Path("/newer"), machine_type=None, disks={}, incoming=False,
        paused=False, qmp=Path("/newer/q.sock"), agent=None,
    )  # fmt: skip
    assert "/new/" not in " ".join(again.cmdline.argv())


def test_relocate_a_wrong_set_is_refused():
    with pytest.raises(UsageError, match="-set"):
        moved("-set drive.a.file=x")


def test_relocate_has_a_rule_for_every_option_we_know_to_be_a_flag():
    from qmpsnap.hypervisor.machine.cmdline import FLAGS

    assert set() == FLAGS - RULES.keys()
