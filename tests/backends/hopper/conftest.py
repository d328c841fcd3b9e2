"""The helpers of ahead-of-time compilation lie with the Triton backend's tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "triton"))
