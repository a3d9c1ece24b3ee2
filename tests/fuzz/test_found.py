"""What fuzzing has found, each made small: none of it is found again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fuzz.guard import guarded
from tests.fuzz.surface import judged
from tests.fuzz.surfaces import SURFACES
from tests.fuzz.surfaces.wires import _DONE, _GREETING

_DEEP_LIST, _DEEP = b"[" * 3000, b'{"a":' * 3000
_LONG = "ä" * 70000
_FILE = {"filename": "x", "virtual-size": 1}


def _node(name: str, **more: Any) -> dict[str, Any]:
    return {"node-name": name, "drv": "qcow2", "ro": False, "image": _FILE, "children": [], **more}


def _beneath(*names: str) -> list[dict[str, str]]:
    return [{"child": "backing", "node-name": name} for name in names]


def _told(*nodes: dict[str, Any], drive: dict[str, Any] | None = None) -> dict[str, Any]:
    shown = {"removable": False, "qdev": "vda", "inserted": {"node-name": "d0"}, **(drive or {})}
    return {'query-named-block-nodes {"flat": true}': list(nodes), "query-block": [shown]}


_UNREADABLE = [_DEEP, _DEEP_LIST, b'{"format":"\xff"', b'{"x":' + _DEEP]
"""Nested without end, and half a character: no decoder takes them, and none of ours let them by."""
_READERS = (
    "manifest",
    "storage",
    "moved",
    "pages",
    "hurt",
    "shared",
    "usage",
    "last-usage",
    "arrival",
    "arriving",
    "dependents",
    "registered",
    "lock",
    "tpm",
    "journal",
    "image-facts",
    "orders",
    "agent-wire",
    "feeder-lines",
    "worker-lines",
    "spare-wire",
)
_PROC = {"loadavg": b"0 0 0", "stat": b"cpu 1 0 0 4\nbtime 1", "meminfo": b"MemTotal:"}
CASES: dict[str, list[Any]] = {
    # a line that never ends, and one that a terminal would act upon
    "paired": [json.dumps({"format": _LONG, "version": 1}).encode()],
    "identity": [json.dumps({"format": "qmpsnap-identity", "version": 1, "vm": _LONG}).encode()],
    "registered": [b'{"format":"\\u001b[31m","name":"","pid":6,"started":1,"qmp":""}'],
    "lock": [b'{"pid":1,"what":"a\\nb","since":"\\b"}'],
    "arriving": [
        b'{"id":"","vm":"","done_bytes":1,"total_bytes":%s,"trouble":"a\\nb","at":""}' % number
        for number in (b"1", b"1" * 400)
    ],
    "dependents": [json.dumps({"folder": "f", "images": ["x" * 300]}).encode()],
    "config": [b'local = "\\u0000"', b"local =" + _DEEP_LIST, b"local = " + b"9" * 5000,
               b'store_timeout = "' + b"9" * 400 + b's"'],
    "journal": [b"", b'{"verb":"delete","phase":[]}\n', b'{"phase":"folding","files":1}\n',
                b'{"verb":"create"}\n{"phase":[]}\n', b'{"phase":{}}\n'],
    "last": [b"99991231T235959999Z\n"],
    "names": ["99991231T235959999Z", "\ud800", "9" * 400, "9" * 400 + "E", "1" * 400 + "h"],
    # a graph that runs in a circle was gone down for ever
    "qmp-graph": [
        _told(_node("d0", children=_beneath("d0"))),
        _told(_node("d0", children=_beneath("d1")), _node("d1", children=_beneath("d0"))),
        _told(_node("d0", drv="throttle", children=[{"child": "file", "node-name": "d0"}])),
        _told(_node("d0", children=_beneath("gone"))), _told(),
        _told(_node("d0", **{"dirty-bitmaps": [{"name": 5}]})), _told(_node("d0", image=[])),
        _told(_node("d0", image={**_FILE, "virtual-size": "x"})),
        _told(_node("d0"), drive={"qdev": 5}),
        _told(_node("d0", image={"filename": "x" * 300, "virtual-size": 1})),
        {'query-named-block-nodes {"flat": true}': "x", "query-block": {}},
        {**_told(_node("d0", children=None)), "x-debug-query-block-graph": {"nodes": [], "edges": [
            {"parent": 1, "child": 2, "name": "x"}]}},
    ],
    "agent-wire": [b"\xff" + b"x" * (1 << 17), b'\xff{"return": ' + b"1" * (1 << 17)],
    "worker-lines": [b'{"error":{"code":"","message":"","hint":""}}\n', b" " * (4 << 20)],
    "feeder-lines": [b'{"failed":{"code":"","message":"","hint":""}}\n',
                     b'{"warning": "' + b"x" * (1 << 17)],
    "return-path": [b"\0\5\0\0", b"\0\5\1\1" + bytes(257)],
    "qmp-states": [{"query-status": []}, {"query-status": {"status": []}}],
    "qmp-abilities": [{"query-version": {"qemu": []}}, {"query-version": None}],
    "qmp-inventory": [{"query-version": {"qemu": {"major": 8, "minor": 0, "micro": 0}},
                       "query-status": {"status": [1]}}],
    "qmp-tuned": [{"query-migrate-capabilities": [], "query-migrate-parameters": {}},
                  {"query-migrate-capabilities": [{}]}],
    "qmp-recover": [{"query-fdsets": [{}], "query-cpus-fast": [{}]}, {"query-uuid": []}],
    "qmp-postcopy": [{'qom-list {"path": "/objects"}': [{}]}],
    "monitor-wire": [
        [_GREETING, _DONE, b'{"id": {"x": 1}, "error": {"class": "GenericError", "desc": "x"}}\n'],
        [_GREETING, _DONE, b'{"id": \x8d\xa2"}\n'],
        [b'{"QMP": "' + b"x" * (11 << 20)],  # a line that never ends
        [_GREETING, _DONE, b'{"return": "' + b"x" * (11 << 20)],
        [_GREETING + _GREETING, _DONE + _GREETING],
        [_GREETING, b'{"event": "STOP", "timestamp": []}\n' + _DONE],
    ],
    "spare-wire": [b"[]\n", b"\n", _GREETING + b"[]\n", _GREETING + b'{"id":"@ID@"}\n',
                   _GREETING + b'{"id":"@ID@","error":5}\n'],
    "image-facts": [
        b'{"filename":"","format":"","virtual-size":4,"format-specific":{"data":false}}',
    ],
    # what the kernel tells
    "kernel-words": ["0-9999999999", "some avg10=", "some a", "some =", "full avg10=0",
                     "x rbps=" + "9" * 5000, "31 1 0:1", "some avg10=1 avg60=1 avg300=1 total=x"],
    "cgroup": [{"7/cgroup": b"x\n", "self/mountinfo": b" "}, {"self/mountinfo": b"\xff"},
               {"7/cgroup": b"::/\0", "self/mountinfo": b"1 3 8 / o rw - cgroup c rw"},
               {"7/cgroup": b"", "self/mountinfo": b"    "}],
    "proc": [{"7/stat": b"S 1"}, {"7/task/7/stat": b""}, {**_PROC, "loadavg": b"\\ 0 0"},
             {**_PROC, "stat": b"cpu \xff"}, {**_PROC, "pressure/cpu": b"full a"},
             {**_PROC, "stat": b"cpu 0 0 0 4\nbtime 700000000000"}],
    "socket-diag": [bytes(16), b"\x14\0\0\0\x02\0" + bytes(10)],
}  # fmt: skip


@pytest.mark.parametrize("name", _READERS)
def test_what_cannot_be_decoded(name: str) -> None:
    with guarded() as scratch:
        for case in _UNREADABLE:
            assert judged(SURFACES[name], case, scratch) is None, case[:80]


@pytest.mark.parametrize("name", CASES)
def test_found(name: str) -> None:
    surface = SURFACES[name]
    with guarded() as scratch:
        for case in CASES[name]:
            assert judged(surface, case, scratch) is None, case
