import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.errors import DamagedData, Foreign, ManifestError, SignatureWrong, Unsigned
from qmpsnap.store import ed25519, signature
from qmpsnap.store.layout import SIGNATURE
from qmpsnap.store.manifest import FileEntry, encode
from qmpsnap.store.signature import Trust, checked, judged, made
from tests.rig import halves

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
PUBLIC = ed25519.public_of(SECRET).hex()
MANIFEST = encode(halves.manifest([FileEntry(name="a", bytes=1, blake3="ab" * 32)], "cd" * 32))
SIGNED = made(MANIFEST, SECRET)
TRUST = Trust(keys=[PUBLIC])


def _flipped(content: bytes, bit: int) -> bytes:
    at, mask = bit // 8, 1 << bit % 8
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


def test_the_keys_of_rfc_8032():
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert ed25519.public_of(secret).hex() == public
    assert (
        ed25519.sign(secret, b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5")
    )


def test_who_has_signed_is_told(tmp_path):
    path = tmp_path / SIGNATURE
    ours = checked(MANIFEST, SIGNED, TRUST, path)
    assert (ours.verdict, ours.accepted) == ("trusted", True)
    assert ours.key == signature.key_id(bytes.fromhex(PUBLIC))
    assert made(MANIFEST, SECRET) == SIGNED  # to write it again is to write the same

    other = made(MANIFEST, OTHER)
    assert judged(MANIFEST, other, TRUST, path).verdict == "foreign"
    with pytest.raises(Foreign, match=f"{tmp_path}: it is signed with the key .* not trusted"):
        checked(MANIFEST, other, TRUST, path)
    with pytest.raises(Unsigned, match="is not signed"):
        checked(MANIFEST, None, TRUST, path)


@pytest.mark.parametrize(("reason", "other"), [("unsigned", "foreign"), ("foreign", "unsigned")])
def test_each_reason_is_accepted_by_its_own_name(tmp_path, reason, other):
    path = tmp_path / SIGNATURE
    content = {"unsigned": None, "foreign": made(MANIFEST, OTHER)}
    accepting = Trust(keys=[PUBLIC], accepted=[reason])
    assert checked(MANIFEST, content[reason], accepting, path).verdict == reason
    with pytest.raises((Unsigned, Foreign)):
        checked(MANIFEST, content[other], accepting, path)


def test_altered_bytes_are_never_accepted(tmp_path):
    anything = Trust(keys=[PUBLIC], accepted=["unsigned", "foreign"])
    altered = MANIFEST.replace(b"before the upgrade", b"after the upgrade.")
    for secret in (SECRET, OTHER):
        with pytest.raises(SignatureWrong, match=r"is not what manifest\.sig"):
            checked(altered, made(MANIFEST, secret), anything, tmp_path / SIGNATURE)


def test_what_is_signed_for_another_purpose_is_no_signature(tmp_path):
    bare = msgspec.json.decode(SIGNED, type=signature.Signature)
    bare = msgspec.structs.replace(bare, signature=ed25519.sign(SECRET, MANIFEST).hex())
    content = msgspec.json.format(msgspec.json.encode(bare), indent=2) + b"\n"
    with pytest.raises(SignatureWrong):
        checked(MANIFEST, content, TRUST, tmp_path / SIGNATURE)


@given(st.integers(0, len(MANIFEST) * 8 - 1))
def test_any_bit_of_the_manifest_counts(tmp_path_factory, bit):
    path = tmp_path_factory.getbasetemp() / SIGNATURE
    with pytest.raises(SignatureWrong):
        checked(_flipped(MANIFEST, bit), SIGNED, TRUST, path)


@given(st.integers(0, len(SIGNED) * 8 - 1))
def test_any_bit_of_the_signature_counts(tmp_path_factory, bit):
    path = tmp_path_factory.getbasetemp() / SIGNATURE
    anything = Trust(keys=[PUBLIC], accepted=["unsigned", "foreign"])
    with pytest.raises(DamagedData):
        checked(MANIFEST, _flipped(SIGNED, bit), anything, path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        SIGNED[:-1],
        SIGNED + b" ",
        SIGNED[:-20],
        SIGNED.replace(b'"version": 1', b'"version": 2'),
        SIGNED.replace(b"{\n", b'{\n  "comment": "x",\n', 1),
        SIGNED.replace(PUBLIC.encode(), PUBLIC.upper().encode()),
        SIGNED.replace(signature.key_id(bytes.fromhex(PUBLIC)).encode(), b"0" * 16),
    ],
)
def test_what_is_no_signature_of_ours_is_damage(tmp_path, content):
    with pytest.raises(ManifestError, match=r"manifest\.sig"):
        checked(MANIFEST, content, TRUST, tmp_path / SIGNATURE)


def test_a_reason_has_to_be_one():
    assert signature.reasons(["foreign", "unsigned", "foreign"]) == ("foreign", "unsigned")
    with pytest.raises(ValueError, match="not one of unsigned, foreign: 'all'"):
        signature.reasons(["all"])
