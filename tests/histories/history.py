"""Random histories: what a seed says will happen, as a list that can be replayed and shortened.

Our own generator, and not hypothesis's: an operation takes milliseconds to seconds and a real QEMU
is in it, so that shrinking is by leaving out whole operations, and a seed must give the same
history whatever happened before. Nothing in a history depends on how far it came: snapshots are
counted modulo those that there are, offsets modulo the size of the disk.
"""

from __future__ import annotations

import random
from typing import Any

Operation = list[Any]
"""A word, and its arguments: plain JSON."""

KIB, MIB = 1 << 10, 1 << 20
_LEVELS = ["auto", "auto", "auto", "inc", "inc", "diff", "full", "overlay", "overlay"]
_COMMANDS = [
    "blockdev-add", "stop", "transaction", "cont", "getfd", "nbd-server-start",
    "block-export-add", "query-block-exports", "block-export-del", "nbd-server-stop",
    "block-commit", "job-complete", "job-dismiss", "blockdev-del", "block-dirty-bitmap-remove",
    "query-jobs", "query-named-block-nodes",
]  # fmt: skip
# when QEMU dies at one of these, a disk's newest bytes are only in a file that is ours
_LATE = [
    "transaction", "transaction", "cont", "nbd-server-start", "block-export-add",
    "block-export-del", "block-commit", "job-complete", "job-dismiss", "blockdev-del",
]  # fmt: skip
_NOTES = ["planned", "holding", "captured", "copied", "sealed", "closed"]


def history(seed: int, *, length: int | None = None) -> dict[str, Any]:
    """The disks, and what happens to them, for *seed*."""
    dice = random.Random(seed)
    disks = _disks(dice)
    count = length or dice.randint(12, 22)
    done: list[Operation] = [_writes(dice, len(disks)), _create(dice, len(disks))]
    while len(done) < count:
        done.append(_operation(dice, len(disks)))
    return {"seed": seed, "disks": disks, "operations": done}


def _disks(dice: random.Random) -> list[dict[str, Any]]:
    kinds = dice.choice([["qcow2", "raw"], ["qcow2", "backed"], ["qcow2", "raw", "backed"]])
    odd = dice.randrange(len(kinds))
    return [
        {
            "kind": kind,
            "size": dice.choice([4, 5, 6, 8]) * MIB + (37 * 512 if index == odd else 0),
            "unmap": dice.random() < 0.5,
        }
        for index, kind in enumerate(kinds)
    ]


def _operation(dice: random.Random, disks: int) -> Operation:
    word = dice.choices(
        ["write", "create", "refresh", "delete", "prune", "restart", "kill", "fault", "resize",
         "check"],
        [30, 22, 10, 9, 5, 5, 3, 14, 3, 5],
    )[0]  # fmt: skip
    match word:
        case "write":
            return _writes(dice, disks)
        case "create":
            return _create(dice, disks)
        case "refresh":
            return _refresh(dice, disks)
        case "delete":
            return ["delete", dice.randrange(64)]
        case "prune":
            return ["prune", dice.randint(1, 5), dice.random() < 0.8]
        case "fault":
            return _fault(dice, disks)
        case "resize":
            return ["resize", dice.randrange(disks), dice.choice([512, 64 * KIB, MIB, 37 * KIB])]
        case _:
            return [word]


def _writes(dice: random.Random, disks: int) -> Operation:
    return ["write", _strokes(dice, disks, dice.randint(1, 5))]


def _strokes(dice: random.Random, disks: int, count: int) -> list[Operation]:
    return [_stroke(dice, disks) for _ in range(count)]


def _stroke(dice: random.Random, disks: int) -> Operation:
    # few clusters are hot, so that snapshots differ in the same places
    offset = dice.choice([*range(6), *range(6), dice.randrange(256)]) * 64 * KIB
    offset += dice.choice([0, 0, 512, 4096, 32 * KIB, 65535, dice.randrange(64 * KIB)])
    size = dice.choice([1, 511, 512, 4096, dice.randrange(1, 9000), 64 * KIB, 200 * KIB])
    disk = dice.randrange(disks)
    match dice.choices(["data", "zero", "unmap", "discard"], [70, 10, 6, 14])[0]:
        case "data":
            return ["data", disk, offset, size, dice.randint(1, 255)]
        case "discard" if dice.random() < 0.7:  # of whole clusters it does something everywhere
            return [
                "discard",
                disk,
                offset // (64 * KIB) * 64 * KIB,
                dice.choice([1, 2, 4]) * 64 * KIB,
            ]
        case word:
            return [word, disk, offset, size]


def _create(dice: random.Random, disks: int) -> Operation:
    """Include a part of the disks now and then: their chains then differ."""
    part = sorted(dice.sample(range(disks), dice.randint(1, disks)))
    ram = dice.choices(["none", "live", "paused", "background"], [88, 5, 4, 3])[0]
    asked = {
        "level": dice.choice(_LEVELS),
        "ram": ram,
        "include": part if dice.random() < 0.3 else [],
        "compress": dice.random() < 0.15,
        "meanwhile": _strokes(dice, disks, dice.randint(4, 16)) if dice.random() < 0.3 else [],
    }
    if ram != "none":
        asked["meanwhile"] = []  # a guest does not write while it is stopped, as our strokes may
    return ["create", asked]


def _refresh(dice: random.Random, disks: int) -> Operation:
    meanwhile = _strokes(dice, disks, dice.randint(4, 16)) if dice.random() < 0.3 else []
    return ["refresh", dice.randrange(64), {"meanwhile": meanwhile}]


def _fault(dice: random.Random, disks: int) -> Operation:
    """An operation in which something dies; *later*: nobody cleans up before the next one."""
    inner = dice.choice(
        [
            *(_create(dice, disks) for _ in range(5)),
            *(_refresh(dice, disks) for _ in range(2)),
            ["delete", dice.randrange(64)],
            ["prune", dice.randint(1, 4), True],
        ]
    )
    if inner[0] in {"create", "refresh"}:
        inner[-1]["meanwhile"] = []
    how = dice.choice(["cut", "engine at command", "engine at call", "engine at note", "qemu"])
    if how == "qemu":
        inner = _create(dice, disks)
        inner[1].update(level=dice.choice(["auto", "inc", "full", "overlay"]), meanwhile=[])
    fault: dict[str, Any] = {"how": how, "later": dice.random() < 0.3}
    match how:
        case "engine at call":  # of a function that changes a file system
            fault["at"] = dice.randint(1, 60)
        case "engine at note":
            fault["at"] = f"{dice.choice(['before', 'after'])} {dice.choice(_NOTES)}"
        case _:
            named = dice.random() < 0.7
            commands = _LATE if how == "qemu" else _COMMANDS
            fault["at"] = dice.choice(commands) if named else dice.randint(20, 90)
            fault["delivered"] = dice.random() < 0.6
            fault["dead"] = how == "cut" and dice.random() < 0.3
    return ["fault", inner, fault]


def shorter(told: dict[str, Any], fails: Any, *, tries: int = 60) -> dict[str, Any]:
    """*told* with as many operations left out as *fails* stays true for, in at most *tries*."""
    operations = list(told["operations"])
    step = max(1, len(operations) // 2)
    while step and tries:
        start = 0
        while start < len(operations) and tries:
            fewer = operations[:start] + operations[start + step :]
            tries -= 1
            if fewer and fails({**told, "operations": fewer}):
                operations = fewer
            else:
                start += step
        step //= 2
    return {**told, "operations": operations}
