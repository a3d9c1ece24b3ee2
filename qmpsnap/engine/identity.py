"""Who a VM is, whatever it is called: what its name is bound to."""

from __future__ import annotations

from qmpsnap.engine.survey import Survey
from qmpsnap.store.manifest import Identity

_NO_UUID = "00000000-0000-0000-0000-000000000000"


def identity_of(facts: Survey) -> Identity:
    """The VM behind the name: QEMU's UUID, or without one the first files of what it writes."""
    uuid = facts.inventory.uuid
    own = [site for site in facts.sites if site.disk.chain and not site.disk.read_only]
    disks = [site.paths[site.layers] for site in own]
    return Identity(
        vm=facts.machine.name,
        uuid=None if uuid in {None, _NO_UUID} else uuid,
        disks=[path for path in disks if path],
    )
