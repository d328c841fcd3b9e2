# %% [markdown]
# # 00 Softmax and the online trick
#
# After this lesson you know
# - what attention computes, by hand on a 2×2 example;
# - why softmax subtracts the maximum, and how it can be had in one pass;
# - that two partial results can be merged, and why tiles, split decoding and rings are all that one operation;
# - what FlashAttention's two versions keep on chip, step by step;
# - the true gradient of softmax, which is not `P∘(1 − P)`.

# %%
import math

import torch

from tilewise.bench.lab import measured, show
from tilewise.bench.report.animation import scrubbers
from tilewise.bench.trace import trace_flash
from tilewise.cost import flash_v1_counts, flash_v2_counts, self_attention
from tilewise.reference import (
    flash_v1,
    flash_v2,
    merge,
    online_attention,
    online_softmax,
    safe_softmax,
    standard_attention,
)
from tilewise.reference.softmax import partial_attention

torch.manual_seed(0)

# %% [markdown]
# ## By hand, 2×2
#
# Two tokens, two dims. `S = QKᵀ/√D`, each row through softmax, then times `V`.

# %%
q = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
k = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
v = torch.tensor([[10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
s = q @ k.T / math.sqrt(2)
row0 = [math.exp(x) for x in s[0].tolist()]
p00 = row0[0] / sum(row0)
print("S =", s.tolist())
print(f"row 0: e^S = {row0[0]:.4f}, {row0[1]:.4f}; P[0, 0] = {p00:.4f}; O[0] = {10 * p00:.4f}, {10 * (1 - p00):.4f}")

out = standard_attention(q[None, None], k[None, None], v[None, None]).out[0, 0]
assert abs(out[0, 0].item() - 10 * p00) < 1e-12
assert torch.allclose(out[1], torch.tensor([5.0, 5.0], dtype=torch.float64))  # equal scores, equal weights

# %% [markdown]
# ## Why the maximum is subtracted
#
# `e^89` overflows float32. Subtracting the row's maximum changes nothing, since numerator and denominator both lose the
# same factor, and the largest exponent becomes 0.

# %%
large = torch.tensor([100.0, 99.0, 98.0])
naive = large.exp() / large.exp().sum()
print("naive:", naive.tolist(), " safe:", [round(x, 4) for x in safe_softmax(large).tolist()])
assert naive.isnan().all()
assert torch.allclose(safe_softmax(large), torch.softmax(large, 0))

# %% [markdown]
# ## One pass instead of three
#
# Safe softmax reads a row three times: for the maximum `m`, for the sum `l`, to normalise. The online form carries both
# along: when a block brings a larger maximum, what was summed so far is multiplied by `e^(m − m')`.
#
#     m' = max(m, max x)        l' = l·e^(m − m') + Σ e^(x − m')

# %%
x = torch.tensor([1.0, 3.0, 2.0, 5.0], dtype=torch.float64)
m, l = -math.inf, 0.0
for value in x.tolist():
    m_new = max(m, value)
    l = l * math.exp(m - m_new) + math.exp(value - m_new)
    m = m_new
    print(f"after {value}: m = {m}, l = {l:.4f}")
assert math.isclose(m + math.log(l), torch.logsumexp(x, 0).item())
for block in (1, 2, 3, 64):
    assert torch.allclose(online_softmax(x, block), torch.softmax(x, 0))

# %% [markdown]
# Attention needs only `Σ P·V`, so the accumulator is rescaled together with `l`, and the row is never visited again.

# %%
scores, values = torch.randn(5, 113, dtype=torch.float64), torch.randn(113, 8, dtype=torch.float64)
whole = torch.softmax(scores, -1) @ values
worst = max((online_attention(scores, values, block).out - whole).abs().max().item() for block in (1, 7, 64, 200))
print(f"one pass, four block sizes: largest difference {worst:.1e}")
assert worst < 1e-12

# %% [markdown]
# ## The merge
#
# A partial result over some keys is `(out, lse)`. Two of them, over different keys, join into one; the order does not
# matter. Tiles, split-KV decoding, pages of a cache, ring attention and sinks are this operation.

# %%
parts = [partial_attention(scores[:, a:b], values[a:b]) for a, b in ((0, 40), (40, 41), (41, 113))]
left = merge(*merge(*parts[0], *parts[1]), *parts[2])
right = merge(*parts[2], *merge(*parts[1], *parts[0]))
merge_error = (left.out - whole).abs().max().item()
assert merge_error < 1e-12
assert torch.allclose(left.out, right.out)
assert torch.allclose(left.lse, right.lse)

# %% [markdown]
# ## Tiles, and what goes through memory
#
# Version 1 of FlashAttention has K/V tiles outside and rewrites O, m and l in memory at every step; version 2 has Q
# tiles outside and keeps them on chip. Both compute the same products. Move the slider: the numbers are those that the
# reference loops had on chip, and the bytes are what they counted.

# %%
q, k, v = torch.randn(3, 1, 1, 12, 4)
traces = [trace_flash(q, k, v, version, causal=True) for version in ("v2", "v1")]
show(scrubbers(traces), "Tiles and the online softmax, N = 12, tiles of 4×4, causal")
v2, v1 = (trace.total for trace in traces)
print(f"v1: {v1.bytes_read} B read, {v1.bytes_written} B written, {v1.divisions} divisions")
print(f"v2: {v2.bytes_read} B read, {v2.bytes_written} B written, {v2.divisions} divisions")
assert v1.matmul_flops == v2.matmul_flops
assert v1.bytes_written > 3 * v2.bytes_written
assert v1.divisions == len(traces[1].frames) > v2.divisions

# %% [markdown]
# What the loops count equals, to the element, what the cost model says from the sizes alone.

# %%
spec = self_attention(113, 16, heads=2, dtype="float32", causal=True)
q, k, v = torch.randn(3, 1, 2, 113, 16)
for loop, model in ((flash_v1, flash_v1_counts), (flash_v2, flash_v2_counts)):
    counted, predicted = loop(q, k, v, causal=True, block_m=32, block_n=16)[1], model(spec, 32, 16)
    print(f"{loop.__name__}: counted {counted.elements:,} elements, predicted {predicted.traffic.elements:,}")
    assert counted.elements_read == predicted.traffic.elements_read
    assert counted.elements_written == predicted.traffic.elements_written
    assert counted.rescalings == predicted.rescalings

# %% [markdown]
# ## The gradient of softmax
#
# `dS = P∘(dP − rowsum(dP∘P))`. The often quoted `P∘(1 − P)` is the diagonal of the Jacobian `diag(P) − PPᵀ` alone: it
# forgets that raising one score lowers every other probability.

# %%
s = torch.randn(6, dtype=torch.float64, requires_grad=True)
dp = torch.randn(6, dtype=torch.float64)
p = torch.softmax(s, 0)
(true,) = torch.autograd.grad(p, s, dp)
formula = p * (dp - (dp * p).sum())
diagonal = p * (1 - p) * dp
diagonal_error = ((diagonal - true).norm() / true.norm()).item()
print(f"formula off by {(formula - true).abs().max().item():.1e}; the diagonal alone is off by {diagonal_error:.0%}")
assert torch.allclose(formula, true)
assert diagonal_error > 0.05

# %%
measured(
    online_against_whole=f"{worst:.1e}",
    merge_against_whole=f"{merge_error:.1e}",
    bytes_written_v1_over_v2=f"{v1.bytes_written / v2.bytes_written:.1f}×",
    diagonal_gradient_error=f"{diagonal_error:.0%}",
)

# %% [markdown]
# ## Checklist
# - I can compute one row of attention by hand.
# - I can update `m` and `l` with one more block, and say why the accumulator is rescaled too.
# - I can say what v1 writes to memory at every step and v2 does not.
#
# ## Questions
# 1. *Why may the output be divided by `l` only once, at the end?* Because the accumulator and `l` are rescaled by the
#    same factor at every step; dividing inside the loop is right only if the old `l` is multiplied back in.
# 2. *What is the LSE of a row that may see no key?* −∞: the neutral element of the merge, whose output is 0.
# 3. *What has to be kept for the backward?* Q, K, V, O and one number a row, the LSE: with it any tile of P is
#    `e^(S − LSE)`.
# 4. *Does the block size change the result?* Only in rounding: the merge is associative.
