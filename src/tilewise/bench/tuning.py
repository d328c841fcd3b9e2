"""Where rows of the Triton engine's tables come from: every tile shape that can hold a problem, kernel by kernel.

    python -m tilewise.bench.tuning --suite window --head-dim 128

All shapes whose accumulators fit in registers are compiled, in parallel processes. Each that compiles runs once on the
case and is held to the judge's budget; what is right is timed briefly, and the fastest again beside the shape that
stands in the table, in rounds that let the clock settle. Nothing is written: `backends/triton/configs.py` is data that
somebody decides on, with these figures beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.backends.base import Needs
from tilewise.backends.triton import TRITON
from tilewise.backends.triton.configs import Tile
from tilewise.backends.triton.launch import TritonPlan
from tilewise.bench.judge import Finding, Judge
from tilewise.bench.precompile import in_processes
from tilewise.bench.suites import Case
from tilewise.bench.timer import Timing, in_rounds, interleaved
from tilewise.bench.workload import Workload

KERNELS = ("forward", "dkdv", "dq")

REGISTERS = 224
"""Of the 255 that a thread can have, what accumulators may take: addresses and row statistics need the rest."""


class Row(NamedTuple):
    """One tile shape of one kernel."""

    kernel: str
    tile: Tile
    stands: bool
    """It is the table's."""
    finding: Finding
    timing: Timing


@dataclass(frozen=True)
class Outcome:
    """What became of the shapes of one kernel on one case."""

    kernel: str
    rows: tuple[Row, ...]
    """The fastest and the one that stands, fastest first."""
    wrong: tuple[Tile, ...]
    """Compiled, ran, and were not within the budget."""
    refused: tuple[tuple[Tile, str], ...]
    """Did not compile or run, and why."""


def candidates(kernel: str, head_dim: int, stands: Tile, element_size: int) -> list[Tile]:
    """Every shape whose float32 accumulators take at most `REGISTERS` registers of a thread, the standing one first.

    Args:
        kernel: one of `KERNELS`.
        head_dim: D = Dv, padded to a power of two.
        stands: the table's shape; its use of the copy engine is kept.
        element_size: bytes. Float32 goes through plain multiply-adds and takes small tiles.
    """
    rows, columns = ((16, 32, 64), (16, 32, 64)) if element_size == 4 else ((32, 64, 128), (32, 64, 128))
    stages = (1, 2) if element_size == 4 else (2, 3, 4)
    found = [stands]
    for block_m, block_n, warps, depth in product(rows, columns, (4, 8), stages):
        scores = block_m * block_n
        held = {
            "forward": block_m * head_dim + scores,
            "dkdv": 2 * block_n * head_dim + 2 * scores,
            "dq": block_m * head_dim + 2 * scores,
        }[kernel]
        tile = Tile(block_m, block_n, warps, depth, stands.tma)
        if held <= REGISTERS * 32 * warps and tile != stands:
            found.append(tile)
    return found


class Bench:
    """One case on the Triton engine, with one kernel's tile shape exchanged at a time."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.work = Workload.of(case, device)
        self._operands = self.work.arguments("triton").operands()
        plan = self.work.plan("triton")
        self._spec, self._config = plan.spec, plan.config
        self._packed = bool(case.packed)
        with torch.no_grad():
            self._saved = TRITON.forward(self._operands, self._spec, self._config)

    @property
    def config(self) -> TritonPlan:
        """The table's."""
        return self._config

    def call(self, kernel: str, tile: Tile, needs: Needs | None = None) -> Callable[[], tuple[Tensor | None, ...]]:
        """That kernel with `tile` (a backward one with the row statistics before it): out, or dq, dk, dv."""
        tiles = self._config.tiles._replace(**{kernel: tile})
        # What the plan remembers is compiled for its own tiles.
        config = self._config._replace(tiles=tiles, compiled={})
        operands, spec, (out, lse) = self._operands, self._spec, self._saved
        if kernel == "forward":
            return lambda: TRITON.forward(operands, spec, config)[:1]
        dout = self.work.dout.transpose(0, 1)[None] if self._packed else self.work.dout
        needs = needs or Needs(q=kernel == "dq", k=kernel == "dkdv", v=kernel == "dkdv")
        return lambda: TRITON.backward(dout, None, operands, out, lse, spec, config, needs)[:3]

    def finding(self, judge: Judge, kernel: str, tile: Tile) -> Finding:
        """How far the results of `tile` are from the truth; the other kernels run as the table says."""
        with torch.no_grad():
            results = self.call(kernel, tile, Needs())()
        results = [x[0].transpose(0, 1) if self._packed else x for x in results if x is not None]
        return judge.out(*results) if kernel == "forward" else judge.gradients(*results)


