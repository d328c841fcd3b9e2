"""What a check of `tilewise doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass

GOOD, ABSENT, BROKEN = "ok", "not here", "broken"
"""A finding's status. Only "broken" makes the exit code 1: what a machine lacks is not an error."""


@dataclass(frozen=True)
class Finding:
    """What one probe found; `fix` is what to do about it, if anything."""

    subject: str
    status: str
    detail: str
    fix: str = ""
