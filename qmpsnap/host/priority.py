"""Work that may take its time: it gets the CPU only when nobody else, the guest above all, does."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

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
