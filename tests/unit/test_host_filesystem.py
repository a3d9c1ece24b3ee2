import pytest

from qmpsnap.errors import LocalFailed
from qmpsnap.host.filesystem import (
    NETWORK_TYPES,
    Mount,
    _parse,
    deepest,
    examine,
    mount_of,
    sync_dir,
)

TABLE = [
    "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro",
    "30 22 0:44 / /mnt rw - nfs4 nas:/one rw,vers=4.2",
    r"31 22 0:45 / /mnt/with\040blank rw master:3 - cifs //nas/share rw",
    "32 30 0:46 / /mnt rw - tmpfs tmpfs rw",
]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("/etc", "/dev/sda1"),
        ("/", "/dev/sda1"),
        ("/mnt", "tmpfs"),
        ("/mntx", "/dev/sda1"),
        ("/mnt/with blank/a", "//nas/share"),
    ],
)
def test_the_deepest_and_latest_mount(path, source):
    found = deepest(path, map(_parse, TABLE))
    assert found is not None
    assert found.source == source


def test_a_line_of_the_table():
    assert _parse(TABLE[1]) == Mount(
        source="nas:/one", point="/mnt", fstype="nfs4", network=True, options=["rw", "vers=4.2"]
    )
    assert not _parse(TABLE[3]).network
    assert "9p" not in NETWORK_TYPES
    assert "virtiofs" not in NETWORK_TYPES


def test_a_path_that_does_not_exist_yet(tmp_path):
    assert mount_of(tmp_path / "a" / "b") == mount_of(tmp_path)
    assert mount_of(tmp_path / "a" / "b", resolve=False) == mount_of(tmp_path)
    facts = examine(tmp_path / "a" / "b")
    assert facts.device == tmp_path.stat().st_dev
    assert facts.path == str(tmp_path.resolve() / "a" / "b")


def test_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    assert mount_of(tmp_path / "link" / "1").fstype == "proc"
    facts = examine(tmp_path / "link")
    assert (facts.magic, facts.network) == (0x9FA0, False)


def test_figures(tmp_path):
    facts = examine(tmp_path)
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert not facts.read_only


def test_sync_of_no_folder(tmp_path):
    sync_dir(tmp_path)
    with pytest.raises(LocalFailed):
        sync_dir(tmp_path / "none")
