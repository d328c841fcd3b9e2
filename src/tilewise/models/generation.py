"""Sampling from a GPT, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tilewise.errors import bad_value
from tilewise.models.gpt import GPT
from tilewise.ops import checks


def pick(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of logits [B, V]: [B].

    Temperature 0 takes the likeliest. Otherwise the logits are divided by it, cut to the `top_k` largest and then to
    the fewest that together have a probability of `top_p` (Holtzman et al., 2020), and drawn from.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        dropped = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def generate(
    model: GPT,
    prompt: list[int],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end: int | None = None,
) -> Iterator[int]:
    """Continue `prompt` by up to `tokens` tokens, giving each as it is drawn.

    Args:
        model: in whatever mode; it is left in evaluation mode.
        prompt: at least one token.
        tokens: most that are given; fewer where learned positions run out.
        temperature, top_k, top_p: see `pick`.
        seed: of what is drawn: the same seed gives the same tokens.
        end: a token that ends the text and is not given.

    Raises:
        ValueError: bad input, before anything runs.
    """
    checks.finite("temperature", temperature)
    if temperature < 0.0:
        raise bad_value("temperature", temperature, "0 for the likeliest token, or a number above")
    if top_k is not None and top_k < 1:
        raise bad_value("top_k", top_k, "at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise bad_value("top_p", top_p, "a probability in (0, 1]")
    if not prompt or min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
        raise bad_value("prompt", f"{len(prompt)} tokens", f"at least one, all below {model.config.vocab_size}")
    if model.wpe is not None:
        if len(prompt) > model.config.length:
            got = f"{len(prompt)} tokens"
            raise bad_value("prompt", got, f"at most {model.config.length}, the learned positions", "its last ones")
        tokens = min(tokens, model.config.length - len(prompt) + 1)
    return _drawn(model.eval(), prompt, tokens, temperature, top_k, top_p, seed, end)


@torch.no_grad()
def _drawn(
    model: GPT,
    prompt: list[int],
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    end: int | None,
) -> Iterator[int]:
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    caches: list[Any] | None = model.make_caches(1, len(prompt) + tokens)
    seen = list(prompt)
    ids, start = torch.tensor([seen], device=device), 0
    for _ in range(tokens):
        logits = model(ids, caches=caches, start=start)[:, -1]
        token = int(pick(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))
        if token == end:
            return
        yield token
        seen.append(token)
        if caches is None:
            ids = torch.tensor([seen], device=device)
        else:
            ids, start = torch.tensor([[token]], device=device), len(seen) - 1
