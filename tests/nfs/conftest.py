"""Steers the NFS server of the rig."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Server = Callable[..., dict[str, Any]]


@pytest.fixture
def server() -> Iterator[Server]:
    """Steers the NFS server: one line to $NFSCTL, one JSON line back. It is mended at the end."""
    if "NFSCTL" not in os.environ:
        told = "needs the rig that gives a real NFS mount: docs/hacking-nfs.md"
        if os.environ.get("QMPSNAP_EXPECT_NFS"):
            pytest.fail(told)
        pytest.skip(told)
    host, port = os.environ["NFSCTL"].split(":")

    def steer(*words: object) -> dict[str, Any]:
        with socket.create_connection((host, int(port))) as wire:
            wire.sendall((" ".join(map(str, words)) + "\n").encode())
            answer: dict[str, Any] = json.loads(wire.makefile().readline())
        assert answer["ok"], answer
        return answer

    yield steer
    steer("unfill")
