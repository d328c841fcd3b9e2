"""The options that name an attention problem, for the commands that compute one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import click

from tilewise.cli.output import DTYPES, HEAD_DIM, SIZE
from tilewise.cost.counts import self_attention
from tilewise.spec import AttentionSpec

_OPTIONS = (
    click.option("--batch", type=SIZE, default=1, show_default=True),
    click.option("--heads", type=SIZE, default=8, show_default=True),
    click.option("--kv-heads", type=SIZE, default=None, help="[default: as many as heads]"),
    click.option("--seq", type=SIZE, default=2048, show_default=True, help="Query rows."),
    click.option("--keys", type=SIZE, default=None, help="Keys; as many as query rows unless given."),
    click.option("--head-dim", type=HEAD_DIM, default=64, show_default=True),
    click.option("--dtype", type=click.Choice(DTYPES), default=None, help="[default: what the device is measured in]"),
    click.option("--causal", is_flag=True, help="Let each token see only itself and what comes before."),
    click.option("--window", type=click.IntRange(0), default=None, help="Keys to the left that a row sees."),
)


def problem_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of `spec_of`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_heads(problem: Mapping[str, Any]) -> None:
    """Raises click.BadParameter where "kv_heads" does not divide "heads"; said before anything is measured."""
    heads, kv_heads = problem["heads"], problem["kv_heads"]
    if kv_heads is not None and heads % kv_heads:
        raise click.BadParameter(f"{heads} heads are no multiple of {kv_heads}", param_hint="--kv-heads")


def spec_of(
    *,
    batch: int,
    heads: int,
    kv_heads: int | None,
    seq: int,
    keys: int | None,
    head_dim: int,
    dtype: str,
    causal: bool,
    window: int | None,
    device: str,
) -> AttentionSpec:
    """The problem that the options name.

    Raises:
        click.BadParameter: the heads do not divide.
    """
    check_heads({"heads": heads, "kv_heads": kv_heads})
    spec = self_attention(
        seq, head_dim, batch=batch, heads=heads, kv_heads=kv_heads, dtype=dtype, causal=causal or window is not None
    )
    reach = (None, None) if window is None else (window, 0)
    return replace(spec, k_len=seq if keys is None else keys, device=device, window=reach)
