"""Jobs: started, watched, and gone again however the block around them ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import msgspec

from qmpsnap.errors import CommandRefused, JobFailed
from qmpsnap.hypervisor.monitor import Events, Monitor
from qmpsnap.shield import finish


class JobInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """One row of query-jobs; progress is in units of the job, bytes for block jobs."""

    id: str
    type: str
    status: str
    current_progress: int = 0
    total_progress: int = 0
    error: str = ""


class Job:
    """One job of ours, from created to dismissed."""

    def __init__(self, id: str, monitor: Monitor, events: Events) -> None:
        self.id, self._monitor, self._events = id, monitor, events

    async def reaches(self, *statuses: str) -> JobInfo:
        """Wait until the job is in one of *statuses*.

        Raises JobFailed with QEMU's words when it ends in an error, or ends too early.
        """
        while True:
            info = await self.info()
            if info is not None and info.error:
                raise JobFailed(f"job {self.id}: {info.error}")
            if info is not None and info.status in statuses:
                return info
            if info is None or info.status in {"concluded", "aborting", "null"}:
                raise JobFailed(f"job {self.id} ended before it was {' or '.join(statuses)}")
            await self._events.next()

    async def info(self) -> JobInfo | None:
        """How it stands; None when QEMU knows it no more."""
        jobs = await self._monitor.query("query-jobs", list[JobInfo])
        return next((job for job in jobs if job.id == self.id), None)

    async def complete(self) -> None:
        await self._monitor.execute("job-complete", {"id": self.id})

    async def gone(self) -> None:
        """Cancel it if it is at work, and dismiss it."""
        while (info := await self.info()) is not None:
            with suppress(CommandRefused):  # it may have moved on since we asked
                verb = "job-dismiss" if info.status == "concluded" else "job-cancel"
                await self._monitor.execute(verb, {"id": self.id})
                if verb == "job-cancel":
                    async with asyncio.timeout(10):
                        await self._events.next()


@asynccontextmanager
async def job(
    monitor: Monitor, verb: str, id: str, arguments: Mapping[str, object]
) -> AsyncIterator[Job]:
    """Start *verb* as the job *id* and own it for the block."""
    with monitor.listen("JOB_STATUS_CHANGE") as events:
        owned = Job(id, monitor, events)
        try:
            await monitor.execute(verb, {"job-id": id, "auto-dismiss": False, **arguments})
            yield owned
        finally:
            if not monitor.lost:
                await finish(owned.gone(), within=30)


async def at_work(monitor: Monitor) -> list[JobInfo]:
    """The jobs of this QEMU that are not concluded, whoever started them."""
    jobs = await monitor.query("query-jobs", list[JobInfo])
    return [job for job in jobs if job.status not in {"concluded", "null"}]
