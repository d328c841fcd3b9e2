"""Standard attention: the whole N×M score matrix at once. Every feature, any device; the thing to beat.

Forward: S = QKᵀ·scale, P = softmax(S), O = PV, with S and P in memory. The backward recomputes both from the LSE, so
that training holds N×M only while a call runs, not between forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tilewise.backends.base import Gradients, Needs, Operands, empty_ordered, empty_output
from tilewise.backends.problems import Problem, allowed_pairs, restriction, sequences
from tilewise.backends.scores import NEG_INF, ScoreBlocks, Totals, delta_rows, sink_gradient
from tilewise.reference.softmax import finish, merge_sink, row_max, shift_of
from tilewise.spec import AttentionSpec


class _Whole:
    """A problem whose only tile is the whole of it."""

    def __init__(self, problem: Problem, operands: Operands, spec: AttentionSpec) -> None:
        self.problem = problem
        self.blocks = ScoreBlocks(problem, operands, spec)
        n, m = problem.q.shape[2], problem.k.shape[2]
        self.rows, self.keys = range(n), range(m)
        self.q = self.blocks.q_rows(self.rows)
        self.allowed = None
        mask = restriction(operands, spec)
        if mask is not None and 0 not in (n, m, problem.q.shape[0]):
            self.allowed = allowed_pairs(problem, mask, spec)


def _wholes(operands: Operands, spec: AttentionSpec) -> Iterator[_Whole]:
    for problem in sequences(operands, spec):
        yield _Whole(problem, operands, spec)


class Standard:
    name = "standard"

    def why_not(self, spec: AttentionSpec) -> str | None:
        return None

    def configure(self, spec: AttentionSpec) -> None:
        return None

    def forward(self, operands: Operands, spec: AttentionSpec, config: None) -> tuple[Tensor, Tensor]:
        out, lse = empty_output(operands)
        for whole in _wholes(operands, spec):
            s, _ = whole.blocks.scores(whole.q, whole.rows, whole.keys, whole.allowed)
            m = row_max(s)
            p = s.sub_(shift_of(m)[..., None]).exp_()
            part = finish(m, p.sum(-1), whole.blocks.times_v(p, whole.rows, whole.keys))
            if whole.blocks.sink is not None:
                part = merge_sink(*part, whole.blocks.sink)
            whole.problem.of_rows(out).copy_(part[0])
            whole.problem.of_rows(lse).copy_(part[1])
        return out, lse

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        operands: Operands,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        config: None,
        needs: Needs,
    ) -> Gradients:
        dq = empty_ordered(operands.q, spec.head_dim)
        totals = Totals.zeros(operands, needs)
        for whole in _wholes(operands, spec):
            problem, blocks = whole.problem, whole.blocks
            lse_rows = problem.of_rows(lse)
            empty = (lse_rows == NEG_INF)[..., None]
            dout_rows = problem.of_rows(dout).to(blocks.dtype).masked_fill(empty, 0.0)
            dlse_rows = None if dlse is None else problem.of_rows(dlse)
            delta = delta_rows(dout_rows, dlse_rows, problem.of_rows(out).to(blocks.dtype))
            if totals.sink is not None and blocks.sink is not None:
                totals.sink.add_(sink_gradient(blocks.sink, lse_rows, delta))
            lse_safe = lse_rows[..., None].masked_fill(empty, float("inf"))
            args = whole.q, dout_rows, delta, lse_safe, whole.rows, whole.keys, whole.allowed, totals
            problem.of_rows(dq).copy_(blocks.backward(*args))
        return totals.gradients(dq, operands)


STANDARD = Standard()
