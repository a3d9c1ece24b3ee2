import pytest

from qmpsnap.store.catalogue import join
from qmpsnap.store.files import digest_bytes
from qmpsnap.store.local import LocalFacts
from qmpsnap.store.manifest import FileEntry, encode
from qmpsnap.store.wire import Found, Listing
from tests.rig.halves import HOST, ID, LATER, manifest, paired, storage

OTHER = "cd" * 32
LOCAL_DIGEST = digest_bytes(encode(storage()))
MANIFEST = manifest([FileEntry(name="machine.json", bytes=7, blake3=OTHER)], LOCAL_DIGEST)
SEAL = digest_bytes(encode(MANIFEST))


def here(**more: object) -> LocalFacts:
    whole = {"vm": "web", "id": ID, "storage": storage(), "storage_blake3": LOCAL_DIGEST}
    return LocalFacts(**whole | more)


def there(value=MANIFEST, **more: object) -> Found:
    content = encode(value)
    whole = {"vm": "web", "id": ID, "manifest": content.decode(), "problem": None}
    return Found(**whole | {"manifest_blake3": digest_bytes(content)} | more)


UNSEALED = there(manifest=None, manifest_blake3=None)
SPOOL = {"spool": True, "spooled": MANIFEST, "spooled_blake3": SEAL}
STRANGER = manifest([], OTHER)


@pytest.mark.parametrize(
    ("local", "found", "state", "why"),
    [
        (here(paired=paired(SEAL)), there(), "paired", ""),
        (here(paired=paired(SEAL), **SPOOL), there(), "paired", ""),
        (here(**SPOOL), there(), "shipping", "yet to note"),
        (here(**SPOOL), None, "shipping", "waits in the spool"),
        (here(**SPOOL), UNSEALED, "shipping", "waits in the spool"),
        (here(paired=paired(SEAL), **SPOOL), None, "shipping", "waits in the spool"),
        (here(), None, "local only", "no store half"),
        (here(spool=True), None, "local only", "never finished"),
        (here(), UNSEALED, "local only", "no spool to finish it"),
        (None, there(), "store only", "gone from this host"),
        (None, there(manifest([], OTHER, host="elsewhere")), "store only", "host elsewhere"),
        (None, UNSEALED, "damaged", "not sealed"),
        (here(storage=None, storage_blake3=None), None, "damaged", "not sealed"),
        (here(storage=None, storage_blake3=None), there(), "damaged", "local half is not"),
        (here(problem="storage.json: is cut short"), there(), "damaged", "cut short"),
        (here(), there(manifest=None, problem="EIO"), "damaged", "EIO"),
        (here(), there(manifest="{"), "damaged", "cut short"),
        (here(paired=paired(SEAL)), there(STRANGER), "damaged", "names another local half"),
        (here(paired=paired(OTHER)), there(), "damaged", "names another store half"),
        (here(), there(), "damaged", "does not name the store half"),
        (here(paired=paired(SEAL)), None, "damaged", "is gone"),
        (here(spool=True, spooled=STRANGER, spooled_blake3=OTHER), None, "damaged", "spool"),
        (here(spool=True, spooled=MANIFEST, spooled_blake3=OTHER), there(), "damaged", "spool"),
        (here(), there(manifest([], LOCAL_DIGEST, id=LATER)), "damaged", f"web {LATER}"),
    ],
)
def test_state(local, found, state, why):
    listing = Listing(found=[found] if found else [], foreign=[])
    (entry,) = join([local] if local else [], listing, host=HOST)
    assert (entry.state, entry.vm, entry.id) == (state, "web", ID)
    assert why in entry.why
    assert bool(entry.why) == (state != "paired")
    assert entry.local == (local is not None)


@pytest.mark.parametrize(
    ("local", "state"),
    [(here(paired=paired(SEAL)), "local only"), (here(**SPOOL), "shipping")],
)
def test_a_store_that_could_not_be_asked(local, state):
    (entry,) = join([local], None, host=HOST)
    assert entry.state == state
    assert "could not be asked" in entry.why


def test_in_order_and_complete():
    local = [here(id=LATER, storage=None), here(vm="zoo", storage=None), here()]
    found = [there(vm="app", problem="EIO", manifest=None), there()]
    entries = join(local, Listing(found=found, foreign=["x"]), host=HOST)
    assert [(one.vm, one.id) for one in entries] == [
        ("app", ID), ("web", ID), ("web", LATER), ("zoo", ID),
    ]  # fmt: skip


def test_what_is_shown():
    (entry,) = join([here(paired=paired(SEAL))], Listing(found=[there()], foreign=[]), host=HOST)
    assert entry.pause_ms == 19.25
    assert (entry.ram, entry.level, entry.note) == ("none", "overlay", "before the upgrade")
    assert (entry.taken_at, entry.host) == (storage().taken_at, HOST)
