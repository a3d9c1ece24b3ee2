"""A short soak, always the same; and that a promise which is broken is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.faults import names
from tests.soak.plot import Plot, plot
from tests.soak.promises import Broken, Promises
from tests.soak.run import options, soaked, summary


@pytest.mark.guest
async def test_a_few_steps(tmp_path: Path) -> None:
    words = ["10", "--guests", "1", "--qemu", "7.2", "--seed", "5", "--steps", "6"]
    asked = options([*words, "--folder", "/var/tmp"])
    tally = await soaked(asked)
    assert tally.broken == []
    assert sum(tally.verbs.values()) == 6
    # how many of them are felt depends on how fast this machine is
    assert sum(tally.tried.values()) > 0
    assert set(tally.tried) <= {*names(), "a byte changed"}
    assert "broken promises: 0" in summary(tally, asked, 1)


@pytest.mark.guest
async def test_what_is_broken_is_found(qemu72: Path, short: Path) -> None:
    async with plot(qemu72, short / "it") as ground:
        promises = Promises(ground)
        nonce = await promises.the_guest_is_sound()
        words = ["create", "soak", "--level", "full", "--ram", "live", "--max-pause", "5s"]
        assert (await ground.run(*words)).code == 0
        (id,) = await promises.snapshots()
        promises.came(id, nonce)
        await promises.nothing_is_owed()
        await promises.restores(id)
        await _fooled(ground, promises, id)


async def _fooled(ground: Plot, promises: Promises, id: str) -> None:
    """Every look at the guest and its snapshots can fail."""
    promises.came(id, "0" * 16)
    with pytest.raises(Broken, match="and was of"):
        await promises.restores(id)
    manifest = ground.content / "soak" / id / "machine.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content + b"\n")
    with pytest.raises(Broken, match="is not what it was"):
        await promises.snapshots()
    other = ground.home / "of-no-snapshot"
    other.write_bytes(b"x")
    with pytest.raises(Broken, match="ended with 7"):
        await promises.verifies(id)
    manifest.write_bytes(content)
    await promises.snapshots()
    with pytest.raises(Broken, match=r"was changed, and .* ended with 0"):
        await promises.damage_is_found(id, other, 0)
    async with ground.console() as console:
        await console.run("fsfreeze --freeze /data/0", within=30)
    with pytest.raises(Broken, match="is it frozen"):
        await promises.the_guest_is_sound(within=3)