def tune(
    case: Case,
    device: torch.device,
    *,
    kernels: Sequence[str] = KERNELS,
    finalists: int = 5,
    rounds: int = 5,
    choose: Callable[[str, int, Tile, int], list[Tile]] = candidates,
    told: Callable[[str], object] = lambda line: None,
) -> Iterator[Outcome]:
    """Tries every shape on `case`, one kernel after another.

    Args:
        finalists: how many are timed again, in `rounds` settled rounds, beside the one that stands.
        choose: the shapes to try, as `candidates` gives them.
        told: what is going on, line by line.

    Raises:
        UnsupportedError: the Triton engine cannot run the case here.
    """
    bench = Bench(case, device)
    judge = Judge(bench.work, backward=any(kernel != "forward" for kernel in kernels))
    element_size = bench.work.q.element_size()
    for kernel in kernels:
        stands: Tile = getattr(bench.config.tiles, kernel)
        tiles = choose(kernel, bench.config.flags["BLOCK_D"], stands, element_size)
        told(f"{case.name}, {kernel}: compiling {len(tiles)} shapes")
        errors = in_processes(_once, [(case, device, kernel, tile) for tile in tiles])
        refused = [(tile, _first_line(error)) for tile, error in zip(tiles, errors, strict=True) if error]
        able = [tile for tile, error in zip(tiles, errors, strict=True) if not error]
        findings = {tile: bench.finding(judge, kernel, tile) for tile in able}
        right = [tile for tile in able if findings[tile].passed]
        told(f"{case.name}, {kernel}: timing {len(right)} shapes")
        calls = {str(tile): bench.call(kernel, tile) for tile in right}
        with torch.no_grad():
            brief = interleaved(calls, device, seconds=0.0, least=3, most=3)
            order = sorted(right, key=lambda tile: brief[str(tile)].least)
            last = [tile for tile in order if tile in order[:finalists] or tile == stands]
            timings = in_rounds({str(tile): calls[str(tile)] for tile in last}, device, rounds=rounds)
        rows = [Row(kernel, tile, tile == stands, findings[tile], timings[str(tile)]) for tile in last]
        yield Outcome(
            kernel,
            tuple(sorted(rows, key=lambda row: row.timing.median)),
            tuple(tile for tile in able if not findings[tile].passed),
            tuple(refused),
        )


def _once(case: Case, device: torch.device, kernel: str, tile: Tile) -> None:
    bench = Bench(case, device)
    bench.call(kernel, tile)()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def main() -> None:
    """The command line of this module."""
    import click

    from tilewise.bench.suites import SUITES, select

    @click.command(help=__doc__)
    @click.option("--suite", "suites", type=click.Choice(list(SUITES)), multiple=True, default=["dense"])
    @click.option("--head-dim", "head_dims", type=click.IntRange(1, 512), multiple=True)
    @click.option("--length", "lengths", type=click.IntRange(1), multiple=True)
    @click.option("--kernel", "kernels", type=click.Choice(KERNELS), multiple=True, default=KERNELS)
    @click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
    def command(
        suites: tuple[str, ...],
        head_dims: tuple[int, ...],
        lengths: tuple[int, ...],
        kernels: tuple[str, ...],
        dtype: str,
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for case in select(suites, dtype, head_dims=head_dims, lengths=lengths):
            for outcome in tune(case, device, kernels=kernels, told=lambda line: click.echo(line, err=True)):
                click.echo(f"{case.name}  {outcome.kernel}")
                for row in outcome.rows:
                    low, high = row.timing.least, row.timing.most
                    mark = "  stands" if row.stands else ""
                    click.echo(f"  {row.timing.median:8.3f} ms ({low:.3f} to {high:.3f})  {row.tile}{mark}")
                for tile in outcome.wrong:
                    click.echo(f"  WRONG  {tile}")
                click.echo(f"  {len(outcome.refused)} refused" + "".join(f"; {why}" for _, why in outcome.refused[:1]))

    command()


if __name__ == "__main__":
    main()
