import pytest

from qmpsnap.hypervisor.machine.changes import changes, name_of
from qmpsnap.hypervisor.machine.cmdline import parse
from qmpsnap.hypervisor.machine.drives import slots
from qmpsnap.hypervisor.machine.inventory import take
from qmpsnap.hypervisor.monitor import connect
from tests.rig.qemu import VERSIONS, binary, running


@pytest.fixture(params=VERSIONS)
def qemu(request):
    return binary(request.param)


UUID = "11111111-2222-3333-4444-555555555555"
PC = [
    "-machine", "pc", "-S", "-m", "64", "-smp", "2", "-name", "web", "-uuid", UUID,
    "-object", "iothread,id=io0", "-device", "virtio-rng-pci,id=rng0,addr=0x7",
    "-device", "pci-bridge,chassis_nr=1,id=br0", "-device", "virtio-rng-pci,bus=br0,addr=3",
    "-device", "virtio-serial-pci,id=vs", "-device", "virtserialport,chardev=c0",
    "-chardev", "null,id=c0",
]  # fmt: skip


async def test_inventory_of_a_pc(qemu):
    async with running(qemu, *PC) as vm, connect(vm.qmp) as monitor:
        found = await take(monitor)
        assert found.missing == []
        assert found.machine.startswith("pc-i440fx-")
        assert found.machine.removeprefix("pc-i440fx-") in found.version.qemu
        assert (found.status, found.accelerator) == ("prelaunch", "tcg")
        assert (found.uuid, found.name) == (UUID, "web")
        assert [cpu.cpu_index for cpu in found.cpus] == [0, 1]
        assert found.cpu_type == "qemu64-x86_64-cpu"
        assert found.memory.base_memory == 64 << 20
        assert [(one.id, one.size) for one in found.memory_backends] == [("pc.ram", 64 << 20)]
        named = {one.id: one for one in found.devices if one.id}
        assert named.keys() == {"rng0", "br0", "vs"}
        assert (named["rng0"].bus, named["rng0"].addr) == ("pci.0", "7.0")
        assert not any(one.hotplugged for one in found.devices)
        anonymous = {one.type: one for one in found.devices if not one.id}
        assert (anonymous["virtio-rng-pci"].bus, anonymous["virtio-rng-pci"].addr) == ("br0", "3.0")
        by_id = {one.qdev_id: one for one in found.pci if one.qdev_id}
        assert (by_id["rng0"].slot, by_id["rng0"].function) == (7, 0)
        behind = [one for one in found.pci if one.bus and one.slot == 3]
        assert [one.vendor for one in behind] in ([0x1AF4], [])  # no firmware has numbered the bus
        assert {"c0", "rig-qmp"} <= {one.label for one in found.chardevs}
        assert [one.id for one in found.iothreads] == ["io0"]


async def test_inventory_of_no_machine(qemu):
    async with running(qemu) as vm, connect(vm.qmp) as monitor:
        found = await take(monitor)
        assert found.machine == "none"
        assert found.devices == []
        assert not set(found.missing) - {"query-pci"}


async def test_inventory_sees_what_came_and_went(qemu):
    argv = [*PC, "-device", "usb-ehci,id=ehci", "-device", "usb-tablet,id=tablet"]
    async with running(qemu, *argv) as vm, connect(vm.qmp) as monitor:
        line = parse(vm.argv)
        before = await take(monitor)
        assert not changes(before, line)
        await monitor.execute("device_add", {"driver": "virtio-rng-pci", "id": "late"})
        with monitor.listen("DEVICE_DELETED") as events:
            await monitor.execute("device_del", {"id": "tablet"})
            assert (await events.next()).data["device"] == "tablet"
        after = await take(monitor)
        found = changes(after, line)
        assert [name_of(line.options[index]) for index in found.gone] == ["tablet"]
        (late,) = found.plugged
        assert (late.type, late.bus) == ("virtio-rng-pci", "pci.0")


@pytest.mark.parametrize("machine", ["pc", "q35"])
async def test_options_drives_are_called_as_qemu_calls_them(qemu, tmp_path, machine):
    image = tmp_path / "x.img"
    image.touch()
    shared = f"format=raw,readonly=on,file={image}"
    argv = [
        "-machine", machine, "-S", "-drive", f"if=virtio,{shared}",
        "-drive", f"if=virtio,index=3,{shared}", "-cdrom", str(image),
        "-drive", f"if=none,{shared}", "-drive", f"if=none,{shared}",
        "-drive", f"if=none,id=mine,{shared}",
        "-drive", f"media=cdrom,{shared}", "-drive", f"media=cdrom,index=3,{shared}",
        "-drive", f"if=pflash,{shared}",
    ]  # fmt: skip
    image.write_bytes(bytes(1 << 20))
    async with running(qemu, *argv) as vm, connect(vm.qmp) as monitor:
        blocks = await monitor.execute("query-block")
        with_media = {one["device"] for one in blocks if "inserted" in one}
    assert {slot.backend for slot in slots(parse(vm.argv))} == with_media
