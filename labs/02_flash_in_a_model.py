# %% [markdown]
# # 02 Flash in a real model
#
# After this lesson you know
# - that a GPT computes the same with standard and with flash attention: loss, gradients, greedy text;
# - what the exchange saves in a training step, in time and in memory, by length;
# - what turning the two loops around was worth: FlashAttention-1's order beside FlashAttention-2's;
# - what the causal rule saves;
# - what a cache saves when a model writes, token by token;
# - how to give a Transformers model the same attention with one line.

# %%
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tilewise as tw
from tilewise.bench.lab import expect, measured, pick, show
from tilewise.bench.report import units
from tilewise.bench.report.charts import Series, log_chart
from tilewise.bench.timer import interleaved
from tilewise.models import GPT, GPTConfig, generate
from tilewise.nn import GroupedQueryAttention
from tilewise.reference import flash_v1, flash_v2

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
sizes = pick(
    {"vocab_size": 257, "dim": 64, "layers": 2, "heads": 4},
    {"vocab_size": 50257, "dim": 1024, "layers": 24, "heads": 16},
)
lengths = pick((64, 128, 256, 512), (512, 1024, 2048, 4096))
model = GPT(GPTConfig(length=lengths[-1], positions="learned", **sizes)).to(device)
print(f"{sum(p.numel() for p in model.parameters()):,} weights")


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B, H, N, D] to out, each row seeing what is before it."""


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as every introduction writes it: S and P are tensors, and autograd keeps P."""
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), float("-inf"))
    return s.softmax(-1) @ v


class WithGradient(torch.autograd.Function):
    """An attention that has a forward pass only, with the gradients of the library's, which begins with one more."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return attend(q.contiguous(), k.contiguous(), v.contiguous())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = tw.attention(*inputs, causal=True)
        return *torch.autograd.grad(out, inputs, dout), None


def loop_orders() -> dict[str, Attend]:
    """Version 1 has K and V tiles outside, and takes O through memory at every step; version 2 has Q tiles outside.
    Kernels on a GPU, loops in Python elsewhere."""
    if device.type == "cuda":
        from tilewise.backends.triton.v1_order import v1_order

        return {
            "v1 order": lambda q, k, v: WithGradient.apply(q, k, v, partial(v1_order, causal=True)),
            "v2": partial(tw.attention, causal=True, backend="triton"),
        }
    loops = {"v1 order": flash_v1, "v2": flash_v2}
    return {
        name: lambda q, k, v, run=run: WithGradient.apply(q, k, v, lambda *x: run(*x, causal=True)[0].out)
        for name, run in loops.items()
    }


ORDERS = {"standard": plain, **loop_orders()}
KINDS = (*ORDERS, "flash")
"""The last is what the model has by itself: the best that this machine can run."""


def around(attn: GroupedQueryAttention, attend: Attend) -> Callable[..., Tensor]:
    """The module's own weights around another attention."""

    def forward(x: Tensor, **_: object) -> Tensor:
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in projections)
        return attn.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))

    return forward


def use(attention: str) -> None:
    """Give every layer of the model one of KINDS."""
    for block in model.blocks:
        block.attn.__dict__.pop("forward", None)
        if attention in ORDERS:
            block.attn.forward = around(block.attn, ORDERS[attention])


# %% [markdown]
# ## The same function
#
# Attention is exact either way, so everything around it is too, up to rounding.

# %%
ids = torch.randint(sizes["vocab_size"], (2, lengths[0]), device=device)
targets = ids.roll(-1, 1)
losses: dict[str, Tensor] = {}
grads: dict[str, tuple[Tensor, ...]] = {}
for attention in KINDS:
    use(attention)
    losses[attention] = model(ids, targets)
    grads[attention] = torch.autograd.grad(losses[attention], list(model.parameters()))
size = sum(g.square().sum() for g in grads["standard"]).sqrt().item()
for attention in KINDS:
    pairs = zip(grads[attention], grads["standard"], strict=True)
    difference = sum((a - b).square().sum() for a, b in pairs).sqrt().item() / size
    print(f"{attention:8}: loss {losses[attention].item():.6f}, gradients {difference:.1e} from those of standard")
    assert abs(losses["standard"].item() - losses[attention].item()) < 1e-4
    assert difference < 1e-3
