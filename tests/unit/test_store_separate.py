import pytest

from qmpsnap.errors import StoreRefused
from qmpsnap.host.filesystem import NETWORK_TYPES, Filesystem, Mount
from qmpsnap.store.separate import refuse_same


def facts(path: str, source: str, fstype: str, device: int, magic: int = 0) -> Filesystem:
    mount = Mount(
        source=source, point=path, fstype=fstype, network=fstype in NETWORK_TYPES, options=["rw"]
    )
    return Filesystem(
        path=path, mount=mount, device=device, magic=magic, free_bytes=1, total_bytes=2,
        free_inodes=3, read_only=False,
    )  # fmt: skip


LOCAL = facts("/var/lib/q", "/dev/vda1", "ext4", 1)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(
    "store",
    [
        facts("/mnt", "nas:/export", "nfs4", 2),
        facts("/mnt", "//nas/share", "cifs", 2),
        facts("/mnt", "me@nas:/x", "fuse.sshfs", 2),
        facts("/mnt", "nas:/x", "odd", 2, 0x6969),
    ],
)
def test_a_network_store_is_no_trial(store, allow):
    assert refuse_same(LOCAL, store, allow_local=allow) is False


@pytest.mark.parametrize(
    ("local", "store", "said"),
    [
        (LOCAL, facts("/mnt", "/dev/vda1", "ext4", 1), "same file system"),
        (facts("/a", "tmpfs", "tmpfs", 1), facts("/b", "tmpfs", "tmpfs", 1), "same file system"),
        (LOCAL, facts("/mnt", "/dev/vda1", "btrfs", 2), "same file system"),
        (LOCAL, facts("/mnt", "/dev/vdb1", "ext4", 2), "not on a network file system"),
        (LOCAL, facts("/mnt", "tmpfs", "tmpfs", 2), "not on a network file system"),
        (facts("/a", "tmpfs", "tmpfs", 1), facts("/b", "tmpfs", "tmpfs", 2), "not on a network"),
        (LOCAL, facts("/mnt", "localhost:/x", "nfs4", 2), "this host itself"),
        (LOCAL, facts("/mnt", "[::1]:/x", "nfs4", 2), "this host itself"),
        (facts("/a", "nas:/x", "nfs4", 1), facts("/b", "nas:/x", "nfs4", 2), "same file system"),
        (facts("/a", "nas:/x/y", "nfs4", 1), facts("/b", "NAS:/x", "nfs", 2), "same file system"),
    ],
)
def test_one_store_is_refused_or_a_trial(local, store, said):
    with pytest.raises(StoreRefused, match=said) as refused:
        refuse_same(local, store, allow_local=False)
    assert "--allow-local-store" in refused.value.hint
    assert refuse_same(local, store, allow_local=True) is True


@pytest.mark.parametrize("path", ["/var/lib/q", "/var/lib/q/store", "/var"])
def test_one_root_inside_the_other_is_never_allowed(path):
    with pytest.raises(StoreRefused, match="inside each other"):
        refuse_same(LOCAL, facts(path, "nas:/x", "nfs4", 2), allow_local=True)


def test_two_exports_of_one_server_are_two():
    local, store = facts("/a", "nas:/x", "nfs4", 1), facts("/b", "nas:/xy", "nfs4", 2)
    assert refuse_same(local, store, allow_local=False) is False
