"""The only place that asks a QEMU of this host which features of a CPU it can give to a guest."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from qmpsnap.errors import UNREADABLE
from qmpsnap.hypervisor.machine import processor

_WITHIN = 15.0  # seconds, for a QEMU that makes no machine
_LONGEST = 1 << 22  # bytes of one answer: the definitions of all models are some 200 KiB
_OWN = ("host", "max")  # models that are what the host has

_asked: dict[tuple[str, int, str, str], frozenset[str] | None] = {}


async def available(path: Path, accelerator: str, model: str) -> frozenset[str] | None:
    """What the binary *path* can give to a guest of the CPU *model* with *accelerator*.

    That is what `max` has here, and what *model* has by itself and is not told to be unavailable:
    some features can be had with a model only. Asked of a process that makes no machine, some
    0.2 s; the answer is kept as long as the file stays the same. None where it does not tell.
    """
    try:
        stamp = (await asyncio.to_thread(path.stat)).st_mtime_ns
    except OSError:
        return None
    key = (str(path), stamp, accelerator, model)
    if key not in _asked:
        _asked[key] = await _available(path, accelerator, model)
    return _asked[key]


async def _available(path: Path, accelerator: str, model: str) -> frozenset[str] | None:
    wanted: list[tuple[str, dict[str, Any]]] = [_expansion("max", {"migratable": False})]
    if model not in _OWN:
        wanted += [_expansion(model, {}), ("query-cpu-definitions", {})]
    answers = await _told(path, accelerator, wanted)
    if answers is None or (found := _on(answers[0])) is None:
        return None
    if len(answers) == 1:
        return found
    lacking = next(
        (one for one in answers[2] or [] if isinstance(one, dict) and one.get("name") == model), {}
    )
    own = _on(answers[1]) or frozenset()
    missing = {str(name).replace("_", "-") for name in lacking.get("unavailable-features", [])}
    return found | (own - missing)


def _expansion(model: str, props: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "query-cpu-model-expansion", {"type": "static", "model": {"name": model, "props": props}}


def _on(answer: Any) -> frozenset[str] | None:
    props = answer.get("model", {}).get("props") if isinstance(answer, dict) else None
    return None if not isinstance(props, dict) else frozenset(processor.features(props)[0])


async def _told(path: Path, accelerator: str, wanted: list[tuple[str, dict[str, Any]]]) -> Any:
    """The answer to each question, None for one that is refused; None where it does not start."""
    words = ["-machine", "none", "-accel", accelerator, "-nodefaults", "-no-user-config"]
    words += ["-display", "none", "-qmp", "stdio"]
    asked = [{"execute": "qmp_capabilities"}]
    asked += [
        {"execute": name, "arguments": arguments, "id": number}  # type: ignore[dict-item]
        for number, (name, arguments) in enumerate(wanted)
    ]
    text = "".join(map(json.dumps, [*asked, {"execute": "quit"}]))
    try:
        process = await asyncio.create_subprocess_exec(
            path, *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, limit=_LONGEST,
        )  # fmt: skip
    except OSError:
        return None
    try:
        async with asyncio.timeout(_WITHIN):
            out, _ = await process.communicate(text.encode())
    except BaseException as ended:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(ended, TimeoutError):
            return None
        raise
    return _answers(out.decode(errors="replace"), len(wanted))


def _answers(out: str, count: int) -> list[Any] | None:
    found: dict[int, Any] = {}
    for row in out.splitlines():
        with suppress(*UNREADABLE):
            said = json.loads(row)
            if isinstance(said, dict) and isinstance(said.get("id"), int):
                found[said["id"]] = said.get("return")
    return [found.get(number) for number in range(count)] if found else None