prompt = ids[0, :8].tolist()
use("flash")
text = list(generate(model, prompt, 16, temperature=0.0))
use("standard")
seen = list(prompt)
with torch.no_grad():
    for token in text:
        assert model(torch.tensor([seen], device=device))[0, -1].argmax() == token
        seen.append(token)
model.train()

# %% [markdown]
# ## What a backward pass keeps
#
# Standard attention keeps P, N×N for every head of every layer. Flash attention keeps its inputs, its output and one
# number a row. A hook counts every tensor that autograd saves.


# %%
def kept(n: int, attention: str) -> int:
    """Bytes that a forward pass saves for its backward pass; weights not counted."""
    use(attention)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    x = torch.randint(sizes["vocab_size"], (1, n), device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        loss = model(x, x)
    del loss
    return sum(seen.values())


held = {name: [(float(n), float(kept(n, name))) for n in lengths] for name in ("standard", "flash")}
for (n, standard), (_, flash) in zip(held["standard"], held["flash"], strict=True):
    print(f"N = {n:6.0f}: standard {standard / 2**20:8.1f} MiB, flash {flash / 2**20:8.1f} MiB")
growth = {name: points[-1][1] / points[-2][1] for name, points in held.items()}
assert growth["flash"] < 2.1, "twice the length, twice the memory"
assert growth["standard"] > growth["flash"]
assert held["standard"][-1][1] > held["flash"][-1][1]
show(
    log_chart(
        "Kept for the backward pass",
        [Series(name, tuple(points), style) for style, (name, points) in enumerate(held.items())],
        x_label="sequence length N",
        x_text=lambda x: f"{x:,.0f}",
        y_text=lambda y: f"{y / 2**20:,.0f} MiB",
    ),
    "A GPT, batch 1",
)

# %% [markdown]
# ## Time
#
# Forward alone, and a whole step of forward and backward, for four attentions. `standard` writes S and P; `v1 order`
# does not, but takes O through memory once for every K tile, and has one program a head to do it; `v2` turns the loops
# around; `flash` is the best there is here. (The first two loops are written in Python where there is no GPU, and the
# backward pass of `v1 order` is the library's, after a forward pass of its own.)


# %%
def step(x: Tensor, attention: str) -> None:
    use(attention)
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = model(x, x)
    loss.backward()


def forward(x: Tensor, attention: str) -> None:
    use(attention)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        model(x, x)


def step_memory(x: Tensor, attention: str) -> float:
    """MiB: the allocator's peak on a GPU; elsewhere what is kept for the backward pass."""
    if device.type != "cuda":
        return kept(x.shape[1], attention) / 2**20
    torch.cuda.reset_peak_memory_stats()
    step(x, attention)
    return torch.cuda.max_memory_allocated() / 2**20


speed = {}
print(f"{'N':>6} {'attention':10}{'forward':>12}{'backward':>12}{'step':>12}{'tokens/s':>12}{'memory':>14}")
for n in lengths[-2:]:
    x = torch.randint(sizes["vocab_size"], (1, n), device=device)
    took = {}
    for run in (forward, step):
        calls = {name: (lambda run=run, x=x, name=name: run(x, name)) for name in KINDS}
        for call in calls.values():
            call()
        took[run] = interleaved(calls, device, seconds=pick(0.2, 1.0))
    for name in KINDS:
        ahead, both = took[forward][name].least, took[step][name].least
        row = "".join(f"{units.duration(max(ms, 0.0)):>12}" for ms in (ahead, both - ahead, both))
        print(f"{n:>6} {name:10}{row}{n / both * 1e3:>12,.0f}{step_memory(x, name):>10,.0f} MiB")
    speed = {
        "forward": took[forward]["standard"].least / took[forward]["flash"].least,
        "step": took[step]["standard"].least / took[step]["flash"].least,
        "loops": took[forward]["v1 order"].least / took[forward]["v2"].least,
    }
expect(speed["step"] > 0.9, "a step with flash attention takes no longer at the longest length")
expect(speed["loops"] > pick(0.5, 1.0), "version 2's order is no slower than version 1's, where both are kernels")

# %% [markdown]
# ## Causal or not
#
# Half of the pairs are never looked at. In the attention alone that is worth up to 2×.

# %%
n = pick(1024, 8192)
q, k, v = (torch.randn(1, 8, n, 64, device=device, dtype=pick(torch.float32, torch.bfloat16)) for _ in range(3))
both = interleaved(
    {
        "full": lambda: tw.attention(q, k, v),
        "causal": lambda: tw.attention(q, k, v, causal=True),
    },
    device,
    seconds=pick(0.2, 1.0),
)
causal_gain = both["full"].least / both["causal"].least
print(f"N = {n}: full {units.duration(both['full'].least)}, causal {units.duration(both['causal'].least)}")
expect(causal_gain > 1.1, "the causal rule saves time")

# %% [markdown]
# ## Writing
#
# Without a cache every new token takes a whole pass. With one it takes a pass over a single token, and reads the rest.

# %%
model.eval()
use("flash")
context = lengths[-1] - 4
x = torch.randint(sizes["vocab_size"], (1, context), device=device)
with torch.no_grad():
    caches = model.make_caches(1, lengths[-1])
    assert caches is not None
    cached_logits = model(x, caches=caches)[:, -1]
    plain_logits = model(x)[:, -1]
    assert torch.allclose(cached_logits, plain_logits, atol=pick(1e-4, 1e-2))

    def one_cached() -> None:
        for cache in caches:
            cache.trim(torch.full((1,), context))
        model(x[:, -1:], caches=caches, start=context)

    latency = interleaved({"cache": one_cached, "no cache": lambda: model(x)}, device, seconds=pick(0.2, 1.0))
saved = latency["no cache"].least / latency["cache"].least
one, whole = (units.duration(latency[name].least) for name in ("cache", "no cache"))
print(f"one token after {context}: {one}, not {whole}")
expect(saved > 1.5, "a cache makes the next token cheaper")

# %% [markdown]
# ## Transformers
#
# One line registers the name; docs/transformers.md says what is covered.

# %%
same = "not installed here"
if importlib.util.find_spec("transformers"):
    from transformers import GPT2Config, GPT2LMHeadModel

    from tilewise.integrations.transformers import register

    register()
    config = GPT2Config(
        vocab_size=257, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=None
    )
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.2)
    written = []
    start = torch.randint(2, 257, (2, 9))
    for name in ("eager", "tilewise"):
        theirs.set_attn_implementation(name)
        written.append(
            theirs.generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        )
    assert torch.equal(*written)
    same = "the same greedy tokens as eager attention"
    print(same)

# %%
assert math.isfinite(causal_gain)
measured(
    memory=f"standard keeps {held['standard'][-1][1] / held['flash'][-1][1]:.1f}× of flash at N = {lengths[-1]}",
    step=f"{speed['step']:.2f}× as fast as with standard attention at N = {lengths[-1]}",
    forward=f"{speed['forward']:.2f}×",
    loop_order=f"version 2's forward pass is {speed['loops']:.2f}× as fast as version 1's",
    causal=f"{causal_gain:.2f}× as fast as full at N = {n}",
    cache=f"{saved:.1f}× faster a token after {context}",
    transformers=same,
)

# %% [markdown]
# ## Checklist
# - I can exchange the attention of a model and prove that nothing else changed.
# - I can say which tensors of a step grow with N² and which with N.
# - I know what a cache saves, and what it costs (lesson 05).
#
# ## Questions
# 1. *Flash attention recomputes P in the backward pass. Why is a step still not slower?* Reading and writing N×N from
#    memory takes longer than computing it again from Q and K.
# 2. *Why are the gradients not bit for bit equal?* Sums are taken in another order; both are as near to the exact ones.
# 3. *Which part of a step does flash attention leave alone?* The projections and the MLP; at short lengths they are
#    nearly all of it.
