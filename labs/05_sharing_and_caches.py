# %% [markdown]
# # 05 MQA, GQA, MLA and the KV cache
#
# After this lesson you know
# - who shares keys and values with whom in MHA, GQA, MQA and MLA, and that the first three are one implementation;
# - what each keeps for a token, and what that is for a long context;
# - that decoding through a cache gives what one pass over everything gives;
# - why MLA decodes in another form than it trains in, and that the two agree;
# - why decoding time goes by the bytes of the cache.

# %%
import torch

import tilewise as tw
from tilewise.bench.calibrate import machine_rates
from tilewise.bench.lab import expect, measured, pick, show
from tilewise.bench.report import units
from tilewise.bench.report.pictures import bars, heads_picture
from tilewise.bench.timer import interleaved
from tilewise.caches import KV, DenseCache, Int8, Latent
from tilewise.cost.counts import ideal_traffic
from tilewise.cost.memory import cache_bytes, kv_cache_elements, latent_cache_elements
from tilewise.spec import AttentionSpec

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = pick(torch.float32, torch.bfloat16)

# %% [markdown]
# ## Who shares what
#
# Query heads above; below what is kept for each token. GQA with as many groups as heads is MHA, with one it is MQA.

# %%
show(heads_picture(8, 2), "MHA, GQA with 2 groups, MQA, and MLA's one latent")
dim, heads = 64, 8
mha = tw.nn.MultiHeadAttention(dim, heads)
gqa = tw.nn.GroupedQueryAttention(dim, heads, heads)
gqa.load_state_dict(mha.state_dict())
mqa = tw.nn.MultiQueryAttention(dim, heads)
one = tw.nn.GroupedQueryAttention(dim, heads, 1)
one.load_state_dict(mqa.state_dict())
x = torch.randn(2, 33, dim)
assert torch.equal(mha(x), gqa(x))
assert torch.equal(mqa(x), one(x))
print("GQA(8 groups) is MHA, GQA(1 group) is MQA: equal outputs from the same weights")

# %% [markdown]
# Sharing is the same as repeating: GQA equals MHA whose K and V weights are copied within each group. Nothing is copied
# when it runs.

