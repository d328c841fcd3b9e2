"""Backends by name, and the one way in which a test can force `tiled` to walk tiles where one dense mask would do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tilewise.backends import tiled
from tilewise.ops.dispatch import choose
from tilewise.ops.library import route


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend named by the parameter; "tiles" is `tiled` without its engine for small problems."""
    if request.param != "tiles":
        yield request.param
        return
    monkeypatch.setattr(tiled, "DENSE_ELEMENTS", 0)
    choose.cache_clear()
    route.cache_clear()
    yield "tiled"
    choose.cache_clear()
    route.cache_clear()
