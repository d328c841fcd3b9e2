"""The cache of linear attention: its size, its life cycle, and what a sum cannot undo."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise.caches import RecurrentCache
from tilewise.errors import UnsupportedError
from tilewise.reference.linear import LinearState


def filled() -> RecurrentCache:
    cache = RecurrentCache(2, 3, 5, batch=3, normalized=True, shifted=True, tail=7)
    g = torch.Generator().manual_seed(0)
    state = LinearState(*(torch.randn(shape, generator=g) for shape in ((3, 2, 3, 5), (3, 2, 3), (3, 2))))
    cache.update(state, 4, torch.randn(3, 7, generator=g))
    return cache


def test_its_size_does_not_depend_on_the_length() -> None:
    cache = filled()
    assert cache.nbytes == 4 * 3 * (2 * 3 * 5 + 2 * 3 + 2 + 7)
    before, address = cache.nbytes, cache.state.s.data_ptr()
    cache.update(cache.state, 1_000_000, cache.tail)
    assert (cache.nbytes, cache.state.s.data_ptr()) == (before, address)
    assert cache.lengths.tolist() == [1_000_004] * 3
    assert cache.max_length == 1_000_004


def test_reorder_fork_free_and_reset() -> None:
    cache = filled()
    rows = [x.clone() for x in cache.state_dict().values()]
    cache.reorder([2, 0, 0])
    for now, before in zip(cache.state_dict().values(), rows, strict=True):
        assert torch.equal(now, before[[2, 0, 0]])
    cache.fork(0, [2])
    cache.free(1)
    for now, before in zip(list(cache.state_dict().values())[:3], rows, strict=False):
        assert torch.equal(now[[0, 2]], before[[2, 2]])
        assert not now[1].any()
    assert cache.state.shift is not None
    assert cache.state.shift[1].isneginf().all()
    cache.reset()
    assert (cache.max_length, cache.lengths.tolist()) == (0, [0, 0, 0])
    assert not cache.state.s.any()


def test_what_a_sum_cannot_undo_is_refused() -> None:
    cache = filled()
    with pytest.raises(UnsupportedError, match="fork"):
        cache.trim(2)
    with pytest.raises(UnsupportedError, match="fork before"):
        cache.fork(0, 1, tokens=2)
    cache.trim([4, 0, 4])
    assert cache.lengths.tolist() == [4, 0, 4]
    cache.fork(0, 1, tokens=4)
    assert torch.equal(cache.state.s[0], cache.state.s[1])


def test_made_in_inference_mode_and_used_outside() -> None:
    with torch.inference_mode():
        cache = filled().to("cpu")
    with torch.no_grad():
        cache.update(cache.state, 2, cache.tail)
        cache.reorder(torch.tensor([2, 0, 1]))
        cache.fork(0, 1)
        cache.free(2)
    assert cache.lengths.tolist() == [6, 6, 0]
    module = tilewise.nn.RWKV6TimeMix(4, 2)
    with torch.inference_mode():
        cache = module.make_cache(1)
        module(torch.ones(1, 3, 4), cache=cache)
    module(torch.ones(1, 2, 4), cache=cache).sum().backward()
    assert cache.lengths.tolist() == [5]


def test_a_state_comes_back_from_its_dict() -> None:
    cache, other = filled(), RecurrentCache(2, 3, 5, batch=3, normalized=True, shifted=True, tail=7)
    other.load_state_dict({name: x.clone() for name, x in cache.state_dict().items()})
    assert all(torch.equal(x, y) for x, y in zip(cache.state_dict().values(), other.state_dict().values(), strict=True))
    assert other.max_length == 4
    with pytest.raises(ValueError, match="state"):
        other.load_state_dict({})


def test_bad_input() -> None:
    cache = filled()
    with pytest.raises(ValueError, match="heads"):
        RecurrentCache(0, 3, 5, batch=1)
    with pytest.raises(ValueError, match="make_cache"):
        cache.update(LinearState(torch.zeros(3, 2, 3, 5)), 1)
    with pytest.raises(ValueError, match="indices"):
        cache.reorder([0])
    with pytest.raises(ValueError, match="0 to 2"):
        cache.free(3)
    with pytest.raises(ValueError, match="got -1; wants 0 to 2"):
        cache.reorder([0, 1, -1])
    with pytest.raises(TypeError, match="indices"):
        cache.reorder(torch.tensor([0.2, 1.7, 2.0]))
    with pytest.raises(TypeError, match="rows"):
        cache.free(True)
    with pytest.raises(ValueError, match="one for each of 3"):
        cache.trim([4, 0])
    with pytest.raises(ValueError, match="at least 0"):
        cache.trim(-1)
    with pytest.raises(ValueError, match="0 to 4, the tokens of sequence 0"):
        cache.fork(0, 1, tokens=5)
    with pytest.raises(ValueError, match="tokens: got -1"):
        cache.update(cache.state, -1, cache.tail)
    with pytest.raises(ValueError, match="tail"):
        RecurrentCache(2, 3, 5, batch=1, tail=-1)
    assert cache.lengths.tolist() == [4, 4, 4]
