"""`qmpsnap keys`: whose snapshots are trusted on this host, and what encrypts its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmpsnap.cli import options
from qmpsnap.cli.completion import keys, snapshots
from qmpsnap.cli.target import Call
from qmpsnap.cli.verb import verb

if TYPE_CHECKING:
    from qmpsnap.cli.render import Output
    from qmpsnap.store.keyring import Key

ABOUT = """Show and change the keys that snapshots are signed with, and those that are trusted.

Each host signs its snapshots with a key of its own, made when it takes the first one; what it
encrypts, it encrypts with another one. Keys are in the folder `keys` of the configuration, else
in .keys on the local root. Without the key that encrypted it a snapshot is lost: keep a copy.
"""
EPILOG = """\b
Examples:
  qmpsnap keys show
  qmpsnap keys export > here.key

\b
Exit codes: 0 done; 2 usage; 3 refused, nothing was changed; 4 failed; 7 a key is damaged.
"""
SHOW_EPILOG = """\b
Examples:
  qmpsnap keys show
  qmpsnap keys show --json

\b
Exit codes: 0 done; 2 usage; 3 somebody else may touch a key; 4 failed; 7 a key is damaged.
"""
EXPORT_EPILOG = """\b
Examples:
  qmpsnap keys export > here.key
  qmpsnap keys export --encryption /root/secret.key

\b
Exit codes: 0 done; 2 usage; 3 somebody else may touch a key, FILE is there already, or no
such key is here; 4 failed; 7 a key is damaged.
"""
IMPORT_EPILOG = """\b
Examples:
  qmpsnap keys import there.key --dry-run
  qmpsnap keys import there.key

\b
Exit codes: 0 done, or it was here already; 2 usage; 3 it is no such key, or somebody else
may touch a key; 4 failed; 7 a key is damaged.
"""
ROTATE_EPILOG = """\b
Examples:
  qmpsnap keys rotate --dry-run
  qmpsnap keys rotate
  qmpsnap keys rotate --encryption

\b
Exit codes: 0 done; 2 usage; 3 somebody else may touch a key; 4 failed; 7 a key is damaged.
"""
FORGET_EPILOG = """\b
Examples:
  qmpsnap keys forget 0f3a --dry-run
  qmpsnap keys forget 0f3a9c1e5b7d2468

\b
Exit codes: 0 done; 2 usage; 3 it is the key that signs, or no single key; 4 failed;
7 a key is damaged.
"""
SIGN_EPILOG = """\b
Examples:
  qmpsnap keys sign web --all --dry-run
  qmpsnap keys sign web 20261122T165057123Z

\b
Exit codes: 0 done, or they were signed already; 2 usage; 3 this host has no local half of
one, somebody else has signed it, or no such snapshot; 4 failed; 7 damaged data found.
"""
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print what would be done, and change nothing. Default: do it.",
        show_default=False,
    ),
]

app = typer.Typer(help=ABOUT, epilog=EPILOG, rich_markup_mode=None, no_args_is_help=False)


@app.command("show", epilog=SHOW_EPILOG)
@verb(sockets=False)
async def show(call: Call) -> None:
    """List the keys that are trusted: the one that signs, retired ones, those of other hosts.

    Then those that decrypt, the one that encrypts now first. The ID is the beginning of the
    fingerprint: the BLAKE3 of the public key, or what is derived from a secret one.
    """
    import asyncio

    known = await asyncio.to_thread(call.keyring().known)
    known += await asyncio.to_thread(call.secrets().known)
    if call.out.json:
        for one in known:
            call.out.record(one)
        return
    if not known:
        call.out.notice("there is no key yet: the first `create` makes it, or `keys export`")
        return
    head = ("ID", "ROLE", "HOST", "CREATED", "FINGERPRINT", "FILE")
    rows = [
        [one.key, one.role, one.host, one.created_at, one.fingerprint, one.path] for one in known
    ]
    call.out.table(head, rows)


@app.command("export", epilog=EXPORT_EPILOG)
@verb(sockets=False)
async def export(
    call: Call,
    *,
    encryption: Annotated[
        Path | None,
        typer.Option(
            "--encryption",
            metavar="FILE",
            help="Write the secret key that encrypts to this new file instead, mode 0600: who has "
            "it can read the snapshots. Default: the public key, printed.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="With --encryption: this key. Default: the one that encrypts now.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the public half of the key that signs, for `keys import` on another host.

    It is no secret; but who carries it has to see to it that it arrives as it was. The key is made
    if there is none yet.
    """
    import asyncio

    from qmpsnap.errors import UsageError
    from qmpsnap.store import keyfile

    if encryption is not None:
        engine = call.engine(roots=call.settings.keys is None and call.local is None)
        written = await asyncio.to_thread(engine.export_secret, encryption, key)
        _tell(call.out, written, f"written to {written.path}, for its owner only")
        return
    if key is not None:
        raise UsageError("--key is about --encryption")
    public = await asyncio.to_thread(call.keyring().public)
    if call.out.json:
        call.out.record(public)
    else:
        call.out.line(keyfile.encode(public).decode().rstrip())


@app.command("import", epilog=IMPORT_EPILOG)
@verb(sockets=False)
async def import_(
    call: Call,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="What `keys export` printed there.", show_default=False
        ),
    ],
    *,
    dry_run: DryRun = False,
) -> None:
    """Trust the snapshots of another host: those that are signed with the key in FILE.

    Or, where it is a key that encrypts, decrypt with it, too. ID and fingerprint are printed:
    compare them with what `keys show` prints on that host.
    """
    import asyncio

    from qmpsnap.store import keyfile

    ring = call.keyring()
    content = await asyncio.to_thread(_read, file)
    if keyfile.is_secret(content):
        key = await asyncio.to_thread(call.secrets().imported, file, dry_run=dry_run)
        _tell(call.out, key, "would decrypt here, too" if dry_run else "decrypts here, too")
        return
    key = await asyncio.to_thread(ring.imported, content, file, dry_run=dry_run)
    _tell(call.out, key, "would be trusted" if dry_run else "trusted")


