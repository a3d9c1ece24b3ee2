from pathlib import Path

import pytest

from qmpsnap.hypervisor.machine.cmdline import CommandLine, parse
from qmpsnap.hypervisor.machine.mapping import Mapped, mapped, unmapped
from qmpsnap.hypervisor.machine.relocate import relocate
from qmpsnap.hypervisor.machine.sizes import in_bytes

SIZE = 64 << 20
PC = {"pc.ram": (Path("/c/0.pages"), SIZE)}
M0 = {"m0": (Path("/c/0.pages"), SIZE)}
OLD = "readonly=on,rom=off,"


def line(text: str) -> CommandLine:
    return parse(["qemu", *text.split()])


def given(text: str, images: dict[str, tuple[Path, int]], **how: object) -> Mapped:
    return mapped(line(text), images, **{"version": "8.2.1", **how})  # type: ignore[arg-type]


def backend(ident: str, more: str = "", canonical: str = "off", number: int = 0) -> str:
    more = f",{more}" if more else ""
    return (
        f"-object memory-backend-file,id={ident},size={SIZE},mem-path=/c/{number}.pages,share=off,"
        f"readonly=on,rom=off{more},x-use-canonical-path-for-ramblock-id={canonical}"
    )


MAPPED = {
    "-m 64": f"-machine memory-backend=pc.ram -m 64 {backend('pc.ram')}",
    "-m size=64M,slots=2,maxmem=1G": (
        f"-machine memory-backend=pc.ram -m size=64M,slots=2,maxmem=1G {backend('pc.ram')}"
    ),
    "-smp 1": f"-machine memory-backend=pc.ram -smp 1 {backend('pc.ram')}",
    "-M q35,mem-merge=off -m 64M": (
        f"-machine q35,mem-merge=off,memory-backend=pc.ram -m 64M {backend('pc.ram')}"
    ),
    "-M pc -m 64 -mem-path /x -mem-prealloc": (
        f"-machine pc,memory-backend=pc.ram -m 64 {backend('pc.ram', 'prealloc=off')}"
    ),
    "-object memory-backend-ram,id=m0,size=64M -M pc,memory-backend=m0 -m 64": (
        f"{backend('m0')} -M pc,memory-backend=m0 -m 64"
    ),
    # what the host does with it stays, where it came from goes
    "-object memory-backend-file,id=m0,size=0.0625g,mem-path=/x,offset=4k,pmem=on,align=2M,"
    "merge=off,dump=off,host-nodes=0-1,policy=bind,prealloc=on,prealloc-threads=4,reserve=off,"
    "discard-data=on": backend(
        "m0", "align=2M,merge=off,dump=off,host-nodes=0-1,policy=bind,reserve=off"
    ),
    "-object memory-backend-memfd,id=m0,size=64M,share=on,seal=on": backend("m0"),
    "-object memory-backend-shm,id=m0,size=64M,share=on": backend("m0"),
    "-object memory-backend-file,id=m0,size=64M,mem-path=/x,readonly=on": backend("m0").replace(
        "rom=off", "rom=on"
    ),
    "-object memory-backend-file,id=m0,size=64M,mem-path=/x,readonly=on,rom=off": backend("m0"),
    "-device virtio-balloon-pci -object memory-backend-ram,id=m0,size=64M": (
        f"-device virtio-balloon-pci {backend('m0')}"
    ),
}


@pytest.mark.parametrize("text", MAPPED)
def test_mapped(text):
    images = M0 if "id=m0" in text else PC
    found = given(text, images)
    assert found.cmdline == line(MAPPED[text])
    assert (found.blocks, found.left) == ({name: at for name, (at, _) in images.items()}, {})


def test_mapped_before_8_2_has_no_rom():
    assert given("-m 64", PC, version="7.2.22").cmdline == line(
        MAPPED["-m 64"].replace(OLD, "").replace("-m 64M", "-m 64")
    )
    found = given(
        "-object memory-backend-file,id=m0,size=64M,mem-path=/x,readonly=on", M0, version="8.1"
    )
    assert found.cmdline == line(backend("m0").replace("rom=off,", ""))


def test_mapped_json_stays_json():
    argv = [
        "qemu",
        "-object",
        '{"qom-type":"memory-backend-memfd","id":"m0","size":67108864,"host-nodes":[0,1],'
        '"policy":"bind","prealloc":true}',
        "-machine",
        "pc,memory-backend=m0",
    ]
    found = mapped(parse(argv), M0, version="10.0")
    assert found.cmdline.options[0].value == (
        '{"qom-type":"memory-backend-file","id":"m0","size":67108864,"mem-path":"/c/0.pages",'
        '"share":false,"readonly":true,"rom":"off","host-nodes":[0,1],"policy":"bind",'
        '"x-use-canonical-path-for-ramblock-id":false}'
    )
    assert found.notices == ("object m0: without prealloc, its pages come when they are used",)


