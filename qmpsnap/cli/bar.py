"""The progress bar on a terminal: drawn when there is something to show, gone when it is done."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


_EVERY = 0.2  # seconds between two drawings


class Bar:
    """One line that says what is going on; safe to call from any thread.

    Made before the work begins, as loading rich takes longer than a guest may stand still. It has
    no thread of its own: that would draw, and hold the interpreter, in the middle of a pause.
    """

    def __init__(self) -> None:
        from rich import progress  # noqa: F401 - loaded now, needed when the first report comes

        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._what, self._next = "", 0.0
        self._task: TaskID | None = None

    def show(self, what: str, done: int, total: int) -> None:
        """*done* of *total* bytes of *what*; a *total* of 0 is not known yet."""
        with self._lock:
            progress = self._progress or self._made()
            if self._task is None or what != self._what:
                if self._task is not None:
                    progress.remove_task(self._task)
                self._task, self._what = progress.add_task(what, total=total or None), what
            progress.update(self._task, completed=done, total=total or None)
            if time.monotonic() >= self._next:
                progress.refresh()
                self._next = time.monotonic() + _EVERY

    def print(self, text: str) -> bool:
        """Print *text* above the bar. False when there is no bar."""
        with self._lock:
            if self._progress is None:
                return False
            console = self._progress.console
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            return True

    def remove(self) -> None:
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
            self._progress = self._task = None

    def _made(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
        )
        self._progress.start()
        return self._progress
