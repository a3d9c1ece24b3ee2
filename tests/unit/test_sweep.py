"""What a removal that was cut off has left goes with the next one."""

from __future__ import annotations

from pathlib import Path

from qmpsnap import Engine
from qmpsnap.engine.delete import sweep
from tests.rig.halves import ID


def test_a_folder_without_its_last_file(tmp_path: Path) -> None:
    roots = Engine(tmp_path / "local", tmp_path / "store", allow_local_store=True).roots
    snapshot = roots.local.snapshot("web", ID)
    revision = snapshot / "20991122T165057123Z"
    revision.mkdir(parents=True)
    assert sweep(roots, "web") == []
    assert not snapshot.exists()
    # whatever is in one keeps it
    revision.mkdir(parents=True)
    (snapshot / "d0.qcow2.partial").touch()
    sweep(roots, "web")
    assert not revision.exists()
    assert (snapshot / "d0.qcow2.partial").exists()
