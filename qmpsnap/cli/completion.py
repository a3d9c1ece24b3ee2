"""What a shell may complete: names of VMs and IDs, from files alone, and never an error."""

from __future__ import annotations

from pathlib import Path

import typer


def vms(context: typer.Context, incomplete: str) -> list[str]:
    """VMs of the configuration, of `qmpsnap run`, and of the local root."""
    from qmpsnap.cli import target
    from qmpsnap.errors import SnapError
    from qmpsnap.hypervisor.machine import registry
    from qmpsnap.store.layout import LocalRoot

    found: set[str] = set()
    try:
        config = target.configuration(context.params.get("config"))
        found.update(config.vms)
        found.update(registry.names())
        if local := _local(context):
            found.update(LocalRoot(local).vms())
    except (SnapError, OSError):
        pass  # half an answer is better than a traceback in somebody's prompt
    return sorted(name for name in found if name.startswith(incomplete))


def snapshots(context: typer.Context, incomplete: str) -> list[str]:
    """IDs of the VM that was named, newest first, as the local root has them."""
    from qmpsnap.errors import SnapError
    from qmpsnap.store.layout import LocalRoot

    vm, local = context.params.get("vm"), _local(context)
    if not vm or local is None:
        return []
    try:
        ids = [str(one) for one in LocalRoot(local).ids(vm)]
    except (SnapError, OSError):
        return []
    return [id for id in ("latest", *reversed(ids)) if id.startswith(incomplete)]


def disks(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the disks of the snapshot that was named."""
    from qmpsnap.errors import SnapError
    from qmpsnap.store import points
    from qmpsnap.store.layout import LocalRoot

    vm, word, local = context.params.get("vm"), context.params.get("id"), _local(context)
    if not vm or not word or local is None:
        return []
    found: set[str] = set()
    try:
        root = LocalRoot(local)
        for id in root.ids(vm):
            if word != "latest" and not str(id).startswith(word):
                continue
            if (point := points.read_one(root.snapshot(vm, id))) is not None:
                found = {disk.device for disk in point.storage.disks}
    except (SnapError, OSError):
        return []
    return sorted(name for name in found if name.startswith(incomplete))


def keys(context: typer.Context, incomplete: str) -> list[str]:
    """IDs of the keys that may be forgotten."""
    from qmpsnap.errors import SnapError
    from qmpsnap.store.layout import LocalRoot

    try:
        folder = _settled(context, "keys")
        if folder is None and (local := _local(context)) is not None:
            folder = LocalRoot(local).keys
        names = [path.name for path in folder.iterdir()] if folder is not None else []
    except (SnapError, OSError):
        return []
    found = [
        name.partition("-")[2].removesuffix(".json")
        for name in names
        if name.startswith(("retired-", "imported-")) and name.endswith(".json")
    ]
    return sorted(id for id in found if id.startswith(incomplete))


def reasons(incomplete: str) -> list[str]:
    """What `--insecure` takes."""
    return [word for word in ("unsigned", "foreign") if word.startswith(incomplete)]


def _local(context: typer.Context) -> Path | None:
    from qmpsnap.errors import SnapError

    given: Path | None = context.params.get("local")
    try:
        return given or _settled(context, "local")
    except SnapError:
        return None


def _settled(context: typer.Context, word: str) -> Path | None:
    """A folder of the configuration. Raises ConfigError."""
    from qmpsnap.cli import target

    found: Path | None = getattr(target.configuration(context.params.get("config")), word)
    return found
