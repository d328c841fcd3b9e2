"""Every complaint about an argument of `linear_attention`, as `checks` has those about the arguments of `attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.ops import checks
from tilewise.ops.library import readable
from tilewise.reference.linear import LinearState
from tilewise.reference.softmax import accumulator_dtype


def sizes(q: Tensor, k: Tensor, causal: bool) -> None:
    if k.shape[1] != q.shape[1]:
        fix = "k = k.repeat_interleave(H // Hkv, dim=1), and v likewise"
        raise bad_value("k", f"{k.shape[1]} heads", f"q's {q.shape[1]} heads: a state belongs to one head", fix)
    if causal and k.shape[2] != q.shape[2]:
        fix = "what came before the first query goes in state="
        raise bad_value("k", f"length {k.shape[2]}", f"q's length {q.shape[2]} where causal", fix)


def packed(q: Tensor, cu_seqlens: Tensor, causal: bool) -> None:
    if q.shape[0] != 1:
        raise bad_value("cu_seqlens", f"tensors of batch {q.shape[0]}", "B = 1, all sequences one after another in N")
    if not causal:
        raise UnsupportedError("cu_seqlens: packed sequences are causal. Fix: causal=True, or one call a sequence")
    checks.cu_seqlens("cu_seqlens", cu_seqlens, q, q.shape[2], q.shape[2])


def features(name: str, given: Any, x: Tensor) -> Tensor:
    """What a feature map gave for x [B, H, N, D], if that is [B, H, N, K]."""
    if not isinstance(given, Tensor) or given.dim() != 4 or given.shape[:3] != x.shape[:3] or given.shape[3] == 0:
        got = f"{list(given.shape)} for {name}" if isinstance(given, Tensor) else type(given).__name__
        raise bad_value("feature_map", f"a map that gives {got}", f"features of shape {[*x.shape[:3], 'K']}")
    if not given.is_floating_point():
        raise bad_type("feature_map", f"a map that gives {given.dtype}", "floating-point features")
    return given


def same_features(q: Tensor, k: Tensor) -> None:
    if q.shape[3] != k.shape[3]:
        got = f"a map that gives {q.shape[3]} features for q and {k.shape[3]} for k"
        raise bad_value("feature_map", got, "as many for both")


def decay(given: Tensor, q: Tensor, k: Tensor, causal: bool) -> None:
    checks.is_float("decay", given)
    checks.same_place("decay", given, q)
    if not causal:
        raise bad_value("decay", "a decay without causal order", "causal=True: a decay counts from earlier to later")
    batch, heads, n = q.shape[:3]
    allowed = ((heads,), (batch, heads, n), (batch, heads, n, k.shape[3]))
    if tuple(given.shape) not in allowed:
        want = f"[H] = [{heads}], [B, H, N] = {list(allowed[1])} or [B, H, N, K] = {list(allowed[2])}"
        raise bad_value("decay", f"shape {list(given.shape)}", want)
    if readable(given) and bool((given > 0).any()):
        raise bad_value("decay", "a value above 0", "logs of factors in [0, 1]", "decay = decay.log(), or logsigmoid")


def bonus(given: Tensor, decay: Tensor | None, k: Tensor, normalized: bool, causal: bool) -> None:
    checks.is_float("bonus", given)
    checks.same_place("bonus", given, k)
    if decay is None or decay.dim() != 4 or normalized or not causal:
        raise bad_value("bonus", "a bonus", "a causal, unnormalised call with a decay per key channel, as in RWKV-6")
    if tuple(given.shape) != (k.shape[1], k.shape[3]):
        raise bad_value("bonus", f"shape {list(given.shape)}", f"[H, K] = {[k.shape[1], k.shape[3]]}")


def beta(given: Tensor, decay: Any, q: Tensor, feature_map: Any, normalized: bool, causal: bool) -> None:
    checks.is_float("beta", given)
    checks.same_place("beta", given, q)
    if not causal or normalized:
        got = "normalize=True" if causal else "a beta without causal order"
        raise bad_value("beta", got, "a causal, unnormalised call: the delta rule replaces what earlier tokens wrote")
    named = isinstance(feature_map, str) and feature_map != "identity"
    if named or hasattr(feature_map, "log_features"):
        got = repr(feature_map) if named else "a map given in logs"
        fix = "feature_map=None, with k of length 1"
        raise bad_value("feature_map", f"{got} with a beta", "None or a callable", fix)
    if isinstance(decay, Tensor) and decay.dim() == 4:
        raise UnsupportedError(
            "decay: the delta rule has one factor a token and head here, not one a key channel. Fix: decay of shape "
            "[B, H, N] or [H]"
        )
    if given.shape != q.shape[:3]:
        raise bad_value("beta", f"shape {list(given.shape)}", f"[B, H, N] = {list(q.shape[:3])}")


def state(given: Any, sequences: int, k: Tensor, v: Tensor, normalized: bool) -> None:
    if given is None:
        return
    if not isinstance(given, LinearState):
        raise bad_type("state", given, "the LinearState that an earlier call returned")
    if normalized and given.z is None:
        raise bad_value("state", "no z", "the z of a normalised call", "normalize=False, or a state of such a call")
    shape = (sequences, k.shape[1], k.shape[3], v.shape[3])
    dtype = accumulator_dtype(k.dtype)
    for name, want in (("s", shape), ("z", shape[:3]), ("shift", shape[:2])):
        x = getattr(given, name)
        if name == "s" or x is not None:
            checks.is_tensor(f"state.{name}", x)
            checks.same_place(f"state.{name}", x, k)
            if tuple(x.shape) != want:
                raise bad_value("state", f"{name} of shape {list(x.shape)}", f"{list(want)}")
            if x.dtype != dtype and name != "shift":
                raise bad_type(f"state.{name}", f"dtype {x.dtype}", str(dtype), f"state.{name}.to({dtype})")
