import os

import msgspec
import pytest

from qmpsnap.errors import DamagedData, HalfMissing, LocalFailed, ManifestError, Refused
from qmpsnap.store import identity, local
from qmpsnap.store.image import changed, examine_image
from qmpsnap.store.layout import LocalRoot
from qmpsnap.store.manifest import Identity
from tests.rig.halves import ID, LATER, names, paired, spooled, storage

DIGEST, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def root(tmp_path):
    return LocalRoot(tmp_path / "local")


def test_sealed_and_read(root):
    digest = local.seal(root, "web", storage())
    assert local.seal(root, "web", storage()) == digest
    assert local.read_storage(root, "web", ID) == storage()
    assert local.storage_digest(root, "web", ID) == digest


def test_sealed_once(root):
    local.seal(root, "web", storage())
    with pytest.raises(LocalFailed, match="another content"):
        local.seal(root, "web", storage(host="f" * 32))
    with pytest.raises(ManifestError, match="no local half of db"):
        local.seal(root, "db", storage())


def test_what_is_not_sealed_is_missing(root):
    with pytest.raises(HalfMissing):
        local.read_storage(root, "web", ID)


def test_a_half_in_the_wrong_folder(root):
    local.seal(root, "web", storage())
    root.snapshot("web", ID).rename(root.snapshot("web", LATER))
    with pytest.raises(ManifestError, match=f"is the local half of web {ID}"):
        local.read_storage(root, "web", LATER)


def test_paired_is_noted_once(root):
    local.seal(root, "web", storage())
    assert local.read_paired(root, "web", ID) is None
    local.mark_paired(root, "web", paired(DIGEST))
    later = paired(DIGEST, shipped_at="2026-11-23T00:00:00.000Z")
    local.mark_paired(root, "web", later)
    assert local.read_paired(root, "web", ID) == paired(DIGEST)
    with pytest.raises(DamagedData, match="another store half"):
        local.mark_paired(root, "web", paired(OTHER))


def test_survey_shows_all_and_says_what_is_wrong(root):
    spooled(root)
    root.snapshot("web", LATER).mkdir()
    local.seal(root, "db", storage("db"))
    root.storage("db", ID).write_bytes(b"{")
    db, first, second = local.survey(root)
    assert db.problem is not None
    assert "storage.json" in db.problem
    assert (first.storage, first.spool, first.problem) == (storage(), True, None)
    assert first.spooled is not None
    assert (second.id, second.storage, second.problem) == (LATER, None, None)
    assert local.survey(root, "web") == [first, second]
    assert local.survey(LocalRoot(root.path / "none")) == []


def bound(uuid: str | None = None, *disks: str) -> Identity:
    return Identity(vm="web", uuid=uuid, disks=list(disks))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (bound("A", "/a"), bound("a", "/b"), True),
        (bound("a", "/a"), bound("b", "/a"), False),
        (bound(None, "/a"), bound(None, "/a", "/b"), True),
        (bound(None, "/a"), bound("b", "/a"), True),
        (bound(None, "/a"), bound(None, "/b"), False),
        (bound("a", "/a"), bound(None, "/b"), False),
        (bound(), bound(), True),
    ],
)
def test_a_name_stands_for_one_vm(root, first, second, same):
    identity.check(root, "web", first)
    identity.bind(root, "web", first)
    if same:
        identity.bind(root, "web", second)
        assert identity.read_identity(root, "web") == first
        return
    with pytest.raises(Refused) as refused:
        identity.bind(root, "web", second)
    assert "--rebind" in refused.value.hint
    assert identity.read_identity(root, "web") == first
    identity.bind(root, "web", second, rebind=True)
    assert identity.read_identity(root, "web") == second
    assert names(root.vm("web")) == ["identity.json"]


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.qcow2"
    path.write_bytes(b"QFI\xfb" + bytes(200_000))
    return path


def test_the_same_file(base):
    assert changed(examine_image(base, "qcow2", 1 << 30)) is None


def test_a_base_that_is_not_what_it_was(base, tmp_path):
    image = examine_image(base, "qcow2", 1 << 30)
    kept = base.stat().st_mtime_ns
    with base.open("r+b") as file:
        file.seek(100_000)
        file.write(b"x")
    os.utime(base, ns=(kept, kept + 1))
    assert "written to" in str(changed(image))
    with base.open("r+b") as file:
        file.write(b"q")
    os.utime(base, ns=(kept, kept))
    assert "another header" in str(changed(image))
    with base.open("ab") as file:
        file.write(b"x")
    assert "has 200005" in str(changed(image))
    base.unlink()
    assert "missing" in str(changed(image))


def test_another_file_of_the_same_content(base, tmp_path):
    image = msgspec.structs.replace(examine_image(base, "qcow2", 1), inode=1)
    assert "inode" in str(changed(image))


def test_what_is_no_image(tmp_path):
    with pytest.raises(LocalFailed):
        examine_image(tmp_path, "raw", 1)
    with pytest.raises(LocalFailed, match="ENOENT"):
        examine_image(tmp_path / "none", "raw", 1)
