"""Transformers' models with random weights: tilewise gives what Transformers' own eager attention gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from tilewise.errors import UnsupportedError
from tilewise.integrations import transformers as integration

transformers = pytest.importorskip("transformers")
from transformers.masking_utils import sdpa_mask  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0,
            embd_pdrop=0.0, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=7)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **GROUPED, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, sliding_window=5
        )
    ),
    "bert": lambda: transformers.BertLMHeadModel(
        transformers.BertConfig(**SIZES, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**GROUPED, head_dim=8, sliding_window=6, num_local_experts=2, num_experts_per_tok=1)
    ),
}  # fmt: skip


def exact_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Any:
    """The oracle on the boolean mask of Transformers' own making. (Its eager attention gives NaN for empty rows in
    float64.)"""
    names = {"scaling": "scale", "softcap": "softcap", "s_aux": "sink"}
    given = {ours: options[theirs] for theirs, ours in names.items() if options.get(theirs) is not None}
    out, _ = oracle.attention(q, k, v, mask=mask, **given)
    return out.transpose(1, 2), None


def exact_mask(**options: Any) -> Tensor | None:
    return sdpa_mask(**(options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    integration.register()
    transformers.AttentionInterface.register("oracle", exact_attention)
    transformers.AttentionMaskInterface.register("oracle", exact_mask)
    yield
    integration.unregister()


def pair(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """The same weights twice, with eager attention and with tilewise; weights large enough for attention to matter."""
    torch.manual_seed(7)
    eager: Any = MODELS[name]().to(device)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.normal_(0.0, 0.2)
    ours = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation("tilewise")
    return eager, ours


def prompts(padding: str, device: str = "cpu") -> dict[str, Tensor]:
    """A batch of four, of lengths 19, 13, 1 and 8 where it is padded."""
    ids = torch.randint(2, 97, (4, 19), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padding != "none":
        for row, length in enumerate((19, 13, 1, 8)):
            hidden = slice(0, 19 - length) if padding == "left" else slice(length, 19)
            mask[row, hidden] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def difference(ours: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Our error over what is allowed: twice that of eager attention, and the rounding of a few operations."""
    allowed = 2 * (eager.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    error = (ours.double() - exact).abs().max()
    return float(error / allowed) if error != 0 else 0.0


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, padding: str) -> None:
    eager, ours = pair(name)
    exact, batch = copy.deepcopy(eager).double(), prompts(padding)
    exact.set_attn_implementation("oracle")
    if name == "gpt_oss":
        exact.set_experts_implementation("eager")
    keep = batch["attention_mask"].bool()
    results = []
    for model in (eager, ours, exact):
        logits = model(**batch, use_cache=False).logits
        dlogits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) * keep[..., None]
        grads = torch.autograd.grad(logits, list(model.parameters()), dlogits.to(logits.dtype), allow_unused=True)
        results.append((logits[keep].detach(), [g for g in grads if g is not None]))
    (base, base_grads), (out, out_grads), (true, true_grads) = results
    assert difference(out, base, true) <= 1.0
    assert len(out_grads) == len(base_grads)
    for ours_grad, eager_grad, true_grad in zip(out_grads, base_grads, true_grads, strict=True):
        assert difference(ours_grad, eager_grad, true_grad) <= 3.0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation(name: str, padding: str, cache: str) -> None:
    eager, ours = pair(name)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = eager.eval().generate(**prompts(padding), **options)
    assert torch.equal(ours.eval().generate(**prompts(padding), **options), expected)
    assert expected.shape[1] == 31


def trained(model: Any, folder: Any, *, recompute: bool) -> None:
    """Two steps of Transformers' own Trainer, of two passes each; plain gradient descent, since Adam's first steps are
    the signs of gradients, however small."""
    batch = prompts("left")
    rows = [{name: x[i] for name, x in batch.items()} for i in range(4)]
    for row in rows:
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, optim="sgd",
        learning_rate=0.5, lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="no", gradient_checkpointing=recompute,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "recompute"), [("llama", False), ("gpt2", True), ("gemma2", False)])
