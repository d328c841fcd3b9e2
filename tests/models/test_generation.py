"""Sampling: what temperature, top-k and top-p leave, and what a seed promises."""

from __future__ import annotations

import pytest
import torch

from tilewise.models import GPT, GPTConfig, generate
from tilewise.models.generation import pick

CONFIG = GPTConfig(vocab_size=31, length=40, dim=16, layers=2, heads=2)


def drawn(logits: torch.Tensor, **options: float | None) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    chosen = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    return set(pick(logits.expand(2000, -1), generator=generator, **chosen).tolist())  # type: ignore[arg-type]


def test_what_may_be_drawn() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]).log()
    assert drawn(logits) == {0, 1, 2, 3, 4}
    assert drawn(logits, temperature=0.0) == {1}
    assert drawn(logits, temperature=0.01) == {1}
    assert drawn(logits, top_k=2) == {1, 3}
    assert drawn(logits, top_p=0.39) == {1}
    assert drawn(logits, top_p=0.6) == {1, 3}
    assert drawn(logits, top_p=0.71) == {1, 3, 4}
    assert drawn(logits, top_p=0.9, top_k=3) == {1, 3, 4}
    counts = torch.bincount(pick(logits.expand(20000, -1), temperature=1.0, top_k=None, top_p=None, generator=None))
    assert (counts / 20000 - logits.exp()).abs().max() < 0.02


@pytest.mark.parametrize("mechanism", ["mha", "rwkv6", "bigbird"])
def test_a_seed_gives_one_text_and_greedy_is_the_whole_pass(mechanism: str) -> None:
    torch.manual_seed(1)
    model = GPT(GPTConfig(31, 40, 16, 2, 2, mechanism)).double()
    for parameter in model.parameters():
        parameter.data.mul_(5.0)
    assert list(generate(model, [3, 4], 20, seed=5)) == list(generate(model, [3, 4], 20, seed=5))
    assert list(generate(model, [3, 4], 20, seed=5)) != list(generate(model, [3, 4], 20, seed=6))
    greedy = [3, 4, *generate(model, [3, 4], 20, temperature=0.0)]
    for i in range(2, 22):
        assert model(torch.tensor([greedy[:i]]))[0, -1].argmax() == greedy[i]
    stop = greedy[4]
    assert list(generate(model, [3, 4], 20, temperature=0.0, end=stop)) == greedy[2 : greedy.index(stop, 2)]


def test_learned_positions_run_out() -> None:
    model = GPT(GPTConfig(31, 10, 16, 1, 2, positions="learned"))
    assert len(list(generate(model, [1, 2, 3], 100))) == 8
    with pytest.raises(ValueError, match="prompt: got 11 tokens; wants at most 10"):
        generate(model, [1] * 11, 3)


def test_bad_input() -> None:
    model = GPT(CONFIG)
    for options, message in [
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, [1], 3, **options)  # type: ignore[arg-type]
    for prompt in ([], [31], [-1]):
        with pytest.raises(ValueError, match="prompt: got"):
            generate(model, prompt, 3)
