"""Linear attention in float64, term by term from its definition: shares no code with the library.

The decay between token j and what query i sees is a product of factors along an explicit path, not a difference of
sums.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-6


def features(name: str | None, x: Tensor) -> Tensor:
    x = x.double()
    if name == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    if name == "relu":
        return x.clamp(min=0)
    if name == "taylor":
        d = x.shape[-1]
        x = x / d**0.25
        outer = torch.einsum("...i,...j->...ij", x, x).reshape(*x.shape[:-1], d * d) / math.sqrt(2)
        return torch.cat([torch.ones_like(x[..., :1]), x, outer], -1)
    assert name in (None, "identity")
    return x


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    feature_map: str | None = "elu",
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool | None = None,
    scale: float = 1.0,
    s: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, s and z for q, k [B, H, N, D], v [B, H, M, Dv]; decay [H], [B, H, N] or [B, H, N, K]."""
    q, k, v = features(feature_map, q) * scale, features(feature_map, k), v.double()
    batch, heads, n, size = q.shape
    m = k.shape[2]
    normalize = decay is None and beta is None if normalize is None else normalize
    s = torch.zeros(batch, heads, size, v.shape[-1], dtype=torch.float64) if s is None else s.double()
    z = torch.zeros(batch, heads, size, dtype=torch.float64) if z is None else z.double()
    factors = torch.ones(batch, heads, m, size, dtype=torch.float64)
    if decay is not None:
        decay = decay.double()
        decay = decay[None, :, None, None] if decay.dim() == 1 else decay if decay.dim() == 4 else decay[..., None]
        factors = factors * decay.exp()
    if not causal:
        s, z = s + torch.einsum("bhmk,bhmd->bhkd", k, v), z + k.sum(2)
        out, den = torch.einsum("bhnk,bhkd->bhnd", q, s), torch.einsum("bhnk,bhk->bhn", q, z)
        return (out / (den + EPSILON)[..., None] if normalize else out), s, z
    rows = []
    for i in range(n):
        factor = factors[:, :, i]
        if beta is not None:  # the matrix that the state is multiplied by, as it stands in the paper
            strength = beta[:, :, i, None, None].double()
            key = k[:, :, i]
            step = torch.eye(size, dtype=torch.float64) - strength * torch.einsum("bhk,bhl->bhkl", key, key)
            s = factor[..., None] * torch.einsum("bhkl,bhld->bhkd", step, s)
            s = s + strength * torch.einsum("bhk,bhd->bhkd", key, v[:, :, i])
            rows.append(torch.einsum("bhk,bhkd->bhd", q[:, :, i], s))
            continue
        pair = torch.einsum("bhk,bhd->bhkd", k[:, :, i], v[:, :, i])
        if bonus is not None:
            read = s + bonus.double()[None, :, :, None] * pair
        s, z = factor[..., None] * s + pair, factor * z + k[:, :, i]
        row = torch.einsum("bhk,bhkd->bhd", q[:, :, i], s if bonus is None else read)
        rows.append(row / ((q[:, :, i] * z).sum(-1) + EPSILON)[..., None] if normalize else row)
    return (torch.stack(rows, 2) if rows else torch.zeros_like(v)), s, z


