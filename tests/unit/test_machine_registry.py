import os
import stat
import subprocess
from pathlib import Path

import pytest

from qmpsnap.errors import ManifestError, Refused, UsageError
from qmpsnap.hypervisor.machine import registry
from qmpsnap.hypervisor.machine.run import prepared


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("QMPSNAP_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def stranger():
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process.pid


def test_registry_finds_who_is_registered_and_no_longer(runtime):
    with registry.register("web", os.getpid(), Path("/q"), Path("/a")) as entry:
        assert registry.find("web") == entry
        assert (entry.qmp, entry.agent) == ("/q", "/a")
        assert registry.names() == ["web"]
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (runtime / "web").rglob("*")]
        assert modes == [0o600]
        assert stat.S_IMODE((runtime / "web").stat().st_mode) == 0o700
    assert registry.find("web") is None
    assert registry.names() == []


def test_registry_name_of_a_living_process_is_refused(stranger):
    with registry.register("web", stranger, Path("/q")):
        with pytest.raises(Refused, match=f"process {stranger}"):
            registry.enter("web", os.getpid(), Path("/r"))
        assert registry.find("web").pid == stranger


def test_registry_name_of_a_dead_process_is_free(stranger):
    process = subprocess.Popen(["true"])
    pid = process.pid
    # a zombie is dead too, though its entry in /proc is not gone
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(Refused, match="no process"):
        registry.enter("web", pid, Path("/q"))
    process.wait()
    registry.enter("web", stranger, Path("/q"))
    assert registry.find("web").pid == stranger


def test_registry_does_not_mistake_a_later_process_for_the_first(runtime, stranger):
    registry.enter("web", stranger, Path("/q"))
    path = runtime / "web/vm.json"
    path.write_text(path.read_text().replace('"started":', '"started":1'))
    assert registry.find("web") is None
    registry.enter("web", os.getpid(), Path("/q"))
    assert registry.find("web").pid == os.getpid()


def test_registry_leaving_does_not_remove_a_successor(stranger):
    with registry.register("web", os.getpid(), Path("/q")):
        path = registry.directory() / "web/vm.json"
        path.unlink()
        successor = registry.enter("web", stranger, Path("/r"))
    assert registry.find("web") == successor


@pytest.mark.parametrize("text", ["", "{}", '{"name":1}'])
def test_registry_entry_that_cannot_be_read_is_named(runtime, text):
    (runtime / "web").mkdir(parents=True)
    (runtime / "web/vm.json").write_text(text)
    with pytest.raises(ManifestError, match=r"web/vm\.json"):
        registry.find("web")


def test_registry_newer_entry_is_named(runtime):
    registry.enter("web", os.getpid(), Path("/q"))
    path = runtime / "web/vm.json"
    path.write_text(path.read_text().replace('"version":1', '"version":2'))
    with pytest.raises(ManifestError, match=r"vm\.json: qmpsnap-registered-vm version 2"):
        registry.find("web")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x"])
def test_registry_takes_no_path_for_a_name(name):
    assert registry.find(name) is None
    with pytest.raises(UsageError):
        registry.enter(name, os.getpid(), Path("/q"))


def test_registry_prepared_adds_our_monitor(tmp_path):
    argv = ["qemu", "-name", "web", "-S", "disk.img"]
    found = prepared(argv, name=None, directory=tmp_path)
    assert found.name == "web"
    assert found.argv[:6] == ["qemu", "-name", "web", "-S", "-hda", "disk.img"]
    assert f"socket,id=qmpsnap-qmp,path={found.qmp},server=on,wait=off" in found.argv
    assert found.qmp.parent == tmp_path
    assert prepared(argv, name="db", directory=tmp_path).name == "db"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["-S"], "no name"),
        (["-name", "../x"], "not a name"),
        (["-name", "a", "-daemonize"], "-daemonize"),
        (["-name", "a", "-chardev", "null,id=qmpsnap-qmp"], "qmpsnap-qmp"),
    ],
)
def test_registry_prepared_refuses(tmp_path, argv, told):
    with pytest.raises(UsageError, match=told):
        prepared(["qemu", *argv], name=None, directory=tmp_path)
