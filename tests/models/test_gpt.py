"""Our GPT: every mechanism trains, decodes and stays causal; GPT-2's weights go through it unchanged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tilewise.errors import UnsupportedError
from tilewise.models import GPT, MECHANISMS, GPTConfig, load_gpt2, save_gpt2

SMALL = GPTConfig(vocab_size=61, length=80, dim=32, layers=2, heads=4, window=6)


def model_of(config: GPTConfig) -> GPT:
    torch.manual_seed(2)
    return GPT(config).double()


def tokens(batch: int = 2, n: int = 70) -> torch.Tensor:
    return torch.randint(61, (batch, n), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_mechanism_is_causal_and_decodes(mechanism: str) -> None:
    """Later tokens change nothing before them; token by token from caches gives the whole pass; all weights learn."""
    model, ids = model_of(replace(SMALL, mechanism=mechanism)), tokens()
    whole = model(ids)
    assert whole.shape == (2, 70, 61)
    changed = ids.clone()
    changed[:, 41:] = (changed[:, 41:] + 7) % 61
    torch.testing.assert_close(model(changed)[:, :41], whole[:, :41])
    assert not torch.allclose(model(changed)[:, 41:], whole[:, 41:])
    grads = torch.autograd.grad(model(ids, ids.roll(-1, 1)), list(model.parameters()), allow_unused=True)
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    model.eval()
    with torch.no_grad():
        caches = model.make_caches(2, 80)
        if caches is None:
            assert mechanism in ("longformer", "bigbird")
            return
        steps = [model(ids[:, :31], caches=caches)]
        steps += [model(ids[:, i : i + 1], caches=caches, start=i) for i in range(31, 36)]
        torch.testing.assert_close(torch.cat(steps, 1), whole[:, :36], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mechanism", [name for name, m in MECHANISMS.items() if m.documents])
def test_documents_are_kept_apart(mechanism: str) -> None:
    model, ids = model_of(replace(SMALL, mechanism=mechanism, positions="none")), tokens(1)
    documents = (torch.arange(70) >= 25).long()[None]
    packed = model(ids, documents=documents)
    if MECHANISMS[mechanism].mask is None:
        torch.testing.assert_close(packed[:, 25:], model(ids[:, 25:]))
    torch.testing.assert_close(packed[:, :25], model(ids)[:, :25])
    assert not torch.allclose(packed[:, 25:], model(ids)[:, 25:])


def test_the_loss_is_that_of_the_logits() -> None:
    model, ids = model_of(SMALL), tokens()
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(ids, targets), expected)


@pytest.mark.parametrize("saving", ["block", "selective"])
def test_checkpointing_changes_no_gradient(saving: str) -> None:
    model, ids = model_of(replace(SMALL, dropout=0.1)), tokens()
    grads = []
    for each in ("none", saving):
        model.saving = each  # type: ignore[assignment]
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(model(ids, ids), list(model.parameters())))
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


def test_gpt2_weights_round_trip(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=40)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.set_attn_implementation("eager")
    for parameter in theirs.parameters():
        parameter.data.normal_(0.0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_gpt2(tmp_path / "theirs").eval()
    ids = tokens(3, 40)
    assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5 * theirs(ids).logits.abs().max()
    exact = theirs.double()(ids).logits
    torch.testing.assert_close(ours.double()(ids), exact)
    save_gpt2(load_gpt2(tmp_path / "theirs"), tmp_path / "ours")
    weights = [(tmp_path / who / "model.safetensors").read_bytes() for who in ("theirs", "ours")]
    assert weights[0] == weights[1]
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval().double()
    torch.testing.assert_close(again(ids).logits, exact)


def test_what_is_not_gpt2(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="GPT-2's format holds mha with learned positions"):
        save_gpt2(model_of(SMALL), tmp_path)
    model = model_of(replace(SMALL, positions="learned"))
    save_gpt2(model, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(UnsupportedError, match="scale_attn_by_inverse_layer_idx"):
        load_gpt2(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described | {"n_layer": 5}))
    with pytest.raises(ValueError, match=r"without 'h\.2\.ln_1\.weight'"):
        load_gpt2(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described | {"n_positions": 5}))
    with pytest.raises(ValueError, match=r"weights of the sizes in config\.json"):
        load_gpt2(tmp_path)


def test_bad_input() -> None:
    for change, message in [
        ({"mechanism": "magic"}, "mechanism: got 'magic'; wants one of mha, mqa"),
        ({"mechanism": "linear", "positions": "rotary"}, "positions: got 'rotary'; wants learned or none with linear"),
        ({"heads": 5}, "heads: got 5"),
        ({"layers": 0}, "layers: got 0"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **change)
    model = model_of(replace(SMALL, positions="learned"))
    with pytest.raises(ValueError, match="ids: got 81 tokens; wants at most 80 positions"):
        model(tokens(1, 81))
    with pytest.raises(TypeError, match=r"ids: got torch\.int32"):
        model(tokens().int())
    with pytest.raises(UnsupportedError, match="documents: linear sums over all"):
        model_of(replace(SMALL, mechanism="linear"))(tokens(), documents=torch.zeros(2, 70))
