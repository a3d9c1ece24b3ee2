"""A row is found by its digest, and only that one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.store.ramrows import DIGEST, Rows


@given(st.lists(st.integers(0, 50).map(lambda n: bytes([n]) * DIGEST), max_size=60))
def test_it_is_as_good_as_a_dict(digests: list[bytes]) -> None:
    first: dict[bytes, int] = {}
    grown = bytearray()
    rows = Rows(grown)
    for row, digest in enumerate(digests):
        assert rows.find(digest) == first.get(digest)
        grown += digest
        rows.add(row)
        first.setdefault(digest, row)
    assert [rows.find(digest) for digest in digests] == [first[digest] for digest in digests]
    assert rows.find(b"\xff" * DIGEST) is None


def test_it_grows_and_tells_apart_what_has_the_same_place() -> None:
    digests = [b"same six" + n.to_bytes(DIGEST - 8, "big") for n in range(200)]
    digests += [n.to_bytes(DIGEST, "little") for n in range(1, 5000)]
    rows = Rows(b"".join(digests))
    for row in range(len(digests)):
        rows.add(row)
    assert [rows.find(digest) for digest in digests] == list(range(len(digests)))
