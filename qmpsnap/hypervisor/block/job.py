"""Jobs: started, watched, and gone again however the block around them ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial

import msgspec

from qmpsnap.errors import CommandRefused, JobFailed, MonitorLost
from qmpsnap.hypervisor.monitor import Events, Monitor, settle
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
        return _of(await query(self._monitor), self.id)

    async def complete(self) -> None:
        await self._monitor.execute("job-complete", {"id": self.id})


@asynccontextmanager
async def job(
    monitor: Monitor, verb: str, id: str, arguments: Mapping[str, object]
) -> AsyncIterator[Job]:
    """Start *verb* as the job *id* and own it: however the block ends, the job is gone."""
    with monitor.listen("JOB_STATUS_CHANGE") as events:
        ours = True  # from the moment that it is sent
        try:
            try:
                await monitor.execute(verb, {"job-id": id, "auto-dismiss": False, **arguments})
            except CommandRefused:
                ours = False  # a job of this name is somebody else's
                raise
            yield Job(id, monitor, events)
        finally:
            if ours:
                with suppress(MonitorLost):  # out of reach: `recover` finds it
                    await finish(settle(monitor, partial(end, id=id)), within=60)


async def end(monitor: Monitor, id: str) -> None:
    """Cancel the job *id* if it is at work, and dismiss it; nothing to do if there is none."""
    with monitor.listen("JOB_STATUS_CHANGE") as events:
        while (info := _of(await query(monitor), id)) is not None:
            verb = "job-dismiss" if info.status == "concluded" else "job-cancel"
            with suppress(CommandRefused):  # it may have moved on since we asked
                await monitor.execute(verb, {"id": id})
            if verb == "job-cancel":
                # the change may have come before we listened: look again
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await events.next()


async def query(monitor: Monitor) -> list[JobInfo]:
    """All jobs of this QEMU, whoever started them, the concluded ones too."""
    return await monitor.query("query-jobs", list[JobInfo])


async def at_work(monitor: Monitor) -> list[JobInfo]:
    """The jobs of this QEMU that are not concluded, whoever started them."""
    return [job for job in await query(monitor) if job.status not in {"concluded", "null"}]


def _of(jobs: list[JobInfo], id: str) -> JobInfo | None:
    return next((job for job in jobs if job.id == id), None)
