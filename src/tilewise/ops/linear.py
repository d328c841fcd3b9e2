"""`linear_attention`: the sub-quadratic family, with and without decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from tilewise.errors import bad_type, bad_value
from tilewise.ops import checks, linear_checks
from tilewise.ops.arguments import autocast
from tilewise.ops.dispatch import Plan, check_name
from tilewise.ops.linear_library import LinearArguments, linear_op, linear_route
from tilewise.reference.features import FIXED, TAYLOR_LIMIT, stabilised_keys, stabilised_queries
from tilewise.reference.linear import LinearState, own_token
from tilewise.reference.softmax import accumulator_dtype
from tilewise.spec import LinearSpec

FeatureMap = str | Callable[[Tensor], Tensor] | None
FUSED = ("identity", "elu", "relu")
"""Maps that the backends compute on the way."""


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    feature_map: FeatureMap = "elu",
    normalize: bool | None = None,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: LinearState | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    layout: str = "bhsd",
    backend: str = "auto",
) -> Tensor: ...


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    feature_map: FeatureMap = "elu",
    normalize: bool | None = None,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: LinearState | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    layout: str = "bhsd",
    backend: str = "auto",
) -> tuple[Tensor, LinearState]: ...


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    feature_map: FeatureMap = "elu",
    normalize: bool | None = None,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    layout: str = "bhsd",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Linear attention, `o_i = φ(q_i) S_i` with `S_i = e^{g_i}∘S_{i−1} + φ(k_i)ᵀ v_i`, in O(N) time and memory.

    Args:
        q: [B, H, N, D], float32, float16, bfloat16 or float64 (on the PyTorch backends).
        k: [B, H, M, D]; M = N where causal.
        v: [B, H, M, Dv].
        causal: token i sees tokens j ≤ i; without it all see all, which no decay allows.
        feature_map: φ: "elu" (elu(x) + 1), "relu", "taylor" (second order, for D ≤ 32), None or "identity" (what
            RetNet, GLA and RWKV use), or a callable from [..., D] to [..., K], such as a module. One that has a method
            `log_features(x)` (`tilewise.nn.FavorFeatures`) is positive and given in logs, and stabilised here.
        normalize: divide by `Σ_j φ(q_i)·φ(k_j)` plus 1e-6; by default exactly when there is neither decay nor beta.
        decay: g, logs of the decay, at most 0: [H] (retention), [B, H, N] (scalar gates) or [B, H, N, K] (a gate a key
            channel, as in GLA and RWKV-6). Has a gradient. Below −60 it counts as −60.
        bonus: u [H, K] of RWKV-6, with a decay per channel: `o_i = q_i (S_{i−1} + diag(u) k_iᵀ v_i)`.
        beta: β [B, H, N] of the delta rule, `S_i = e^{g_i}(I − β_i k_iᵀ k_i) S_{i−1} + β_i k_iᵀ v_i`: causal, not
            normalised, with feature_map None or a callable, and a decay [H], [B, H, N] or none. Has a gradient. States
            stay bounded for β|k|² in [0, 2]: give k of length 1 and β in [0, 1], or up to 2 where they may change sign.
        scale: a factor of all weights, 1 by default: `φ(q)·φ(k)` as it is. GLA and RetNet pass 1/√D.
        state: what a previous call returned: the tokens so far. Has gradients.
        return_state: also return the state after the last token.
        cu_seqlens: [sequences + 1] int32: q, k and v hold that many sequences one after another in N, with B = 1;
            states then have one row a sequence.
        layout: "bhsd" as above, or "bshd" for q, k, v and out [B, N, H, D], decay [B, N, H] or [B, N, H, K] and beta
            [B, N, H].
        backend: "auto", or one of "triton", "tiled", "standard", which then runs or raises.

    Returns:
        out, shaped as q with Dv for D, in q's dtype; with `return_state`, also the `LinearState`.

    Raises:
        ValueError, TypeError: bad input, before anything runs. That decays are at most 0 is checked on the CPU only.
        UnsupportedError: the named backend cannot do this; the message says which one can.

    Parallel, chunked and recurrent computation agree; which one runs is the backend's choice. First derivatives only.

    Sources: Katharopoulos et al. (2020); Yang et al., GLA (2023); Peng et al., RWKV-6 (2024); Yang et al.,
    Gated DeltaNet (2024).
    """
    call = _prepare(
        q, k, v, causal, feature_map, normalize, decay, bonus, beta, scale, state, return_state, cu_seqlens, layout,
        backend,
    )  # fmt: skip
    out, _, s, z = linear_op(*call.arguments)
    if bonus is not None:
        dtype = accumulator_dtype(out.dtype)
        a = call.arguments
        own = own_token(a.q.to(dtype) * a.scale, a.k.to(dtype), a.v.to(dtype), bonus)
        out = (out.to(dtype) + own).to(out.dtype)
    if layout == "bshd":
        out = out.transpose(1, 2)
    if not return_state:
        return out
    return out, LinearState(s, z if call.arguments.normalize else None, call.shift)


def explain_linear(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **options: Any) -> Plan[LinearSpec]:
    """What `linear_attention` would do with these arguments: the backend, its configuration and the reasons.

    Args and errors as for `linear_attention`.
    """
    given: dict[str, Any] = {
        "feature_map": "elu", "normalize": None, "decay": None, "bonus": None, "beta": None, "scale": None,
        "state": None, "return_state": False, "cu_seqlens": None, "layout": "bhsd", "backend": "auto",
    }  # fmt: skip
    for name, value in options.items():
        if name not in given:
            raise TypeError(f"explain_linear() has no argument {name!r}")
        given[name] = value
    arguments = _prepare(q, k, v, causal, *given.values()).arguments
    plan, _, _ = linear_route(arguments.signature(), arguments.backend)
    return replace(plan, rejected=dict(plan.rejected))