def case(
    kind: str,
    n: int,
    *,
    batch: int = 2,
    heads: int = 2,
    dim: int = 8,
    dim_v: int = 12,
    seed: int = 0,
    state: bool = False,
) -> dict[str, Any]:
    """Tensors and options of a call: `kind` is a feature map and a decay, "elu", "none+retention", "relu+near0" …"""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    name, _, gates = kind.partition("+")
    given: dict[str, Any] = {
        "q": normal(batch, heads, n, dim), "k": normal(batch, heads, n, dim), "v": normal(batch, heads, n, dim_v),
        "causal": gates != "full", "feature_map": None if name == "none" else name,
    }  # fmt: skip
    channels = (batch, heads, n, dim)
    if gates == "retention":
        given["decay"] = (1 - 2.0 ** (-2 - torch.arange(heads, dtype=torch.float64))).log()
    elif gates in ("scalar", "normalized"):
        given["decay"] = torch.nn.functional.logsigmoid(normal(batch, heads, n))
    elif gates in ("gla", "rwkv"):
        given["decay"] = torch.nn.functional.logsigmoid(normal(*channels) + 1)
    elif gates == "near0":  # almost everything is forgotten, now and then nothing
        given["decay"] = -normal(*channels).abs() * torch.where(normal(*channels) > 1, 1e-3, 20.0)
    elif gates == "near1":
        given["decay"] = -normal(*channels).abs() * 1e-4
    elif gates == "strong":  # one factor a token, from 1 to e^−40
        given["decay"] = -normal(batch, heads, n).abs() * torch.where(normal(batch, heads, n) > 0.5, 1e-3, 20.0)
    elif gates == "gated-delta":
        given["decay"] = torch.nn.functional.logsigmoid(normal(batch, heads, n) + 2)
    elif gates == "retained-delta":
        given["decay"] = (1 - 2.0 ** (-2 - torch.arange(heads, dtype=torch.float64))).log()
    elif gates == "extreme-delta":  # from 1 − 10⁻⁴ to e^−40
        given["decay"] = -normal(batch, heads, n).abs() * torch.where(normal(batch, heads, n) > 1, 20.0, 1e-4)
    if gates.endswith("delta"):
        given["k"] = given["k"] / given["k"].norm(dim=-1, keepdim=True)
        given["beta"] = normal(batch, heads, n).sigmoid()
    if gates == "extreme-delta":  # nothing, everything replaced, and reflected
        ends = torch.tensor([0.0, 1e-4, 1.0, 1.9999, 2.0], dtype=torch.float64)
        given["beta"] = ends[torch.randint(5, (batch, heads, n), generator=g)]
    if gates == "normalized":
        given["normalize"] = True
    if gates == "rwkv":
        given["bonus"] = normal(heads, dim)
    if state:
        size = 1 + dim + dim * dim if name == "taylor" else dim
        given["s"], given["z"] = normal(batch, heads, size, dim_v), normal(batch, heads, size).abs()
    return given


KINDS = (
    "elu", "elu+full", "relu", "relu+full", "taylor", "none+retention", "none+scalar", "none+strong", "none+gla",
    "none+rwkv", "none+near0", "none+near1", "elu+gla", "elu+normalized", "relu+retention", "none+delta",
    "none+gated-delta", "none+retained-delta", "none+extreme-delta",
)  # fmt: skip
"""Every feature map and decay, what FAVOR+ becomes (a normalised decay), and the delta rule."""

TENSORS = ("q", "k", "v", "decay", "bonus", "beta", "s", "z")


def leaves_of(given: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a case, wanting gradients."""
    return {name: given[name].clone().requires_grad_() for name in TENSORS if isinstance(given.get(name), Tensor)}


def cancellation(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, ddecay: Tensor, feature_map: str, lengths: tuple[int, ...] = ()
) -> float:
    """How much larger than ddecay the rounding errors of its terms are, in units of one term's relative error.

    ddecay_t is the sum over s ≥ t of φ(q_s)∘dφ(q_s) − φ(k_s)∘dφ(k_s), most of which cancels: what of a term is
    rounding, and independent of the others', does not. `lengths` are those of packed sequences, if any.
    """
    squares = torch.zeros_like(q)
    for x, grad in ((q, dq), (k, dk)):
        ratio = torch.where(x > 0, x + 1, 1.0) if feature_map == "elu" else x  # φ/φ'
        squares = squares + (ratio * grad if ddecay.dim() == 4 else (ratio * grad).sum(-1, keepdim=True)) ** 2
    parts = squares.split(lengths, 2) if lengths else [squares]
    later = torch.cat([part.flip(2).cumsum(2) for part in parts], 2)
    return (later.sum().sqrt() / ddecay.norm()).item()


class Judged:
    """A case with the oracle's results and gradients for random cotangents."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        leaves = leaves_of(given)
        self.options = {name: x for name, x in given.items() if name not in leaves}
        self.normalized = given.get("normalize", "decay" not in given and "beta" not in given)
        outputs = linear_attention(**leaves, **self.options)
        outputs = outputs if self.normalized else outputs[:2]
        g = torch.Generator().manual_seed(7)
        self.cotangents = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), self.cotangents, materialize_grads=True)
        self.outputs = [x.detach() for x in outputs]
        self.grads = dict(zip(leaves, grads, strict=True))

    @property
    def cancellation(self) -> float:
        given, grads = self.given, self.grads
        return cancellation(*(x[name] for x in (given, grads) for name in "qk"), grads["decay"], given["feature_map"])

    def errors(self, outputs: list[Tensor], grads: dict[str, Tensor]) -> dict[str, float]:
        """Norms of the errors over norms of what is exact (at least 1e-3), by name."""
        pairs = list(zip(("out", "s", "z"), outputs, self.outputs, strict=False))
        pairs += [(f"d{name}", grads[name], exact) for name, exact in self.grads.items() if name in grads]
        return {
            name: ((x.detach().cpu().double() - exact).norm() / exact.norm().clamp(min=1e-3))
            .nan_to_num(math.inf)
            .item()
            for name, x, exact in pairs
        }
