"""Limits on a kernel that has v2 alone: the one thing that no host with v1 can show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.rig.kernel import told

SCRIPT = """
import asyncio, errno, json, os, signal, subprocess
from pathlib import Path
from qmpsnap.host import cage, limits, site
from qmpsnap.host.limits import GroupLimits

TOP = Path("/sys/fs/cgroup")
EVERY = "+cpu +memory +pids +cpuset +hugetlb"
WANTED = GroupLimits(
    cpu_max_count=0.5, cpu_weight=300, memory_max_bytes=64 << 20, memory_high_bytes=48 << 20,
    swap_max_bytes=16 << 20, pids_max_count=20, cpus=[1], memory_nodes=[0],
    hugetlb_max_bytes={"2MB": 2 << 20},
)

def tell(name, value):
    print("TOLD", json.dumps({name: value}), flush=True)

def inside(group, *words):
    return subprocess.Popen([*group.words, *words], pass_fds=group.hold, stdout=subprocess.PIPE)

def left():
    # os.walk passes over a folder that goes away meanwhile; Path.rglob raises
    return [one for _, ones, _ in os.walk(TOP) for one in ones if one.startswith("qmpsnap-")]

async def held(place, name):
    async with cage.made(place, name) as group:
        out, _ = inside(group, "cat", "/proc/self/cgroup").communicate()
        seen = limits.limits({"": group.folders[0]})
        tell(name, [out.decode().strip(), seen == WANTED])
    tell(name + " left", left())

async def main():
    (TOP / "vms").mkdir()
    (TOP / "me").mkdir()
    tell("nothing handed down", site.site(WANTED).troubles)
    (TOP / "cgroup.subtree_control").write_text(EVERY)
    (TOP / "me/cgroup.procs").write_text(str(os.getpid()))
    tell("with processes", site.site(WANTED, "/me").troubles)
    try:
        (TOP / "me/cgroup.subtree_control").write_text("+memory")
    except OSError as refused:
        tell("the kernel", errno.errorcode[refused.errno])
    named = site.site(WANTED, "/vms")
    tell("to enable", [named.enable, named.troubles])
    await held(named, "named")
    await held(site.site(WANTED), "nearest")

    tight = site.site(GroupLimits(memory_max_bytes=8 << 20, swap_max_bytes=0), "/vms")
    async with cage.made(tight, "tight") as group:
        hungry = inside(group, "/python", "-I", "-S", "-c", "b = bytearray(64 << 20)")
        hungry.communicate()
        tell("hungry", hungry.returncode)

    for file, text in (("memory.max", "1000000"), ("cpu.max", "20000 100000")):
        (TOP / "vms" / file).write_text(text)
    tell("above", site.site(WANTED, "/vms").troubles)

    # an engine that is killed while something is inside, which then ends by itself
    if os.fork() == 0:
        asyncio.set_event_loop(None)
        asyncio.events._set_running_loop(None)
        asyncio.run(killed())
    os.wait()
    tell("after the kill", len(left()))
    (TOP / "vms/stop").mkdir()
    while left():
        await asyncio.sleep(0.05)
    tell("later", left())

async def killed():
    async with cage.made(site.site(GroupLimits(pids_max_count=9), "/vms"), "killed") as group:
        inside(group, "sh", "-c", "while [ ! -d /sys/fs/cgroup/vms/stop ]; do sleep 0.1; done")
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.guest
async def test_v2_as_its_kernel_has_it(qemu72: Path, tmp_path: Path) -> None:
    said = await told(qemu72, SCRIPT, tmp_path)
    facts: dict[str, object] = {}
    for line in re.findall(r"^TOLD (.*)$", said, re.M):
        facts |= json.loads(line)
    every = "cpu, cpuset, hugetlb, memory, pids: /sys/fs/cgroup"
    assert f"{every}/cgroup.subtree_control does not hand it down" in str(
        facts["nothing handed down"]
    )
    assert f"{every}/me/cgroup.subtree_control: the group has processes" in str(
        facts["with processes"]
    )
    assert facts["the kernel"] == "EBUSY"
    assert facts["to enable"] == [["cpu", "cpuset", "hugetlb", "memory", "pids"], []]
    for name, parent in (("named", "/vms"), ("nearest", "")):
        place, same = facts[name]  # type: ignore[misc]
        assert re.fullmatch(rf"0::{parent}/qmpsnap-{name}-[0-9a-f]{{6}}", place)
        assert same
        assert facts[f"{name} left"] == []
    assert facts["hungry"] == -9
    assert facts["above"] == [
        "cpu: cpu.max: 0.5 is above the 0.2 of /sys/fs/cgroup/vms",
        "memory: memory.max: 67108864 is above the 999424 of /sys/fs/cgroup/vms",
    ]
    assert facts["after the kill"] == 1
    assert facts["later"] == []
