"""How a quoted figure is held: beside the computed one, or beside the command that measures it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_UNITS = ("B", "KB", "MB", "GB")


def size(count: float) -> str:
    """Bytes as the quotations write them: 262144 → "256 KB"; below 1 MB the scores' table counts in MB."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:g} {_UNITS[power]}"


class Row(NamedTuple):
    """One figure: what it is of, what is quoted and what comes out."""

    what: str
    quoted: str
    computed: str
    note: str = ""
    """Where it is not equal, or true only under conditions: the derivation."""

    @property
    def equal(self) -> bool:
        return self.quoted == self.computed


@dataclass(frozen=True, slots=True)
class Claim:
    """A table that people know."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""


class Measured(NamedTuple):
    """A claim that only a measurement can test, what others reported, and what reruns it on this machine."""

    what: str
    quoted: str
    command: str
