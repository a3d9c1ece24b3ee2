"""A kernel of its own for one Python script: the guest's, with this Python and our package."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tests.rig.guest import built
from tests.rig.qemu import ROOT

_INIT = """\
#!/bin/sh
export PATH=/bin:/usr/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t cgroup2 none /sys/fs/cgroup
exec </dev/console >/dev/console 2>&1
/python -I -S -B /script.py; echo "ended with $?"
poweroff -f
"""
_LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "config-*",
    "site-packages", "dist-packages", "tkinter", "distutils", "unittest", "turtledemo",
)  # fmt: skip


async def told(qemu: Path, script: str, folder: Path) -> str:
    """What *script* prints on a kernel that has control groups of v2 alone.

    It runs with the standard library, msgspec and qmpsnap, as root, beside busybox and flock.
    """
    kernel, base = built() / "vmlinuz", built() / "initrd.img"
    more = await asyncio.to_thread(_packed, script, folder)
    whole = folder / "initrd"  # the kernel takes several archives, one behind the other
    whole.write_bytes(base.read_bytes() + more)
    process = await asyncio.create_subprocess_exec(
        *(qemu, "-m", "1024", "-smp", "2", "-accel", "tcg", "-cpu", "max", "-nodefaults"),
        *("-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", kernel),
        *("-initrd", whole, "-append"),
        "console=ttyS0 quiet cgroup_no_v1=all panic=-1 rdinit=/try tsc=reliable mitigations=off",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(150):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    said = out.decode(errors="replace").replace("\r", "")
    assert "ended with 0\n" in said, said
    return said


def _packed(script: str, folder: Path) -> bytes:
    root = folder / "root"
    stdlib = Path(sysconfig.get_path("stdlib"))
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    home = root / stdlib.relative_to("/")
    shutil.copytree(stdlib, home, ignore=_LEFT_OUT)
    for package in (Path(msgspec.__file__).parent, ROOT / "qmpsnap"):
        shutil.copytree(package, home / package.name, ignore=_LEFT_OUT)
    (root / "usr/bin").mkdir(parents=True)
    flock = Path(shutil.which("flock") or "")
    shutil.copy(flock, root / "usr/bin")
    shutil.copy(python, root / "python")
    modules = [*(home / "lib-dynload").glob("*.so"), *(home / "msgspec").glob("*.so")]
    for library in _libraries([python, flock, *modules]):
        place = root / library.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)
    (root / "script.py").write_text(f"import sys; sys.path = {_paths(stdlib)}\n{script}")
    (root / "try").write_text(_INIT)
    (root / "try").chmod(0o755)
    names = "\n".join(str(one.relative_to(root)) for one in sorted(root.rglob("*")))
    words = ["cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"]
    return subprocess.run(
        words, cwd=root, input=names.encode(), stdout=subprocess.PIPE, check=True
    ).stdout


def _paths(stdlib: Path) -> list[str]:
    return [str(stdlib), str(stdlib / "lib-dynload")]


def _libraries(files: Iterable[Path]) -> set[Path]:
    """What the dynamic linker would load for *files*, itself among them."""
    found = set()
    for file in files:
        ran = subprocess.run(["ldd", file], capture_output=True, text=True, check=False)
        found |= set(re.findall(r"(/\S+) \(0x", ran.stdout))
    return {Path(one) for one in found}
