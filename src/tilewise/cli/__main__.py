"""`python -m tilewise.cli`, which is what `torchrun -m tilewise.cli` runs in every process."""

from __future__ import annotations

import sys

from tilewise.cli import run

sys.exit(run())
