"""A verb as a soak runs it: on SIGUSR1 it says what each of its tasks waits for."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from typing import Any

from qmpsnap.cli.main import main


def _tell(*_: object) -> None:
    for task in asyncio.all_tasks():
        print(f"{task.get_name()} waits in {' > '.join(_frames(task))}", file=sys.stderr)


def _frames(task: asyncio.Task[Any]) -> Iterator[str]:
    """Where each coroutine stands, the outermost first, as far as Python tells."""
    at: Any = task.get_coro()
    while at is not None:
        frame = getattr(at, "cr_frame", None) or getattr(at, "gi_frame", None)
        if frame is not None:
            name = frame.f_code.co_filename.rpartition("/")[2]
            yield f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        at = getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _tell)
    sys.exit(main())
