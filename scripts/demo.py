"""The main job, shown: a running guest, a paired snapshot of it, and the guest back from it."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
KERNEL = (
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=on "
    "init_on_alloc=0 cryptomgr.notests acpi=noirq "
    "initcall_blacklist=init_kprobe_trace,load_system_certificate_list"
)
CONFIG = """\
local = "{folder}/local"
store = "{folder}/store"
allow_local_store = true

[vm.web]
socket = "{folder}/qmp.sock"
agent_socket = "{folder}/agent.sock"
"""
BOLD, PLAIN = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
WITHIN = 90.0  # seconds that anything may take


class Wrong(Exception):
    """The guest is not what it should be."""


class Console:
    """The guest's serial port: what its witness says, and its shell.

    It is read all the while: a guest that is taken while nobody takes its console's output would
    wait for that for ever after a restore.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self._socket.makefile("rb") as file, contextlib.suppress(OSError):
            for line in file:
                self._lines.put(line.decode(errors="replace"))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # QEMU may have gone first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def forget(self) -> None:
        """What was said until now is of no interest."""
        while not self._lines.empty():
            self._lines.get()

    def find(self, pattern: str) -> re.Match[str]:
        """The first line from here on that *pattern* is found in."""
        try:
            while not (found := re.search(pattern, self._lines.get(timeout=WITHIN))):
                pass
        except queue.Empty:
            raise Wrong("the guest's console is silent") from None
        return found

    def counter(self, beyond: int = -1) -> tuple[str, int]:
        """Nonce and counter of the next word of the witness past *beyond*."""
        while True:
            found = self.find(r"W ([0-9a-f]{16}) (\d+)")
            if int(found[2]) > beyond:
                return found[1], int(found[2])

    def ask(self, command: str, answer: str) -> re.Match[str]:
        self._socket.sendall(f"{command}\n".encode())
        return self.find(answer)


def step(text: str) -> None:
    print(f"\n{BOLD}== {text}{PLAIN}", flush=True)


def tell(name: str, value: object) -> None:
    print(f"   {name:<44} {value}", flush=True)


def run(folder: Path, *words: str) -> None:
    """Run a command of ours in *folder* as a user would, shown with what it says."""
    print(f"{BOLD}$ {shlex.join(words)}{PLAIN}", flush=True)
    surroundings = {
        "QMPSNAP_CONFIG": str(folder / "qmpsnap.toml"),
        "QMPSNAP_RUNTIME_DIR": str(folder / "run"),
    }
    subprocess.run(words, cwd=folder, env=os.environ | surroundings, check=True)


