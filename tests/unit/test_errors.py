"""What goes wrong is told in one line that any terminal takes."""

from __future__ import annotations

import pytest

from qmpsnap.errors import AgentError, CommandRefused, LocalFailed, in_one_line


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("so it is: ä", "so it is: ä"),
        ("two\nlines", r"two\nlines"),
        ("\x1b[31mred\x00", r"\x1b[31mred\x00"),
        ("to the \u202eleft", r"to the \u202eleft"),
        ("half a character \udcff", r"half a character \udcff"),
    ],
)
def test_others_words_are_spelled(said: str, told: str) -> None:
    assert in_one_line(said) == told
    failed = AgentError(said, hint=said)
    assert (str(failed), failed.hint) == (told, told)
    refused = CommandRefused("stop", "GenericError", said)
    assert str(refused) == f"stop: {told}"
    assert refused.desc == said


def test_a_message_has_an_end() -> None:
    told = str(LocalFailed("x" * 100_000))
    assert len(told) < 5000
    assert told.endswith("...")
