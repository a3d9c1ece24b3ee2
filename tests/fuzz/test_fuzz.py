"""A small part of the fuzzing, always the same one; and that its witness and its limits see."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from qmpsnap.errors import LocalFailed
from tests.fuzz.guard import WroteOutside, guarded
from tests.fuzz.run import tried
from tests.fuzz.shrink import smallest
from tests.fuzz.surface import Surface, judged
from tests.fuzz.surfaces import SURFACES

_FEW, _SLOW = 60, 12


@pytest.mark.parametrize("name", SURFACES)
def test_nothing_odd_is_more_than_an_error_in_one_line(name: str) -> None:
    surface = SURFACES[name]
    failed, found = tried(surface, 7, 0, _SLOW if surface.slow else _FEW)
    assert not failed, found


@pytest.mark.parametrize("name", SURFACES)
def test_what_is_good_is_understood(name: str) -> None:
    surface = SURFACES[name]
    seeds = surface.good()
    assert seeds
    with guarded() as scratch:
        assert all(judged(surface, one, scratch) is None for one in seeds[:3])


def test_an_input_is_always_the_same() -> None:
    surface = SURFACES["storage"]
    assert [surface.input(1, n) for n in range(20)] == [surface.input(1, n) for n in range(20)]
    assert surface.input(1, 3) != surface.input(2, 3)


def test_the_witness_sees_what_is_written_elsewhere(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "file").touch()
    with guarded() as scratch:
        (scratch / "mine").write_text("x")
        (scratch / "mine").unlink()
        for write in (
            lambda: (tmp_path / "new").write_text("x"),
            lambda: os.open(tmp_path / "new", os.O_CREAT | os.O_WRONLY),
            lambda: (tmp_path / "new").mkdir(),
            lambda: shutil.rmtree(there, ignore_errors=True),
            lambda: (there / "file").rename(scratch / "file"),
            lambda: (scratch / "link").symlink_to("x") or (there / "file").unlink(),
            lambda: os.system("true"),
        ):
            with pytest.raises(WroteOutside):
                write()
    assert [one.name for one in tmp_path.iterdir()] == ["there"]
    assert (there / "file").exists()
    (tmp_path / "afterwards").touch()  # nobody looks any more


def _surface(tried: object) -> Surface:
    return Surface("x", lambda: [b""], tried)  # type: ignore[arg-type]


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.surface.SECONDS", 0.05)

    def raising(error: BaseException) -> object:
        def tried(_given: object, _scratch: Path) -> object:
            raise error

        return tried

    with guarded(256 << 20) as scratch:
        odd = {
            "KeyError": raising(KeyError("x")),
            "RecursionError": raising(RecursionError()),
            "MemoryError": lambda *_: bytes(1 << 30),
            "takes long": lambda *_: time.sleep(5),
            "names no x.json": raising(LocalFailed("no name")),
            "writes": lambda *_: Path("/nowhere-at-all").write_text(""),
        }
        for kind, tried_ in odd.items():
            surface = Surface("x", list, tried_, named="x.json" if "names" in kind else "")  # type: ignore[arg-type]
            found = judged(surface, b"", scratch)
            assert found is not None, kind
            assert found.kind.startswith(kind), found
        assert judged(_surface(raising(LocalFailed("so it is"))), b"", scratch) is None


def test_a_case_is_made_small() -> None:
    assert smallest(b"aaaXbbb", lambda one: b"X" in one) == b"X"
    assert smallest({"a": [1, {"b": "xyz"}], "c": 2}, lambda one: "y" in str(one)) == {
        "a": [{"b": "y"}]
    }
