import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.errors import Blocked, UsageError
from qmpsnap.hypervisor.machine.cmdline import FLAGS, CommandLine, Option, parse

_NAMES = st.sampled_from(["drive", "m", "device", "name", "hda", "serial", "x-new"])
_OPTIONS = st.one_of(
    st.builds(Option, _NAMES, st.text()),
    st.builds(Option, st.sampled_from(sorted(FLAGS))),
)
_LINES = st.builds(CommandLine, st.text(), st.lists(_OPTIONS).map(tuple))


@given(_LINES)
def test_cmdline_is_the_inverse_of_argv(line):
    assert parse(line.argv()) == line


def test_cmdline_takes_two_dashes_for_one_and_a_bare_word_for_hda():
    line = parse(["qemu", "--nodefaults", "--m", "64", "disk.img"])
    assert line.options == (Option("nodefaults"), Option("m", "64"), Option("hda", "disk.img"))


def test_cmdline_takes_a_value_that_looks_like_an_option():
    assert parse(["qemu", "-append", "-S"]).options == (Option("append", "-S"),)


@pytest.mark.parametrize("argv", [[], ["qemu", "-m"]])
def test_cmdline_that_is_cut_off_is_refused(argv):
    with pytest.raises(UsageError):
        parse(argv)


def test_cmdline_that_starts_no_machine_is_named():
    with pytest.raises(Blocked, match="-writeconfig"):
        parse(["qemu", "-writeconfig", "file"])


def test_cmdline_edits_leave_the_rest_in_order():
    line = parse(["qemu", "-S", "-m", "64", "-S", "-smp", "2"])
    assert line.without({"S"}).argv() == ["qemu", "-m", "64", "-smp", "2"]
    assert line.all("S", "m") == [Option("S"), Option("m", "64"), Option("S")]
    assert line.append(Option("s")).argv()[-1] == "-s"
    twice = line.replace(lambda index, option: [option] * (2 if index == 1 else 0))
    assert twice.argv() == ["qemu", "-m", "64", "-m", "64"]