@contextmanager
def guest(folder: Path) -> Iterator[None]:
    """A QEMU as anybody would start it: two disks, an agent, a QMP socket."""
    subprocess.run([TOP / "images/disk", folder / "d0.qcow2", "qcow2", "64M", "data"], check=True)
    subprocess.run([TOP / "images/disk", folder / "d1.raw", "raw", "64M", "data"], check=True)
    words = [
        *("qemu-system-x86_64", "-M", "pc", "-m", "128", "-nodefaults", "-display", "none"),
        *("-accel", "tcg", "-name", "web", "-append", KERNEL),
        *("-kernel", str(TOP / "build/guest/vmlinuz")),
        *("-initrd", str(TOP / "build/guest/initrd.img")),
        *("-qmp", f"unix:{folder}/qmp.sock,server=on,wait=off"),
        *("-serial", f"unix:{folder}/console.sock,server=on,wait=off"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={folder}/agent.sock,server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
        *("-blockdev", f"qcow2,node-name=d0,file.driver=file,file.filename={folder}/d0.qcow2"),
        *("-device", "virtio-blk-pci,drive=d0,id=vd0"),
        *("-blockdev", f"raw,node-name=d1,file.driver=file,file.filename={folder}/d1.raw"),
        *("-device", "virtio-blk-pci,drive=d1,id=vd1"),
    ]
    # a demo that is killed takes its guest along
    process = subprocess.Popen(["setpriv", "--pdeathsig=KILL", *words], cwd=folder)
    try:
        end = time.monotonic() + WITHIN
        sockets = [folder / f"{name}.sock" for name in ("qmp", "console", "agent")]
        while not all(path.exists() for path in sockets):
            if process.poll() is not None or time.monotonic() > end:
                raise Wrong("QEMU did not start")
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def console(folder: Path) -> Iterator[Console]:
    one = Console(folder / "console.sock")
    try:
        yield one
    finally:
        one.close()


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """No process whose command line names *folder* is left: the restored guest was detached."""
    try:
        yield
    finally:
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                named = str(folder).encode() in (entry / "cmdline").read_bytes()
                if named and int(entry.name) not in {os.getpid(), os.getppid()}:
                    os.kill(int(entry.name), signal.SIGKILL)


def on_disk(image: Path, format: str) -> tuple[str, int]:
    """What an image holds: nonce and counter, read on the host without the guest."""
    raw = image.with_suffix(".look")
    subprocess.run(["qemu-img", "convert", "-U", "-f", format, "-O", "raw", image, raw], check=True)
    # the file may so far stand in the journal only
    subprocess.run(["/usr/sbin/e2fsck", "-p", "-E", "journal_only", raw], stdout=subprocess.DEVNULL)
    command = ["/usr/sbin/debugfs", "-R", "cat /witness", str(raw)]
    text = subprocess.run(command, capture_output=True, check=True).stdout
    raw.unlink()
    found = re.match(rb"W ([0-9a-f]{16}) (\d{20})", text)
    if found is None:
        raise Wrong(f"{image} holds no record of the witness")
    return found[1].decode(), int(found[2])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def show(folder: Path) -> None:
    (folder / "store").mkdir()
    (folder / "qmpsnap.toml").write_text(CONFIG.format(folder=folder))
    step("A guest boots: 128 MiB, a qcow2 and a raw disk, started with -qmp unix:...")
    with guest(folder), console(folder) as here:
        here.find("READY")
        here.ask("busy ram=24 rate=20 disk=512; echo busy-$status", "busy-")
        print(
            "   Its witness counts in RAM and on both disks; a load keeps dirtying RAM and disks."
        )
        nonce, before = here.counter(beyond=100)
        tell("counter before the snapshot", before)

        step("A paired snapshot: disks here, RAM and configuration on the store, one ID")
        print("   THIS IS A TRIAL: the store is a folder of this machine (allow_local_store);")
        print("   in earnest it is an NFS mount, and anything else is refused.")
        run(folder, "qmpsnap", "create", "web", "--max-pause", "2s", "--note", "a trial")
        half = next((folder / "local/web").glob("*/storage.json")).parent
        disk0, disk1 = on_disk(half / "vd0.qcow2", "qcow2"), on_disk(half / "vd1.raw", "raw")
        tell("counter at the snapshot, on the copied disks", f"{disk0[1]} and {disk1[1]}")
        _, after = here.counter(beyond=disk0[1] + 100)
        tell("counter after it: the guest runs on", after)

        step("Later the disks have changed: a revision under the same ID, the store untouched")
        sealed = tree(folder / "store")
        run(folder, "qmpsnap", "refresh", "web", "--max-pause", "2s")
        if tree(folder / "store") != sealed:
            raise Wrong("the refresh changed the store")
        run(folder, "qmpsnap", "list")
        run(folder, "qmpsnap", "show", "web")

        step("Back to that instant, beside the guest that still runs")
        run(folder, "qmpsnap", "restore", "web", "--to", "back", "--detach")
        with console(folder / "back") as there:
            found, restored = there.counter()
            tell("the restored guest's first word", restored)
            verdict = there.ask("witness-check", r"(OK|BAD) nonce=.*")
            tell("its RAM and its disks", verdict[0].strip())
            _, going = there.counter(beyond=restored + 20)
            tell("it goes on", going)
        here.forget()
        tell("the first guest meanwhile", here.counter()[1])
        if not (before <= disk0[1] and restored >= disk0[1] and disk0[1] - disk1[1] in {0, 1}):
            raise Wrong("the counters are out of order")
        if verdict[1] != "OK" or {found, disk0[0], disk1[0]} != {nonce}:
            raise Wrong("RAM and disks are not of one instant")
    step("RAM and disks were of one instant. Nothing of this is left.")


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with nothing_left(folder):
            show(folder)
    except KeyboardInterrupt:
        return 130
    except (Wrong, OSError, subprocess.CalledProcessError) as failed:
        print(f"demo: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
