"""Unix sockets as the kernel sees them: the only place that asks which inode is at which end."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

_ACCEPTS = 0x10000  # __SO_ACCEPTCON in the flags of /proc/net/unix
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ESTABLISHED = 1
_SHOW_NAME_PEER = 0x1 | 0x4
_ATTR_NAME, _ATTR_PEER = 0, 2
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE


def listeners(path: Path) -> list[tuple[int, str]]:
    """Inode and name (as it was bound) of each listening socket that may be the one at *path*.

    A name may be relative, to the folder its process was in: such a one matches by its last part
    only, and the caller looks closer. Raises OSError.
    """
    real = os.path.realpath(path)
    found = []
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        # Num RefCount Protocol Flags Type St Inode Path
        fields = line.split(maxsplit=7)
        if len(fields) < 8 or not int(fields[3], 16) & _ACCEPTS:
            continue
        if may_be(fields[7], real):
            found.append((int(fields[6]), fields[7]))
    return found


def may_be(bound: str, real: str) -> bool:
    """Whether a socket bound as *bound* may lie at the resolved path *real*."""
    if bound.startswith("/"):
        return os.path.realpath(bound) == real
    return os.path.basename(bound) == os.path.basename(real)  # noqa: PTH119 (text, not a path)


def peers(bound: str) -> list[int]:
    """The inodes at the far end of the connections to the socket bound as *bound*.

    Raises OSError where the kernel has no such query.
    """
    found: list[int] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as query:
        query.settimeout(1.0)
        body = struct.pack(
            "=BBHIIIII", socket.AF_UNIX, 0, 0, 1 << _ESTABLISHED, 0, _SHOW_NAME_PEER, 2**32 - 1,
            2**32 - 1,
        )  # fmt: skip
        head = struct.pack("=IHHII", 16 + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
        query.send(head + body)
        over = False
        while not over:
            some, over = ends(query.recv(1 << 18), bound)
            found += some
    return found


def ends(answer: bytes, bound: str) -> tuple[list[int], bool]:
    """As `peers`, of what the kernel has sent at once, and whether that was the last of it.

    What is cut short is the last, too. Raises OSError: the kernel's own.
    """
    found: list[int] = []
    while len(answer) >= 20:
        length, kind = struct.unpack_from("=IH", answer)
        if kind == _ERROR:
            number = -struct.unpack_from("=i", answer, 16)[0]
            raise OSError(number, os.strerror(number))
        if kind == _DONE or length < 16:
            return found, True
        attributes = _attributes(answer[32:length])  # 16 header, 16 unix_diag_msg
        name, peer = attributes.get(_ATTR_NAME, b""), attributes.get(_ATTR_PEER, b"")
        if name.rstrip(b"\0") == os.fsencode(bound) and len(peer) == 4:
            found.append(struct.unpack("=I", peer)[0])
        answer = answer[(length + 3) & ~3 :]
    return found, bool(answer)


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found
