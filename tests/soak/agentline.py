"""The way to a guest's agent, with somebody on it who cuts, swallows, garbles or delays."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class AgentLine:
    """Carries bytes between *path* and the agent at *behind*, and misbehaves as *how* says.

    `deaf`: no answer comes back; `garbage`: junk comes instead; `late`: after three seconds; `cut`:
    the line is cut at the first answer. "": all is well. *happened* counts the answers that it
    spoiled since *how* was set.
    """

    def __init__(self, path: Path, behind: Path) -> None:
        self.path, self.behind = path, behind
        self.how = ""
        self.happened = 0
        self._over = threading.Event()

    def fails(self, how: str) -> None:
        self.how, self.happened = how, 0

    def run(self) -> None:
        """Serve one client after the other until `end`."""
        self.path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen(4)
            while not self._over.is_set():
                if not select.select([listener], [], [], 0.2)[0]:
                    continue
                client, _ = listener.accept()
                with client, contextlib.suppress(OSError):
                    self._serve(client)

    def end(self) -> None:
        self._over.set()

    def _serve(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(str(self.behind))
            while not self._over.is_set():
                for one in select.select([client, agent], [], [], 0.2)[0]:
                    data = one.recv(65536)
                    if not data:
                        return
                    if one is client:
                        agent.sendall(data)
                    elif not self._answered(client, data):
                        return

    def _answered(self, client: socket.socket, data: bytes) -> bool:
        if not self.how:
            client.sendall(data)
            return True
        self.happened += 1  # before a client that has not waited can be met
        match self.how:
            case "cut":
                return False
            case "late":
                time.sleep(3)
                client.sendall(data)
            case "garbage":
                client.sendall(b"\xff%&/ no JSON {\n")
        return True


@contextlib.contextmanager
def agent_line(path: Path, behind: Path) -> Iterator[AgentLine]:
    """The line for the block."""
    line = AgentLine(path, behind)
    thread = threading.Thread(target=line.run, daemon=True)
    thread.start()
    try:
        yield line
    finally:
        line.end()
        thread.join()
