"""Sparse modules: equal to dense attention under the same mask, and to Transformers' Longformer and BigBird."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewise.nn as tnn
from tilewise.errors import UnsupportedError
from tilewise.masks import BigBird, Causal, Dense, Dilated, Global, Window


def tokens(n: int, dim: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(n))


def copy(ours: nn.Linear, theirs: Any) -> None:
    ours.load_state_dict(theirs.state_dict())


def bare_output(module: Any) -> None:
    """The modules of Transformers end before the output projection."""
    nn.init.eye_(module.o_proj.weight)
    if module.o_proj.bias is not None:
        nn.init.zeros_(module.o_proj.bias)


def gradients(module: nn.Module, x: Tensor, out: Tensor, names: list[str]) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    weights = [module.get_parameter(name) for name in names]
    return list(torch.autograd.grad(out, [x, *weights], torch.randn(out.shape, generator=g)))


@pytest.mark.parametrize("mask", [Window(9, 2), Dilated(3, 2) | Global([0]), Causal() & Window(20, None)], ids=str)
def test_sparse_attention_is_dense_attention_under_its_mask(mask: Any) -> None:
    x, padding = tokens(150), torch.ones(2, 1, 1, 150, dtype=torch.bool)
    padding[1, ..., 90:] = False
    module = tnn.SparseAttention(16, 4, mask, kv_heads=2)
    dense = tnn.GroupedQueryAttention(16, 4, 2)
    dense.load_state_dict(module.state_dict())
    allowed = (
        torch.from_numpy(mask.to_dense(150, 150))
        if not isinstance(mask.to_dense(150, 150), Tensor)
        else mask.to_dense(150, 150)
    )
    allowed = allowed.reshape(1, -1, 150, 150)
    torch.testing.assert_close(module(x), dense(x, mask=allowed))
    torch.testing.assert_close(module(x, mask=padding), dense(x, mask=allowed & padding))
    torch.testing.assert_close(module(x, mask=Causal()), dense(x, mask=allowed & torch.ones(150, 150).tril().bool()))


def test_bigbird_is_its_mask() -> None:
    module = tnn.BigBirdAttention(16, 2, block=16, window_blocks=3, global_blocks=1, random_blocks=2, seed=4)
    assert module.mask == BigBird(16, 3, 1, 2, 4)
    same = tnn.SparseAttention(16, 2, BigBird(16, 3, 1, 2, 4))
    same.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(tokens(200)), same(tokens(200)))
    dense = tnn.MultiHeadAttention(16, 2)
    dense.load_state_dict(module.state_dict())
    for n in (1, 15, 16):  # no more tokens than global ones
        torch.testing.assert_close(module(tokens(n)), dense(tokens(n)))
    torch.testing.assert_close(module(tokens(40), tokens(9)), dense(tokens(40), tokens(9)))


@pytest.mark.parametrize("places", [(), (0,), (3, 0, 40)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_longformer_is_transformers(places: tuple[int, ...], padded: bool) -> None:
    pytest.importorskip("transformers", reason="compares with Transformers")
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    window, n = 16, 96
    config = LongformerConfig(
        hidden_size=32, num_attention_heads=4, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0)
    ours = tnn.LongformerAttention(32, 4, window=window, global_tokens=places, bias=True)
    for a, b in (("q", "query"), ("k", "key"), ("v", "value")):
        copy(getattr(ours, f"{a}_proj"), getattr(theirs, b))
        copy(getattr(ours, f"global_{a}_proj"), getattr(theirs, f"{b}_global"))
    bare_output(ours)
    x = tokens(n, 32).requires_grad_()
    live = torch.ones(2, n, dtype=torch.bool)
    if padded:
        live[1, 70:] = False
    marks = torch.zeros(2, n)
    marks[:, list(places)] = 10000.0
    marks[~live] = -10000.0
    expected = theirs(
        x, attention_mask=marks, is_index_masked=marks < 0, is_index_global_attn=marks > 0, is_global_attn=bool(places)
    )[0]
    out = ours(x, mask=live[:, None, None] if padded else None)
    torch.testing.assert_close(out[live], expected[live], rtol=0, atol=1e-5)
    names = [("q_proj.weight", "query.weight"), ("v_proj.weight", "value.weight")]
    if places:
        names += [("global_q_proj.weight", "query_global.weight"), ("global_k_proj.weight", "key_global.weight")]
    hidden = live[..., None].float()
    ours_grads = gradients(ours, x, out * hidden, [a for a, _ in names])
    for a, b in zip(ours_grads, gradients(theirs, x, expected * hidden, [b for _, b in names]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("places", [(0, 1), (5, 30)], ids=str)
def test_global_queries_need_no_projected_keys(places: tuple[int, ...], bias: bool) -> None:
    """Each path gives the same outputs and gradients, for a sequence of padding alone too; a replaced layer is used."""
    module = tnn.LongformerAttention(32, 4, window=8, global_tokens=places, bias=bias, v_head_dim=6, scale=0.3)
    x = tokens(50, 32).requires_grad_()
    mask = torch.ones(2, 1, 1, 50, dtype=torch.bool)
    mask[1] = False
    names = [name for name, _ in module.named_parameters()]

    def results() -> list[Tensor]:
        out = module(x, mask=mask)
        return [out, *gradients(module, x, out, names)]

    assert module._few_queries(x, 0.0)
    found = results()
    calls = []
    handle = module.global_k_proj.register_forward_hook(lambda *_: calls.append(1))
    assert not module._few_queries(x, 0.0)
    for a, b in zip(found, results(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert calls
    handle.remove()
    pre = module.global_v_proj.register_forward_pre_hook(lambda *_: None)
    assert not module._few_queries(x, 0.0)
    pre.remove()
    module.global_v_proj.forward = module.global_v_proj.forward  # as libraries do that move weights between devices
    assert not module._few_queries(x, 0.0)
    del module.global_v_proj.forward
    assert module._few_queries(x, 0.0)
    for setting in ({"softcap": 3.0}, {"sinks": True}, {"qk_norm": 1e-6}, {"backend": "standard"}):
        assert not tnn.LongformerAttention(32, 4, window=8, global_tokens=places, **setting)._few_queries(x, 0.0)
    assert not module._few_queries(x, 0.1)


def test_bigbird_is_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its random blocks are caught as it draws them; in evaluation it would leave them all at block 0."""
    pytest.importorskip("transformers", reason="compares with Transformers")
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    torch.manual_seed(0)
    block, heads, n = 8, 4, 96
    config = BigBirdConfig(
        hidden_size=32, num_attention_heads=heads, block_size=block, num_random_blocks=2, attention_type="block_sparse",
        attention_probs_dropout_prob=0.0, use_bias=True, max_position_embeddings=n,
    )  # fmt: skip
    theirs = BigBirdBlockSparseAttention(config, seed=3).train()
    caught: list[Any] = []
    draw = BigBirdBlockSparseAttention._bigbird_block_rand_mask_with_head

    def catch(self: Any, *args: Any, **kwargs: Any) -> Any:
        caught.append(draw(self, *args, **kwargs))
        return caught[-1]

    monkeypatch.setattr(BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", catch)
    x = tokens(n, 32).requires_grad_()
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, n), block)
    expected = theirs(
        x, band_mask=band, from_mask=from_mask, to_mask=to_mask, from_blocked_mask=blocked, to_blocked_mask=blocked
    )[0]
    count = n // block
    allowed = torch.zeros(heads, count, count, dtype=torch.bool)
    i, j = torch.arange(count)[:, None], torch.arange(count)
    allowed |= ((i - j).abs() <= 1) | (j == 0) | (j == count - 1) | (i == 0) | (i == count - 1)
    for head, rows in enumerate(caught[0]):
        for row, picked in enumerate(rows):
            allowed[head, row + 1, torch.as_tensor(picked).long()] = True
    ours = tnn.BigBirdAttention(32, heads, block=block, bias=True)
    ours.mask = Dense(allowed.repeat_interleave(block, 1).repeat_interleave(block, 2)[None])
    for a, b in (("q", "query"), ("k", "key"), ("v", "value")):
        copy(getattr(ours, f"{a}_proj"), getattr(theirs, b))
    bare_output(ours)
    out = ours(x)
    assert len({tuple(map(tuple, rows)) for rows in caught[0]}) > 1
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    for a, b in zip(
        gradients(ours, x, out, ["q_proj.weight", "k_proj.weight"]),
        gradients(theirs, x, expected, ["query.weight", "key.weight"]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_rotary_positions_reach_global_tokens() -> None:
    x = tokens(50)
    module = tnn.LongformerAttention(16, 2, window=100, global_tokens=(7,), rotary=tnn.RotaryEmbedding(8))
    for name in "qkv":
        copy(getattr(module, f"global_{name}_proj"), getattr(module, f"{name}_proj"))
    dense = tnn.MultiHeadAttention(16, 2, rotary=tnn.RotaryEmbedding(8))
    dense.load_state_dict({name: p for name, p in module.state_dict().items() if not name.startswith("global")})
    torch.testing.assert_close(module(x), dense(x))


def test_errors() -> None:
    x = tokens(30)
    with pytest.raises(TypeError, match="Dense"):
        tnn.SparseAttention(16, 2, torch.ones(30, 30, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="window="):
        tnn.SparseAttention(16, 2, Window(3, 0))(x, cache=object())
    with pytest.raises(ValueError, match="even"):
        tnn.LongformerAttention(16, 2, window=7)
    with pytest.raises(ValueError, match="causal"):
        tnn.LongformerAttention(16, 2, window=8, causal=True)
    for name, value in (("alibi", True), ("relative", 3), ("kv_heads", 1)):
        with pytest.raises(ValueError, match=f"{name}: got {value}; wants none"):
            tnn.LongformerAttention(16, 2, window=8, global_tokens=(0,), **{name: value})
    with pytest.raises(TypeError, match="no argument 'need_weights'"):
        tnn.LongformerAttention(16, 2, window=8)(x, need_weights=True)
    with pytest.raises(TypeError, match="mask: got causal; wants a boolean tensor"):
        tnn.SparseAttention(16, 2, Causal())(x, mask="causal")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="below N"):
        tnn.LongformerAttention(16, 2, window=8, global_tokens=(30,))(x)
    with pytest.raises(ValueError, match="self-attention"):
        tnn.LongformerAttention(16, 2, window=8)(x, x)
    with pytest.raises(UnsupportedError, match="key padding"):
        tnn.LongformerAttention(16, 2, window=8)(x, mask=Causal())
