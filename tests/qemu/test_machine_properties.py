from qmpsnap.hypervisor.machine.properties import Properties
from qmpsnap.hypervisor.monitor import connect
from tests.rig.qemu import running

Q35 = [
    "-machine", "q35", "-m", "64,slots=2,maxmem=1G", "-nodefaults",
    "-object", "memory-backend-ram,id=mem1,size=64M", "-device", "pc-dimm,id=dimm,memdev=mem1",
    "-object", "iothread,id=io0", "-netdev", "user,id=net0",
    "-device", "virtio-net-pci,id=nic,netdev=net0,mac=52:54:00:12:34:99,mq=on,romfile=,addr=6.1,"
    "multifunction=on",
    "-device", "virtio-rng-pci,id=rng,max-bytes=100,period=7",
    "-blockdev", "null-co,node-name=n0,size=1048576",
    "-device", "virtio-blk-pci,id=disk,drive=n0,iothread=io0,serial=seven,discard=off,bootindex=3",
    "-device", "virtio-serial-pci,id=vs,max_ports=4", "-chardev", "null,id=c0",
    "-device", "virtserialport,chardev=c0,id=port,bus=vs.0,nr=2,name=org.example",
]  # fmt: skip


async def test_properties_that_differ_are_those_that_were_given(qemu):
    async with running(qemu, *Q35) as vm, connect(vm.qmp) as monitor:
        asking = Properties(monitor)
        kinds = {
            "nic": "virtio-net-pci", "rng": "virtio-rng-pci", "disk": "virtio-blk-pci",
            "vs": "virtio-serial-pci", "port": "virtserialport", "dimm": "pc-dimm",
        }  # fmt: skip
        found = {
            name: await asking.changed(f"/machine/peripheral/{name}", kind)
            for name, kind in kinds.items()
        }
        cpus = await monitor.execute("query-cpus-fast")
        assert await asking.changed(cpus[0]["qom-path"], "qemu64-x86_64-cpu") == {}
        assert await asking.changed("/machine/peripheral/nic", "no-such-type") == {}
    nic = found["nic"]
    assert nic["netdev"] == "net0"
    assert nic["mac"] == "52:54:00:12:34:99"
    assert (nic["addr"], nic["multifunction"], nic["romfile"], nic["mq"]) == ("6.1", True, "", True)
    assert "bootindex" not in nic
    assert "virtio-backend" not in nic
    assert (found["rng"]["max-bytes"], found["rng"]["period"]) == (100, 7)
    assert "rng" not in found["rng"]  # a back end that it made for itself is none of the user's
    disk = found["disk"]
    assert (disk["drive"], disk["iothread"], disk["serial"]) == ("n0", "io0", "seven")
    assert (disk["discard"], disk["bootindex"]) == (False, 3)
    assert found["vs"]["max_ports"] == 4
    assert found["port"] == {"chardev": "c0", "name": "org.example", "nr": 2}
    assert found["dimm"] == {"addr": 4 << 30, "memdev": "mem1", "slot": 0}


async def test_a_device_plugged_with_what_was_told_is_the_same_again(qemu):
    async with running(qemu, *Q35) as vm, connect(vm.qmp) as monitor:
        path, kind = "/machine/peripheral/rng", "virtio-rng-pci"
        before = await Properties(monitor).changed(path, kind)
    at = Q35.index("virtio-rng-pci,id=rng,max-bytes=100,period=7")
    said = [f"{key}={_word(value)}" for key, value in before.items()]
    again = [*Q35[:at], ",".join([kind, "id=rng", *said]), *Q35[at + 1 :]]
    async with running(qemu, *again) as vm, connect(vm.qmp) as monitor:
        assert await Properties(monitor).changed(path, kind) == before


def _word(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
