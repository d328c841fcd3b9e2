"""The errors tilewise raises on purpose, and the one way in which they are phrased.

Every message names the argument, what it got, what it wants and, where there is one, the likely fix.
"""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """A valid request that the chosen backend cannot serve; the message names one that can."""


def _phrase(argument: str, got: object, want: str, fix: str | None) -> str:
    message = f"{argument}: got {got}; wants {want}"
    return f"{message}. Fix: {fix}" if fix else message


def bad_value(argument: str, got: object, want: str, fix: str | None = None) -> ValueError:
    """A ValueError for `argument`; the caller raises it."""
    return ValueError(_phrase(argument, got, want, fix))


def bad_type(argument: str, got: object, want: str, fix: str | None = None) -> TypeError:
    """A TypeError for `argument`; the caller raises it."""
    described = got if isinstance(got, str) else type(got).__name__
    return TypeError(_phrase(argument, described, want, fix))
