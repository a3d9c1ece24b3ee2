"""Runs of a verb, told to Prometheus if that is wanted."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qmpsnap.cli.target import Call
    from qmpsnap.engine.engine import Engine
    from qmpsnap.engine.metrics import Run

log = logging.getLogger(__name__)

MetricsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write how this run went, and what snapshots the VM has, as a text file for "
        "Prometheus' node_exporter; one for each VM and verb. Default: none.",
        show_default=False,
    ),
]


@asynccontextmanager
async def metered(
    call: Call, path: Path | None, engine: Engine, vm: str, verb: str
) -> AsyncIterator[Run]:
    """The block is the run. However it ends, the file *path* tells; nothing fails for its sake."""
    import asyncio  # not for --help

    from qmpsnap.engine.metrics import Run
    from qmpsnap.errors import SnapError

    run, clock = Run(vm, verb, time.time()), time.monotonic()
    try:
        yield run
    except SnapError as failed:
        run.exit_code = failed.exit_code
        raise
    except BaseException as other:
        cancelled = isinstance(other, asyncio.CancelledError)
        run.exit_code = call.interrupted_code if cancelled else 4
        raise
    finally:
        run.seconds = time.monotonic() - clock
        if path is not None:
            await _written(path, engine, run)


async def _written(path: Path, engine: Engine, run: Run) -> None:
    from qmpsnap.engine import metrics
    from qmpsnap.errors import SnapError
    from qmpsnap.shield import finish

    try:
        entries = await finish(engine.list(run.vm), within=60)
        metrics.write(path, metrics.text(run, entries))
    except (SnapError, TimeoutError) as failed:
        log.warning("no metrics: %s", failed)
