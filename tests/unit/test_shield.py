"""A debt is paid to its end, whatever happens to the one that pays it."""

from __future__ import annotations

import asyncio
import logging

import pytest

from qmpsnap.shield import finish


class Debt:
    """Paid when *gate* opens; *begun* tells that it is being paid."""

    def __init__(self) -> None:
        self.begun, self.gate, self.paid = asyncio.Event(), asyncio.Event(), False

    async def pay(self, trouble: Exception | None = None) -> str:
        self.begun.set()
        await self.gate.wait()
        if trouble is not None:
            raise trouble
        self.paid = True
        return "paid"


async def test_what_the_debt_gives_is_given() -> None:
    debt = Debt()
    debt.gate.set()
    assert await finish(debt.pay(), within=5) == "paid"


async def test_what_the_debt_raises_is_raised() -> None:
    debt = Debt()
    debt.gate.set()
    with pytest.raises(OSError, match="no"):
        await finish(debt.pay(OSError("no")), within=5)


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_cancellations_wait_until_it_is_paid(times: int) -> None:
    debt = Debt()
    owner = asyncio.create_task(finish(debt.pay(), within=5))
    await debt.begun.wait()
    for number in range(times):
        owner.cancel(f"number {number}")
        await asyncio.wait([owner], timeout=0.01)
        assert not owner.done()
    debt.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert debt.paid


async def test_a_failure_under_a_cancellation_is_told_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    debt = Debt()
    owner = asyncio.create_task(finish(debt.pay(OSError("no")), within=5))
    await debt.begun.wait()
    owner.cancel()
    debt.gate.set()
    with caplog.at_level(logging.ERROR), pytest.raises(asyncio.CancelledError):
        await owner
    assert "a debt failed while its owner was being cancelled" in caplog.text


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_debt_that_cannot_be_paid_has_a_deadline(cancelled: bool) -> None:
    debt = Debt()
    owner = asyncio.create_task(finish(debt.pay(), within=0.05))
    await debt.begun.wait()
    if cancelled:
        owner.cancel()
    with pytest.raises(asyncio.CancelledError if cancelled else TimeoutError):
        await owner
    assert not debt.paid
