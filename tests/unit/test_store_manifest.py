import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as some

from qmpsnap.engine import configuration, tpm, usage
from qmpsnap.errors import ManifestError
from qmpsnap.store import holder, hurt, keyfile, lease, moved, pages, rival, shared, signature
from qmpsnap.store.manifest import (
    KINDS,
    Digests,
    FileEntry,
    Identity,
    Manifest,
    Merged,
    Pack,
    Paired,
    RamImage,
    Replacement,
    Storage,
    decode,
    encode,
    schemas,
)
from tests.rig.halves import manifest, paired, storage

HERE = Path("/store/web/manifest.json")
DIGEST = "ab" * 32
WHOLE = [
    storage(),
    paired(DIGEST),
    manifest([FileEntry(name="vmstate/ram.zst", bytes=7, blake3=DIGEST)], DIGEST),
    Identity(vm="web", uuid=None, disks=["/images/a.qcow2"]),
]


@pytest.mark.parametrize("value", WHOLE, ids=lambda value: value.format)
def test_what_is_written_is_read(value):
    content = encode(value)
    assert decode(content, type(value), HERE) == value
    assert content.endswith(b"}\n")
    assert list(json.loads(content))[:2] == ["format", "version"]


@pytest.mark.parametrize("value", WHOLE, ids=lambda value: value.format)
def test_every_cut_is_refused_by_name(value):
    content = encode(value)
    for length in range(len(content) - 2):
        with pytest.raises(ManifestError, match=r"manifest\.json"):
            decode(content[:length], type(value), HERE)


def spoilt(**change: object) -> bytes:
    return json.dumps(json.loads(encode(WHOLE[2])) | change).encode()


def test_the_control_is_not_spoilt():
    assert decode(spoilt(), Manifest, HERE) == WHOLE[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 4}, "version 4; this qmpsnap knows up to 3"),
        ({"version": 3}, "what is encrypted is version 3, and that is encrypted"),
        ({"encryption": {"key": "ab" * 8, "sealed": ""}}, "what is encrypted is version 3"),
        ({"version": 0}, r"\$\.version"),
        ({"format": "qmpsnap-storage"}, "format 'qmpsnap-storage', not 'qmpsnap-manifest'"),
        ({"pause_ms": "19"}, r"\$\.pause_ms"),
        ({"storage_blake3": "AB"}, r"\$\.storage_blake3"),
        ({"vm": "../web"}, "not a name for a VM"),
        ({"id": "20261122T165057123"}, "not a snapshot id"),
        ({"taken_at": "2026-11-22T16:50:57.123"}, "not a moment in UTC"),
        ({"taken_at": "yesterday, at noonZ"}, "yesterday"),
        ({"files": []}, "the vmstate is not among the files"),
        ({"files": [{"name": "a", "bytes": -1, "blake3": DIGEST}]}, r"\$\.files\[0\]\.bytes"),
        ({"files": [{"name": "a", "bytes": 1, "blake3": DIGEST}] * 2}, "listed twice"),
    ],
)
def test_a_spoilt_key_is_named(change, said):
    with pytest.raises(ManifestError, match=said):
        decode(spoilt(**change), Manifest, HERE)


@pytest.mark.parametrize("content", [b"", b"  ", b"\xff\xfe", b"[]", b"{}", b"null", b"\0" * 9])
def test_no_manifest_at_all(content):
    with pytest.raises(ManifestError, match=r"/store/web/manifest\.json"):
        decode(content, Manifest, HERE)


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../a", "a/../../b", "a//b", "./a", "a/", "a\0b", "a\nb", "manifest.json",
     "a.partial", "manifest.sig", "a" * 300, "a/" + "ä" * 130 + "/b"],
)  # fmt: skip
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match="name"):
        FileEntry(name=name, bytes=1, blake3=DIGEST)


@pytest.mark.parametrize("label", ["", ".", "..", "../a", "a/b", "a\0", "a\n", "-o", "a" * 65])
def test_labels_that_lead_elsewhere(label):
    disk = storage().disks[0]
    with pytest.raises(ValueError, match="not a word for a disk"):
        msgspec.structs.replace(disk, label=label)
    sealed = encode(storage()).replace(b'"vda"', msgspec.json.encode(label))
    with pytest.raises(ManifestError, match="not a word for a disk"):
        decode(sealed, Storage, HERE)
    odd = encode(storage()).replace(b'"format": "qcow2"', b'"format": "../../x"')
    with pytest.raises(ManifestError, match="not a word for a disk"):
        decode(odd, Storage, HERE)


