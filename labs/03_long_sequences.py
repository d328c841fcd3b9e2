# %% [markdown]
# # 03 Long sequences
#
# After this lesson you know
# - what fills the memory of a training step, and what each way of saving is worth: flash attention, the chunked
#   loss, autocast, checkpointing;
# - that memory then grows with the length, not with its square;
# - how training behaves as sequences grow, in loss and in tokens a second;
# - what mechanisms with a short sight or a small state cannot do: copying what they no longer see.

# %%
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.bench.lab import measured, pick, show
from tilewise.bench.report.charts import Series, log_chart
from tilewise.models import GPT, GPTConfig
from tilewise.nn import GroupedQueryAttention
from tilewise.train import TrainConfig, Trainer, prepare
from tilewise.train.tasks import accuracy, copy
from tilewise.train.text import default_folder, documents, find
from tilewise.train.tokenizers import Bytes

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
work = Path(tempfile.mkdtemp())
sizes = pick({"dim": 64, "layers": 3, "heads": 4}, {"dim": 1024, "layers": 24, "heads": 16})
vocab = pick(2048, 50257)


def model_of(length: int, vocab_size: int = vocab, **settings: str) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size, length, **(sizes | settings))).to(device)


def plain(attn: GroupedQueryAttention) -> Callable[..., Tensor]:
    """Standard attention on the module's own weights, as in lesson 02: autograd keeps P, N×N for every head."""

    def forward(x: Tensor, **_: object) -> Tensor:
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in projections)
        assert attn.rotary is not None
        s = attn.rotary(q) @ attn.rotary(k).mT * attn.head_dim**-0.5
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), float("-inf"))
        return attn.o_proj((s.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return forward


# %% [markdown]
# ## What a step keeps
#
# A hook counts what the forward pass saves for the backward pass. Four savings, one after another.


# %%
def kept(model: GPT, ids: Tensor, *, chunked: bool, autocast: bool) -> int:
    """Bytes saved for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast), hooks:
        loss = model(ids, ids) if chunked else F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
    del loss
    return sum(seen.values())


n = pick(512, 4096)
model, ids = model_of(n), torch.randint(vocab, (1, n), device=device)
table: dict[str, int] = {}
for name, attention, chunked, saving, autocast in (
    ("nothing saved", "standard", False, "none", False),
    ("flash attention", "flash", False, "none", False),
    ("and the chunked loss", "flash", True, "none", False),
    ("and autocast", "flash", True, "none", True),
    ("and whole blocks again", "flash", True, "block", True),
):
    for block in model.blocks:
        block.attn.__dict__.pop("forward", None)
        if attention == "standard":
            block.attn.forward = plain(block.attn)
    model.saving = saving
    table[name] = kept(model, ids, chunked=chunked, autocast=autocast)
    print(f"{name:28} {table[name] / 2**20:9.1f} MiB")
assert list(table.values()) == sorted(table.values(), reverse=True), "each saves something"

# %% [markdown]
# ## Memory by length

# %%
lengths = pick((128, 256, 512, 1024), (2048, 8192, 32768))
curve: dict[str, list[tuple[float, float]]] = {"nothing": [], "blocks": []}
for length in lengths:
    model = model_of(length)
    x = torch.randint(vocab, (1, length), device=device)
    for name, points in curve.items():
        model.saving = "block" if name == "blocks" else "none"
        points.append((float(length), float(kept(model, x, chunked=True, autocast=False))))
    print(f"N = {length:6}: " + ", ".join(f"{name} {points[-1][1] / 2**20:.1f} MiB" for name, points in curve.items()))
for points in curve.values():
    growth = (points[-1][1] / points[0][1]) / (points[-1][0] / points[0][0])
    assert growth < 1.1, "linear in the length"
show(
    log_chart(
        "Kept for the backward pass",
        [Series(name, tuple(points), style) for style, (name, points) in enumerate(curve.items())],
        x_label="sequence length N",
        x_text=lambda x: f"{x:,.0f}",
        y_text=lambda y: f"{y / 2**20:,.1f} MiB",
    ),
    "With nothing recomputed, and with every block recomputed",
)

# %% [markdown]
# ## Training as sequences grow
#
# Rotary positions, the same number of tokens a step, Python's own library as text. Longer sequences give each token
# more to look back to, and each step fewer independent ones.

# %%
shards = prepare(documents(find([default_folder()]), most=pick(300_000, 8_000_000)), Bytes(), work / "tokens")
tokens = pick(1024, 65536)
steps = pick(30, 300)
runs: dict[int, list[float]] = {}
for length in lengths[:3]:
    plan = TrainConfig(
        steps=steps, batch=tokens // length or 1, length=length, warmup=5, checkpoint_every=10_000, log_every=5,
        autocast=pick("none", "bfloat16"), lr=pick(3e-3, 3e-4),
    )  # fmt: skip
    trainer = Trainer(
        model_of(length, vocab_size=257),
        lambda i, plan=plan: shards.batch(0, i, plan.batch, plan.length),
        plan,
        work / str(length),
        described={},
    )
    found = list(trainer.run())
    runs[length] = [step.loss for step in found]
    print(
        f"N = {length:6}: loss {found[0].loss:.2f} to {found[-1].loss:.2f}, "
        f"largest gradient {max(step.grad_norm for step in found):.2f}, {found[-1].tokens_per_second:,.0f} tokens/s"
    )
    assert found[-1].loss < found[0].loss - 0.5
print(f"unigram entropy {shards.unigram_entropy:.2f}")

# %% [markdown]
# ## What is out of sight
#
# The copy task: random tokens, a mark, the same tokens again. Full attention finds the place. A window shorter than the
# distance cannot, whatever it learns; a state of fixed size holds only so much.

# %%
distance = pick(16, 128)
answers: dict[str, float] = {}
for mechanism in ("mha", "window", "linear"):
    torch.manual_seed(0)
    small = GPT(GPTConfig(32, 2 * distance + 1, 32, 2, 2, mechanism, positions="learned", window=distance // 4)).to(
        device
    )
    plan = TrainConfig(
        steps=pick(200, 1500), batch=32, length=2 * distance + 1, lr=5e-3, warmup=20, checkpoint_every=10_000
    )
    trainer = Trainer(
        small,
        lambda i: copy(0, i, 32, 2 * distance + 1, 32),
        plan,
        work / mechanism,
        described={},
    )
    list(trainer.run())
    answers[mechanism] = accuracy(small, copy(1, 0, 64, 2 * distance + 1, 32))
    print(f"{mechanism:8} copies {answers[mechanism]:.0%} of {distance} tokens")
assert answers["mha"] > 0.9
assert answers["window"] < 0.5

# %%
shutil.rmtree(work)
measured(
    flash_attention=f"{table['nothing saved'] / table['flash attention']:.1f}× less kept at N = {n}",
    chunked_loss=f"{table['flash attention'] / table['and the chunked loss']:.1f}× less again",
    autocast=f"{table['and the chunked loss'] / table['and autocast']:.2f}× less again",
    whole_blocks=f"{table['and autocast'] / table['and whole blocks again']:.1f}× less again",
    last_losses=", ".join(f"{length}: {losses[-1]:.2f}" for length, losses in runs.items()),
    copying=", ".join(f"{name} {share:.0%}" for name, share in answers.items()),
)

# %% [markdown]
# ## Checklist
# - I can list what a training step keeps, largest first, for a short and for a long sequence.
# - I know which saving costs time (checkpointing) and which costs nothing (flash attention, the chunked loss).
# - I can name a task that a window cannot do, and say why more training does not help.
#
# ## Questions
# 1. *Once attention is O(N), what runs out of memory first?* The logits: tokens × vocabulary, several times over in
#    plain cross-entropy.
# 2. *Selective checkpointing (`saving="selective"`) keeps what attention returned. Why that?* It is small, N×D, and at
#    long lengths the most expensive to compute again.
# 3. *Two layers with a window of W: how far back can a token learn from?* 2·W, through what the layer below passed on.
