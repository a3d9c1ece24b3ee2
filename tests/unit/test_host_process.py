import os
import socket
import subprocess
import sys

import pytest

from qmpsnap.errors import LocalFailed
from qmpsnap.host import cgroup, memory, process, tasks

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
    facts = process.describe(os.getpid())
    assert facts.uid == os.geteuid()
    assert facts.cwd == os.getcwd()  # noqa: PTH109
    assert facts.argv
    assert facts.started_at.endswith("Z")


def test_a_process_that_is_gone():
    with subprocess.Popen(["true"]) as done:
        pass
    for ask in (process.describe, tasks.usage, memory.usage, cgroup.usage):
        with pytest.raises(LocalFailed, match=str(done.pid)):
            ask(done.pid)
