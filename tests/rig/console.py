"""The only place that speaks with the test guest: its console, and its heartbeat."""

import asyncio
import itertools
import re
import socket
import threading
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# The witness speaks at any moment, also in the middle of another command's output.
_TICK = re.compile(r"W [0-9a-f]{16} \d+\n")
_ALARM = re.compile(r"WITNESS BAD [^\n]*\n")
_PAST = 4000  # characters
_VERDICT = re.compile(
    r"^(OK|BAD) nonce=([0-9a-f]{16}) ram=(\d+)(?: disk0=(\d+)\S*)?(?: disk1=(\d+))?", re.M
)


class ConsoleLost(ConnectionError):
    """The console's other end has gone."""


class CommandFailed(AssertionError):
    """A command in the guest ended with another status than 0; its output is the message."""


@dataclass(frozen=True, slots=True)
class Witness:
    """What the witness knows in RAM, and what the disks hold past the guest's page cache."""

    nonce: str
    ram: int
    disk0: int | None
    disk1: int | None
    ok: bool


class Console:
    """The guest's shell on a serial port; one reader at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._text = ""
        self._serial = itertools.count(time.monotonic_ns() % 1_000_000_000)
        self.alarms: list[str] = []
        """Mismatches that the witness found by itself, as far as they have been read."""
        self.past = ""
        """The end of what has been taken."""

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path | str) -> AsyncIterator[Self]:
        """Connect to the chardev's unix socket."""
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()

    async def until(self, pattern: str, *, within: float) -> re.Match[str]:
        """Read on to the first match and take all up to its end. Raises TimeoutError."""
        wanted = re.compile(pattern, re.M)
        async with asyncio.timeout(within):
            while not (match := wanted.search(self._text)):
                data = await self._reader.read(65536)
                if not data:
                    raise ConsoleLost(f"no {pattern!r} in {self._text[-400:]!r}")
                self._text += data.decode(errors="replace").replace("\r", "")
        taken, self._text = self._text[: match.end()], self._text[match.end() :]
        self.alarms += _ALARM.findall(taken)
        self.past = (self.past + taken)[-_PAST:]
        return match

    async def listen(self) -> None:
        """Read until cancelled, and keep what the witness complains of.

        A port whose client does not read stands still: so it is in a snapshot, and after a restore.
        """
        while data := await self._reader.read(65536):
            self._text += data.decode(errors="replace").replace("\r", "")
            *lines, self._text = self._text.split("\n")
            self.alarms += _ALARM.findall("".join(f"{line}\n" for line in lines))

    async def run(self, command: str, *, within: float) -> str:
        """Run one line in the guest's shell; what it printed. Raises CommandFailed."""
        output, status = await self._call(command, within)
        if status:
            raise CommandFailed(f"{command!r} ended with {status}: {output}")
        return output

    async def witness(self, *, within: float) -> Witness:
        """Ask whether RAM and disks are of one instant, and always were."""
        # it starts beside READY, and has its first round behind it a little later
        await self._call("until [ -s /run/witness ]; do sleep 0.01; done", within)
        output, _ = await self._call("witness-check", within)
        verdict = _VERDICT.search(output)
        if verdict is None:
            raise CommandFailed(f"witness-check said {output!r}")
        word, nonce, ram, *disks = verdict.groups()
        disk0, disk1 = (None if count is None else int(count) for count in disks)
        return Witness(nonce, int(ram), disk0, disk1, ok=word == "OK")

    async def _call(self, command: str, within: float) -> tuple[str, int]:
        # The marks as sent do not match the marks as printed: an echo cannot deceive us.
        mark = next(self._serial)
        line = f"printf '\\n<%s\\n' {mark}\n{command}\nprintf '\\n<{mark} %s>\\n' ${{status:-2}}\n"
        self._writer.write(line.encode())
        await self._writer.drain()
        found = await self.until(rf"(?s)^<{mark}\n(.*?)\n<{mark} (\d+)>\n", within=within)
        # the witness may have spoken between the mark and the line break before it
        output = _ALARM.sub("", _TICK.sub("", found[1] + "\n"))
        return output.replace("guest# ", "").strip("\n"), int(found[2])


class Heartbeat:
    """Arrival times of the guest's heartbeat, one about every millisecond while it runs."""

    def __init__(self) -> None:
        self._arrivals = array("q")

    @classmethod
    @contextmanager
    def open(cls, path: Path | str) -> Iterator[Self]:
        """Connect to the port's unix socket and note arrivals until the block ends."""
        self = cls()
        with socket.socket(socket.AF_UNIX) as wire:
            wire.connect(str(path))
            # A thread, because an event loop that is busy would count as the guest's silence.
            reader = threading.Thread(target=self._read, args=(wire,), daemon=True)
            reader.start()
            try:
                yield self
            finally:
                wire.shutdown(socket.SHUT_RDWR)
                reader.join()

    def _read(self, wire: socket.socket) -> None:
        while wire.recv(65536):
            self._arrivals.append(time.monotonic_ns())

    @property
    def count(self) -> int:
        """How many arrivals there were so far."""
        return len(self._arrivals)

    @staticmethod
    def mark() -> int:
        """Now, as silence() counts time: time.monotonic_ns()."""
        return time.monotonic_ns()

    def silence(self, since: int, until: int) -> float:
        """Seconds of the largest silence that touches the time between two marks."""
        arrivals = self._arrivals[:]
        # The silence that begins before a mark or is cut short by the end counts in full.
        ends = [*arrivals, until] if not arrivals or arrivals[-1] < until else [*arrivals]
        gaps = (
            end - start
            for start, end in itertools.pairwise([min(since, *ends), *ends])
            if end >= since and start <= until
        )
        return max(gaps, default=0) / 1e9
