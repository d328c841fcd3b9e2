# %% [markdown]
# # 01 Setup and comparison
#
# After this lesson you know
# - what this machine has, and which backend it uses, and why;
# - how standard and flash attention compare here in time, memory and accuracy, from length 512 to 4096;
# - what of that follows from the sizes alone;
# - what difference between two exact methods is normal.

# %%
import torch

import tilewise as tw
from tilewise.bench.comparison import Settings, compare
from tilewise.bench.environment import environment
from tilewise.bench.inputs import default_text
from tilewise.bench.lab import measured, pick, show
from tilewise.bench.report import units
from tilewise.bench.report.charts import Series, log_chart
from tilewise.cost import attention_memory, forward_flops, self_attention

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
for name, value in environment(device).items():
    print(f"{name:10} {value}")

# %% [markdown]
# ## Which backend, and why
#
# `explain` prints what a call would do; shapes are enough. `tilewise doctor` says more.

# %%
x = torch.empty(1, device=device).expand(1, 8, 4096, 64)
plan = tw.explain(x, x, x, causal=True)
print(plan)
assert {plan.backend, *plan.rejected} == {"standard", "tiled", "sdpa", "triton", "hopper"}

# %% [markdown]
# ## What the sizes say
#
# Standard attention holds two N×N matrices, S and P: twice the length, four times the scores. Q, K, V and O only
# double.

# %%
for n in (512, 1024, 2048, 4096):
    memory = attention_memory(self_attention(n, 64), "standard")
    print(
        f"N = {n:5}: Q, K, V, O {units.size(memory.qkvo):>8}, S and P {units.size(memory.working):>8} "
        f"({memory.share_beyond_qkvo:.0%})"
    )
sizes = [attention_memory(self_attention(n, 64), "standard").working for n in (512, 1024)]
assert sizes[1] == 4 * sizes[0]
assert forward_flops(self_attention(1024)).total == 4 * forward_flops(self_attention(512)).total

# %% [markdown]
# ## What this machine says
#
# Each method computes the same attention on Q, K and V made from real text, is checked against float64, then timed in
# turns with the others, then its memory is measured.

# %%
lengths = pick((128, 256), (512, 1024, 2048, 4096))
settings = Settings(
    default_text(),
    lengths=lengths,
    heads=pick(2, 16),
    head_dim=64,
    dtype=pick(torch.float32, torch.bfloat16),
    device=device,
    seconds=pick(0.1, 2.0),
)
comparison = compare(settings)
rows = {(row.method, row.n): row for row in comparison.rows}
shown = ("standard", "auto")
print(f"{'N':>6} {'method':>9} {'time':>9} {'memory':>9} {'error':>8} {'allowed':>8}")
for n in lengths:
    for method in shown:
        row = rows[method, n]
        held = "–" if row.peak_bytes is None else units.size(row.peak_bytes)
        time = "–" if row.ms is None else units.duration(row.ms)
        print(f"{n:6} {method:>9} {time:>9} {held:>9} {row.error:8.1e} {row.budget:8.1e}")
assert comparison.passed, "every method must stay within its error budget"


# %%
def series(value):
    return [
        Series(name, tuple((float(n), float(value(rows[name, n]))) for n in lengths if value(rows[name, n])), style)
        for style, name in enumerate(shown)
    ]


axis = {"x_label": "sequence length N", "x_text": lambda n: f"{n:,.0f}"}
show(log_chart("Time", series(lambda row: row.ms), y_text=units.duration, **axis), "Time: standard and auto")
show(
    log_chart("Memory", series(lambda row: row.peak_bytes or 0), y_text=units.size, binary=True, **axis),
    "Extra memory: standard grows with N², the other with N",
)

# %% [markdown]
# ## How different is normal?
#
# Tiles sum in another order, so the last bits differ. On unit-normal inputs less than 1e-5 in float32 and 1e-3 in
# float16 is normal, and neither result is the truer one: compare both with float64.

# %%
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 4, 513, 64, generator=generator) for _ in range(3))
exact = tw.attention(q.double(), k.double(), v.double(), backend="standard")
found = {}
for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
    inputs = [t.to(device, dtype) for t in (q, k, v)]
    plain = tw.attention(*inputs, backend="standard").double().cpu()
    fast = tw.attention(*inputs).double().cpu()
    found[dtype] = (fast - plain).abs().max().item()
    print(
        f"{dtype}: fast − standard {found[dtype]:.1e}; from float64: fast {(fast - exact).abs().max():.1e}, "
        f"standard {(plain - exact).abs().max():.1e}"
    )
    assert found[dtype] < limit

# %%
last = lengths[-1]
standard, auto = rows["standard", last], rows["auto", last]
facts = {"difference_fp32": f"{found[torch.float32]:.1e}", "difference_fp16": f"{found[torch.float16]:.1e}"}
if standard.ms and auto.ms:
    facts[f"speed_up_at_{last}"] = units.times(standard.ms / auto.ms)
if standard.peak_bytes and auto.peak_bytes:
    facts[f"memory_at_{last}"] = f"{units.size(standard.peak_bytes)} against {units.size(auto.peak_bytes)}"
    assert standard.peak_bytes > auto.peak_bytes
measured(**facts)

# %% [markdown]
# ## Checklist
# - I can say which backend runs here and what would change it.
# - I can predict how time and memory grow when N, batch, heads or head_dim doubles.
# - I know which difference between two exact methods is a bug and which is rounding.
#
# ## Questions
# 1. *Does doubling head_dim double the memory of standard attention?* No: the scores are N×N whatever D is; only Q, K,
#    V and O double.
# 2. *Flash does the same FLOPs as standard attention. Why is it faster?* It moves fewer bytes: scores stay on chip.
# 3. *Why is the quoted "4× to 64× less memory" not what is measured?* It compares one score matrix with two of the four
#    N×D tensors. Beyond Q, K, V and O the ratio is N.
