"""Work that may take its time: it gets the CPU only when nobody else, the guest above all, does."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

from qmpsnap.shield import finish

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
_NICE = 10  # about a tenth of a busy CPU: less would never end on a host that is full


def lower() -> None:
    """The calling thread, and those that it starts from now on, yield to all others."""
    # on Linux a thread has a nice value of its own (sched(7))
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


async def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run the blocking *function* in a thread that yields."""
    executor = ThreadPoolExecutor(1, "qmpsnap-background", initializer=lower)
    try:
        return await asyncio.get_running_loop().run_in_executor(
            executor, lambda: function(*args, **kwargs)
        )
    finally:
        executor.shutdown(wait=False)


async def stoppable(work: Callable[[Callable[[], bool]], T]) -> T:
    """As `in_background`; *work* is given what it asks, time and again, whether to give up.

    Cancelled, it is told so and waited for: nothing of it goes on behind the caller's back.
    """
    stop = threading.Event()
    task = asyncio.ensure_future(in_background(work, stop.is_set))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        with suppress(TimeoutError):  # a target that hangs: the thread ends when it no more does
            await finish(_ended(task), within=60)
        raise


async def _ended(task: asyncio.Future[T]) -> None:
    await asyncio.wait({task})
    if not task.cancelled() and (failure := task.exception()):
        log.debug("stopped: %s", failure)
