"""The process that reads a guest's RAM out of a pipe into a file, and never stops reading.

Run as a plain script (`python -I -S drain.py PIPE FILE`, two descriptors). A background save
whose target stops taking data stops the guest, and on QEMU 7.2 one whose target fails hangs it
for ever: so after a failed write the rest is read and thrown away, and the report says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys

_CHUNK = 1 << 20


def drain(pipe: int, file: int) -> dict[str, object]:
    """Move all of *pipe* into *file*, sync it, and say how many bytes and what went wrong."""
    with contextlib.suppress(OSError):  # past the user's limit for pipes: a smaller one serves
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _CHUNK)
    moved, error = 0, ""
    while not error:
        try:
            count = os.splice(pipe, file, _CHUNK)
        except OSError as failed:
            if failed.errno == errno.EINVAL and not moved:
                break  # this file system takes no splice
            error = os.strerror(failed.errno or 0)
            break
        if count == 0:
            break
        moved += count
    while data := os.read(pipe, _CHUNK):
        try:
            while data and not error:
                written = os.write(file, data)
                moved, data = moved + written, data[written:]
        except OSError as failed:
            error = os.strerror(failed.errno or 0)
    try:
        os.ftruncate(file, moved)
        os.fsync(file)
    except OSError as failed:
        error = error or os.strerror(failed.errno or 0)
    return {"bytes": moved, "error": error}


if __name__ == "__main__":
    print("reading", flush=True)
    print(json.dumps(drain(int(sys.argv[1]), int(sys.argv[2]))))
