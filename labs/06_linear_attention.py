# %% [markdown]
# # 06 Linear attention
#
# After this lesson you know
# - how reordering one product turns N×N scores into a state of D×D, and why that is another function;
# - that the parallel, chunked and recurrent forms are equal;
# - from which length it does less work, here in FLOPs and in time;
# - why it decodes in constant time a token;
# - what it pays: recall of single tokens, and how both train at equal size.

# %%
import math

import torch
from torch import nn
from torch.nn import functional as F

import tilewise as tw
from tilewise.bench.inputs import default_text
from tilewise.bench.lab import expect, measured, pick, show
from tilewise.bench.report import units
from tilewise.bench.report.charts import Series, log_chart
from tilewise.bench.timer import interleaved
from tilewise.cost.counts import forward_flops, self_attention
from tilewise.cost.linear import crossover_length, decode_flops, linear_counts
from tilewise.ops.linear import linear_attention
from tilewise.reference import features, linear

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = pick(torch.float32, torch.bfloat16)

# %% [markdown]
# ## One product, reordered
#
# Softmax needs every score before it can weigh a value. With a feature map φ in place of the exponential the weights
# are a product, and products can be reordered: `(φ(Q)φ(K)ᵀ)V = φ(Q)(φ(K)ᵀV)`. The right side never forms N×N.

# %%
q, k, v = torch.randn(3, 1, 2, 65, 16, dtype=torch.float64)
phi_q, phi_k = features.elu(q), features.elu(k)
by_scores = (phi_q @ phi_k.mT) @ v
by_state = phi_q @ (phi_k.mT @ v)
assert torch.allclose(by_scores, by_state)
exact = tw.attention(q, k, v, causal=True, backend="standard")
other = linear_attention(q, k, v, causal=True)
distance = ((exact - other).norm() / exact.norm()).item()
print(f"the same numbers reordered; but not softmax attention: {distance:.0%} apart on random inputs")
assert distance > 0.05

# %% [markdown]
# ## Three equal forms

# %%
parallel = linear.parallel(phi_q, phi_k, v, causal=True, normalize=True)
chunked = linear.chunked(phi_q, phi_k, v, causal=True, normalize=True, chunk=16)
recurrent = linear.recurrent(phi_q, phi_k, v, normalize=True)
forms_error = max((x.out - parallel.out).abs().max().item() for x in (chunked, recurrent))
print(
    f"chunked and recurrent against parallel: {forms_error:.1e}; the state is {list(recurrent.state.s.shape)} for any N"
)
assert forms_error < 1e-10
assert torch.allclose(other, parallel.out)
assert recurrent.state.s.shape[-2:] == (16, 16)

# %% [markdown]
# ## From which length it is less work
#
# A token of exact causal attention costs `2·N·D` FLOPs, of the chunked form about `2·C·D + 4·D²`: the first grows.

# %%
d = 64
crossover = crossover_length(d)
lengths = pick((128, 512, 2048), (1024, 4096, 16384, 65536))
for n in lengths:
    spec = self_attention(n, d, heads=4, causal=True)
    print(
        f"N = {n:6}: exact {forward_flops(spec).matmul / 1e6:10.1f} MFLOP, "
        f"linear {linear_counts(spec).flops / 1e6:10.1f}"
    )
print(f"equal FLOPs at N ≈ {crossover}")
assert (
    linear_counts(self_attention(4 * crossover, d, causal=True)).flops
    < forward_flops(self_attention(4 * crossover, d, causal=True)).matmul
)

# %%
times: dict[str, list[tuple[float, float]]] = {"exact": [], "linear": []}
for n in lengths:
    q, k, v = (torch.randn(1, 4, n, d, device=device).to(dtype) for _ in range(3))
    calls = {
        "exact": lambda q=q, k=k, v=v: tw.attention(q, k, v, causal=True),
        "linear": lambda q=q, k=k, v=v: linear_attention(q, k, v, causal=True),
    }
    with torch.inference_mode():
        for call in calls.values():
            call()
        found = interleaved(calls, device, seconds=pick(0.2, 1.0))
    for name, timing in found.items():
        times[name].append((float(n), timing.least))
    print(
        f"N = {n:6}: exact {units.duration(found['exact'].least):>9}, linear {units.duration(found['linear'].least):>9}"
    )
