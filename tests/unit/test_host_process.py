import os
import socket
import subprocess
import sys

import pytest

from qmpsnap.errors import LocalFailed
from qmpsnap.host import cgroup, process

SERVE = """
import os, socket, sys
os.chdir(sys.argv[1])
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[2])
server.listen()
print("listening", flush=True)
taken = server.accept()
print("accepted", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["absolute", "relative"])
def server(request, tmp_path):
    bound = "qmp.sock" if request.param == "relative" else str(tmp_path / "qmp.sock")
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, tmp_path, bound], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as serving:  # fmt: skip
        assert serving.stdout is not None
        assert serving.stdout.readline() == b"listening\n"
        yield serving
        serving.kill()


def test_the_owner_and_the_holder_of_a_socket(server, tmp_path):
    path = tmp_path / "qmp.sock"
    assert process.find_owner(path) == server.pid
    (tmp_path / "link").symlink_to(path)
    assert process.find_owner(tmp_path / "link") == server.pid
    assert process.holder_of_connection(path) is None
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert server.stdout.readline() == b"accepted\n"
        assert f"(process {os.getpid()})" in str(process.holder_of_connection(path))
    assert process.find_owner(tmp_path / "other" / "qmp.sock") is None


def test_nobody_listens(tmp_path):
    assert process.find_owner(tmp_path / "none") is None
    assert process.holder_of_connection(tmp_path / "none") is None


def test_this_process():
    facts, used = process.describe(os.getpid()), process.usage(os.getpid())
    assert facts.uid == os.geteuid()
    assert facts.cwd == os.getcwd()  # noqa: PTH109
    assert facts.argv
    assert facts.started_at.endswith("Z")
    assert used.rss_bytes is not None
    assert used.rss_bytes > 1 << 20
    assert used.cpu_user_seconds
    assert used.cpu_affinity == sorted(os.sched_getaffinity(0))


def test_a_process_that_is_gone():
    with subprocess.Popen(["true"]) as done:
        pass
    for ask in (process.describe, process.usage, cgroup.usage):
        with pytest.raises(LocalFailed, match=str(done.pid)):
            ask(done.pid)


def test_the_host():
    host = process.host_usage()
    assert host.cpu_count == os.cpu_count()
    assert 0 < host.memory_available_bytes <= host.memory_total_bytes


@pytest.fixture
def proc(tmp_path):
    """A /proc and its cgroup file systems, as far as they are read."""

    def make(groups: str, mounts: list[str], **files: str):
        (tmp_path / "7").mkdir()
        (tmp_path / "self").mkdir()
        (tmp_path / "7" / "cgroup").write_text(groups)
        table = "\n".join(mount.replace("AT", str(tmp_path)) for mount in mounts)
        (tmp_path / "self" / "mountinfo").write_text(table)
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name.replace("_", ".", 1)).write_text(content)
        return cgroup.usage(7, proc=tmp_path)

    return make


def test_v2(proc):
    used = proc(
        "0::/vm/one\n",
        ["31 23 0:28 / AT/two rw - cgroup2 cgroup2 rw"],
        two__vm__one__memory_current="4096\n",
        two__vm__one__memory_max="max\n",
        two__vm__one__cpu_stat="usage_usec 2500000\nuser_usec 1\n",
        two__vm__one__cpu_max="150000 100000\n",
        two__vm__one__pids_current="0\n",
    )
    assert used.memory_bytes == 4096
    assert used.memory_max_bytes is None
    assert (used.cpu_seconds, used.cpu_max_count, used.pids_count) == (2.5, 1.5, 0)


def test_v1_and_hybrid(proc):
    used = proc(
        "5:cpu,cpuacct:/vm\n4:memory:/box/vm\n1:name=systemd:/x\n0::/x\n",
        [
            "31 23 0:28 / AT/cpu rw - cgroup cgroup rw,cpu,cpuacct",
            "32 23 0:29 /box AT/mem rw - cgroup cgroup rw,memory",
            "33 23 0:30 / AT/uni rw - cgroup2 cgroup2 rw",
        ],
        cpu__vm__cpuacct_usage="1500000000\n",
        cpu__vm__cpu_cfs_quota_us="-1\n",
        cpu__vm__cpu_cfs_period_us="100000\n",
        mem__vm__memory_usage_in_bytes="8192\n",
        mem__vm__memory_limit_in_bytes="9223372036854771712\n",
    )
    assert (used.memory_bytes, used.memory_max_bytes) == (8192, None)
    assert (used.cpu_seconds, used.cpu_max_count) == (1.5, None)
    assert used.pids_count is None
    assert used.groups["cpuacct"] == "/vm"


def test_what_is_not_there_is_not_zero(proc):
    used = proc("0::/../elsewhere\n", ["31 23 0:28 / AT/two rw - cgroup2 cgroup2 rw"])
    assert (used.memory_bytes, used.cpu_seconds, used.cpu_max_count, used.pids_count) == (
        None, None, None, None,
    )  # fmt: skip
