import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from qmpsnap.errors import Foreign, KeyRefused, LocalFailed, ManifestError
from qmpsnap.store import keyfile, signature
from qmpsnap.store.keyring import SIGNING, Keyring
from tests.rig.halves import names

MANIFEST = b'{"format": "qmpsnap-manifest"}\n'


@pytest.fixture
def ring(tmp_path):
    return Keyring(tmp_path / "local" / ".keys", "here")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _verdict(ring: Keyring, content: bytes) -> str:
    return signature.judged(MANIFEST, content, ring.trust(), ring.folder / "manifest.sig").verdict


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o177])
def test_made_at_first_use_and_private_whatever_the_umask(ring, umask):
    before = os.umask(umask)
    try:
        assert ring.known() == []
        assert not ring.folder.exists()
        content = ring.sign(MANIFEST)
        ring.rotate()
        other = Keyring(ring.folder.parent / "other", "there")
        ring.imported(keyfile.encode(other.public()), Path("there.key"))
    finally:
        os.umask(before)
    assert _mode(ring.folder) == 0o700
    assert {_mode(path) for path in ring.folder.iterdir()} == {0o600}
    assert {path.stat().st_nlink for path in ring.folder.iterdir()} == {1}
    assert _verdict(ring, content) == "trusted"
    assert [one.role for one in ring.known()] == ["signs", "retired", "imported"]
    assert [one.host for one in ring.known()] == ["here", "here", "there"]


def _first(folder: Path) -> str:
    return Keyring(folder, "here").ready()


def test_two_that_make_it_at_once_have_the_same(ring):
    with ProcessPoolExecutor(4) as pool:
        found = set(pool.map(_first, [ring.folder] * 16))
    assert found == {ring.ready()}
    assert names(ring.folder) == [SIGNING]


def test_an_interrupted_first_use_is_made_good(ring):
    ring.folder.mkdir(parents=True, mode=0o700)
    (ring.folder / f"{SIGNING}.partial").write_bytes(b"{")
    assert ring.trust().keys == []
    assert _verdict(ring, ring.sign(MANIFEST)) == "trusted"
    assert names(ring.folder) == [SIGNING]


def test_rotate_signs_anew_and_trusts_the_old(ring):
    old = ring.sign(MANIFEST)
    new, retired = ring.rotate()
    assert (new.role, retired.role) == ("signs", "retired")
    assert new.key != retired.key
    assert ring.ready() == new.key
    assert ring.sign(MANIFEST) != old
    assert _verdict(ring, old) == _verdict(ring, ring.sign(MANIFEST)) == "trusted"
    # the secret of the old one is gone for good
    text = "".join(path.read_text() for path in ring.folder.iterdir())
    assert text.count('"secret_key"') == 1


def test_a_rotation_that_was_cut_off_changes_nothing(ring, monkeypatch):
    old, before = ring.sign(MANIFEST), ring.ready()

    def cut(*args, **other):
        raise LocalFailed("no space is left")

    monkeypatch.setattr("qmpsnap.store.keyring.replace", cut)
    with pytest.raises(LocalFailed):
        ring.rotate()
    monkeypatch.undo()
    assert ring.ready() == before
    assert _verdict(ring, old) == "trusted"
    assert [(one.key, one.role) for one in ring.known()] == [(before, "signs")]
    ring.rotate()
    assert [one.role for one in ring.known()] == ["signs", "retired"]


def test_another_hosts_key_is_trusted_once_it_is_imported(ring, tmp_path):
    there = Keyring(tmp_path / "there", "there")
    content = there.sign(MANIFEST)
    ring.ready()
    assert _verdict(ring, content) == "foreign"
    handed = keyfile.encode(there.public())
    assert b"secret" not in handed
    assert ring.imported(handed, Path("f"), dry_run=True).role == "imported"
    assert _verdict(ring, content) == "foreign"
    key = ring.imported(handed, Path("f"))
    assert (key.key, key.host) == (there.ready(), "there")
    assert key.fingerprint.startswith(key.key)
    assert _verdict(ring, content) == "trusted"
    assert ring.imported(handed, Path("f")) == key  # twice is as good
    assert ring.imported(keyfile.encode(ring.public()), Path("f")).role == "signs"
    assert ring.forget(key.key[:6], dry_run=True) == key
    assert _verdict(ring, content) == "trusted"
    ring.forget(key.key)
    assert _verdict(ring, content) == "foreign"