@app.command("rotate", epilog=ROTATE_EPILOG)
@verb(sockets=False)
async def rotate(
    call: Call,
    *,
    encryption: Annotated[
        bool,
        typer.Option(
            "--encryption",
            help="Encrypt with a new key from now on; the old one stays, for what it has "
            "encrypted. Default: the key that signs.",
            show_default=False,
        ),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Sign with a new key from now on. The old one is retired: what it has signed stays trusted.

    The secret half of the old one is gone then. Where somebody may have read it, `keys forget` ends
    the trust in it as well, and with it in the snapshots that it has signed.
    """
    import asyncio

    from qmpsnap.cli.shapes import Rotated

    if encryption:
        await _rotate_encryption(call, dry_run=dry_run)
        return

    ring = call.keyring()
    if dry_run:
        known = await asyncio.to_thread(ring.known)
        new, old = None, next((one for one in known if one.role == "signs"), None)
    else:
        new, old = await asyncio.to_thread(ring.rotate)
    if call.out.json:
        call.out.record(Rotated(signs=new, retired=old))
        return
    if new is not None:
        call.out.line(f"{new.key} signs from now on; {new.path}")
    if old is not None:
        call.out.line(f"{old.key} {'would be' if dry_run else 'is'} retired")


@app.command("forget", epilog=FORGET_EPILOG)
@verb(sockets=False)
async def forget(
    call: Call,
    id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="The key: its ID, or a unique beginning of it.",
            autocompletion=keys,
            show_default=False,
        ),
    ],
    *,
    dry_run: DryRun = False,
) -> None:
    """Trust a retired or an imported key no more: what it has signed is refused from then on.

    The key that signs is not forgotten: `keys rotate` retires it first.
    """
    import asyncio

    key = await asyncio.to_thread(call.keyring().forget, id, dry_run=dry_run)
    _tell(call.out, key, "would be trusted no more" if dry_run else "trusted no more")


async def _rotate_encryption(call: Call, *, dry_run: bool) -> None:
    import asyncio

    from qmpsnap.cli.shapes import RotatedEncryption

    ring = call.secrets()
    if dry_run:
        known = await asyncio.to_thread(ring.known)
        new, old = None, next((one for one in known if one.role == "encrypts"), None)
    else:
        new, old = await asyncio.to_thread(ring.rotate)
    if call.out.json:
        call.out.record(RotatedEncryption(encrypts=new, decrypts=old))
        return
    if new is not None:
        call.out.line(f"{new.key} encrypts from now on; {new.path}")
    if old is not None:
        call.out.line(f"{old.key} {'would decrypt' if dry_run else 'decrypts'} only")


@app.command("sign", epilog=SIGN_EPILOG)
@verb(sockets=False, insecure=True)
async def sign(
    call: Call,
    vm: options.Vm,
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ID",
            help="Snapshots: their IDs, unique beginnings of them, or `latest`.",
            autocompletion=snapshots,
            show_default=False,
        ),
    ] = None,
    *,
    all_: Annotated[
        bool,
        typer.Option(
            "--all", help="All of the VM that are not signed. Default: those named.",
            show_default=False,
        ),
    ] = False,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Sign snapshots that are on the store without a signature: an older qmpsnap took them.

    Each is read whole and compared with its digests, and has to be the one that the local half on
    this host names. Where this host has none, `--insecure unsigned` signs it all the same.
    """
    from qmpsnap.cli.target import snapshot
    from qmpsnap.errors import UsageError

    call.machine(vm, reach=False)
    if bool(ids) == all_:
        raise UsageError("name the snapshots, or give --all: one of the two")
    if "foreign" in (call.insecure or ()):
        raise UsageError("--insecure foreign: what somebody else has signed is not signed anew")
    out = call.out
    out.expect_progress()
    words = None if all_ else [snapshot(word) for word in ids or ()]
    done, refused = await call.engine().sign(vm, words, dry_run=dry_run)
    out.settle()
    for one in done:
        if out.json:
            out.record(one)
        else:
            held = " (its local half is not here)" if one.vouched == "insecure" else ""
            out.line(f"{one.vm} {one.id}: {one.outcome}, with the key {one.key}{held}")
    if not done and not refused:
        out.notice("all that is on the store is signed")
    gravest = max(refused, key=lambda one: one.exit_code, default=None)
    for trouble in refused:
        if trouble is not gravest:
            out.aside("warning", str(trouble))
    if gravest is not None:
        raise gravest


def _tell(out: Output, key: Key, what: str) -> None:
    if out.json:
        out.record(key)
        return
    out.facts([
        ("key", f"{key.key}: {what}"),
        ("role", key.role),
        ("host", key.host),
        ("created", key.created_at),
        ("fingerprint", key.fingerprint),
    ])  # fmt: skip


def _read(file: Path) -> bytes:
    from qmpsnap.errors import KeyRefused

    limit = 64 << 10
    try:
        with file.open("rb") as opened:
            content = opened.read(limit + 1)
    except OSError as failed:
        raise KeyRefused(f"{file}: {failed.strerror}") from failed
    if len(content) > limit:
        raise KeyRefused(f"not a key: {file}: is larger than one")
    return content