@given(some.text())
def test_an_accepted_name_stays_below_its_folder(name):
    try:
        FileEntry(name=name, bytes=0, blake3=DIGEST)
    except ValueError:
        return
    assert Path("/a/b", name).resolve().is_relative_to("/a/b")
    assert Path("/a/b", name) != Path("/a/b")


def in_packs(**change: object) -> Manifest:
    """A snapshot whose RAM is stored once."""
    whole = WHOLE[2]
    assert isinstance(whole, Manifest)
    entry = FileEntry(name="vmstate/ram.index", bytes=7, blake3=DIGEST)
    image = RamImage(block="pc.ram", bytes=1 << 30, stored_pages=3)
    ram = msgspec.structs.replace(whole.ram, index=entry.name, images=[image])
    one = Pack(blake3="cd" * 32, bytes=900, used_bytes=800, fresh=True)
    fields = {"version": 2, "files": [*whole.files, entry], "ram": ram, "packs": [one]}
    return msgspec.structs.replace(whole, **(fields | change))


def test_ram_in_packs():
    made = in_packs()
    assert decode(encode(made), Manifest, HERE) == made
    assert [one.name for one in made.listed][-1] == f"shared/{'cd' * 32}"
    # who knows version 1 only must not take the stream for all
    for change, said in (
        ({"version": 1}, "that is version 2"),
        ({"packs": made.packs * 2}, "a pack is listed twice"),
        ({"files": made.files[:-1]}, "the RAM's index is not among the files"),
        ({"ram": WHOLE[2].ram}, "no index tells where"),
    ):
        with pytest.raises(ValueError, match=said):
            in_packs(**change)


def test_what_could_not_be_read_is_not_written():
    endless = msgspec.structs.replace(WHOLE[2], pause_ms=float("nan"))
    with pytest.raises(ManifestError, match="pause_ms"):
        encode(endless)


def test_the_committed_schemas_are_current():
    folder = Path(__file__).parents[2] / "docs" / "schemas"
    others = configuration.schemas() | usage.schemas() | shared.schemas() | tpm.schemas()
    others |= moved.schemas() | pages.schemas() | hurt.schemas()
    others |= signature.schemas() | keyfile.schemas()
    others |= holder.schemas() | lease.schemas() | rival.schemas()
    assert {path.stem for path in folder.glob("qmpsnap-*.json")} == {*KINDS, *others}
    for word, schema in (schemas() | others).items():
        assert json.loads((folder / f"{word}.json").read_text()) == schema, "run scripts/schemas"


def test_each_kind_has_its_word():
    told = {kind for kind, _ in KINDS.values()}
    assert told == {Storage, Identity, Manifest, Paired, Merged, Digests}


def _disks(value: Storage, **image: object) -> list[dict[str, object]]:
    """Its disks, each image changed so."""
    found = json.loads(encode(value))["disks"]
    return [one | {"chain": [it | image for it in one["chain"]]} for one in found]


def test_encrypted_disks_are_of_a_version_of_their_own() -> None:
    """Who knows version 1 only would take them for images of QEMU's."""
    plain = WHOLE[0]
    assert isinstance(plain, Storage)
    assert plain.disks
    assert (plain.version, plain.keys) == (1, [])
    key = "ab" * 8
    good = json.loads(encode(plain)) | {
        "version": 2, "disks": _disks(plain, format="sealed", key=key),
    }  # fmt: skip
    found = decode(json.dumps(good).encode(), Storage, HERE)
    assert found.keys == [key]
    assert decode(encode(found), Storage, HERE) == found
    for wrong, said in (
        ({"version": 1}, "it is version 2"),
        ({"disks": _disks(plain)}, "it is version 2"),
        ({"version": 3}, "knows up to 2"),
        ({"disks": _disks(plain, format="sealed")}, "has a key"),
        ({"disks": _disks(plain, key=key)}, "has a key"),
        ({"disks": _disks(plain, format="sealed", key="../" + key)}, "key"),
    ):
        with pytest.raises(ManifestError, match=said):
            decode(json.dumps(good | wrong).encode(), Storage, HERE)
    image = plain.disks[0].chain[0]
    sealed = msgspec.structs.replace(image, format="sealed", key=key)
    with pytest.raises(ValueError, match="version 2"):
        Merged(point=plain.id, disks={"a": Replacement(image=sealed, instead_of=1, parent=None)})
    merged = Merged(
        version=2,
        point=plain.id,
        disks={"a": Replacement(image=sealed, instead_of=1, parent=None)},
    )
    assert decode(encode(merged), Merged, HERE) == merged
