"""The test guest of images/ as a running machine: two data disks, console, agent, heartbeat."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qmpsnap import Engine
from qmpsnap.engine.restore import Restoration, Restored
from tests.rig.console import Console, Witness
from tests.rig.qemu import ROOT, Running, running

GUEST = ROOT / "build/guest"
_APPEND = (
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off "
    "random.trust_cpu=on init_on_alloc=0 cryptomgr.notests "
    "initcall_blacklist=init_kprobe_trace,load_system_certificate_list"
)


@functools.cache
def built() -> Path:
    """The folder of kernel and initrd; a second build of the same recipe costs nothing."""
    subprocess.run([ROOT / "images/build"], check=True, stdout=subprocess.DEVNULL)
    return GUEST


def disk(path: Path, format: str = "qcow2", size: str = "64M", label: str = "data") -> Path:
    """A new image with a fresh ext4."""
    subprocess.run([ROOT / "images/disk", path, format, size, label], check=True)
    return path


def blockdev(path: Path, node: str, format: str, *, device: str) -> list[str]:
    """A disk as -blockdev users have it."""
    return [
        *("-blockdev", f"driver={format},node-name={node},file.driver=file,file.filename={path}"),
        *("-device", f"virtio-blk-pci,drive={node},id={device}"),
    ]


@dataclass(frozen=True, slots=True)
class Guest:
    """A booted guest. `qemu.witness` is a second monitor, which the engine knows nothing of."""

    qemu: Running
    console: Console
    dir: Path
    agent: Path
    heartbeat: Path
    disks: list[Path] = field(default_factory=list)

    @property
    def qmp(self) -> Path:
        return self.qemu.qmp


def machine_options(
    dir: Path, *, memory: int = 128, machine: str = "pc", also: str = "", cpus: int = 1
) -> list[str]:
    """Everything but disks; the sockets lie in *dir*, *also* names sets of drivers."""
    folder = built()
    # hides the other CPUs, and whatever is plugged
    append = _APPEND if cpus > 1 else f"{_APPEND} acpi=noirq"
    return [
        *("-M", machine, "-m", str(memory), "-nodefaults", "-accel", "tcg"),
        *("-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd.img")),
        *("-smp", str(cpus), "-append", f"{append} also={also}" if also else append),
        *("-chardev", f"socket,id=console,path={dir}/console.sock,server=on,wait=off"),
        *("-serial", "chardev:console", "-device", "virtio-serial-pci,id=vser"),
        *("-chardev", f"socket,id=agent,path={dir}/agent.sock,server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0,id=port-agent"),
        *("-chardev", f"socket,id=beat,path={dir}/beat.sock,server=on,wait=off"),
        *("-device", "virtserialport,chardev=beat,name=org.qmpsnap.heartbeat,id=port-beat"),
    ]


@contextlib.asynccontextmanager
async def booted(
    qemu: Path,
    dir: Path,
    *,
    disks: Sequence[str] | None = None,
    memory: int = 128,
    machine: str = "pc",
    also: str = "",
    cpus: int = 1,
    extra: Sequence[str] = (),
) -> AsyncIterator[Guest]:
    """A guest whose witness runs, on *qemu*, with its sockets and images in *dir*.

    Without *disks* (options) it has two: `d0`, a qcow2, and `d1`, raw, as devices vd0 and vd1.
    """
    images: list[Path] = []
    if disks is None:
        images = [disk(dir / "d0.qcow2"), disk(dir / "d1.raw", "raw")]
        disks = [
            *blockdev(images[0], "d0", "qcow2", device="vd0"),
            *blockdev(images[1], "d1", "raw", device="vd1"),
        ]
    options = [
        *machine_options(dir, memory=memory, machine=machine, also=also, cpus=cpus),
        *disks,
        *extra,
    ]
    async with (
        running(qemu, *options, directory=dir) as process,
        Console.open(dir / "console.sock") as console,
    ):
        await console.until("READY", within=120)
        await console.witness(within=60)
        yield Guest(process, console, dir, dir / "agent.sock", dir / "beat.sock", images)


@contextlib.asynccontextmanager
async def back(
    engine: Engine, vm: str, wish: Restoration, word: str = "latest"
) -> AsyncIterator[tuple[Restored, Console]]:
    """The machine of a snapshot, brought back for the block, and its console."""
    ready = await engine.prepare_restore(vm, wish, word)
    async with (
        engine.restored(ready) as restored,
        Console.open(wish.to / "console.sock") as console,
    ):
        yield restored, console


async def agrees(
    engine: Engine, vm: str, wish: Restoration, before: Witness, word: str = "latest"
) -> Witness:
    """Restore, and ask the witness inside: RAM and disks are of one instant, *before* or later."""
    async with back(engine, vm, wish, word) as (_, console):
        found = await console.witness(within=60)
        # it must still hold after the witness has gone its rounds: a lost write shows there
        await console.run("sleep 0.3", within=30)
        again = await console.witness(within=60)
    assert found.ok, f"{vm} {word}: {found}"
    assert again.ok, f"{vm} {word}: {again}"
    assert again.ram > found.ram >= before.ram
    assert again.nonce == before.nonce
    assert console.alarms == []
    return found
