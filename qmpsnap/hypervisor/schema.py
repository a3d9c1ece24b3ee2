"""What this QEMU can do, asked of its own schema instead of guessed from its version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmpsnap.errors import CommandRefused
from qmpsnap.hypervisor.monitor import Monitor, settle
from qmpsnap.shield import finish


class Schema:
    """The reply of query-qmp-schema, by name: 200 KiB, so ask once a session."""

    def __init__(self, entities: list[dict[str, Any]]) -> None:
        self._by_name = {entity["name"]: entity for entity in entities}

    def has_command(self, command: str) -> bool:
        return self._by_name.get(command, {}).get("meta-type") == "command"

    def has_argument(self, command: str, *path: str) -> bool:
        """Whether *command* takes the argument *path* (nested: one word a level).

        Types have anonymous names in the schema; only the way from the command is stable.
        """
        if not self.has_command(command):
            return False
        types = [self._by_name[command]["arg-type"]]
        for word in path:
            found = [
                member["type"]
                for type_ in types
                for member in self._members(type_)
                if member["name"] == word
            ]
            if not found:
                return False
            types = found
        return True

    def _members(self, type_: str) -> list[dict[str, Any]]:
        entity = self._by_name.get(type_, {})
        if entity.get("meta-type") == "array":
            return self._members(entity["element-type"])
        members = list(entity.get("members", []))
        for variant in entity.get("variants", []):
            members += self._members(variant["type"])
        return members


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the snapshot engine asks of a QEMU, each found by probing.

    file_uri           migrate to `file:` (8.2); before, a regular file goes as `fd:`
    background         write-tracked saving of RAM; *background_trouble* says why not
    background_safe    a failed background save lets the guest go on (8.2; 7.2 hangs it for ever)
    stays_paused       a background save of a paused guest leaves it paused (9.0)
    """

    version: str
    package: str
    file_uri: bool
    background: bool
    background_trouble: str
    background_safe: bool
    stays_paused: bool


async def probe(monitor: Monitor) -> Abilities:
    """Ask everything. Sets and resets one migration capability, so no migration may be running.

    For `background-snapshot` setting it is the probe: QEMU then checks the guest's memory, the
    kernel and our privileges (qemu: migration/options.c, migration/ram.c).
    """
    version = await monitor.execute("query-version")
    schema = Schema(await monitor.execute("query-qmp-schema"))
    names = {item["capability"] for item in await monitor.execute("query-migrate-capabilities")}
    trouble = await _background_trouble(monitor, names)
    number = version["qemu"]
    return Abilities(
        version=f"{number['major']}.{number['minor']}.{number['micro']}",
        package=version["package"],
        file_uri=schema.has_argument("migrate", "channels"),
        background=not trouble,
        background_trouble=trouble,
        # both came with what the schema shows: `channels` in 8.2, `mapped-ram` in 9.0
        background_safe=schema.has_argument("migrate", "channels"),
        stays_paused="mapped-ram" in names,
    )


async def _background_trouble(monitor: Monitor, capabilities: set[str]) -> str:
    if "background-snapshot" not in capabilities:
        return "this QEMU does not have it"
    try:
        await set_capabilities(monitor, {"background-snapshot": True})
    except CommandRefused as refused:
        return refused.desc
    finally:
        await finish(settle(monitor, _background_off), within=20)
    return ""


async def _background_off(monitor: Monitor) -> None:
    await set_capabilities(monitor, {"background-snapshot": False})


async def set_capabilities(monitor: Monitor, wanted: dict[str, bool]) -> None:
    """Set migration capabilities; they stay set until somebody resets them."""
    await monitor.execute(
        "migrate-set-capabilities",
        {
            "capabilities": [
                {"capability": name, "state": state} for name, state in sorted(wanted.items())
            ]
        },
    )
