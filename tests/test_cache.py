"""The cache alone; that decoding with it equals one pass is tested with the models."""

import pytest
import torch

from sightline.cache import Cache


def test_appended_tokens_come_back_in_order():
    cache = Cache(num_layers=2, batch=1, capacity=6)
    key, value = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 3)
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        for layer, sign in ((0, 1), (1, -1)):
            keys, values = cache.append(layer, sign * key[:, :, start:stop], sign * value[:, :, start:stop])
            assert torch.equal(keys, sign * key[:, :, :stop])
            assert torch.equal(values, sign * value[:, :, :stop])
        cache.advance(stop - start)
    assert cache.length == 6


def test_memory_never_moves_and_follows_the_dtype():
    cache = Cache(num_layers=1, batch=1, capacity=4)
    new = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    first, _ = cache.append(0, new, new)
    cache.advance(1)
    second, _ = cache.append(0, new, new)
    assert second.dtype == torch.bfloat16
    assert second.data_ptr() == first.data_ptr()


def test_beyond_the_capacity_is_refused_until_it_is_cleared():
    cache = Cache(num_layers=1, batch=1, capacity=4)
    new = torch.ones(1, 1, 3, 2)
    cache.append(0, new, new)
    cache.advance(3)
    with pytest.raises(ValueError, match="3 tokens and 3 more are beyond its capacity of 4"):
        cache.append(0, new, new)
    cache.clear()
    keys, _ = cache.append(0, 2 * new, new)
    assert torch.equal(keys, 2 * new)


def test_another_batch_is_refused():
    with pytest.raises(ValueError, match="batch of 2, got 1"):
        Cache(num_layers=1, batch=2, capacity=4).append(0, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))


def test_gradients_are_refused():
    new = torch.ones(1, 1, 1, 2)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        Cache(num_layers=1, batch=1, capacity=4).append(0, new, new.clone().requires_grad_())


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="got 1, 0 and 4"):
        Cache(num_layers=1, batch=0, capacity=4)


def test_what_is_read_follows_a_new_order():
    cache = Cache(num_layers=1, batch=3, capacity=4)
    keys, values = torch.randn(3, 2, 3, 4), torch.randn(3, 2, 3, 4)
    cache.append(0, keys, values)
    cache.advance(3)
    assert all(map(torch.equal, cache.read(0), (keys, values)))
    rows = torch.tensor([2, 2, 0])
    cache.reorder(rows)
    assert all(map(torch.equal, cache.read(0), (keys[rows], values[rows])))
