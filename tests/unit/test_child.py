"""What we start ends with us, also when we end before the kernel was told to see to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from qmpsnap.child import dying_with_us


def _ran(parent: int, at: Path) -> int:
    *words, _ = dying_with_us(signal.SIGTERM)
    return subprocess.run([*words, str(parent), "touch", at], check=False).returncode


def test_who_was_started_by_somebody_that_is_no_more_does_not_begin(tmp_path: Path) -> None:
    orphan, child = tmp_path / "orphan", tmp_path / "child"
    assert _ran(os.getppid(), orphan) != 0
    assert not orphan.exists()
    assert _ran(os.getpid(), child) == 0  # the control
    assert child.exists()


def test_it_gets_its_signal_when_its_parent_dies(tmp_path: Path) -> None:
    told = tmp_path / "told"
    script = f"trap 'echo term >{told}; exit' TERM; echo ready; while :; do sleep 0.05; done"
    starter = (
        "import signal, subprocess, sys; from qmpsnap.child import dying_with_us as prefix; "
        "subprocess.Popen([*prefix(signal.SIGTERM), 'sh', '-c', sys.argv[1]]); signal.pause()"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", starter, script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        assert parent.stdout.read() == b""  # until the last who has it has ended
    assert told.read_text() == "term\n"
