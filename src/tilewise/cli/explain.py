"""`tilewise explain`: which backend a problem gets, and one true sentence for each that it does not get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tilewise.cli import FAILED, OK
from tilewise.cli.output import DTYPES, MOST, SIZE, console, json_option, pick_device, print_json
from tilewise.cli.problem import check_heads

if TYPE_CHECKING:
    import torch

    from tilewise.ops.dispatch import Plan
    from tilewise.spec import AttentionSpec


class _Window(click.ParamType):
    """LEFT,RIGHT with "none" for an unlimited side."""

    name = "LEFT,RIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        sides = str(value).lower().split(",")
        try:
            left, right = (None if side.strip() == "none" else int(side) for side in sides)
        except ValueError:
            self.fail(f"{value!r} is not LEFT,RIGHT such as 512,0 or none,0", param, ctx)
        return left, right


@click.command(short_help="Which backend a problem gets, and why not each other one.")
@click.option("--batch", type=SIZE, default=1, show_default=True)
@click.option("--heads", type=SIZE, default=8, show_default=True)
@click.option("--kv-heads", type=SIZE, help="[default: as --heads]")
@click.option("--seq", type=click.IntRange(0, MOST), default=4096, show_default=True, help="Query length N.")
@click.option("--keys", type=click.IntRange(0, MOST), help="Key length M.  [default: as --seq]")
@click.option("--head-dim", type=SIZE, default=64, show_default=True, help="Of queries and keys, D.")
@click.option("--v-head-dim", type=SIZE, help="Of values, Dv.  [default: as --head-dim]")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--causal", is_flag=True)
@click.option("--window", type=_Window(), help="Keys that a row sees to either side, such as 512,0 or none,0.")
@click.option("--softcap", type=click.FloatRange(0, min_open=True), help="Cap c of c·tanh(s/c).")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True)
@click.option("--alibi", is_flag=True, help="With ALiBi slopes.")
@click.option("--bias", is_flag=True, help="With a bias [1, H, N, M].")
@click.option("--sink", is_flag=True, help="With one learnable sink a head.")
@click.option("--grad", is_flag=True, help="With gradients for every tensor.")
@click.option("--deterministic", is_flag=True)
@click.option("--backend", default="auto", show_default=True, help="Ask for one by name.")
@json_option
def explain(device: str, as_json: bool, **problem: Any) -> int:
    """Print the plan for a problem: backend, tiles, the reason, and why not each other backend.

    Nothing is computed. Exits with 1 if the backend asked for cannot do it.
    """
    check_heads(problem)
    from tilewise.errors import UnsupportedError

    try:
        plan = _plan(pick_device(device), **problem)
    except UnsupportedError as refusal:
        if as_json:
            print_json({"backend": None, "reason": str(refusal)})
        else:
            click.echo(str(refusal), err=True)
        return FAILED
    except ValueError as problem_found:
        raise click.UsageError(str(problem_found), click.get_current_context()) from problem_found
    if as_json:
        print_json(plan.as_dict())
    else:
        _print(plan)
    return OK


def _plan(
    device: torch.device,
    *,
    batch: int,
    heads: int,
    kv_heads: int | None,
    seq: int,
    keys: int | None,
    head_dim: int,
    v_head_dim: int | None,
    dtype: str,
    alibi: bool,
    bias: bool,
    sink: bool,
    grad: bool,
    **options: Any,
) -> Plan[AttentionSpec]:
    """`tilewise.explain` on tensors of these shapes that take no memory: one element, expanded."""
    import torch

    import tilewise

    kind: torch.dtype = getattr(torch, dtype)

    def tensor(*shape: int) -> torch.Tensor:
        row = torch.empty([1] * (len(shape) - 1) + [shape[-1]], dtype=kind, device=device)
        return row.requires_grad_(grad).expand(shape)

    kv_heads, keys, v_head_dim = kv_heads or heads, seq if keys is None else keys, v_head_dim or head_dim
    return tilewise.explain(
        tensor(batch, heads, seq, head_dim),
        tensor(batch, kv_heads, keys, head_dim),
        tensor(batch, kv_heads, keys, v_head_dim),
        alibi=torch.empty(heads, device=device) if alibi else None,
        bias=tensor(1, heads, seq, keys) if bias else None,
        sink=tensor(heads) if sink else None,
        **options,
    )


def _print(plan: Plan[AttentionSpec]) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    out.print(Text(f"{plan.op}: {plan.spec}"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(plan.backend, style="bold green"), Text(plan.reason))
    table.add_row("", Text(f"config: {plan.config}"))
    for name, sentence in plan.rejected.items():
        table.add_row(Text(f"not {name}", style="dim"), Text(sentence))
    out.print(table)
