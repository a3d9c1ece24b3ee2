"""Debts that outlive cancellation: the one place that makes a coroutine deaf to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


async def finish(debt: Coroutine[Any, Any, T], *, within: float) -> T:
    """Pay *debt* to its end, or to its own deadline, however often the caller is cancelled.

    A cancellation that arrives meanwhile is handed on once the debt is paid. Should the debt fail
    as well, its failure goes to the log, as only one of the two can be raised.

    Raises what *debt* raises, TimeoutError after *within* seconds, or CancelledError.
    """
    paying = asyncio.create_task(asyncio.wait_for(debt, within))
    cancellations: list[asyncio.CancelledError] = []
    while not paying.done():
        try:
            # wait(), unlike a plain await, leaves the task alone when we are cancelled
            await asyncio.wait([paying])
        except asyncio.CancelledError as one:
            cancellations.append(one)
    if not cancellations:
        return paying.result()
    if not paying.cancelled() and (failure := paying.exception()) is not None:
        log.error("a debt failed while its owner was being cancelled", exc_info=failure)
    raise cancellations[0]
