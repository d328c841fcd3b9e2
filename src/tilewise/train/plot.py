"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tilewise.train.loop import Step


def plot(steps: Sequence[Step], path: Path, *, unigram: float | None = None) -> None:
    """Loss, and the gradient's norm below it, over steps, as SVG; `unigram` is a line to stay below.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    FigureCanvasSVG(figure)
    losses, norms = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    x = [step.step for step in steps]
    losses.plot(x, [step.loss for step in steps], label="loss")
    if unigram is not None:
        losses.axhline(unigram, linestyle="--", color="gray", label="unigram entropy")
    losses.set_ylabel("nats a token")
    losses.legend()
    norms.plot(x, [step.grad_norm for step in steps])
    norms.set_ylabel("gradient norm")
    norms.set_xlabel("step")
    figure.savefig(path, format="svg", metadata={"Date": None})