show(
    log_chart(
        "Time by length",
        [Series(name, tuple(points), style) for style, (name, points) in enumerate(times.items())],
        x_label="sequence length N",
        x_text=lambda n: f"{n:,.0f}",
        y_text=units.duration,
    ),
    "Exact and linear attention, causal, D = 64",
)
faster = [n for (n, e), (_, x) in zip(times["exact"], times["linear"], strict=True) if x < e]
growth = {name: points[-1][1] / points[-2][1] for name, points in times.items()}
print(f"last step in length: exact {growth['exact']:.1f}×, linear {growth['linear']:.1f}×")
expect(growth["linear"] < growth["exact"], "linear attention grows more slowly with N")

# %% [markdown]
# ## A constant cost a token
#
# Decoding exact attention reads a cache that grows; the recurrent form updates a state that does not.

# %%
steps = pick((128, 1024, 8192), (1024, 8192, 65536))
per_token: dict[int, tuple[float, float]] = {}
state = None
for n in steps:
    k, v = (torch.randn(1, 4, n, d, device=device).to(dtype) for _ in range(2))
    q1, k1, v1 = (torch.randn(1, 4, 1, d, device=device).to(dtype) for _ in range(3))
    _, state = linear_attention(k, k, v, causal=True, return_state=True)
    calls = {
        "exact": lambda q1=q1, k=k, v=v: tw.attention(q1, k, v),
        "linear": lambda q1=q1, k1=k1, v1=v1, state=state: linear_attention(q1, k1, v1, causal=True, state=state),
    }
    with torch.inference_mode():
        for call in calls.values():
            call()
        found = interleaved(calls, device, seconds=0.1)
    per_token[n] = found["exact"].least, found["linear"].least
    print(
        f"after {n:6} tokens: exact {units.duration(per_token[n][0]):>9}, linear {units.duration(per_token[n][1]):>9}, "
        f"cache {units.size(k.nbytes + v.nbytes)}, state {units.size(state.s.nbytes)}"
    )
assert decode_flops(self_attention(1, d)) == 4 * d * d
exact_growth = per_token[steps[-1]][0] / per_token[steps[0]][0]
linear_growth = per_token[steps[-1]][1] / per_token[steps[0]][1]
expect(exact_growth > linear_growth, "a token costs the same however many came before")

# %% [markdown]
# ## What it pays: recall
#
# Store n random pairs of keys and values, then ask for each value by its key. A sharp softmax finds one key among n. A
# state of D×D keeps about D pairs apart at best ("identity", keys as they are); positive maps such as elu + 1 blur them
# further; Taylor's map has 1 + D + D² features, and holds more than its positive rivals.


# %%
def recalled(n: int, method: str) -> float:
    """The share of n values that come out nearest to themselves."""
    generator = torch.Generator().manual_seed(1)
    keys = F.normalize(torch.randn(1, 1, n, 32, generator=generator), dim=-1)
    values = torch.randn(1, 1, n, 32, generator=generator)
    if method == "softmax":
        out = tw.attention(keys * 40, keys, values, scale=1.0)
    else:
        sharp = keys if method == "identity" else keys * 6
        out = linear_attention(sharp, sharp, values, causal=False, feature_map=method, normalize=method != "identity")
    nearest = torch.cdist(out[0, 0], values[0, 0]).argmin(-1)
    return (nearest == torch.arange(n)).float().mean().item()


recall = {
    method: {n: recalled(n, method) for n in (4, 16, 64, 256)} for method in ("softmax", "identity", "elu", "taylor")
}
for method, found in recall.items():
    print(f"{method:8}" + "".join(f"  n = {n}: {share:4.0%}" for n, share in found.items()))
assert recall["softmax"][256] > 0.95
assert recall["identity"][4] > 0.95
for method in ("identity", "elu", "taylor"):
    assert recall[method][256] < 0.6 * recall["softmax"][256]

