"""A surface, and what is asked of it for each input: a value, or an error in one line."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from qmpsnap.errors import SnapError
from tests.fuzz import mutation
from tests.fuzz.guard import TooLong, WroteOutside, within

SECONDS = 5.0
LONGEST = 8192
"""Characters that an error may have."""


@dataclass(frozen=True)
class Surface:
    """*tried* reads an input in a scratch folder; *seeds* are good ones; *spoil* makes odd ones.

    *named*: a word that each error has to have, such as the file's name.
    """

    name: str
    seeds: Callable[[], Sequence[Any]]
    tried: Callable[[Any, Path], object]
    spoil: Callable[[Random, Any], Any] = mutation.content
    named: str = ""
    slow: bool = False
    _made: dict[str, Sequence[Any]] = field(default_factory=dict)

    def good(self) -> Sequence[Any]:
        """The seeds, made once."""
        if "seeds" not in self._made:
            self._made["seeds"] = self.seeds()
        return self._made["seeds"]

    def input(self, seed: int, number: int) -> Any:
        """The *number*-th input of that *seed*: always the same one."""
        dice = Random(f"{self.name} {seed} {number}")
        return self.spoil(dice, dice.choice(self.good()))


@dataclass(frozen=True)
class Finding:
    """What went wrong with *input*: *kind* is the same for what is likely the same fault."""

    kind: str
    told: str


def judged(surface: Surface, given: Any, scratch: Path) -> Finding | None:
    """None if all is well."""
    try:
        with within(SECONDS):
            surface.tried(given, scratch)
    except SnapError as failed:
        return _wording(failed, surface.named)
    except TooLong as late:
        return Finding(f"takes long {_where(late)}", f"not through within {SECONDS:g} s")
    except WroteOutside as wrote:
        return Finding(f"writes {_where(wrote)}", str(wrote))
    except MemoryError as odd:
        traceback.clear_frames(odd.__traceback__)  # what they hold leaves no room to look
        return Finding(f"MemoryError {_where(odd)}", "takes more memory than there is")
    except Exception as odd:  # noqa: BLE001 - that is what is sought
        return Finding(f"{type(odd).__name__} {_where(odd)}", f"{odd!r:.300}")
    return None


def _wording(failed: SnapError, named: str) -> Finding | None:
    for text in (str(failed), failed.hint):
        if not text.isprintable():
            return Finding(f"not one printable line {_where(failed)}", repr(text)[:300])
        if len(text) > LONGEST:
            return Finding(f"a line without end {_where(failed)}", f"{len(text)} characters")
    if not str(failed):
        return Finding(f"no words {_where(failed)}", repr(failed))
    if named and named not in str(failed):
        return Finding(f"names no {named} {_where(failed)}", str(failed)[:300])
    return None


def _where(odd: BaseException) -> str:
    """The last line of ours that it came by."""
    frames = traceback.extract_tb(odd.__traceback__)
    ours = [one for one in frames if "/qmpsnap/" in one.filename]
    last = ours[-1] if ours else frames[-1]
    return f"at {last.filename.rpartition('/qmpsnap/')[2]}:{last.lineno} {last.name}"
