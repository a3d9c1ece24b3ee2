"""The only place that reads a file of -readconfig: its groups, as options of a command line."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path

from qmpsnap.errors import Blocked
from qmpsnap.hypervisor.machine import keyval
from qmpsnap.hypervisor.machine.cmdline import CommandLine, Option
from qmpsnap.hypervisor.machine.keyval import Fields
from qmpsnap.hypervisor.machine.options import IMPLIED

NAME = "readconfig"

# The groups that QEMU acts upon after it has read all of them (vl.c, 7.2 to 11.1), and the option
# of each. It takes others too, such as smbios and icount, and makes nothing of what they say.
_OPTIONS = {
    **{name: name for name in ("accel", "audiodev", "chardev", "device", "drive", "fsdev",
                               "fw_cfg", "global", "iscsi", "machine", "mon", "name", "net",
                               "netdev", "nic", "numa", "object", "rtc", "sandbox", "spice",
                               "tpmdev", "vnc")},
    "boot-opts": "boot", "memory": "m", "smp-opts": "smp",
}  # fmt: skip
_GROUP = re.compile(r'\[(\S+)\s+"([^"]+)"\]?')
_ANONYMOUS = re.compile(r"\[([^]]+)\]")
# as sscanf has it: the key ends at white space, the value at the quote
_PAIR = re.compile(r'\s*(\S+)\s+=\s*"([^"]*)"')
_LINE = 1022  # characters of a line, and those of a key or an id, that fit QEMU's buffers
_WORD = 63
_SLACK = 0.5  # seconds: clocks are read one after the other, and /proc counts in hundredths
_OPEN = ("/dev/fd/", "/dev/fdset/", "/dev/stdin", "/proc/")


def included(line: CommandLine, cwd: Path, *, started: float | None = None) -> CommandLine:
    """*line* with each `-readconfig FILE` replaced by the options that FILE, from *cwd*, gives.

    *started* is the moment at which the QEMU that read them was started, in seconds since the
    epoch; None where there is none yet.

    Raises Blocked, naming the file, when it cannot be read or understood, or was changed since:
    what QEMU was told cannot be known then.
    """
    options: list[Option] = []
    for option in line.options:
        if option.name == NAME:
            options += _options_of(option, cwd, started)
        else:
            options.append(option)
    return CommandLine(line.binary, tuple(options))


def _options_of(option: Option, cwd: Path, started: float | None) -> Iterator[Option]:
    path = cwd / (option.value or "")
    if str(path).startswith(_OPEN):
        raise Blocked(f"{option}: an open descriptor cannot be read once more")
    try:
        seen = path.stat()
        if not stat.S_ISREG(seen.st_mode):
            raise Blocked(f"{option}: {path} is no regular file")
        text = path.read_text(encoding="utf-8")
    except OSError as failed:
        raise Blocked(f"{option}: {path}: {failed.strerror}") from failed
    except UnicodeDecodeError as failed:
        raise Blocked(f"{option}: {path}: {failed}") from failed
    # the time of the inode's change also tells of a file that was moved to this name
    if started is not None and max(seen.st_mtime, seen.st_ctime) > started + _SLACK:
        raise Blocked(
            f"{option}: {path} was changed after QEMU had read it: what QEMU was told is not known",
            hint="start QEMU again with the file as it is now",
        )
    yield from parse(text, str(path))


def parse(text: str, path: str) -> Iterator[Option]:
    """The options that *text*, a file of QEMU's configuration, stands for, in its order.

    Raises Blocked with *path* and the line for what QEMU would read in another way, or not at all.
    """
    group: tuple[str, dict[str, str]] | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        if len(line.encode()) > _LINE:
            raise Blocked(f"{path}: line {number} is longer than QEMU takes")
        if line.startswith("["):
            if group is not None:
                yield _option(*group)
            group = _opened(line, f"{path}: line {number}")
        elif (pair := _PAIR.match(line)) and group is not None and len(pair[1]) <= _WORD:
            group[1][pair[1]] = pair[2]
        else:
            raise Blocked(f'{path}: line {number} is no `[group]` and no `key = "value"` of one')
    if group is not None:
        yield _option(*group)


def _opened(line: str, where: str) -> tuple[str, dict[str, str]]:
    named = _GROUP.match(line)
    found = named or _ANONYMOUS.match(line)
    if found is None or any(len(word.encode()) > _WORD for word in found.groups()):
        raise Blocked(f'{where} is no `[group]` and no `[group "id"]`')
    if found[1] not in _OPTIONS:
        raise Blocked(f"{where}: it is not known what QEMU makes of a group {found[1]}")
    return _OPTIONS[found[1]], {"id": named[2]} if named else {}


def _option(name: str, keys: dict[str, str]) -> Option:
    implied = IMPLIED.get(name)
    first = {implied: keys[implied]} if implied is not None and implied in keys else {}
    fields = Fields(tuple((first | keys).items()))
    return Option(name, keyval.format(fields, implied))