class _Call(NamedTuple):
    arguments: LinearArguments
    shift: Tensor | None


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    feature_map: FeatureMap,
    normalize: bool | None,
    decay: Tensor | None,
    bonus: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    state: LinearState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    layout: str,
    backend: str,
) -> _Call:
    """Everything checked, in one layout, with feature maps applied that no backend fuses."""
    checks.layout_name(layout)
    check_name(backend)
    checks.floats(q, k, v)
    q, k, v = autocast(q), autocast(k), autocast(v)
    checks.qkv(q, k, v, rank=4)
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if isinstance(decay, Tensor) and decay.dim() in (3, 4):
            decay = decay.transpose(1, 2)
        if isinstance(beta, Tensor) and beta.dim() == 3:
            beta = beta.transpose(1, 2)
    checks.heads_and_lengths(q, k, v, layout)
    checks.flag("causal", causal)
    checks.flag("return_state", return_state)
    checks.finite("scale", scale)
    if normalize is not None:
        checks.flag("normalize", normalize)
    linear_checks.sizes(q, k, causal)
    if cu_seqlens is not None:
        linear_checks.packed(q, cu_seqlens, causal)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    normalized = decay is None and beta is None if normalize is None else normalize
    if beta is not None:
        linear_checks.beta(beta, decay, q, feature_map, normalized, causal)
    logs = getattr(feature_map, "log_features", None)
    shift = None
    if logs is None:
        name, q, k = _mapped(feature_map, q, k)
        linear_checks.state(state, sequences, k, v, normalized)
    else:
        if decay is not None or not normalized:
            got = "a decay" if decay is not None else "normalize=False"
            raise bad_value("feature_map", f"a map given in logs with {got}", "one without decay, normalised")
        name = "identity"
        dtype = q.dtype
        log_q, log_k = (linear_checks.features(name, logs(x), x) for name, x in (("q", q), ("k", k)))
        linear_checks.same_features(log_q, log_k)
        linear_checks.state(state, sequences, log_k, v, normalized)
        state = _common_shift(state, packed=cu_seqlens is not None)
        before = None if state is None else state.shift
        q = stabilised_queries(log_q).to(dtype)
        if k.shape[2] == 0 and not causal:
            raise bad_value("k", "0 keys", "at least one with a feature map given in logs")
        keys, decay, shift = stabilised_keys(log_k, causal, before)
        k = keys.to(dtype)
        if not causal and state is not None and before is not None:
            lowered = (before - shift).exp()
            z = state.z if state.z is None else state.z * lowered[..., None]
            state = LinearState(state.s * lowered[..., None, None], z, shift)
        if cu_seqlens is not None:
            shift = shift.expand(sequences, -1)
    if decay is not None and logs is None:
        linear_checks.decay(decay, q, k, causal)
        decay = decay[None, :, None].expand(q.shape[:3]) if decay.dim() == 1 else decay
    if bonus is not None:
        linear_checks.bonus(bonus, decay, k, normalized, causal)
    arguments = LinearArguments(
        q, k, v, decay, beta,
        None if state is None else state.s,
        None if state is None or not normalized else state.z,
        cu_seqlens, causal, name, bonus is not None, normalized, 1.0 if scale is None else float(scale), return_state,
        backend,
    )  # fmt: skip
    return _Call(arguments, shift)


def _mapped(feature_map: FeatureMap, q: Tensor, k: Tensor) -> tuple[str, Tensor, Tensor]:
    """The name that is left for the backend, and q and k after a map that no backend fuses."""
    if feature_map is None or feature_map in FUSED:
        return str(feature_map or "identity"), q, k
    if isinstance(feature_map, str):
        if feature_map == "favor":
            fix = "pass tilewise.nn.FavorFeatures(head_dim, features), which holds them"
            raise bad_value("feature_map", "'favor'", "a map with its random directions", fix)
        if feature_map not in FIXED:
            raise bad_value("feature_map", repr(feature_map), f"a callable, None, or one of {', '.join(FIXED)}")
        if feature_map == "taylor" and q.shape[-1] > TAYLOR_LIMIT:
            got = f"'taylor' with head dim {q.shape[-1]}, {1 + q.shape[-1] + q.shape[-1] ** 2} features"
            raise bad_value("feature_map", got, f"a head dim up to {TAYLOR_LIMIT}", "project q and k to fewer dims")
        apply = FIXED[feature_map]
    elif callable(feature_map):
        apply = feature_map
    else:
        raise bad_type("feature_map", feature_map, "a name, a callable or None")
    phi_q, phi_k = (linear_checks.features(name, apply(x), x) for name, x in (("q", q), ("k", k)))
    linear_checks.same_features(phi_q, phi_k)
    return "identity", phi_q.to(q.dtype), phi_k.to(q.dtype)


def _common_shift(state: LinearState | None, packed: bool) -> LinearState | None:
    """A state of features given in logs; packed sequences, which share their running maximum, brought to one shift."""
    if state is None:
        return None
    if state.shift is None:
        raise bad_value("state", "no shift", "the state of a call with a feature map given in logs")
    if not packed:
        return state
    common = state.shift.amax(0, keepdim=True)
    lowered = (state.shift - common).exp()
    z = state.z if state.z is None else state.z * lowered[..., None]
    return LinearState(state.s * lowered[..., None, None], z, common)