def test_the_trainer(name: str, recompute: bool, tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    eager, ours = pair(name)
    begun, exact = copy.deepcopy(eager).state_dict(), copy.deepcopy(eager).double()
    exact.set_attn_implementation("oracle")
    for model in (eager, ours, exact):
        trained(model, tmp_path, recompute=recompute)
    moved = 0
    for (part, weight), base, true in zip(ours.named_parameters(), eager.parameters(), exact.parameters(), strict=True):
        assert difference(weight, base, true) <= 3.0, part
        moved += not torch.equal(weight, begun[part])
    assert moved > 10


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sliding_caches(cache: str) -> None:
    """Layers that hold their window only: the first key is not at position 0, and the mask has to know."""
    eager, ours = pair("mistral")
    made = [
        transformers.DynamicCache(config=eager.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=eager.config, max_cache_len=31)
        for _ in range(2)
    ]
    assert all(each.is_sliding == [True, True] for each in made)
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    expected, out = (
        model.eval().generate(**prompts("left"), **options, past_key_values=each)
        for model, each in zip((eager, ours), made, strict=True)
    )
    assert torch.equal(out, expected)
    assert made[1].layers[0].keys.shape[2] <= 7


def test_generation_in_steps_of_several_tokens() -> None:
    """A dynamic cache and more than one new token: the mask is bottom-right."""
    eager, ours = pair("mistral")
    ids = prompts("none")["input_ids"]
    logits = []
    for model in (eager, ours):
        first = model(input_ids=ids[:, :11], use_cache=True)
        logits.append(model(input_ids=ids[:, 11:], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_packed_by_position_ids(name: str) -> None:
    """Three sequences in one row give what they give alone, and the mask needs no N×M."""
    eager, ours = pair(name)
    ids = prompts("none")["input_ids"][:1]
    cuts = (0, 4, 15, 19)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)])[None]
    packed = ours(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = [eager(input_ids=ids[:, a:b], use_cache=False).logits for a, b in pairwise(cuts)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_an_encoder(padding: str) -> None:
    torch.manual_seed(5)
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    eager = transformers.BertModel(config, add_pooling_layer=False).double()
    ours = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation("tilewise")
    batch = prompts(padding)
    keep = batch["attention_mask"].bool()
    expected, out = (model(**batch).last_hidden_state[keep] for model in (eager, ours))
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    wanted, grads = (torch.autograd.grad(x, list(m.parameters()), dout) for x, m in ((expected, eager), (out, ours)))
    torch.testing.assert_close(grads, wanted)


def test_t5_with_its_bias() -> None:
    torch.manual_seed(5)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    eager = transformers.T5ForConditionalGeneration(config)
    ours = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation("tilewise")
    batch = prompts("right")
    grads, tokens = [], []
    for model in (eager, ours):
        loss = model(**batch, labels=batch["input_ids"]).loss
        weight = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        grads.append(torch.autograd.grad(loss, weight)[0])
        tokens.append(model.eval().generate(**batch, max_new_tokens=8, do_sample=False))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(tokens[0], tokens[1])


def test_masks_need_no_square() -> None:
    """A padded batch of sliding windows is a restriction; a custom rule is booleans, and right."""
    seen: list[Any] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments[4])
        return integration.attend(*arguments, **options)

    eager, ours = pair("mistral")
    transformers.AttentionInterface.register(integration.NAME, spy)
    ours(**prompts("left"))
    assert all(isinstance(each, integration.Restriction) for each in seen)
    assert seen[0].left == 6
    assert seen[0].causal
    assert seen[0].padding.shape == (4, 19)
    custom = torch.tril(torch.ones(19, 19, dtype=torch.bool))[None, None].expand(4, 1, 19, 19).clone()
    custom[:, :, :, 3] = False
    custom[:, :, 3, 3] = True
    ids = prompts("none")["input_ids"]
    floating = torch.zeros(custom.shape).masked_fill(~custom, torch.finfo(torch.float32).min)
    expected = eager(input_ids=ids, attention_mask=floating, use_cache=False).logits
    for given in (custom, floating):
        out = ours(input_ids=ids, attention_mask=given, use_cache=False).logits
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_ignored() -> None:
    _, ours = pair("llama")
    batch = prompts("none")
    with pytest.raises(UnsupportedError, match="output_attentions: the attention weights are never formed"):
        integration.attend(ours, *[torch.zeros(1, 4, 3, 8)] * 3, None, output_attentions=True)
    with pytest.raises(UnsupportedError, match="cu_seq_lens_q: packed sequences are told by position_ids"):
        ours(**batch, cu_seq_lens_q=torch.tensor([0, 19], dtype=torch.int32), use_cache=False)
    with pytest.raises(UnsupportedError, match="a_new_rule: tilewise does not know this argument"):
        ours(**batch, a_new_rule=3, use_cache=False)
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 9, 8)
    with pytest.raises(UnsupportedError, match="no mask for 3 causal queries and 9 keys"):
        integration.attend(ours.model.layers[0].self_attn, q, k, k, None)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[1, 9\]"):
        integration.attend(ours.model.layers[0].self_attn, q, k, k, torch.ones(1, 9, dtype=torch.bool))


