import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.errors import UsageError
from qmpsnap.hypervisor.machine.keyval import Bare, Fields, format, from_json, nested, parse

_KEYS = st.from_regex(r"[a-z][a-z0-9-]{0,5}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True)
_VALUES = st.one_of(st.text(), st.just(Bare.KEY))


@given(st.lists(st.tuples(_KEYS, _VALUES)).map(tuple))
def test_keyval_text_says_what_was_said(pairs):
    fields = Fields(pairs)
    assert parse(format(fields)) == fields


@given(st.lists(st.tuples(_KEYS, st.text())).map(tuple))
def test_keyval_text_says_what_was_said_with_a_first_key_left_out(pairs):
    fields = Fields((("driver", "virtio,=x"), *pairs))
    assert parse(format(fields, "driver"), "driver") == fields
    plain = Fields((("driver", "virtio,,x"), *pairs))
    assert format(plain, "driver").startswith("virtio,,,,x")
    assert parse(format(plain, "driver"), "driver") == plain


_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.text())
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), inner, max_size=3),
    ),
)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), _TREES, max_size=4))
def test_keyval_json_survives_being_flat(tree):
    fields = from_json(tree)
    assert nested(fields) == tree
    assert json.loads(format(fields)) == tree
    assert parse(format(fields), json_too=True) == fields


def test_keyval_knows_commas_flags_and_dots():
    fields = parse("a,,b.img,server,nowait,file.driver=qcow2,opt=x=y,", "file")
    assert fields.get("file") == "a,b.img"
    assert fields.on("server")
    assert fields.get("wait") == "off"
    assert fields.below("file").get("driver") == "qcow2"
    assert fields.get("opt") == "x=y"


def test_keyval_last_value_counts_and_all_are_kept():
    fields = parse("hostfwd=a,id=1,hostfwd=b")
    assert fields.get("hostfwd") == "b"
    assert format(fields) == "hostfwd=a,id=1,hostfwd=b"


def test_keyval_bare_first_word_is_not_mistaken_for_the_implied_key():
    fields = Fields((("nowait", Bare.KEY), ("server", Bare.KEY)))
    again = parse(format(fields, "path"), "path")
    assert (again.get("path"), again.get("wait"), again.get("server")) == (None, "off", "on")


def test_keyval_edits_reach_below_a_key():
    fields = parse("id=a,file.driver=file,file.aio=native,filename=x")
    assert format(fields.without("file")) == "id=a,filename=x"
    assert format(fields.set("id", "b")).startswith("id=b,file.driver")
    assert fields.has("file")
    assert not fields.has("fil")


@pytest.mark.parametrize("text", ["{", "{}x", '{"a":', "{'a':'hunter2}"])
def test_keyval_broken_json_is_named(text):
    with pytest.raises(UsageError, match="not JSON") as odd:
        parse(text, json_too=True)
    assert "hunter2" not in str(odd.value)  # there may be a password in it


def test_keyval_quotes_of_both_kinds():
    text = """{'a': 'it\\'s "so"', "b": "it's \\"so\\"", 'c': 'x\\"y\\\\'}"""
    fields = parse(text, json_too=True)
    assert [fields.get(key) for key in "abc"] == ['it\'s "so"', 'it\'s "so"', 'x"y\\']