# %%
gqa = tw.nn.GroupedQueryAttention(dim, heads, 2)
state = dict(gqa.state_dict())
for name in ("k_proj.weight", "v_proj.weight"):
    state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(heads // 2, 0).flatten(0, 1)
mha.load_state_dict(state)
repeat_error = (gqa(x) - mha(x)).abs().max().item()
assert repeat_error < 1e-5

# %% [markdown]
# ## What a token costs
#
# In elements a token and layer: MHA `2·H·D`, GQA `2·G·D`, MQA `2·D`, MLA `r_kv + d_rope`.

# %%
h, g, d = 32, 8, 128
kinds = {
    "MHA": kv_cache_elements(h, d),
    "GQA, 8 groups": kv_cache_elements(g, d),
    "MQA": kv_cache_elements(1, d),
    "MLA, 512 + 64": latent_cache_elements(512, 64),
}
context = {name: float(cache_bytes(n, tokens=32768, layers=32)) for name, n in kinds.items()}
for name, elements in kinds.items():
    print(f"{name:14} {elements:5} elements, {units.size(context[name]):>8} for 32,768 tokens and 32 layers in fp16")
show(bars("KV cache", context, units.size), "KV cache of 32,768 tokens, 32 layers, H = 32, D = 128, fp16")
assert kinds["MHA"] == 2 * h * d == 4 * kinds["GQA, 8 groups"] == 32 * kinds["MQA"]
assert kinds["MLA, 512 + 64"] == 576

# %% [markdown]
# The shipped caches hold exactly that, and 8-bit contents a little more than half of 16 bits, for their scales.

# %%
small, tokens = 2, 48
for name, contents, elements in (
    ("dense GQA", KV(g, 64), kv_cache_elements(g, 64)),
    ("dense MQA", KV(1, 64), kv_cache_elements(1, 64)),
    ("latent MLA", Latent(128, 32), latent_cache_elements(128, 32)),
):
    cache = DenseCache(contents, small, tokens, dtype=torch.float16)
    print(f"{name:10} {cache.nbytes} B")
    assert cache.nbytes == cache_bytes(elements, tokens=tokens, batch=small)
int8 = DenseCache(Int8(g, 64), small, tokens, dtype=torch.float16).nbytes
full = DenseCache(KV(g, 64), small, tokens, dtype=torch.float16).nbytes
print(f"int8 against fp16: {int8 / full:.3f}")
assert 0.5 <= int8 / full < 0.6

# %% [markdown]
# ## Decoding through a cache
#
# Prefill appends a prompt at once, decoding one token at a time; the result is that of one causal pass over everything.

# %%
layer = tw.nn.GroupedQueryAttention(dim, heads, 2, causal=True).eval()
x = torch.randn(2, 20, dim)
with torch.no_grad():
    whole = layer(x)
    cache = DenseCache(KV(2, dim // heads), 2, 32)
    steps = [layer(x[:, :13], cache=cache)] + [layer(x[:, t : t + 1], cache=cache) for t in range(13, 20)]
decode_error = (torch.cat(steps, 1) - whole).abs().max().item()
print(f"13 tokens at once, then 7 one by one: off by {decode_error:.1e}")
assert decode_error < 1e-5

# %% [markdown]
# ## MLA in two forms
#
# Training expands the latent into keys and values of every head. Decoding moves that projection over to the query and
# the output ("absorbed"), so that the latent itself is key and value, and is read once for all heads.

# %%
mla = tw.nn.MultiHeadLatentAttention(dim, 4, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=16).eval()
with torch.no_grad():
    expanded, absorbed = mla(x, absorbed=False), mla(x, absorbed=True)
mla_error = (expanded - absorbed).abs().max().item()
print(f"expanded − absorbed: {mla_error:.1e}")
assert mla_error < 1e-4

# %% [markdown]
# ## Decoding time goes by bytes
#
# One new token reads the whole cache and does a few FLOPs with each byte: memory-bound. So fewer K/V heads are less
# time, roughly as their bytes go, once the cache is larger than what stays on chip.

# %%
batch, keys, q_heads, hd = pick((2, 2048, 16, 64), (16, 8192, 32, 128))
calls, bytes_of = {}, {}
for name, kv_heads in (("MHA", q_heads), ("GQA", q_heads // 4), ("MQA", 1)):
    contents = KV(kv_heads, hd)
    cache = DenseCache(contents, batch, keys, dtype=dtype, device=device)
    k, v = (torch.randn(batch, kv_heads, keys, hd, device=device).to(dtype) for _ in range(2))
    cache.append(k, v)
    q = torch.randn(batch, q_heads, 1, hd, device=device).to(dtype)
    calls[name] = lambda q=q, cache=cache: tw.attention_decode(q, cache)
    spec = AttentionSpec(batch, q_heads, kv_heads, 1, keys, hd, hd, dtype=str(dtype).removeprefix("torch."))
    bytes_of[name] = ideal_traffic(spec).bytes
    calls[name]()
with torch.inference_mode():
    times = interleaved(calls, device, seconds=pick(0.2, 0.5))
rates = machine_rates(device, dtype)
for name, timing in times.items():
    least = bytes_of[name] / rates.copy * 1e3
    print(
        f"{name}: {units.size(bytes_of[name]):>8} read, {units.duration(timing.least)}, "
        f"by the rate of a large copy {units.duration(least)}"
    )
show(bars("Decoding", {name: t.least for name, t in times.items()}, units.duration), "Time of one decoding step")
expect(times["MQA"].least < times["MHA"].least, "fewer bytes are less time")

# %%
measured(
    decode_against_one_pass=f"{decode_error:.1e}",
    mla_expanded_against_absorbed=f"{mla_error:.1e}",
    decode_mha_gqa_mqa=", ".join(units.duration(t.least) for t in times.values()),
    bytes_mha_over_mqa=f"{bytes_of['MHA'] / bytes_of['MQA']:.1f}×",
    time_mha_over_mqa=f"{times['MHA'].least / times['MQA'].least:.1f}×",
)

# %% [markdown]
# ## Checklist
# - I can draw who shares K and V in the four kinds.
# - I can compute the cache of a model for a context length.
# - I can say what `append` does and what the attention call does not.
#
# ## Questions
# 1. *Why does MLA cache more than MQA and still win?* Its 576 elements make different keys and values for every head;
#    MQA's 256 are the same for all.
# 2. *Why is the absorbed form not used in training?* Its products are 576 and 512 wide where the expanded ones are 192
#    and 128: more FLOPs, which only pay where reading the cache is what takes time.
# 3. *What does a sliding window do to the cache?* A rolling cache keeps the window alone, whatever the length.
