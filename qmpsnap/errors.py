"""The tree of everything that can go wrong, with the exit code and the hint of each.

SnapError
 ├─ UsageError (2)            the words or the configuration are off
 │   └─ ConfigError
 ├─ Refused (3)               refused before anything was touched
 │   ├─ VmUnknown, SnapshotUnknown, MonitorAbsent, MonitorBusy
 │   ├─ VmBusy, StoreRefused (LeaseHeld), Blocked
 │   ├─ KeyRefused, KeyMissing
 │   └─ Untrusted: Unsigned, Foreign
 ├─ Failed (4)                tried, failed; the guest is as before, nothing is lost
 │   ├─ MonitorError: MonitorLost (QemuGone), ReplyMalformed
 │   ├─ CommandRefused, JobFailed, AgentError, PauseTooLong, FreezeTooLong
 │   ├─ MigrationFailed, LaunchFailed, LocalFailed, StreamUnknown
 │   └─ StoreError: StoreAway (StoreStalled), LeaseLost
 ├─ NotShipped (5)            captured; the spool holds the store half
 ├─ GuestNeedsHelp (6)        stopped or frozen, and we could not mend it
 │   ├─ GuestLeftStopped, GuestStillFrozen, GuestLacksPages
 ├─ DamagedData (7)           what is on disk is not what the manifest says
 │   ├─ ManifestError, HalfMissing (PacksMissing), DigestMismatch, BaseChanged
 │   ├─ SignatureWrong, NotAuthentic
 └─ IllegalMove (4)           our own bug: a phase was skipped
"""

from __future__ import annotations

import re

UNREADABLE = (ValueError, RecursionError)
"""What decoders raise for what is none of theirs, or is nested without end."""
_LONGEST = 4000  # characters of a message


def in_one_line(text: str) -> str:
    """*text* as a message may have it: others' words are in it, a guest's and a file's among them.

    What cannot be printed, a line's end too, is spelled: no terminal is told anything by it.
    """
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


class SnapError(Exception):
    """Anything that qmpsnap raises on purpose; its message is one line that can be printed."""

    exit_code = 4
    hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(in_one_line(message) or self.code)
        if hint:
            self.hint = in_one_line(hint)

    @property
    def code(self) -> str:
        """The class as a word for programs: `MonitorLost` is `monitor-lost`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower()


class UsageError(SnapError):
    exit_code = 2


class ConfigError(UsageError):
    """A configuration file says something that cannot be; the message names file and key."""


class Refused(SnapError):
    exit_code = 3


class VmUnknown(Refused):
    hint = "name it in the configuration, start it with `qmpsnap run`, or give --socket"


class SnapshotUnknown(Refused):
    hint = "`qmpsnap list VM` shows the snapshots there are"


class MonitorAbsent(Refused):
    """Nobody listens at the QMP socket."""

    hint = "is QEMU running, with `-qmp unix:PATH,server=on,wait=off`?"


class MonitorBusy(Refused):
    """The socket takes a connection and says nothing: another client holds the monitor."""

    hint = "QEMU serves one client a monitor: end the other one, or give QEMU a second -qmp"


class VmBusy(Refused):
    """Another engine, or a job or a migration of somebody else, holds this VM."""


class StoreRefused(Refused):
    """The two roots are not two data stores, or the store is not a network file system."""


class LeaseHeld(StoreRefused):
    """Another host has the lease of this VM on the store."""

    hint = (
        "run this on that host; if it is gone for good, `qmpsnap lease VM --take` takes the VM over"
    )


class Blocked(Refused):
    """QEMU, a device or the host rules out what was asked for; nothing was touched."""


class KeyRefused(Refused):
    """A key of this host is not as safe as it has to be, or not to be had; nothing was changed."""


class KeyMissing(Refused):
    """What is asked for is encrypted with a key that this host has not; nothing was changed."""


class Untrusted(Refused):
    """A manifest that no key vouches for which is trusted here; nothing of it was used."""


class Unsigned(Untrusted):
    hint = (
        "it was taken by an older qmpsnap, or somebody has removed its signature; `qmpsnap keys "
        "sign` signs what this host has taken, `--insecure unsigned` takes it as it is"
    )


class Foreign(Untrusted):
    hint = (
        "`qmpsnap keys export` on the host that took it, and `qmpsnap keys import FILE` here, make "
        "it trusted; `--insecure foreign` takes it as it is"
    )


class Failed(SnapError):
    exit_code = 4


class MonitorError(Failed):
    pass


class MonitorLost(MonitorError):
    """The connection went away under a command; whether it ran is unknown. Look before acting."""


class QemuGone(MonitorLost):
    """Nobody listens at the socket any more: QEMU has ended, and no guest is left to help."""


class ReplyMalformed(MonitorError):
    pass


class CommandRefused(Failed):
    """QEMU answered a command with an error."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"{command}: {desc}")
        self.command, self.error_class, self.desc = command, error_class, desc


