"""The only place that prints: results on stdout, all else on stderr, as text or as JSON."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Self

import msgspec

from qmpsnap.cli.bar import Bar
from qmpsnap.units import in_bytes as in_bytes

_ENDLESS = 10_000
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class Output:
    """Where one call of the program prints. Used as a context, it also takes the log."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: int = 0) -> None:
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self._bar: Bar | None = None
        self._log = _Log(self)

    def __enter__(self) -> Self:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        level = logging.ERROR if self.quiet else _LEVELS[min(self.verbose, 2)]
        logging.basicConfig(level=level, handlers=[self._log], force=True)
        if self.verbose < 3:
            logging.getLogger("asyncio").setLevel(logging.WARNING)
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()
        logging.getLogger().removeHandler(self._log)
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            return
        self.abandon()

    def record(self, value: object) -> None:
        """One JSON object as a line of its own."""
        self._write(msgspec.json.encode(value).decode())

    def line(self, text: str = "") -> None:
        self._write(_printable(text))

    def facts(self, pairs: Sequence[tuple[str, object]]) -> None:
        """Names and values, aligned; a pair whose value is None is left out."""
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            if value is not None:
                self.line(f"{name:<{width}}  {value}".rstrip())

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Aligned columns; drawn nicely where somebody looks."""
        clean = [[_printable(cell) for cell in row] for row in rows]
        if sys.stdout.isatty():
            self._draw(head, clean)
            return
        widths = [max(map(len, column)) for column in zip(head, *clean, strict=True)]
        for row in (head, *clean):
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
            self._write("  ".join(cells).rstrip())

    def notice(self, text: str) -> None:
        """For whoever looks on; not under --quiet. JSON under --json."""
        if not self.quiet:
            self.aside("notice", text)

    def aside(self, kind: str, text: str) -> None:
        """A line on stderr that is neither a result nor the error."""
        if self.json:
            self._complain(msgspec.json.encode({kind: text}).decode())
        else:
            self._complain(_printable(text if kind == "notice" else f"{kind}: {text}"))

    def failed(self, code: str, message: str, hint: str) -> None:
        """The error that the program ends with."""
        self.settle()
        if self.json:
            error = {"error": {"code": code, "message": message, "hint": hint}}
            self._complain(msgspec.json.encode(error).decode())
            return
        self._complain(_printable(f"qmpsnap: {message}"))
        if hint:
            self._complain(_printable(f"hint: {hint}"))

    def unexpected(self, bug: Exception) -> None:
        """A bug of ours: one line, and the traceback for who asks for it."""
        if self.verbose >= 2:
            self._complain("".join(traceback.format_exception(bug)).rstrip())
        told = " ".join(str(bug).split())
        hint = "" if self.verbose >= 2 else "once more with -vv for the traceback, and tell us"
        self.failed("unexpected", f"unexpected {type(bug).__name__}: {told}", hint)

    def expect_progress(self) -> None:
        """Make ready to show it, if anybody looks: to be called before a guest has to wait."""
        if sys.stderr.isatty() and not (self.json or self.quiet):
            self._bar = Bar()

    def progress(self, what: str, done: int, total: int) -> None:
        """What is going on; may be called from any thread."""
        if self._bar is not None:
            self._bar.show(what, done, total)

    def settle(self) -> None:
        """Take the progress bar off the terminal, before something else is printed there."""
        if self._bar is not None:
            self._bar.remove()

    def flush(self) -> None:
        """Let whoever reads our stdout see what was printed."""
        sys.stdout.flush()

    def abandon(self) -> None:
        """Nobody reads stdout any more: keep the interpreter from flushing it at its end."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _write(self, text: str) -> None:
        self.settle()
        sys.stdout.write(f"{text}\n")

    def _complain(self, text: str) -> None:
        if self._bar is not None and self._bar.print(text):
            return
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def _draw(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        self.settle()
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name in head:
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        # an ID or a path that is broken in two could not be copied: the terminal wraps lines itself
        Console(file=sys.stdout, width=_ENDLESS).print(table)


class _Log(logging.Handler):
    """The log, as lines on stderr."""

    def __init__(self, out: Output) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]}"
            if self._out.verbose >= 2:
                text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        self._out.aside(record.levelname.lower(), text)


def in_ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.0f} ms"


def _printable(text: str) -> str:
    """*text* without what would steer a terminal: notes and manifests come from anywhere."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else "\ufffd" for one in text)
