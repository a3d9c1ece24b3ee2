"""Runs a verb: options become a `Call`, signals a cancellation, what is raised an exit code."""

from __future__ import annotations

import functools
import inspect
import signal
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import TYPE_CHECKING

from qmpsnap.cli import options
from qmpsnap.cli.target import Call

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output

_NO_MEMORY = "look at its limits (`ulimit -a`, its control group); `qmpsnap recover VM` then"
Work = Callable[..., Coroutine[object, object, int | None]]


def verb(
    *, sockets: bool = True, roots: bool = True, insecure: bool = False
) -> Callable[[Work], Callable[..., int]]:
    """Makes a command of a coroutine function that takes a `Call` and its own options.

    The shared options are added behind its own, with *insecure* that of what need not be trusted.
    The command gives the exit code.
    """
    shared = {
        **(options.SOCKETS if sockets else {}),
        **(options.INSECURE if insecure else {}),
        **(options.ROOTS if roots else options.CONFIG if sockets else {}),
        **options.OUTPUT,
    }

    def made(work: Work) -> Callable[..., int]:
        own = list(inspect.signature(work, eval_str=True).parameters.values())[1:]
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
            for name, (kind, default) in shared.items()
        ]

        @functools.wraps(work)
        def command(**words: object) -> int:
            given = {name: words.pop(name) for name in shared}
            return _run(work, given, words)

        # typer reads these two
        command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in (*own, *added)}
        return command

    return made


def _run(work: Work, given: dict[str, object], words: dict[str, object]) -> int:
    from qmpsnap.cli.render import Output

    out = Output(
        json=bool(given.pop("json")),
        quiet=bool(given.pop("quiet")),
        verbose=int(str(given.pop("verbose"))),
    )
    with out:
        call = Call(out, **given)  # type: ignore[arg-type]
        return _exit_code(call, lambda: work(call, **words))


def _exit_code(call: Call, start: Callable[[], Coroutine[object, object, int | None]]) -> int:
    import asyncio

    from qmpsnap.errors import SnapError

    out, caught = call.out, call.caught
    try:
        return asyncio.run(_until_signalled(start, caught, out)) or 0
    except SnapError as failed:
        out.failed(failed.code, str(failed), failed.hint)
        return failed.exit_code
    except asyncio.CancelledError:
        by = caught[0] if caught else signal.SIGTERM
        out.failed("interrupted", f"interrupted by {by.name}; all debts are paid", "")
        return call.interrupted_code
    except BrokenPipeError:
        out.abandon()  # whoever read our stdout has seen enough
        return 0
    except OSError as failed:
        where = f"{failed.filename}: " if failed.filename else ""
        out.failed("os-error", f"{where}{failed.strerror or failed}", "")
        return 4
    except Exception as bug:  # noqa: BLE001 - the last face before the user: one line, no traceback
        if _no_memory(bug):
            out.failed("no-memory", "no memory is left for this process", _NO_MEMORY)
        else:
            out.unexpected(bug)
        return 4


def _no_memory(failed: BaseException) -> bool:
    """Python spells a thread that got no stack in words only."""
    return isinstance(failed, MemoryError) or "can't start new thread" in str(failed)


async def _until_signalled(
    start: Callable[[], Coroutine[object, object, int | None]],
    caught: list[signal.Signals],
    out: Output,
) -> int | None:
    """The verb, cancelled by the first SIGINT, SIGTERM or SIGHUP; further ones change nothing.

    asyncio.run's own handler would break off at the second Ctrl-C, with the guest stopped.
    """
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def cancel(number: int) -> None:
        caught.append(signal.Signals(number))
        if len(caught) == 1:
            task.cancel()
        else:
            out.notice("still giving the guest back as it was; this ends by itself")

    def handler(number: int, frame: FrameType | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(cancel, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # whoever started us with nohup or `&` wants us not to hear this one
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    return await start()
