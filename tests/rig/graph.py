"""What a running QEMU says for itself: the only place where tests ask its second monitor."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any


async def ask(witness: Path, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """The `return` of one command, over a connection of its own."""
    reader, writer = await asyncio.open_unix_connection(witness, limit=1 << 24)
    try:
        async with asyncio.timeout(30):
            await reader.readline()
            await _said(reader, writer, {"execute": "qmp_capabilities"})
            sent = {"execute": command, "arguments": arguments or {}}
            return await _said(reader, writer, sent)
    finally:
        writer.close()
        await writer.wait_closed()


async def _said(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: dict[str, Any]
) -> Any:
    writer.write(json.dumps(sent).encode())
    while True:
        answer = json.loads(await reader.readline())
        if "error" in answer:
            raise AssertionError(f"{sent['execute']}: {answer['error']}")
        if "return" in answer:
            return answer["return"]


async def status(witness: Path) -> str:
    """The guest's run state."""
    return str((await ask(witness, "query-status"))["status"])


async def chains(witness: Path) -> dict[str, list[str]]:
    """The files under each drive that the guest sees, top first, by the drive's or device's id."""
    found = {}
    for drive in await ask(witness, "query-block"):
        if "inserted" not in drive or not drive.get("qdev"):
            continue
        words = drive["qdev"].removesuffix("/virtio-backend").split("/")
        named = "peripheral" in words or len(words) == 1
        name = words[-1] if named else drive["device"]
        image: dict[str, Any] | None = drive["inserted"]["image"]
        files = []
        while image is not None:
            files.append(_file(image["filename"]))
            image = image.get("backing-image")
        found[name] = files
    return found


def _file(name: str) -> str:
    # a filter has no name of its own but QEMU's JSON for all that is beneath it
    found = re.search(r'"filename": "([^"]+)"', name) if name.startswith("json:") else None
    return found[1] if found else name


async def untouched(witness: Path) -> None:
    """Asserts that no job, export or overlay node waits in this QEMU, and no migration."""
    for query in ("query-jobs", "query-block-exports"):
        found = await ask(witness, query)
        assert found == [], f"{query}: {found}"
    migration = await ask(witness, "query-migrate")
    ended = {"none", "completed", "cancelled", "failed"}
    assert migration.get("status", "none") in ended, f"a migration: {migration}"
    in_use = {name for chain in (await chains(witness)).values() for name in chain}
    for node in await ask(witness, "query-named-block-nodes", {"flat": True}):
        if node["drv"] == "qcow2":
            assert _file(node["image"]["filename"]) in in_use, f"a node that nothing uses: {node}"