def test_mapped_numa_nodes_and_modules_each_have_their_own():
    text = (
        "-m 128M,slots=1,maxmem=1G -object memory-backend-ram,id=m0,size=64M "
        "-object memory-backend-memfd,id=m1,size=64M -numa node,memdev=m0 -numa node,memdev=m1 "
        "-object memory-backend-ram,id=d,size=64M -device pc-dimm,memdev=d,id=dimm0"
    )
    images = {name: (Path(f"/c/{n}.pages"), SIZE) for n, name in enumerate(("m0", "m1", "d"))}
    found = given(text, images)
    assert [str(one) for one in found.cmdline.all("object")] == [
        backend("m0"), backend("m1", number=1), backend("d", number=2),
    ]  # fmt: skip
    assert not found.cmdline.has("machine")
    assert not found.left
    assert "other backends" in given(text, PC).left["pc.ram"]


def test_mapped_blocks_of_old_machines_are_called_by_their_path():
    found = given(
        "-M pc-i440fx-3.1,memory-backend=m0 -object memory-backend-file,id=m0,size=64M,mem-path=x",
        {"/objects/m0": M0["m0"]},
    )
    assert str(found.cmdline.options[1]) == backend("m0", canonical="on")
    assert list(found.blocks) == ["/objects/m0"]


LEFT = {
    "-object memory-backend-memfd,id=m0,size=64M,hugetlb=on": "huge pages",
    "-object memory-backend-memfd,id=m0,size=64M,hugetlbsize=2M": "huge pages",
    "-object memory-backend-epc,id=m0,size=64M": "memory-backend-epc",
    "-object memory-backend-ram,id=m0,size=64M,x-odd=1": "x-odd",
    "-object memory-backend-ram,id=m0,size=32M": "33554432 bytes",
    "-object memory-backend-ram,id=m0,size=64M -device ivshmem-plain,memdev=m0,id=i": "device i",
    "-object memory-backend-ram,id=m0,size=64M -device virtio-mem-pci,memdev=m0": "virtio-mem-pci",
    "-object memory-backend-memfd,id=m0,size=64M -device vhost-user-fs-pci,chardev=c": "vhost-user",
    "-object memory-backend-memfd,id=m0,size=64M -netdev vhost-user,chardev=c,id=n": "vhost-user",
    "-object memory-backend-memfd,id=m0,size=64M -device virtio-gpu-pci,blob=on": "virtio-gpu",
    "-object memory-backend-ram,id=m0,size=64M "
    "-device virtio-balloon-pci,free-page-reporting=on": "free pages",
    "-m 64": "a device's own",
}


@pytest.mark.parametrize("text", LEFT)
def test_left_with_a_reason(text):
    images = (
        M0 if "m0" in text else {"0000:00:02.0/qxl.vram": PC["pc.ram"], "vga.vram": PC["pc.ram"]}
    )
    found = given(text, images)
    assert found.cmdline == line(text)
    assert found.left.keys() == images.keys()
    assert all(LEFT[text] in why for why in found.left.values())


def test_left_as_the_snapshot_was_on_huge_pages():
    assert "huge pages" in given("-m 64 -mem-path /huge", PC, huge=["pc.ram"]).left["pc.ram"]
    text = "-object memory-backend-file,id=m0,size=64M,mem-path=/huge"
    assert "huge pages" in given(text, M0, huge=["m0"]).left["m0"]


def test_left_where_the_balloon_could_punch_holes_into_the_image():
    text = "-m 64 -device virtio-balloon-pci,id=b"
    assert "device b" in given(text, PC, version="8.1.5").left["pc.ram"]
    (notice,) = given(text, PC, version="8.2").notices
    assert "device b" in notice


def test_prealloc_of_all_stays_for_what_is_left():
    text = (
        "-mem-prealloc -object memory-backend-memfd,id=m1,size=64M,hugetlb=on "
        "-object memory-backend-ram,id=m0,size=64M"
    )
    found = given(text, M0 | {"m1": M0["m0"]})
    assert found.cmdline.has("mem-prealloc")
    assert str(found.cmdline.options[2]) == backend("m0", "prealloc=off")


def test_a_restore_of_a_mapped_machine_does_not_need_its_image():
    first = given("-M pc,accel=tcg -m 64", PC).cmdline
    again = unmapped(first)
    assert [str(one) for one in again.all("object")] == [
        f"-object memory-backend-ram,id=pc.ram,size={SIZE},x-use-canonical-path-for-ramblock-id=off"
    ]
    assert unmapped(again) == again
    theirs = line("-object memory-backend-file,id=m,size=1M,mem-path=/x/0.pages,share=on")
    assert unmapped(theirs) == theirs
    moved = relocate(
        first, cwd=Path("/"), into=Path("/n"), machine_type=None, disks={}, incoming=False,
        paused=False, qmp=Path("/n/q"),
    )  # fmt: skip
    assert "/c/" not in " ".join(moved.cmdline.argv())
    assert mapped(again, PC, version="8.2").cmdline == mapped(first, PC, version="8.2").cmdline


def test_sizes():
    assert [in_bytes(text) for text in ("64", "1k", "1.5M", "2G", "x", "", None)] == [
        64, 1024, 3 << 19, 2 << 30, None, None, None,
    ]  # fmt: skip
    assert in_bytes("64", bare="m") == SIZE
