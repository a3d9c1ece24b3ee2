"""A few of the store's campaign, as a sample; all of it: python -m tests.campaigns.store."""

from __future__ import annotations

import os

import pytest

from tests.campaigns.store import FAULTS, SAMPLE, Row, campaign
from tests.nfs.conftest import Server

pytestmark = pytest.mark.nfs


@pytest.mark.timeout(580)
async def test_a_store_that_misbehaves_hurts_no_guest(server: Server) -> None:
    rows: list[Row] = []
    wanted = [one for one in FAULTS if one.name in SAMPLE]
    assert len(wanted) == len(SAMPLE)
    await campaign(os.environ.get("NFS_OPTIONS", "as it is"), wanted, rows.append, with_guest=False)
    assert [row.exit for row in rows if row.fault == "healthy"] == [0, 0]
    assert {row.exit for row in rows if row.fault != "healthy"} == {5}
    assert all(row.later_s is not None for row in rows if row.exit == 5)
