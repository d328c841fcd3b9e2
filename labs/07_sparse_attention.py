# %% [markdown]
# # 07 Sparse attention
#
# After this lesson you know
# - what windows, dilated windows, Longformer and BigBird let a token see;
# - why work goes by tiles and not by scores, and what a pattern really saves;
# - that masking dense scores saves nothing, gathering does, and tiles do without copies;
# - how much of a row's weight its few largest scores hold;
# - where sparse becomes faster than dense on this machine.

# %%
from functools import partial

import torch

import tilewise as tw
from tilewise.bench.inputs import attention_inputs, default_text
from tilewise.bench.lab import expect, measured, pick, show
from tilewise.bench.report import units
from tilewise.bench.report.charts import Series, log_chart
from tilewise.bench.report.pictures import bars
from tilewise.bench.sparsity import METHODS, call_of, pattern_of
from tilewise.bench.timer import interleaved
from tilewise.cost.counts import self_attention
from tilewise.cost.sparse import sparse_counts
from tilewise.masks import BigBird, Causal, Dilated, Longformer, Strided, Window, tile_map
from tilewise.reference import standard_attention

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %% [markdown]
# ## The patterns
#
# Blue tiles are full, orange ones partly visible, grey ones are never visited.

# %%
n = 4096
patterns = {
    "causal": Causal(),
    "window of 512": Causal() & Window(512, 0),
    "dilated, 64 keys, step 8": Causal() & Dilated(64, 8),
    "strided by 64": Causal() & Strided(64),
    "Longformer": Longformer(512, [0]),
    "BigBird": BigBird(64, 3, 2, 2),
}
spec = self_attention(n, 64, dtype="float32")
saved = {}
for name, mask in patterns.items():
    counts = sparse_counts(spec, tile_map(mask, n, n))
    visible = counts.visible / n**2
    saved[name] = counts.speedup
    print(
        f"{name:25} sees {visible:6.1%} of the scores, computes {counts.share:6.1%}: "
        f"at most {counts.speedup:5.1f}× less"
    )
    assert counts.share >= visible * 0.999
    if name in ("window of 512", "BigBird", "Longformer"):
        show(mask.show(n, n).svg(), f"{name}, N = {n}")
show(bars("Work saved", saved, lambda x: f"{x:.1f}×"), "Most that each pattern can save, by tiles")

# %% [markdown]
# Strided by 64 sees 1 score in 64 and yet nearly every tile: on tiles it saves almost nothing beyond causality. A
# pattern has to be empty in whole tiles to be fast.

# %%
assert saved["strided by 64"] < 1.1 * saved["causal"]
assert saved["window of 512"] > 3 * saved["causal"]
linear = [
    sparse_counts(self_attention(m, 64), tile_map(Causal() & Window(512, 0), m, m)).flops.total for m in (4096, 8192)
]
print(f"a window's work from N = 4096 to 8192: {linear[1] / linear[0]:.2f}×")
assert linear[1] / linear[0] < 2.1

# %% [markdown]
# ## Three ways to compute a pattern
#
# Dense scores and then a mask; gathered blocks and a batched product; tiles that are visited or not. The same pattern,
# the same result. (Below some size `attention` itself prefers one dense mask: walking tiles has a cost too.)

# %%
length, heads = pick(4096, 8192), pick(1, 8)
pattern = pattern_of(length, 0.9)
pattern = pattern._replace(dense=pattern.dense.to(device))
inputs = [torch.randn(1, heads, length, 64, device=device) for _ in range(3)]
calls = {name: partial(call_of(name, pattern), *inputs) for name in METHODS}
with torch.inference_mode():
    expected = calls["dense, then mask"]()
    for name in ("gather", "tiles"):
        torch.testing.assert_close(calls[name](), expected)
    calls["no mask"]()
    ways = interleaved(calls, device, seconds=pick(0.3, 2.0))
for name, timing in ways.items():
    print(f"{name:17} {units.duration(timing.least):>9}")
show(
    bars("Three ways", {name: t.least for name, t in ways.items()}, units.duration),
    "90 % of the blocks hidden: time by method",
)
nothing_saved = ways["dense, then mask"].least / ways["no mask"].least
expect(nothing_saved > 0.7, "masking dense scores saves nothing")
expect(ways["tiles"].least < ways["dense, then mask"].least, "visiting fewer tiles does")

