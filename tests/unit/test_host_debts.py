import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qmpsnap.engine.recover import understood
from qmpsnap.errors import LocalFailed, ManifestError, VmBusy
from qmpsnap.host.journal import Journal, Record, pending
from qmpsnap.host.lock import held

ID, LATER = "20261122T165057123Z", "20261122T165058000Z"
OWED = {
    "phase": "planned", "running": True, "agent": None, "freeze": False, "failure_safe": True,
    "laid": [], "capabilities": {}, "parameters": {},
}  # fmt: skip
TOP = Path(__file__).parents[2]
HOLD = """
import asyncio, sys
from pathlib import Path
from qmpsnap.host.lock import held
async def main():
    async with held(Path(sys.argv[1]), "create"):
        print("held", flush=True)
        sys.stdin.read()
asyncio.run(main())
"""


async def test_one_at_a_time(tmp_path):
    path = tmp_path / "web" / "lock"
    async with held(path, "create"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(VmBusy, match=f"web is held by `create` of process {os.getpid()}"):
            async with held(path, "ship"):
                pass
        assert json.loads(path.read_text())["what"] == "create"
    inode = path.stat().st_ino
    async with held(path, "ship"):
        pass
    assert path.stat().st_ino == inode


async def test_given_back_when_the_body_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):
        async with held(tmp_path / "lock", "create"):
            raise ZeroDivisionError
    async with held(tmp_path / "lock", "create"):
        pass


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `web`."""
    command = [sys.executable, "-c", HOLD, tmp_path / "web" / "lock"]
    with subprocess.Popen(
        command, cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


async def test_given_back_when_the_holder_is_killed(tmp_path, holder):
    path = tmp_path / "web" / "lock"
    with pytest.raises(VmBusy, match=f"process {holder.pid}"):
        async with held(path, "ship"):
            pass
    holder.kill()
    holder.wait()
    async with held(path, "ship"):
        pass


async def test_a_lock_with_no_name_in_it(tmp_path):
    async with held(tmp_path / "lock", "create"):
        (tmp_path / "lock").write_bytes(b"{")
        with pytest.raises(VmBusy, match="another qmpsnap"):
            async with held(tmp_path / "lock", "ship"):
                pass


async def test_where_no_lock_can_be(tmp_path):
    (tmp_path / "web").touch()
    with pytest.raises(LocalFailed):
        async with held(tmp_path / "web" / "lock", "create"):
            pass


def test_a_debt_is_there_until_it_is_paid(tmp_path):
    journal = Journal(tmp_path / "journal")
    assert pending(journal.folder) == []
    entry = journal.open_entry(ID, {"verb": "create", "socket": "/run/q"})
    entry.note("stopped", nodes=["d0"])
    journal.open_entry(LATER, {})
    first, second = pending(journal.folder)
    assert (first.id, first.torn) == (ID, False)
    assert first.lines == [
        {"verb": "create", "socket": "/run/q"},
        {"phase": "stopped", "nodes": ["d0"]},
    ]
    assert second.lines == [{}]
    assert stat.S_IMODE(entry.path.stat().st_mode) == 0o600
    entry.close()
    entry.close()
    assert [record.id for record in pending(journal.folder)] == [LATER]


def test_every_torn_line(tmp_path):
    journal = Journal(tmp_path)
    entry = journal.open_entry(ID, {"verb": "create"})
    whole = entry.path.stat().st_size
    entry.note("stopped")
    content = entry.path.read_bytes()
    for length in range(len(content)):
        entry.path.write_bytes(content[:length])
        (record,) = pending(tmp_path)
        assert record.lines == ([{"verb": "create"}] if length >= whole else [])
        assert record.torn == (length not in (0, whole))
        again = journal.reopen(ID)
        again.note("resumed")
        (record,) = pending(tmp_path)
        assert record.lines[-1] == {"phase": "resumed"}
        assert not record.torn


def test_foreign_files_are_left_out(tmp_path):
    for name in ("README", "x.jsonl", f"{ID}.json", f"{ID}.jsonl~"):
        (tmp_path / name).write_text("?")
    assert pending(tmp_path) == []


def test_one_debt_an_id(tmp_path):
    journal = Journal(tmp_path)
    journal.open_entry(ID, {})
    with pytest.raises(LocalFailed, match="exists"):
        journal.open_entry(ID, {})
    with pytest.raises(ValueError, match="not a snapshot id"):
        journal.open_entry("../x", {})
    with pytest.raises(LocalFailed):
        journal.reopen(LATER)


def test_a_debt_that_cannot_be_written_is_not_begun(tmp_path):
    journal = Journal(tmp_path / "journal")
    entry = journal.open_entry(ID, {})
    entry.path.unlink()
    with pytest.raises(LocalFailed):
        entry.note("stopped")


@pytest.mark.parametrize(
    "lines",
    [
        [{"phase": "planned"}],
        [{**OWED, "laid": 5}],
        [OWED, {"phase": "nowhere"}],
        [OWED, {"phase": []}],
        [OWED, {}],
    ],
)
def test_a_debt_that_is_not_understood_is_named(lines: list[dict[str, object]]) -> None:
    with pytest.raises(ManifestError, match=ID):
        understood(Record(ID, lines, torn=False))


def test_a_line_nested_without_end_is_torn(tmp_path: Path) -> None:
    entry = Journal(tmp_path).open_entry(ID, {"phase": "planned"})
    with entry.path.open("ab") as file:
        file.write(b'{"x":' + b"[" * 3000 + b"\n")
    (record,) = pending(tmp_path)
    assert record.torn
    assert record.lines == [{"phase": "planned"}]
