"""A guest agent that misbehaves, on a socket of its own; it notes every command that it gets."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class FakeAgent:
    """Answers as *replies* say (a value, or None for silence), else as a sound agent would."""

    def __init__(self, path: Path, replies: dict[str, Callable[[], Any]]) -> None:
        self.path, self._replies = path, replies
        self.heard: list[str] = []
        self.status = "thawed"
        self.deaf = 0
        """So many of the next clients get no answer."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def hang_up(self) -> None:
        """Nobody is there any more."""
        for one in (self._listener, self._client):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._client, _ = self._listener.accept()
                deaf, self.deaf = self.deaf > 0, max(0, self.deaf - 1)
                with self._client, contextlib.suppress(ConnectionError):
                    if deaf:
                        self._client.makefile("rb").read()
                    self._serve(self._client)

    def _serve(self, client: socket.socket) -> None:
        for line in client.makefile("rb"):
            asked = json.loads(line.lstrip(b"\xff"))
            self.heard.append(asked["execute"])
            if (answer := self._answer(asked)) is not None:
                client.sendall(answer)

    def _answer(self, asked: dict[str, Any]) -> bytes | None:
        command = asked["execute"]
        reply = self._replies[command]() if command in self._replies else self._sound(asked)
        if reply is None or isinstance(reply, bytes):
            return reply
        mark = b"\xff" if command == "guest-sync-delimited" else b""
        return mark + json.dumps({"return": reply}).encode() + b"\n"

    def _sound(self, asked: dict[str, Any]) -> Any:
        match asked["execute"]:
            case "guest-sync-delimited":
                return asked["arguments"]["id"]
            case "guest-fsfreeze-status":
                return self.status
            case "guest-fsfreeze-freeze":
                self.status = "frozen"
                return 2
            case "guest-fsfreeze-thaw":
                count = 2 if self.status == "frozen" else 0
                self.status = "thawed"
                return count
        return {}


@contextlib.contextmanager
def fake_agent(path: Path, **replies: Callable[[], Any]) -> Iterator[FakeAgent]:
    """An agent at *path*; `guest_sync_delimited=…` is its reply to that command."""
    one = FakeAgent(path, {name.replace("_", "-"): reply for name, reply in replies.items()})
    try:
        yield one
    finally:
        one.close()