def test_unregistering() -> None:
    integration.unregister()
    with pytest.raises(ValueError, match="tilewise"):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, attn_implementation="tilewise"))


def seen_by(made: Any, n: int, m: int) -> Tensor:
    """[2, 1, N, M]: which keys a mask lets be seen, from what attention gives: one-hot values tell the keys apart."""
    q, k, v = torch.zeros(2, 1, n, 4), torch.zeros(2, 1, m, 4), torch.eye(m).expand(2, 1, m, m)
    return integration.attend(nn.Module(), q, k, v, made)[0].transpose(1, 2) > 0


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_every_rule_of_theirs_is_read_right(padded: bool, offset: int) -> None:
    """Against the booleans that Transformers makes of the same rule; rules that are unknown here become those."""
    theirs = transformers.masking_utils
    n, m = 9, 9 + offset
    packed = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
    causal = theirs.causal_mask_function
    rules = {
        "causal": causal,
        "both ways": theirs.bidirectional_mask_function,
        "sliding": theirs.sliding_window_causal_mask_function(4),
        "sliding both ways": theirs.sliding_window_bidirectional_mask_function(2),
        "chunked": theirs.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
        "either": theirs.or_masks(causal, lambda b, h, i, j: j < 2),
        "packed": theirs.and_masks(theirs.packed_sequence_mask_function(packed), causal),
    }
    tokens = torch.ones(2, m, dtype=torch.bool)
    tokens[1, :2] = not padded
    for name, rule in rules.items():
        if name == "packed" and offset:
            continue
        asked = {
            "batch_size": 2, "q_length": n, "kv_length": m, "q_offset": offset, "kv_offset": 0, "mask_function": rule,
            "attention_mask": tokens,
        }  # fmt: skip
        made, expected = integration.mask(**asked), exact_mask(**asked)
        assert isinstance(made, integration.Restriction) == (name not in ("chunked", "either")), name
        assert torch.equal(seen_by(made, n, m), expected.expand(2, 1, n, m)), name


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_compiled(name: str) -> None:
    _, ours = pair(name)
    batch = prompts("left")
    expected = ours(**batch, use_cache=False).logits
    out = torch.compile(ours, backend="aot_eager", fullgraph=True)(**batch, use_cache=False).logits
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(out[keep], expected[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_compiled_with_a_static_cache(name: str) -> None:
    """As on a GPU, where `generate` compiles by itself: the place of a token in the cache is told by the device."""
    eager, ours = pair(name)
    compiling = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = eager.eval().generate(**prompts("left"), **options)
    torch._dynamo.utils.counters.clear()
    options |= {"cache_implementation": "static", "compile_config": compiling}
    assert torch.equal(ours.eval().generate(**prompts("left"), **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_on_a_gpu(name: str, padding: str) -> None:
    eager, ours = pair(name, "cuda")
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = eager.eval().generate(**prompts(padding, "cuda"), **options)
    assert torch.equal(ours.eval().generate(**prompts(padding, "cuda"), **options), expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # with which PyTorch opens its pool of graphs
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_generation_on_a_gpu(name: str) -> None:
    eager, ours = pair(name, "cuda")
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = eager.eval().generate(**prompts("left", "cuda"), **options)
    out = ours.eval().generate(**prompts("left", "cuda"), **options, cache_implementation="static")
    assert torch.equal(out, expected)
