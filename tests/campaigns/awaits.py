"""Every suspension of every task of an event loop, seen; and the one place that strikes at one."""

from __future__ import annotations

import asyncio
import collections
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType
from typing import Any

import qmpsnap

_PACKAGE = str(Path(qmpsnap.__file__).parent) + os.sep
_WAITS = (CoroutineType, GeneratorType, AsyncGeneratorType)


@dataclass(frozen=True, slots=True)
class Strike:
    """A signal to this very process, where a task waits at *position* for the *visit*-th time.

    *moment*: `suspended`, just when it has begun to wait, or `resumed`, when what it waited for
    is there and it has not gone on yet.
    """

    position: str
    moment: str = "suspended"
    visit: int = 1
    number: signal.Signals = signal.SIGKILL


@dataclass(slots=True)
class Eye:
    """What was seen: how often a task waited at each position, in the order of the first times.

    A position is the chain of `file:line` of qmpsnap from the outermost frame that awaits to the
    innermost, after that of whoever made the task. *suspensions* counts all, those of tasks of
    libraries too, and *ends* tasks that ended or were closed.
    """

    strike: Strike | None = None
    visits: collections.Counter[str] = field(default_factory=collections.Counter)
    suspensions: int = 0
    ends: int = 0
    _returns: collections.Counter[str] = field(default_factory=collections.Counter)

    def loop(self) -> asyncio.AbstractEventLoop:
        """A new event loop whose tasks are all looked at."""
        loop = asyncio.new_event_loop()
        loop.set_task_factory(self._task)
        return loop

    def _task(
        self, loop: asyncio.AbstractEventLoop, coro: Any, context: Any = None
    ) -> asyncio.Task[Any]:
        return asyncio.Task(_Watched(coro, self, _made_by()), loop=loop, context=context)

    def suspended(self, position: str) -> None:
        self.suspensions += 1
        if position:
            self.visits[position] += 1
            self._hit(position, "suspended", self.visits[position])

    def resumed(self, position: str) -> None:
        if position:
            self._returns[position] += 1
            self._hit(position, "resumed", self._returns[position])

    def _hit(self, position: str, moment: str, visit: int) -> None:
        aim = self.strike
        if aim is not None and (aim.position, aim.moment, aim.visit) == (position, moment, visit):
            self.strike = None
            os.kill(os.getpid(), aim.number)


class _Watched(Coroutine[Any, Any, Any]):
    """A task's coroutine; all that the task gives it and gets from it passes here."""

    def __init__(self, inner: Any, eye: Eye, made_by: str) -> None:
        self._inner, self._eye, self.made_by = inner, eye, made_by
        self._at: str | None = None  # where it waits; None: it has not begun

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *failure: Any) -> Any:
        return self._step(self._inner.throw, *failure)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise TypeError("a task steps it")

    def _step(self, step: Callable[..., Any], *given: Any) -> Any:
        if self._at is not None:
            self._eye.resumed(self._at)
        try:
            waits_for = step(*given)
        except BaseException:
            self._eye.ends += 1
            raise
        own = chain(self._inner)
        self._at = " | ".join(part for part in (self.made_by, own) if part) if own else ""
        self._eye.suspended(self._at)
        return waits_for


def chain(waiting: Any) -> str:
    """The lines of qmpsnap in which *waiting*, a suspended coroutine, awaits; outermost first."""
    found = []
    while waiting is not None:
        if not isinstance(waiting, _WAITS):
            # a step of an asynchronous generator leads to that; a future leads no further
            inner = [one for one in gc.get_referents(waiting) if isinstance(one, _WAITS)]
            waiting = inner[0] if inner else None
            continue
        frame, waiting = _frame_and_next(waiting)
        if frame is not None and (line := _line(frame.f_code, frame.f_lineno)):
            found.append(line)
    return " > ".join(found)


def _frame_and_next(waiting: Any) -> tuple[FrameType | None, Any]:
    if isinstance(waiting, CoroutineType):
        return waiting.cr_frame, waiting.cr_await
    if isinstance(waiting, GeneratorType):
        return waiting.gi_frame, waiting.gi_yieldfrom
    return waiting.ag_frame, waiting.ag_await


def _made_by() -> str:
    """Who makes a task now: the lines of qmpsnap on the stack, and who made their own task."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _Watched._step.__code__:
            maker: _Watched = frame.f_locals["self"]
            return " | ".join(part for part in (maker.made_by, " > ".join(found)) if part)
        if line := _line(frame.f_code, frame.f_lineno):
            found.insert(0, line)
        frame = frame.f_back
    return " > ".join(found)


def _line(code: CodeType, number: int) -> str:
    name = code.co_filename
    return f"{name.removeprefix(_PACKAGE)}:{number}" if name.startswith(_PACKAGE) else ""
