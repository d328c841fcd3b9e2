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
    "attention_decode": "tilewise.ops.decode",
    "explain_decode": "tilewise.ops.decode",
    "KVView": "tilewise.ops.views",
    "linear_attention": "tilewise.ops.linear",
    "explain_linear": "tilewise.ops.linear",
    "LinearState": "tilewise.reference.linear",
    "merge": "tilewise.ops.merging",
    "Plan": "tilewise.ops.dispatch",
    "UnsupportedError": "tilewise.errors",
    "AttentionSpec": "tilewise.spec",
}
_MODULES = {
    "biases": "tilewise.ops.biases",
    "caches": "tilewise.caches",
    "cost": "tilewise.cost",
    "masks": "tilewise.masks",
    "nn": "tilewise.nn",
    "reference": "tilewise.reference",
}

__all__ = [
    "AttentionSpec",
    "KVView",
    "LinearState",
    "Plan",
    "UnsupportedError",
    "attention",
    "attention_decode",
    "attention_varlen",
    "biases",
    "caches",
    "cost",
    "explain",
    "explain_decode",
    "explain_linear",
    "linear_attention",
    "masks",
    "merge",
    "nn",
    "reference",
]

if TYPE_CHECKING:
    from tilewise import caches as caches
    from tilewise import cost as cost
    from tilewise import masks as masks
    from tilewise import nn as nn
    from tilewise import reference as reference
    from tilewise.errors import UnsupportedError as UnsupportedError
    from tilewise.ops import biases as biases
    from tilewise.ops.decode import attention_decode as attention_decode
    from tilewise.ops.decode import explain_decode as explain_decode
    from tilewise.ops.dense import attention as attention
    from tilewise.ops.dense import explain as explain
    from tilewise.ops.dispatch import Plan as Plan
    from tilewise.ops.linear import explain_linear as explain_linear
    from tilewise.ops.linear import linear_attention as linear_attention
    from tilewise.ops.merging import merge as merge
    from tilewise.ops.varlen import attention_varlen as attention_varlen
    from tilewise.ops.views import KVView as KVView
    from tilewise.reference.linear import LinearState as LinearState
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
