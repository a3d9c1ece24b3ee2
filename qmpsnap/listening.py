"""Whether somebody listens on a unix socket: its file alone, which a killed server leaves, does
not tell."""

from __future__ import annotations

from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket


def listens(path: Path) -> bool:
    """Whether somebody listens at *path*. Does not wait, and raises nothing."""
    with socket(AF_UNIX, SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # so many connect that it has no room for us
        except OSError:
            return False
    return True