def test_the_key_that_signs_is_not_forgotten(ring):
    signs = ring.ready()
    for word, why in ((signs, "that signs"), ("", "no single key"), ("zz", "none")):
        with pytest.raises(KeyRefused, match=why):
            ring.forget(word)
    assert ring.ready() == signs


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ssh-ed25519 AAAA",
        b'{"format": "qmpsnap-signing-key", "version": 1}',
        b'{"format": "qmpsnap-public-key", "version": 2}',
        json.dumps({"format": "qmpsnap-public-key", "version": 1, "key": "0" * 16,
                    "public_key": "1" * 64, "host": "x", "created_at": "now"}).encode(),
    ],
)  # fmt: skip
def test_what_is_no_public_key_is_refused_and_nothing_changes(ring, content):
    ring.ready()
    with pytest.raises(KeyRefused, match="not a public key: given"):
        ring.imported(content, Path("given"))
    assert names(ring.folder) == [SIGNING]


def test_a_name_that_would_write_on_the_terminal_is_refused(ring, tmp_path):
    key = keyfile.encode(Keyring(tmp_path / "there", "there").public())
    key = key.replace(b'"there"', rb'"\u001b[2Jthere"')
    with pytest.raises(KeyRefused, match="not words to be printed"):
        ring.imported(key, Path("given"))


@pytest.mark.parametrize(
    ("mode", "why"),
    [(0o640, "read the secret"), (0o604, "read the secret"), (0o660, "write"), (0o602, "write")],
)
def test_a_secret_key_that_others_may_touch_is_refused(ring, mode, why):
    ring.ready()
    (ring.folder / SIGNING).chmod(mode)
    for verb in (ring.trust, ring.ready, ring.known, ring.rotate, lambda: ring.sign(MANIFEST)):
        with pytest.raises(KeyRefused, match=f"{SIGNING}: others may {why}.* {mode:04o}"):
            verb()
    assert names(ring.folder) == [SIGNING]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_refused(ring, mode):
    ring.ready()
    ring.folder.chmod(mode)
    for verb in (ring.trust, ring.ready, ring.rotate):
        with pytest.raises(KeyRefused, match="others may write it"):
            verb()


def test_a_public_key_that_others_may_write_is_refused(ring):
    ring.ready()
    _, old = ring.rotate()
    Path(old.path).chmod(0o666)
    with pytest.raises(KeyRefused, match="others may write it"):
        ring.trust()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_refused(ring):
    ring.ready()
    os.chown(ring.folder / SIGNING, 4242, 4242)
    with pytest.raises(KeyRefused, match="belongs to the user 4242"):
        ring.trust()


def test_a_link_is_not_followed(ring, tmp_path):
    ring.ready()
    (ring.folder / SIGNING).rename(tmp_path / "elsewhere")
    (ring.folder / SIGNING).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LocalFailed):
        ring.ready()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(KeyRefused, match="is no folder"):
        Keyring(tmp_path / "link", "here").ready()
    assert names(tmp_path / "real") == []


def test_a_damaged_key_is_told_without_its_secret(ring):
    ring.ready()
    path = ring.folder / SIGNING
    secret = json.loads(path.read_bytes())["secret_key"]
    for content in (b"", path.read_bytes()[:-30], path.read_bytes().replace(b'"key"', b'"kex"')):
        path.write_bytes(content)
        with pytest.raises(ManifestError, match=SIGNING) as odd:
            ring.sign(MANIFEST)
        assert secret not in str(odd.value)


def test_no_secret_is_printed(ring):
    key = keyfile.read(_signing(ring), keyfile.Signing, side=LocalFailed)
    assert key.secret_key not in repr(key) + str(key)
    assert key.secret_key not in repr(ring.trust()) + repr(ring.known())


def _signing(ring: Keyring) -> Path:
    ring.ready()
    return ring.folder / SIGNING


def test_a_file_under_another_keys_name_is_damage(ring):
    ring.ready()
    _, old = ring.rotate()
    Path(old.path).rename(ring.folder / f"imported-{'0' * 16}.json")
    with pytest.raises(ManifestError, match=f"has the key {old.key}"):
        ring.trust()


def test_nobody_loads_the_library_before_it_is_needed():
    said = (
        "import sys, qmpsnap.engine.engine, qmpsnap.store.worker, qmpsnap.cli.main;"
        "print('cryptography' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_foreign_is_refused_by_name(ring, tmp_path):
    content = Keyring(tmp_path / "there", "there").sign(MANIFEST)
    with pytest.raises(Foreign) as refused:
        signature.checked(MANIFEST, content, ring.trust(), tmp_path / "manifest.sig")
    assert refused.value.exit_code == 3
    assert "keys import" in refused.value.hint