# %% [markdown]
# A sum has another weakness: what is written twice under one key comes out as both. The *delta rule* takes out of the
# state what the key finds there before it writes, so a new value replaces the old one. Its price is that it also erases
# a little of what lies under similar keys.


# %%
def rewritten(n: int, rule: str) -> float:
    """The share of n values, each written over an older one, that come out nearest to themselves."""
    generator = torch.Generator().manual_seed(1)
    keys = F.normalize(torch.randn(1, 1, n, 32, generator=generator), dim=-1).repeat(1, 1, 2, 1)
    values = torch.randn(1, 1, 2 * n, 32, generator=generator)
    beta = torch.ones(1, 1, 2 * n) if rule == "delta" else None
    options = {"causal": True, "feature_map": None, "normalize": False, "beta": beta}
    _, state = linear_attention(keys, keys, values, return_state=True, **options)
    nearest = torch.cdist((keys[:, :, :n] @ state.s)[0, 0], values[0, 0]).argmin(-1)
    return (nearest == torch.arange(n, 2 * n)).float().mean().item()


replaced = {rule: {n: rewritten(n, rule) for n in (4, 8, 16)} for rule in ("sum", "delta")}
for rule, found in replaced.items():
    print(f"{rule:8}" + "".join(f"  n = {n}: {share:4.0%}" for n, share in found.items()))
assert replaced["delta"][8] > 0.8 > replaced["sum"][8]

# %% [markdown]
# ## Training both at equal size
#
# The same one-layer byte model, the same text and steps, softmax or linear attention. At this size it only shows the
# direction; the figures are this run's.


# %%
class TinyModel(nn.Module):
    def __init__(self, method: str, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.method, self.heads = method, heads
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(1024, width)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = (
            tw.attention(q, k, v, causal=True) if self.method == "softmax" else linear_attention(q, k, v, causal=True)
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(x + self.ff(x))


def train(method: str, steps: int, batch: int, length: int) -> tuple[float, float, float]:
    """(first loss, mean of the last ten, largest gradient norm)."""
    torch.manual_seed(0)
    data = torch.frombuffer(bytearray(default_text().data), dtype=torch.uint8).long()
    model = TinyModel(method).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, norms = [], []
    for _ in range(steps):
        starts = torch.randint(len(data) - length - 1, (batch,))
        rows = torch.stack([data[s : s + length + 1] for s in starts]).to(device)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10, max(norms)


training = {method: train(method, pick(60, 600), pick(4, 16), pick(96, 512)) for method in ("softmax", "linear")}
for method, (first, last, norm) in training.items():
    print(
        f"{method:8} loss {first:.2f} → {last:.2f} (perplexity {math.exp(last):.1f}), largest gradient norm {norm:.2f}"
    )
    assert last < first - 1.0
    assert math.isfinite(norm)

# %%
measured(
    equal_flops_at=f"N ≈ {crossover}",
    faster_here_from=f"N = {faster[0]:.0f}" if faster else f"not up to N = {lengths[-1]}",
    decode_growth=f"exact {exact_growth:.1f}×, linear {linear_growth:.1f}× from {steps[0]} to {steps[-1]} tokens",
    recall_of_256=", ".join(f"{method} {found[256]:.0%}" for method, found in recall.items()),
    loss_softmax_linear=f"{training['softmax'][1]:.2f} against {training['linear'][1]:.2f}",
)

# %% [markdown]
# ## Checklist
# - I can say which product is reordered, and what has to be given up for it.
# - I can choose between the three forms: training, long prompts, decoding.
# - I can say why a state of fixed size must forget.
#
# ## Questions
# 1. *Why does linear attention do fewer FLOPs and yet lose to exact attention at moderate lengths?* Its products are
#    small, and the machine runs large ones nearer to its peak.
# 2. *What does a decay add?* The state forgets by itself, so that old tokens make room; then no normaliser is needed.
# 3. *Why is it not normalised with decay?* The denominator would decay too; a norm on the output takes its place.
