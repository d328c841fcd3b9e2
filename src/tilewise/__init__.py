"""tilewise: exact and sub-quadratic attention behind one small API.

Names are loaded when first used, so that `import tilewise` costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "attention": "tilewise.ops.dense",
    "explain": "tilewise.ops.dense",
    "attention_varlen": "tilewise.ops.varlen",
    "merge": "tilewise.ops.merging",
    "Plan": "tilewise.ops.dispatch",
    "UnsupportedError": "tilewise.errors",
    "AttentionSpec": "tilewise.spec",
}
_MODULES = {
    "biases": "tilewise.ops.biases",
    "cost": "tilewise.cost",
    "masks": "tilewise.masks",
    "reference": "tilewise.reference",
}

__all__ = [
    "AttentionSpec",
    "Plan",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "biases",
    "cost",
    "explain",
    "masks",
    "merge",
    "reference",
]

if TYPE_CHECKING:
    from tilewise import cost as cost
    from tilewise import masks as masks
    from tilewise import reference as reference
    from tilewise.errors import UnsupportedError as UnsupportedError
    from tilewise.ops import biases as biases
    from tilewise.ops.dense import attention as attention
    from tilewise.ops.dense import explain as explain
    from tilewise.ops.dispatch import Plan as Plan
    from tilewise.ops.merging import merge as merge
    from tilewise.ops.varlen import attention_varlen as attention_varlen
    from tilewise.spec import AttentionSpec as AttentionSpec


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'tilewise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
