"""Takes down what real QEMUs answer: `python -m tests.fuzz.record` writes `recorded.json`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qmpsnap.engine import survey
from qmpsnap.engine.machine import Machine
from qmpsnap.errors import CommandRefused, SnapError
from qmpsnap.hypervisor.block import job
from qmpsnap.hypervisor.machine import figures
from qmpsnap.hypervisor.machine.usb import Ports
from qmpsnap.hypervisor.monitor import Monitor, connect
from tests.rig.qemu import VERSIONS, binary, running

FILE = Path(__file__).with_name("recorded.json")
_MOST = 8
"""Entries of a list that are kept: one of each kind is enough."""
_LINE = (
    "-machine", "q35", "-m", "size=64M,slots=2,maxmem=1G", "-smp", "1,maxcpus=2", "-nodefaults",
    "-object", "memory-backend-ram,id=m0,size=64M", "-machine", "memory-backend=m0",
    "-object", "iothread,id=io0", "-object", "throttle-group,id=t0,x-iops-total=100",
    "-object", "secret,id=s0,data=x", "-blockdev", "file,filename=b.qcow2,node-name=f1",
    "-blockdev", "qcow2,node-name=d1,file=f1,detect-zeroes=on",
    "-blockdev", "throttle,throttle-group=t0,node-name=l1,file=d1",
    "-device", "virtio-blk-pci,id=vda,drive=l1,iothread=io0",
    "-drive", "file=a.raw,format=raw,if=virtio,id=vdb,iops=50", "-drive", "if=ide,media=cdrom",
    "-netdev", "user,id=n0", "-device", "e1000,netdev=n0,id=nic0", "-device", "nec-usb-xhci,id=x",
    "-device", "usb-tablet,bus=x.0", "-device", "virtio-balloon-pci", "-serial", "null",
    "-device", "pcie-root-port,id=rp,chassis=1",
)  # fmt: skip


class _Listening:
    """Notes each answer on its way, by the command and what it was given."""

    def __init__(self, monitor: Monitor) -> None:
        self.told: dict[str, Any] = {}
        self._execute, self._monitor = monitor.execute, monitor
        monitor.execute = self.execute  # type: ignore[method-assign]

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        try:
            answer = await self._execute(command, arguments)
        except CommandRefused as refused:
            self.told[called(command, arguments)] = {"$refused": refused.desc}
            raise
        self.told[called(command, arguments)] = _short(answer)
        return answer


def called(command: str, arguments: Mapping[str, object] | None) -> str:
    """What an answer is noted under."""
    return f"{command} {json.dumps(arguments, sort_keys=True)}" if arguments else command


def _short(value: Any) -> Any:
    match value:
        case dict():
            return {key: _short(one) for key, one in value.items()}
        case list():
            return [_short(one) for one in value[:_MOST]]
    return value


def _disks(home: Path) -> None:
    for words in (
        ["create", "-q", "-f", "raw", "a.raw", "1M"],
        ["create", "-q", "-f", "qcow2", "b.qcow2", "1M"],
        ["bitmap", "--add", "b.qcow2", "old"],
    ):
        subprocess.run(["qemu-img", *words], cwd=home, check=True)


async def recorded(version: str) -> dict[str, Any]:
    """What QEMU *version* answers to all that a survey and its details ask."""
    with tempfile.TemporaryDirectory(prefix="q", dir="/var/tmp") as name:
        home = Path(name)
        await asyncio.to_thread(_disks, home)
        async with running(binary(version), *_LINE, directory=home) as qemu:
            async with connect(qemu.qmp) as monitor:
                await monitor.execute(
                    "device_add", {"driver": "virtio-rng-pci", "id": "r", "bus": "rp"}
                )
                heard = _Listening(monitor)
                facts = await survey.take(monitor, Machine("vm", qemu.qmp), home / "layers")
                await survey.detailed(monitor, facts)
                await figures.query(monitor)
                with suppress(SnapError):
                    await Ports(monitor, facts.inventory).of((facts.inventory.devices or [])[0])
                await monitor.execute(
                    "blockdev-add", {"driver": "null-co", "node-name": "n", "size": 1 << 20}
                )
                await monitor.execute(
                    "blockdev-backup",
                    {
                        "device": "d1",
                        "target": "n",
                        "sync": "full",
                        "job-id": "j",
                        "auto-dismiss": False,
                    },
                )
                await job.query(monitor)
                await monitor.execute("query-fdsets")
            text = json.dumps(heard.told).replace(name, "/vm")  # whatever the folder was
            told: dict[str, Any] = json.loads(text)
            return told


def main() -> None:
    """Write the file, the answers of each version in it."""
    found = {version: asyncio.run(recorded(version)) for version in VERSIONS}
    FILE.write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
