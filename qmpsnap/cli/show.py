"""`qmpsnap show`: what the two halves of a snapshot say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qmpsnap.cli import options
from qmpsnap.cli.target import Call, snapshot
from qmpsnap.cli.verb import verb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpsnap.store.manifest import Manifest, Storage

EPILOG = """\b
Examples:
  qmpsnap show web
  qmpsnap show web 20261122T1650 --json
  qmpsnap show web --usage
  qmpsnap show web --machine
  qmpsnap show web --vmstate

\b
Exit codes: 0 done; 2 usage; 3 no such snapshot, one without RAM, or one that nobody
trusted has signed; 4 a root cannot be read;
7 a half is missing or damaged.
"""


def _packs(manifest: Manifest) -> str | None:
    """What is stored of the RAM once for all snapshots, and how much of it came with this one."""
    from qmpsnap.cli.render import in_bytes

    if not manifest.packs:
        return None
    used = sum(one.used_bytes for one in manifest.packs)
    fresh = sum(one.used_bytes for one in manifest.packs if one.fresh)
    return f"{in_bytes(used)} in {len(manifest.packs)}, {in_bytes(fresh)} of them brought by it"


@verb(insecure=True)
async def show(
    call: Call,
    vm: options.Vm,
    id: options.Id = "latest",
    usage: Annotated[
        bool,
        typer.Option(
            "--usage",
            help="Show what the VM and its host used, then and since the snapshot before. "
            "Default: what the snapshot consists of.",
            show_default=False,
        ),
    ] = False,
    machine: Annotated[
        bool,
        typer.Option(
            "--machine",
            help="Show what the captured machine was made of. With --json: the record itself. "
            "Default: what the snapshot consists of.",
            show_default=False,
        ),
    ] = False,
    vmstate: Annotated[
        bool,
        typer.Option(
            "--vmstate",
            help="Show what is in the execution state: RAM blocks, and each device's section. It "
            "is read and checked for that. Default: what the snapshot consists of.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Show both halves of one snapshot: disks, RAM, pause, digests, where everything lies."""
    import asyncio

    from qmpsnap.cli import described, sectioned, used
    from qmpsnap.cli.render import in_bytes, in_ms
    from qmpsnap.cli.shapes import Shown
    from qmpsnap.errors import UsageError
    from qmpsnap.store.lease import in_words

    call.machine(vm, reach=False)
    engine = call.engine()
    if usage + machine + vmstate > 1:
        raise UsageError("--usage, --machine and --vmstate are views: give one of them")
    if vmstate:
        call.out.expect_progress()
        held = await engine.vmstate(vm, snapshot(id))
        call.out.settle()
        if call.out.json:
            call.out.record(held)
        else:
            sectioned.show(call.out, held)
        return
    if machine:
        captured = await engine.captured(vm, snapshot(id))
        if call.out.json:
            call.out.record(captured)
        else:
            described.show(call.out, captured)
        return
    if usage:
        record = await engine.usage(vm, snapshot(id))
        if call.out.json:
            call.out.record(record)
        else:
            used.show(call.out, record)
        return
    pair, rival = await asyncio.gather(engine.show(vm, snapshot(id)), engine.rival(vm))
    refreshed = [one for one in await engine.revisions(vm, pair.id) if one.revision]
    out, storage, manifest = call.out, pair.storage, pair.manifest
    local = pair.roots.local.snapshot(pair.vm, pair.id)
    store = pair.roots.store.root.snapshot(pair.vm, pair.id)
    state: Literal["shipping", "paired"] = "shipping" if pair.spooled else "paired"
    if out.json:
        shown = Shown(
            id=pair.id,
            vm=pair.vm,
            state=state,
            local=str(local),
            store=str(store),
            storage=storage,
            manifest=manifest,
            revisions=refreshed,
            signature=pair.signed,
            lease=rival,
        )
        out.record(shown)
        return
    ram, trial = manifest.ram, " (for a trial only: not on the network)"
    out.facts([
        ("snapshot", f"{pair.id} of {pair.vm}, {state}"),
        ("taken", manifest.taken_at),
        ("signature", pair.signed.words if pair.signed else None),
        ("encryption", f"with the key {manifest.key}" if manifest.key else None),
        ("disks", _keys([storage, *refreshed])),
        ("note", manifest.note or None),
        ("pause", f"{in_ms(manifest.pause_ms)}; the guest was {manifest.was}"),
        ("quiesce", manifest.quiesce),
        ("frozen", in_ms(manifest.frozen_ms) if manifest.frozen_ms is not None else None),
        ("RAM", f"{ram.mode} ({ram.reason}), {in_bytes(ram.raw_bytes)}"),
        ("RAM in packs", _packs(manifest)),
        ("level", storage.level),
        ("revisions", f"0 to {refreshed[-1].revision}" if refreshed else None),
        ("QEMU", manifest.qemu_version),
        ("identity", manifest.identity.uuid or ", ".join(manifest.identity.disks) or None),
        ("host", manifest.host),
        ("lease", in_words(rival) if rival else None),
        ("local half", str(local)),
        ("store half", f"{store}{trial if manifest.trial_store else ''}"),
    ])  # fmt: skip
    out.line()
    out.table(
        ("REVISION", "TAKEN", "DISK", "LEVEL", "ROLE", "SIZE", "WRITTEN", "FILE", "STANDS ON"),
        [
            [
                str(one.revision),
                one.taken_at,
                disk.device,
                disk.level,
                disk.role,
                in_bytes(disk.virtual_size_bytes),
                in_bytes(disk.bytes_written),
                disk.chain[0].path,
                disk.parent or "-",
            ]
            for one in (storage, *refreshed)
            for disk in one.disks
        ],
    )
    for one in (storage, *refreshed):
        for disk in one.disks:
            told = f"; the guest now writes to {disk.overlay}" if disk.overlay else ""
            out.line(f"{disk.device}, revision {one.revision}: {disk.reason}{told}")
    for left in storage.left_out:
        out.line(f"left out: {left.device} ({left.reason})")
    out.line()
    out.table(
        ("STORE FILE", "BYTES", "BLAKE3"),
        [[file.name, in_bytes(file.bytes), file.blake3] for file in manifest.files],
    )


def _keys(halves: Sequence[Storage]) -> str | None:
    """With what the images of all revisions are encrypted."""
    keys = dict.fromkeys(key for one in halves for key in one.keys)
    return f"encrypted with the key {', '.join(keys)}" if keys else None
