"""An answer of QEMU's that cannot be is an error that names the question, never anything else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.engine import details
from qmpsnap.errors import CommandRefused, ReplyMalformed
from qmpsnap.hypervisor import abilities
from qmpsnap.hypervisor.block import bitmap, graph
from qmpsnap.hypervisor.guest import runstate
from qmpsnap.hypervisor.machine import inventory
from qmpsnap.hypervisor.monitor import understood
from qmpsnap.hypervisor.vmstate import migration
from tests.fuzz.surfaces.replies import Recorded, _versions

NODES = 'query-named-block-nodes {"flat": true}'
IMAGE = {"filename": "a.qcow2", "virtual-size": 1 << 20}
SHOWN = {"removable": False, "qdev": "vda", "inserted": {"node-name": "d0"}}


def node(name: str, *beneath: str, **other: Any) -> dict[str, Any]:
    children = [{"child": "backing", "node-name": one} for one in beneath]
    whole = {"node-name": name, "drv": "qcow2", "ro": False, "image": IMAGE, "children": children}
    return whole | other


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([node("d0", "d0")], "d0 is beneath itself"),
        ([node("d0", "d1"), node("d1", "d2"), node("d2", "d1")], "d0 is beneath itself"),
        ([node("d0", "gone")], "KeyError.*gone"),
        ([node("d1")], "KeyError.*d0"),
        ([node("d0", ro="no")], r"Expected `bool`, got `str` - at `\$\[0\].ro`"),
        ([node("d0", image={"filename": "x"})], "virtual-size"),
        ([node("d0", **{"dirty-bitmaps": [{"name": "x", "count": "many"}]})], "count"),
        ("none", "Expected `array`, got `str`"),
    ],
)
async def test_a_graph_that_cannot_be(nodes: Any, said: str) -> None:
    with pytest.raises(ReplyMalformed, match=rf"^query-named-block-nodes: .*{said}"):
        await graph.query(Recorded({NODES: nodes, "query-block": [SHOWN]}))


async def test_a_graph_that_can_be() -> None:
    told = {NODES: [node("d0", "d1"), node("d1")], "query-block": [SHOWN]}
    (disk,) = (await graph.query(Recorded(told))).disks
    assert [one.name for one in disk.chain] == ["d0", "d1"]


@pytest.mark.parametrize(
    ("ask", "told", "question"),
    [
        (runstate.query, {"query-status": {"status": []}}, "query-status"),
        (bitmap.query, {NODES: [{"dirty-bitmaps": 5}]}, "query-named-block-nodes"),
        (abilities.probe, {"query-version": {"qemu": {"major": 8}}}, "query-version"),
        (abilities.capabilities, {"query-migrate-capabilities": [{}]}, "query-migrate-capab"),
        (inventory.take, {"query-version": []}, "query-version"),
    ],
)
async def test_the_question_is_named(
    ask: Callable[[Recorded], Awaitable[object]], told: dict[str, Any], question: str
) -> None:
    with pytest.raises(ReplyMalformed, match=f"^{question}"):
        await ask(Recorded(told))


async def test_nothing_is_set_that_could_not_be_set_back() -> None:
    monitor = Recorded({"query-migrate-capabilities": [], "query-migrate-parameters": {}})
    with pytest.raises(ReplyMalformed, match="query-migrate-parameters"):
        async with migration.tuned(monitor, set(), {}):
            pass
    assert not any(one.startswith("migrate-set") for one in monitor.asked)


async def test_what_would_not_be_read_again_is_missing() -> None:
    told = dict(_versions()["7.2"])
    told[NODES] = [one | {"image": IMAGE | {"virtual-size": "x"}} for one in told[NODES]]
    seen = await inventory.take(Recorded(_versions()["7.2"]))
    subject = details.Subject(seen, None, None, Path("/"), (), None, True)
    found = await details.take(Recorded(told), subject)
    assert found.block_nodes is None
    assert "block_nodes" in found.missing
    assert found.block_drives is not None


async def test_a_refusal_is_no_odd_answer() -> None:
    with pytest.raises(CommandRefused):
        async with understood("x"):
            raise CommandRefused("x", "GenericError", "no")