class JobFailed(Failed):
    pass


class AgentError(Failed):
    hint = "is qemu-guest-agent running in the guest? `--quiesce none` goes without it"


class PauseTooLong(Failed):
    """The pause would be, or was, longer than --max-pause; the snapshot was given up."""

    hint = "allow more with --max-pause, or leave the RAM out with --ram none"


class FreezeTooLong(Failed):
    """The guest would have been frozen, or was, longer than --max-freeze; it was given up."""

    hint = "allow more with --max-freeze, or go without a freeze: --quiesce none"


class MigrationFailed(Failed):
    pass


class LaunchFailed(Failed):
    pass


class LocalFailed(Failed):
    """The local root could not take what was to be written."""


class StreamUnknown(Failed):
    """A migration stream has something that we cannot take apart; QEMU may well load it."""


class StoreError(Failed):
    pass


class StoreAway(StoreError):
    """The store cannot be reached, or its server has lost track of us: that may pass by itself."""


class StoreStalled(StoreAway):
    """The store made no progress within its deadline."""


class LeaseLost(StoreError):
    """Another host took this VM over on the store while we wrote."""

    hint = "`qmpsnap lease VM` tells whose it is"


class NotShipped(SnapError):
    """*created*: from `create`, the `Created` of the snapshot, its state `shipping`.

    *packs*: the digests of the packs that it needs and that are in no place, if that is the reason.
    """

    exit_code = 5
    hint = "the snapshot is safe in the local spool: `qmpsnap ship` delivers it"
    created: object = None
    packs: tuple[str, ...] = ()


class GuestNeedsHelp(SnapError):
    exit_code = 6


class GuestLeftStopped(GuestNeedsHelp):
    hint = "`qmpsnap recover VM` or the QMP command `cont` lets it run"


class GuestStillFrozen(GuestNeedsHelp):
    hint = "`qmpsnap thaw VM` or a restart of qemu-guest-agent in the guest thaws it"


class GuestLacksPages(GuestNeedsHelp):
    """The guest was let run before its RAM was there, and not all of it came."""

    hint = "what touches a page that is missing waits for it: `qmpsnap recover VM` brings the rest"


class DamagedData(SnapError):
    exit_code = 7


class ManifestError(DamagedData):
    """A manifest cannot be read, or is of a version that we do not know."""


class HalfMissing(DamagedData):
    pass


class PacksMissing(HalfMissing):
    """RAM that a snapshot shares is in no place: *packs* are the digests of what is lost."""

    def __init__(self, message: str, *, hint: str = "", packs: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.packs = packs


class DigestMismatch(DamagedData):
    pass


class SignatureWrong(DamagedData):
    """A manifest and its signature do not belong together: one of them was altered."""

    hint = "nothing accepts it: whole files of that name put it right, or another snapshot"


class NotAuthentic(DamagedData):
    """An encrypted file is not what was encrypted: altered, cut off, or put in another's place."""


class BaseChanged(DamagedData):
    """A frozen base is not the file that the snapshot froze."""


class IllegalMove(SnapError):
    pass
