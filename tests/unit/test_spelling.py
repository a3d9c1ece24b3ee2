"""Names that are no text: no reason to have no snapshot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec

from qmpsnap import spelling
from qmpsnap.engine import tpm

ODD = os.fsdecode(b"/run/swtpm-\xff\xc3\xa4")


def test_what_is_text_is_left_alone() -> None:
    for text in ("", "/boot/vmlinuz", "/ä/\U0001f427", "a\\udcff"):
        assert spelling.spelled(text) == text
    assert spelling.spelled(ODD) == "/run/swtpm-\\udcffä"
    assert spelling.spelled("\ud800") == "\\ud800"


def test_everywhere_in_a_file() -> None:
    tree = {ODD: [ODD, 1, None, {"ä": ODD, "yes": True}]}
    name = "/run/swtpm-\\udcffä"
    assert json.loads(spelling.encode(tree)) == {name: [name, 1, None, {"ä": name, "yes": True}]}


def test_a_tpm_whose_socket_and_keys_are_no_text(tmp_path: Path) -> None:
    facts = msgspec.structs.replace(
        tpm.nothing("tpm0", f"{ODD}: cannot be read", Path(ODD)),
        keys=[tpm.Key(option="key", value=f"file={ODD},mode=aes-cbc")],
    )
    assert tpm.write(tmp_path, tpm.Held(facts, None, None)) == [tpm.NAME]
    found = msgspec.json.decode((tmp_path / tpm.NAME).read_bytes(), type=tpm.Tpm)
    assert found.socket == "/run/swtpm-\\udcffä"
    assert found.keys[0].file == found.socket