# %% [markdown]
# ## Are attention matrices sparse?
#
# The weight that the largest k keys of a row hold, over the rows of a causal matrix on Q and K made from real text by
# an untrained block. (Trained models concentrate more.)

# %%
q, k, v = attention_inputs(default_text(), length=512, heads=4, head_dim=64)
scores = (q @ k.mT / 8).masked_fill(~torch.ones(512, 512, dtype=torch.bool).tril(), float("-inf"))
weights = torch.softmax(scores, -1)[:, :, 256:]
mass = {share: weights.topk(round(512 * share), -1).values.sum(-1).mean().item() for share in (0.01, 0.05, 0.1, 0.25)}
for share, held in mass.items():
    print(f"the largest {share:4.0%} of the keys hold {held:.0%} of the weight")
assert mass[0.1] > 2 * 0.1
best = weights.topk(51, -1).indices
kept = torch.zeros_like(scores[:, :, 256:], dtype=torch.bool).scatter_(-1, best, True)
part = standard_attention(q[:, :, 256:], k, v, allowed=kept).out
truth = (weights @ v).float()
lost = ((part - truth).norm() / truth.norm()).item()
print(f"with only the largest 10 % of the keys the output is {lost:.0%} off")

# %% [markdown]
# ## Where sparse wins
#
# A window against full causal attention, both by the best method here. Short sequences have few tiles to skip.

# %%
window = 256
curve: dict[str, list[tuple[float, float]]] = {"causal": [], f"window of {window}": []}
for m in pick((256, 512, 1024, 2048), (1024, 4096, 16384, 65536)):
    q, k, v = (torch.randn(1, 4, m, 64, device=device).to(pick(torch.float32, torch.bfloat16)) for _ in range(3))
    calls = {
        "causal": lambda q=q, k=k, v=v: tw.attention(q, k, v, causal=True),
        f"window of {window}": lambda q=q, k=k, v=v: tw.attention(q, k, v, causal=True, window=(window, 0)),
    }
    with torch.inference_mode():
        for call in calls.values():
            call()
        found = interleaved(calls, device, seconds=pick(0.15, 1.0))
    for name, timing in found.items():
        curve[name].append((float(m), timing.least))
    print(f"N = {m:6}: " + ", ".join(f"{name} {units.duration(t.least)}" for name, t in found.items()))
show(
    log_chart(
        "Time by length",
        [Series(name, tuple(points), style) for style, (name, points) in enumerate(curve.items())],
        x_label="sequence length N",
        x_text=lambda x: f"{x:,.0f}",
        y_text=units.duration,
    ),
    "Full causal against a window",
)
wins = [x for (x, a), (_, b) in zip(*curve.values(), strict=True) if b < a]
causal_growth, window_growth = (points[-1][1] / points[0][1] for points in curve.values())
expect(window_growth < causal_growth, "a window grows more slowly with N")

# %%
measured(
    masking_dense_scores=f"{nothing_saved:.2f} times the time without a mask: nothing saved",
    gather_over_masking=f"{ways['dense, then mask'].least / ways['gather'].least:.1f}×",
    tiles_over_masking=f"{ways['dense, then mask'].least / ways['tiles'].least:.1f}×",
    mass_in_the_top_tenth=f"{mass[0.1]:.0%}",
    window_wins_from=f"N = {wins[0]:.0f}" if wins else "not here",
)

# %% [markdown]
# ## Checklist
# - I can read a mask's picture and say what it saves.
# - I can say why a strided pattern is sparse in scores and dense in tiles.
# - I know the crossover of a window on this machine.
#
# ## Questions
# 1. *Why does masking dense scores save nothing?* Every score is computed and moved before it is hidden.
# 2. *What does gathering cost that tiles do not?* Copies: each block of queries gets its own copy of the keys it sees.
# 3. *Random blocks help BigBird's theory. What do they do to a kernel?* Each is a whole tile, wherever it lies: no
#    harm, as long as they are blocks and not single tokens.
