"""The floor of the benchmarks: the same steps as the engine's, as a bare blocking QMP script.

No journal, no watchdog, no checks, no compression: what QEMU itself takes.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNLIMITED = 1 << 40
OVERLAY_CACHE = {"direct": False, "no-flush": False}


class Qmp:
    """A blocking QMP client that keeps the events."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, fd: int | None = None, **arguments: object) -> Any:
        wire = {key.replace("_", "-"): value for key, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": wire}).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd else []
        self._socket.sendmsg([message], rights)
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def event(self, name: str, **data: object) -> dict[str, Any]:
        """Wait for an event that has not been waited for yet."""
        while True:
            for index, one in enumerate(self.events):
                if one["event"] == name and data.items() <= one.get("data", {}).items():
                    return self.events.pop(index)
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise ConnectionError("QEMU has gone")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def status(self) -> str:
        return str(self("query-migrate").get("status"))

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@contextlib.contextmanager
def session(path: Path, capabilities: set[str]) -> Iterator[Qmp]:
    qmp = Qmp(path)
    wanted = {*capabilities, "events"}
    on = [{"capability": name, "state": True} for name in sorted(wanted)]
    off = [{"capability": name, "state": False} for name in sorted(wanted)]
    qmp("migrate-set-capabilities", capabilities=on)
    qmp("migrate-set-parameters", max_bandwidth=UNLIMITED, downtime_limit=20)
    try:
        yield qmp
    finally:
        qmp("migrate-set-capabilities", capabilities=off)
        qmp("migrate-set-parameters", max_bandwidth=128 << 20, downtime_limit=300)
        qmp.close()


def overlays(qmp: Qmp, folder: Path, nodes: dict[str, Path], size: int) -> list[dict[str, Any]]:
    """Make and open an overlay a node; the actions of the transaction."""
    actions = []
    for node, path in nodes.items():
        file = folder / f"bare-{node}.qcow2"
        file.unlink(missing_ok=True)
        subprocess.run(
            ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", path, file,
             str(size)], check=True,
        )  # fmt: skip
        child = {"driver": "file", "filename": str(file)}
        qmp("blockdev-add", driver="qcow2", node_name=f"o-{node}", backing=None, file=child)
        data = {"node": node, "overlay": f"o-{node}"}
        actions.append({"type": "blockdev-snapshot", "data": data})
    return actions


def fold(qmp: Qmp, nodes: dict[str, Path]) -> None:
    """Put the overlays back, so that the next run finds what this one found."""
    for node in nodes:
        qmp("block-commit", job_id="f", device=f"o-{node}", base_node=node, auto_dismiss=False)
        qmp.event("BLOCK_JOB_READY")
        qmp("job-complete", id="f")
        qmp.event("JOB_STATUS_CHANGE", status="concluded", id="f")
        qmp("job-dismiss", id="f")
        qmp("blockdev-del", node_name=f"o-{node}")


def pause(mode: str, path: Path, folder: Path, nodes: dict[str, Path], size: int) -> float:
    """Take RAM and disks once in *mode*; STOP to RESUME in milliseconds, by QEMU's clock."""
    capability = {"live": "pause-before-switchover", "background": "background-snapshot"}
    target = folder / "bare-stream"
    target.unlink(missing_ok=True)
    with session(path, {capability[mode]} if mode in capability else set()) as qmp:
        file_uri = "mapped-ram" in {one["capability"] for one in qmp("query-migrate-capabilities")}
        actions = overlays(qmp, folder, nodes, size)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
        os.posix_fallocate(fd, 0, 1 << 20)
        if file_uri:
            number = qmp("add-fd", fd=fd)["fdset-id"]
            uri = f"file:/dev/fdset/{number}"
        else:
            qmp("getfd", fd=fd, fdname="bare")
            uri = "fd:bare"
        qmp.events.clear()
        if mode == "live":
            qmp("migrate", uri=uri)
            while qmp.status() != "pre-switchover":
                qmp.event("MIGRATION")
            qmp("transaction", actions=actions)
            qmp("migrate-continue", state="pre-switchover")
        else:
            qmp("stop")
            qmp("transaction", actions=actions)
            qmp("migrate", uri=uri)
        if mode == "background":
            armed = False
            while not armed:
                ram = qmp("query-migrate").get("ram", {})
                armed = ram.get("normal", 0) + ram.get("duplicate", 0) > 0
            if qmp("query-status")["status"] == "paused":
                qmp("cont")
        while qmp.status() != "completed":
            pass
        while qmp("query-status")["status"] != "running":
            with contextlib.suppress(RuntimeError):
                qmp("cont")
        took = held(qmp)
        if file_uri:
            qmp("remove-fd", fdset_id=number)
        fold(qmp, nodes)
    os.close(fd)
    target.unlink()
    return took


def held(qmp: Qmp) -> float:
    stops = [at(one) for one in qmp.events if one["event"] == "STOP"]
    resumes = [at(one) for one in qmp.events if one["event"] == "RESUME"]
    return (resumes[-1] - stops[0]) * 1000


def at(event: dict[str, Any]) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def snapshot_save(path: Path, nodes: dict[str, Path]) -> float:
    """QEMU's own internal snapshot; its pause in milliseconds."""
    qmp = Qmp(path)
    first = next(iter(nodes))
    qmp("snapshot-save", job_id="s", tag="bench", vmstate=first, devices=list(nodes))
    while not any(
        one["event"] == "JOB_STATUS_CHANGE" and one["data"]["status"] == "concluded"
        for one in qmp.events
    ):
        qmp("query-status")
    took = held(qmp)
    qmp("job-dismiss", id="s")
    qmp.events.clear()
    qmp("snapshot-delete", job_id="d", tag="bench", devices=list(nodes))
    qmp.event("JOB_STATUS_CHANGE", status="concluded", id="d")
    qmp("job-dismiss", id="d")
    qmp.close()
    return took


def backup(
    path: Path, node: str, target: Path, size: int, beneath: Path | None = None
) -> tuple[float, float]:
    """Copy *node* by blockdev-backup into the new qcow2 *target*.

    With *beneath*, a qcow2, only what the bitmap `bare` says. Seconds until the job has ended, and
    until the copy is on the disk.
    """
    begun = time.monotonic()
    over = ["-u", "-F", "qcow2", "-b", beneath] if beneath else []
    create = ["qemu-img", "create", "-q", "-f", "qcow2", *over, target, str(size)]
    subprocess.run(create, check=True)
    qmp = Qmp(path)
    file = {"driver": "file", "filename": str(target)}
    qmp("blockdev-add", driver="qcow2", node_name="bare-copy", backing=None, file=file)
    which = {"sync": "incremental", "bitmap": "bare"} if beneath else {"sync": "full"}
    job = {"job_id": "bare", "device": node, "target": "bare-copy", "auto_dismiss": False}
    qmp("blockdev-backup", **job, **which)
    qmp.event("JOB_STATUS_CHANGE", status="concluded", id="bare")
    copied = time.monotonic() - begun
    assert not any("error" in one for one in qmp("query-jobs"))
    qmp("job-dismiss", id="bare")
    qmp("blockdev-del", node_name="bare-copy")
    qmp.close()
    synced(target)
    return copied, time.monotonic() - begun


def synced(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
