"""swtpm without a machine: what is found of one at work, and when one of ours ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from pathlib import Path

import pytest

from qmpsnap.engine import tpm as engine_tpm
from qmpsnap.errors import LocalFailed
from qmpsnap.host import swtpm, tpmstate
from tests.rig import tpm


def initialised(path: Path, *, data: bool = False) -> None:
    """A client as QEMU is one; the TPM has a state on disk then. It ends with one's *data*."""
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as control, ours, theirs:
        control.connect(str(path))
        if data:
            socket.send_fds(control, [bytes.fromhex("00000010")], [theirs.fileno()])
            assert control.recv(4) == bytes(4)
        control.sendall(bytes.fromhex("00000002 00000000"))  # CMD_INIT
        assert control.recv(4) == bytes(4)


def one(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_where_its_state_is(short: Path) -> None:
    with tpm.swtpm(one(short / "a")) as path:
        found = tpmstate.behind(path)
        assert (found.tpm2, found.backend, found.keys) == (True, "dir", ())
        assert found.place == short / "a/state"
        assert tpmstate.read(found).content == {}
        initialised(path)
        assert list(tpmstate.read(found).content) == ["tpm2-00.permall"]
    (short / "key").write_bytes(os.urandom(32))
    state = ("--tpmstate=backend-uri=file://linear",)
    key = ("--key", "file=../key,format=binary,mode=aes-256-cbc")
    with tpm.swtpm(one(short / "b"), *key, state=state) as path:
        initialised(path)
        found = tpmstate.behind(path)
        assert (found.backend, found.place) == ("file", short / "b/linear")
        assert found.keys == (("key", f"file={short}/key,format=binary,mode=aes-256-cbc"),)
        assert tpmstate.read(found).content == {"state": (short / "b/linear").read_bytes()}
    with pytest.raises(LocalFailed, match="no process that we may see"):
        tpmstate.behind(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(short / "other"))
        other.listen()
        with pytest.raises(LocalFailed, match=rf"process {os.getpid()}\) is no swtpm"):
            tpmstate.behind(short / "other")


def test_what_is_written_meanwhile_is_told(short: Path) -> None:
    with tpm.swtpm(one(short / "a")) as path:
        initialised(path)
        before = engine_tpm._looked("t0", path)
        assert before.facts.moment == "instant"
        assert engine_tpm._settled(before) is before
        file = short / "a/state/tpm2-00.permall"
        content = file.read_bytes()
        (short / "new").write_bytes(content)
        (short / "new").replace(file)  # as swtpm replaces it when it is asked for its state
        assert engine_tpm._settled(before) is before
        (short / "new").write_bytes(content + b"!")
        (short / "new").replace(file)
        after = engine_tpm._settled(before)
        assert after.facts.moment == "around"
        assert after.state is not None
        assert after.state.content == {file.name: content + b"!"}
    lost = engine_tpm._settled(before)  # its files are there still, and no swtpm
    assert lost.facts.moment == "around"
    gone = engine_tpm._looked("t0", path)
    assert (gone.facts.moment, gone.facts.files) == (None, [])
    assert "no process" in gone.facts.trouble


async def looked_at(path: Path) -> int:
    """A descriptor of the swtpm at the socket *path*, which is there before the program is."""
    async with asyncio.timeout(30):
        while True:
            try:
                return os.pidfd_open(tpmstate.behind(path).pid)
            except LocalFailed:
                await asyncio.sleep(0.01)


async def test_ours_ends_with_its_client_or_with_the_block(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swtpm, "_GRACE", 0.1)
    wanted = swtpm.Wanted(short / "own.sock", True, "dir", one(short / "state"))
    for lifetime in ("with-us", "detached"):
        async with swtpm.serving(wanted, log=short / "log", lifetime=lifetime):
            pidfd = await looked_at(wanted.socket)
            initialised(wanted.socket, data=True)
            assert select.select([pidfd], [], [], 30)[0]  # the client hung up
        os.close(pidfd)
        wanted.socket.unlink(missing_ok=True)
    async with swtpm.serving(wanted, log=short / "log", lifetime="with-us"):
        pidfd = await looked_at(wanted.socket)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(wanted.socket))
    assert select.select([pidfd], [], [], 0)[0]
    os.close(pidfd)
    assert not wanted.socket.exists()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(contextlib.suppress(ZeroDivisionError))
        ours = swtpm.serving(wanted, log=short / "log", lifetime="detached")
        await stack.enter_async_context(ours)
        pidfd = await looked_at(wanted.socket)
        raise ZeroDivisionError
    assert select.select([pidfd], [], [], 0)[0]
    os.close(pidfd)


def test_what_is_told_to_start_by_hand_starts(short: Path) -> None:
    place = one(short / "state")
    wanted = swtpm.Wanted(short / "own.sock", True, "dir", place)
    with tpm.started(["setpriv", "--pdeathsig=KILL", *wanted.argv()]) as process:
        assert wanted.socket.stat().st_mode & 0o777 == 0o600
        initialised(wanted.socket, data=True)
        assert process.wait(30) == 0
    assert [path.stat().st_mode & 0o777 for path in place.glob("*.permall")] == [0o600]
