# %% [markdown]
# # 03 Long sequences
#
# After this lesson you know
# - what fills the memory of a training step, and what each way of saving is worth: flash attention, the chunked
#   loss, autocast, checkpointing;
# - that memory then grows with the length, not with its square;
# - how training behaves as sequences grow, in loss and in tokens a second;
# - what mechanisms with a short sight or a small state cannot do: copying what they no longer see;
# - the same on real text: questions about a long document, a long dialogue, whole files of code, and a summary by
#   retrieval.

# %%
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import tilewise as tw
from tilewise.bench.lab import measured, pick, show
from tilewise.bench.report.charts import Series, log_chart
from tilewise.models import GPT, GPTConfig
from tilewise.models.gpt import MECHANISMS
from tilewise.nn import GroupedQueryAttention
from tilewise.train import Step, TrainConfig, Trainer, prepare
from tilewise.train.quality import SMALL, Plan, Stage, measure
from tilewise.train.quality import table as quality_table
from tilewise.train.shards import Batch
from tilewise.train.tasks import accuracy, copy, dialogue, questions, summaries, words
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
runs: dict[int, list[Step]] = {}
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
    runs[length] = found
    print(
        f"N = {length:6}: loss {found[0].loss:.2f} to {found[-1].loss:.2f}, "
        f"largest gradient {max(step.grad_norm for step in found):.2f}, {found[-1].tokens_per_second:,.0f} tokens/s"
    )
    assert found[-1].loss < found[0].loss - 0.5
print(f"unigram entropy {shards.unigram_entropy:.2f}")
for title, pick_one in (("Loss", lambda s: s.loss), ("Gradient norm", lambda s: s.grad_norm)):
    lines = [
        Series(f"N = {length}", tuple((float(s.step), pick_one(s)) for s in found), style)
        for style, (length, found) in enumerate(runs.items())
    ]
    axes = {"x_label": "step", "x_text": lambda x: f"{x:.0f}", "y_text": lambda y: f"{y:.2f}"}
    show(log_chart(f"{title} while training", lines, **axes), f"{title}: no spikes, whatever the length")
