"""`tilewise cost`: what attention costs, from sizes alone, and every table that is quoted of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tilewise.cli import FAILED, OK
from tilewise.cli.grids import print_grid, write_grids
from tilewise.cli.output import (
    DTYPES,
    HEAD_DIM,
    SIZE,
    PositiveIntegers,
    json_option,
    only_with,
    print_json,
    report_option,
)
from tilewise.cli.problem import check_heads
from tilewise.cost import (
    DEVICES,
    Estimate,
    TileShape,
    estimate,
    fitting_shapes,
)
from tilewise.cost.banks import ACCESSES, LAYOUTS, SharedTile, conflict_ways
from tilewise.cost.claims import MEASURED, computed_claims
from tilewise.cost.model import MODELS
from tilewise.cost.quoted import Claim, size
from tilewise.cost.tables import (
    Grid,
    caches,
    comparison,
    devices,
    hierarchy,
    kernels,
    mechanisms,
    model_memory,
    model_times,
)

_LENGTH = click.IntRange(1, 2**26)
"""Every tile row is walked, which takes a second or two at the most."""


@click.command(short_help="FLOPs, bytes and memory of attention, and the tables that are quoted of it.")
@click.option("--batch", type=SIZE, default=1, show_default=True)
@click.option("--heads", type=SIZE, default=32, show_default=True)
@click.option("--kv-heads", type=SIZE, default=None, help="[default: as many as heads]")
@click.option("--seq", type=_LENGTH, default=8192, show_default=True, help="Query rows.")
@click.option("--keys", type=_LENGTH, default=None, help="Keys; as many as query rows unless given.")
@click.option("--head-dim", type=HEAD_DIM, default=128, show_default=True)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="[default: bfloat16, or float16 on a device that has no other]"
)
@click.option("--causal", is_flag=True, help="Let each token see only itself and what comes before.")
@click.option("--tables", is_flag=True, help="Every table that is quoted, computed beside the quotation.")
@click.option(
    "--device",
    type=click.Choice(tuple(DEVICES), case_sensitive=False),
    help="Tile shapes that fit a device; with --model its least time.",
)
@click.option("--model", type=click.Choice(tuple(MODELS)), help="Memory of a training step of a whole model.")
@click.option(
    "--lengths", type=PositiveIntegers(), default="512,1024,2048,4096,8192", show_default=True, help="With --model."
)
@click.option("--checkpoint", is_flag=True, help="With --model: activation checkpointing, a layer at a time.")
@click.option("--chunked-loss", type=SIZE, default=None, help="With --model: tokens of logits at once.")
@report_option
@json_option
def cost(
    batch: int,
    heads: int,
    kv_heads: int | None,
    seq: int,
    keys: int | None,
    head_dim: int,
    dtype: str | None,
    causal: bool,
    tables: bool,
    device: str | None,
    model: str | None,
    lengths: tuple[int, ...],
    checkpoint: bool,
    chunked_loss: int | None,
    report: Path | None,
    as_json: bool,
) -> int:
    """What one attention layer costs, or a whole model, or a tile shape; nothing is run and no PyTorch is needed.

    With --tables the exit code is 1 if a figure differs from the quotation without a derivation that says why.
    """
    check_heads({"heads": heads, "kv_heads": kv_heads})
    _check_mode(tables=tables, model=model, device=device)
    where = DEVICES[device or "H100 SXM"]
    dtype = dtype or where.usual_dtype
    if dtype not in where.matmul and (device is not None or model is not None):
        raise click.BadParameter(f"{where.name} has no matrix units for {dtype}", param_hint="--dtype")
    grids: list[Grid]
    value: Any
    code = OK
    if tables:
        claims = computed_claims()
        grids = [*(_claim_grid(claim) for claim in claims), _measured_grid(), *_known_tables()]
        value = {"computed": [_claim_json(claim) for claim in claims], "measured": [m._asdict() for m in MEASURED]}
        code = FAILED if any(not row.equal and not row.note for claim in claims for row in claim.rows) else OK
    elif model is not None:
        options = {"checkpoint": checkpoint, "chunked_loss": chunked_loss}
        grids = [
            model_memory(model, MODELS[model], batch, lengths, **options),
            model_times(model, MODELS[model], batch, lengths, where, dtype=dtype),
        ]
        times = {"device": where.name, "rows": _records(grids[1])}
        value = {"model": model, "batch": batch, **options, "rows": _records(grids[0]), "least_times": times}
    elif device is not None:
        grids = _device_grids(device, head_dim, dtype)
        value = {grid.title: _records(grid) for grid in grids}
    else:
        found = estimate(
            batch=batch,
            heads=heads,
            seq=seq,
            head_dim=head_dim,
            kv_heads=kv_heads,
            k_seq=keys,
            dtype=dtype,
            causal=causal,
        )
        grids = _estimate_grids(found)
        value = {**asdict(found), "forward": found.forward._asdict(), "backward": found.backward._asdict()}
    write_grids("cost", grids, report)
    if as_json:
        print_json(value)
    else:
        for grid in grids:
            print_grid(grid)
    return code


def _check_mode(*, tables: bool, model: str | None, device: str | None) -> None:
    """An option that the kind of answer asked for does not use is refused, so that nobody takes it for used."""
    if tables:
        only_with("with --tables", "tables", "report", "as_json")
    elif model is not None:
        useful = ("model", "batch", "lengths", "checkpoint", "chunked_loss", "device", "dtype")
        only_with("with --model", *useful, "report", "as_json")
    elif device is not None:
        only_with("with --device but without --model", "device", "head_dim", "dtype", "report", "as_json")
    else:
        problem = ("batch", "heads", "kv_heads", "seq", "keys", "head_dim", "dtype", "causal")
        only_with("without --model", *problem, "report", "as_json")


def _claim_grid(claim: Claim) -> Grid:
    rows = tuple((row.what, row.quoted, row.computed, "=" if row.equal else "≠", row.note) for row in claim.rows)
    title = f"{claim.title}. {claim.note}" if claim.note else claim.title
    shown = 5 if any(row.note for row in claim.rows) else 4
    return Grid(title, ("", "quoted", "computed", "", "why")[:shown], tuple(row[:shown] for row in rows))


def _claim_json(claim: Claim) -> dict[str, Any]:
    rows = [{**row._asdict(), "equal": row.equal} for row in claim.rows]
    return {"title": claim.title, "note": claim.note, "rows": rows}


def _measured_grid() -> Grid:
    rows = tuple((claim.what, claim.quoted, claim.command) for claim in MEASURED)
    return Grid("Claims that only a measurement can test", ("claim", "quoted by others", "measures it here"), rows)


def _known_tables() -> list[Grid]:
    lengths = (512, 1024, 2048, 4096, 8192)
    medium = model_memory("gpt2-medium", MODELS["gpt2-medium"], 4, lengths)
    times = model_times("gpt2-medium", MODELS["gpt2-medium"], 4, lengths, DEVICES["A100 80GB"])
    return [mechanisms(), comparison(), caches(), kernels(), medium, times, hierarchy(DEVICES["A100 80GB"]), devices()]


def _records(grid: Grid) -> list[dict[str, str]]:
    return [dict(zip(grid.columns, row, strict=True)) for row in grid.rows]


def _device_grids(name: str, head_dim: int, dtype: str) -> list[Grid]:
    device = DEVICES[name]
    shapes = tuple(
        (
            f"{shape.block_m}×{shape.block_n}",
            size(shape.shared(2)),
            size(shape.registers),
            str(programs),
            f"{shape.intensity:.0f}",
        )
        for shape, programs in fitting_shapes(device, head_dim, dtype=dtype)
    )
    columns = ("tile", "shared, 2 stages", "registers", "programs a multiprocessor", "FLOP/byte of K, V")
    sources = tuple((field, source) for field, source in device.sources.items())
    return [
        Grid(f"Tile shapes that fit {name}, D = {head_dim}, {dtype}", columns, shapes),
        bank_grid(head_dim, dtype),
        hierarchy(device),
        Grid(f"Sources of {name}", ("number", "source"), sources),
    ]


def bank_grid(head_dim: int, dtype: str) -> Grid:
    """Conflicts of a 64-row tile by layout and access."""
    rows: list[tuple[str, ...]] = []
    for layout in LAYOUTS:
        try:
            tile = SharedTile(64, head_dim, dtype, layout)
        except ValueError:
            continue
        rows.append((layout, size(tile.nbytes), *(f"{conflict_ways(tile, access):g}" for access in ACCESSES)))
    title = f"Bank conflicts of a 64×{head_dim} {dtype} tile: times slower than conflict-free"
    return Grid(title, ("layout", "bytes", *ACCESSES), tuple(rows))


def _estimate_grids(found: Estimate) -> list[Grid]:
    spec = found.spec
    work = Grid(
        str(spec).removesuffix(f" {spec.device}"),
        ("", "products", "softmax", "all"),
        tuple(
            (name, *(f"{part / 1e9:,.2f} GFLOP" for part in (flops.matmul, flops.softmax, flops.total)))
            for name, flops in (("forward", found.forward), ("backward", found.backward))
        ),
    )
    ideal = found.ideal.bytes
    traffics = {
        "ideal: Q, K, V, O once": ideal,
        "flash v2, 128×128 tiles, no cache": found.flash_v2.traffic.bytes,
        "flash v1, 128×128 tiles": found.flash_v1.traffic.bytes,
        "standard, three kernels": found.standard.bytes,
        "standard, six kernels": found.six_step.bytes,
        "flash backward": found.flash_backward.traffic.bytes,
    }
    traffic = Grid(
        "HBM traffic",
        ("", "bytes", "of ideal", "FLOP/byte"),
        tuple(
            (name, _mib(count), f"{count / ideal:.1f}×", f"{_flops_of(found, name) / count:.1f}")
            for name, count in traffics.items()
        ),
    )
    memory = Grid(
        "Memory",
        ("method", "Q, K, V, O", "working", "saved for backward", "O(N²) share"),
        tuple(
            (method, _mib(held.qkvo), _mib(held.working), _mib(held.saved), f"{100 * held.share_beyond_qkvo:.0f} %")
            for method, held in found.memory.items()
        ),
    )
    tile = TileShape(128, 64, spec.head_dim, spec.v_head_dim, spec.dtype)
    fits = ", ".join(f"{d.name} {tile.programs_per_sm(d, 2)}" for d in DEVICES.values())
    chip = Grid(
        "A 128×64 tile set on chip",
        ("Q", "K", "V", "S", "P", "accumulator", "programs a multiprocessor, 2 stages"),
        ((size(tile.q), size(tile.k), size(tile.v), size(tile.s), size(tile.s), size(tile.acc), fits),),
    )
    return [work, traffic, memory, chip]


def _flops_of(found: Estimate, name: str) -> float:
    return found.backward.matmul if name == "flash backward" else found.forward.matmul


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
