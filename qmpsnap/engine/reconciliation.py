"""What `machine.json` says of devices that came and went at run time: its key `reconciled`."""

from __future__ import annotations

from typing import Any

import msgspec

from qmpsnap.hypervisor.machine import records, secrecy
from qmpsnap.hypervisor.machine.reconcile import Reconciled


class Reconciliation(msgspec.Struct, frozen=True, kw_only=True):
    """*options* is the command line, typed, of the machine as it was when it was captured: what
    was plugged at the places where it was, what was unplugged left out.

    *troubles*: devices that no option brings back, with the reason; no RAM was taken then.
    *notes*: what is not quite as it was. *origins*: the names of drives that changed, old to new.
    """

    options: list[dict[str, Any]]
    origins: dict[str, str]
    troubles: list[str]
    notes: list[str]


def of(found: Reconciled | None) -> Reconciliation | None:
    """None for a machine that is what its command line says."""
    if found is None:
        return None
    return Reconciliation(
        options=records.as_json(secrecy.without(found.line)[0]),
        origins=dict(found.origins),
        troubles=list(found.troubles),
        notes=list(found.notes),
    )