worst = max(s.grad_norm for found in runs.values() for s in found[len(found) // 2 :])
first = min(found[0].grad_norm for found in runs.values())
assert worst < 3 * first, "stable: gradients of the second half are no larger than those of the start"

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
        steps=pick(150, 1500), batch=32, length=2 * distance + 1, lr=5e-3, warmup=20, checkpoint_every=10_000
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

# %% [markdown]
# ## Every mechanism at equal size
#
# Recall, text and cost in one table, as `python -m tilewise.train.quality` measures it. Tiny, it is a look at the
# costs: nothing is learned in three steps. docs/quality.md has the table at 1K.

# %%
tiny = Plan((Stage(32, 4, 2, 3),), text_steps=3, dim=32, tokens=256, length=256, characters=100_000, tested=2)
compared = pick(("mha", "mqa", "gla"), tuple(MECHANISMS))
rows = list(measure(pick(tiny, SMALL), work / "quality", mechanisms=compared, device=device))
print(quality_table(rows))
cost = {row.mechanism: row for row in rows if row.task == "text"}
assert cost["gla"].cache_bytes < cost["mqa"].cache_bytes < cost["mha"].cache_bytes
assert max(row.score for row in rows if row.task == "recall") >= pick(0.0, 0.95)

# %% [markdown]
# ## Questions about a long document, and a long dialogue
#
# Real documentation (Python's own, as bytes) with a fact planted somewhere, `@Q7`: asked at the end is `@Q`. And turns
# of two speakers around the same text: the first states the fact, the last asks for it. The answer is right or it is
# not. Both models learn on short texts first; the window of 16 is what separates them. Several facts at once are the
# recall task; docs/quality.md has it, at equal size, for every mechanism.

# %%
told = np.frombuffer("\n".join(topics.values()).encode(), np.uint8)
lengths = pick((16, 48, 95, 191), (64, 256, 1024, 4095))
each, room, turn = pick(50, 400), pick(1536, 32768), pick(12, 64)


def conversation(step: int) -> Batch:
    n = lengths[step // each]
    if step % 2:
        return questions(told, 0, step, room // n, n, facts=1)
    return dialogue(told, 0, step, room // n, max(n, 2 * turn - 1), facts=1, turn=turn)


print(bytes(questions(told, 0, 0, 1, 95, facts=1).ids[0].tolist()).decode(errors="replace"), end="…\n\n")
exact: dict[tuple[str, str], float] = {}
for mechanism in ("mha", "window"):
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, lengths[-1], 32, 2, 2, mechanism, window=16)).to(device)
    plan = TrainConfig(
        steps=each * len(lengths), batch=room // lengths[-1], length=lengths[-1], warmup=20, checkpoint_every=10_000
    )
    list(Trainer(model, conversation, plan, work / f"{mechanism}-answers", described={}).run())
    for name, task, how in (("document", questions, {}), ("dialogue", dialogue, {"turn": turn})):
        exact[mechanism, name] = accuracy(model, task(told, 1, 0, 64, lengths[-1], facts=1, **how))
        print(f"{mechanism:8} {name}: {exact[mechanism, name]:.0%} exact, {lengths[-1]} bytes")
for name in ("document", "dialogue"):
    assert exact["mha", name] > 0.6, "full attention finds it"
    assert exact["window", name] < exact["mha", name] - 0.3, "a window does not: one digit in ten is a guess"

# %% [markdown]
# ## Whole files of code
#
# Completing a name in Python's own library: three letters are typed, and the guess is the last name above that begins
# with them. That is all that a head which copies can do, and no model is needed to count how often it is right, by how
# far back it sees. In a file, what is asked for was often defined far above.

# %%
reach = (64, 256, 1024, 4096, 16384)
right, names = dict.fromkeys(reach, 0), 0
for path in find([default_folder()])[: pick(60, 400)]:
    last: dict[str, tuple[str, int]] = {}
    for name in re.finditer(r"[A-Za-z_]\w{5,}", path.read_text(encoding="utf-8")):
        names += 1
        guess, place = last.get(name[0][:3], ("", 0))
        for w in reach if guess == name[0] else ():
            right[w] += name.start() - place <= w
        last[name[0][:3]] = name[0], name.start()
completed = {w: count / names for w, count in right.items()}
print("; ".join(f"{share:.0%} right from {w} bytes" for w, share in completed.items()), f"({names:,} names)")
assert completed[4096] > 1.4 * completed[256], "what a file repeats is far above"

# %% [markdown]
# ## A summary by retrieval
#
# No training: a sentence is the vector of its words, rare ones weighing more (tf-idf). The document's mean attends to
# its sentences, and the one with the largest weight is the summary. Judged by people: docstrings begin with a line that
# sums them up (PEP 257); it is taken away, and the sentence chosen from the rest is compared with it.

# %%
pairs = summaries(sorted(default_folder().glob("*.py"))[: pick(100, 1000)])
within: dict[str, int] = {}
for _, sentences in pairs:
    for word in {word for sentence in sentences for word in words(sentence)}:
        within[word] = within.get(word, 0) + 1
column = {word: i for i, word in enumerate(within)}


def vector(text: str) -> Tensor:
    v = torch.zeros(len(column))
    for word in words(text):
        if word in column:
            v[column[word]] += np.log(len(pairs) / within[word])
    return F.normalize(v, dim=0)


judged = ("chosen by attention", "the first", "any (mean)", "the best there is")
likeness: dict[str, list[float]] = {how: [] for how in judged}
for head, sentences in pairs:
    k = torch.stack([vector(s) for s in sentences])[None, None].to(device)
    v = torch.eye(len(sentences), device=device)[None, None]
    weights = tw.attention(k.mean(2, keepdim=True), k, v, scale=10.0)[0, 0, 0]  # with V = 1, what comes out is P
    alike = (k[0, 0] @ vector(head).to(device)).cpu()
    for how, value in zip(likeness, (alike[weights.argmax().item()], alike[0], alike.mean(), alike.max()), strict=True):
        likeness[how].append(float(value))
summary = {how: float(np.mean(values)) for how, values in likeness.items()}
print(f"{len(pairs)} docstrings: " + ", ".join(f"{how} {value:.3f}" for how, value in summary.items()))
assert summary["chosen by attention"] > 1.25 * summary["any (mean)"], "better than a sentence at random"

# %%
shutil.rmtree(work)
measured(
    flash_attention=f"{table['nothing saved'] / table['flash attention']:.1f}× less kept at N = {n}",
    chunked_loss=f"{table['flash attention'] / table['and the chunked loss']:.1f}× less again",
    autocast=f"{table['and the chunked loss'] / table['and autocast']:.2f}× less again",
    whole_blocks=f"{table['and autocast'] / table['and whole blocks again']:.1f}× less again",
    last_losses=", ".join(f"{length}: {found[-1].loss:.2f}" for length, found in runs.items()),
    copying=", ".join(f"{name} {share:.0%}" for name, share in answers.items()),
    exact_answers=", ".join(f"{name} {task} {share:.0%}" for (name, task), share in exact.items()),
    names_completed=", ".join(f"{share:.0%} from {w} bytes" for w, share in completed.items()),
    likeness_to_the_summary_line=", ".join(f"{how} {value:.3f}" for how, value in summary.items()),
)

# %% [markdown]
# ## Checklist
# - I can list what a training step keeps, largest first, for a short and for a long sequence.
# - I know which saving costs time (checkpointing) and which costs nothing (flash attention, the chunked loss).
# - I can name a task that a window cannot do, and say why more training does not help.
# - I can say how far above the names of a file stand, and what a context must hold to see them.
#
# ## Questions
# 1. *Once attention is O(N), what runs out of memory first?* The logits: tokens × vocabulary, several times over in
#    plain cross-entropy.
# 2. *Selective checkpointing (`saving="selective"`) keeps what attention returned. Why that?* It is small, N×D, and at
#    long lengths the most expensive to compute again.
# 3. *Two layers with a window of W: how far back can a token learn from?* 2·W, through what the layer below passed on.
