import os
import stat

import pytest

from qmpsnap import private


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_no_folder_on_the_way_is_open(tmp_path, umask):
    before = os.umask(umask)
    try:
        private.folders(tmp_path / "a/b/c")
        private.folders(tmp_path / "a/b/d")
        private.folders(tmp_path / "a/b")
        with open(tmp_path / "a/log", "ab", opener=private.opener):
            pass
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert found == {"a": 0o700, "b": 0o700, "c": 0o700, "d": 0o700, "log": 0o600}


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "a").touch()
    for path in (tmp_path / "a", tmp_path / "a/b"):
        with pytest.raises(NotADirectoryError):
            private.folders(path)
