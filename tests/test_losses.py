"""The chunked loss against the expression it stands for, in float64, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sightline import losses
from sightline.losses import next_token_loss
from sightline.models import Decoder, DecoderConfig
from sightline.shapes import ShapeError


def draw(tokens: int, vocabulary: int, d_model: int, *, seed: int = 0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    features, weight = (
        torch.randn(n, d_model, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (tokens, vocabulary)
    )
    return features, weight, torch.randint(vocabulary, (tokens,), generator=random)


def plain(features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return F.cross_entropy(F.linear(features, weight), targets, label_smoothing=smoothing)


@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(1, 30),
    d_model=st.integers(1, 9),
    rows=st.integers(1, 41),
    factor=st.sampled_from([1.0, -3.5]),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_loss_and_gradients_are_those_of_all_logits(tokens, vocabulary, d_model, rows, factor, smoothing):
    features, weight, targets = draw(tokens, vocabulary, d_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_BYTES", rows * vocabulary * 8)
        found = next_token_loss(features, weight, targets, smoothing=smoothing)
        got = torch.autograd.grad(found * factor, (features, weight))
    exact = plain(features, weight, targets, smoothing)
    torch.testing.assert_close(found, exact)
    for ours, right in zip(got, torch.autograd.grad(exact * factor, (features, weight)), strict=True):
        torch.testing.assert_close(ours, right, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 64)
    *leaves, targets = draw(20, 11, 4)
    leaves[frozen] = leaves[frozen].detach()
    next_token_loss(*leaves, targets).backward()
    assert leaves[frozen].grad is None
    assert leaves[1 - frozen].grad is not None
    with torch.no_grad():
        assert not next_token_loss(*leaves, targets).requires_grad


def test_float32_is_as_accurate_as_all_logits(monkeypatch):
    features, weight, targets = draw(300, 500, 32)
    exact = plain(features, weight, targets)
    small = [t.detach().float().requires_grad_() for t in (features, weight)]
    theirs = torch.autograd.grad(plain(*small, targets), small)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 70 * 500 * 4)
    ours = torch.autograd.grad(next_token_loss(*small, targets), small)
    for own, other, right in zip(ours, theirs, torch.autograd.grad(exact, (features, weight)), strict=True):
        assert (own.double() - right).abs().max() <= 2 * (other.double() - right).abs().max() + 1e-9


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32(monkeypatch):
    features, weight, targets = draw(60, 50, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        all_at_once = next_token_loss(features, weight, targets)
        monkeypatch.setattr(losses, "CHUNK_BYTES", 7 * 50 * 4)
        chunked = next_token_loss(features, weight, targets)
    assert chunked.dtype == all_at_once.dtype == torch.float32
    torch.testing.assert_close(chunked, all_at_once, rtol=1e-3, atol=1e-3)
    chunked.backward()
    assert weight.grad is not None
    torch.testing.assert_close(
        weight.grad, torch.autograd.grad(plain(features, weight, targets), weight)[0], rtol=0.05, atol=2e-3
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), "no tokens"),
        (torch.zeros(3), "whole numbers, got torch.float32"),
        (torch.tensor([0, 5, 2]), "0 to 4, got 0 to 5"),
        (torch.tensor([0, -1, 2]), "0 to 4, got -1 to 2"),
    ],
)
def test_bad_targets_are_an_error(targets, message):
    with pytest.raises(ValueError, match=message):
        next_token_loss(torch.zeros(len(targets), 4), torch.zeros(5, 4), targets)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_says_the_loss_of_its_logits(tied):
    model = Decoder(DecoderConfig.modern(vocabulary=30, d_model=16, num_layers=1, num_heads=2, tied=tied))
    tokens = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model.loss(tokens[:, :-1], tokens[:, 1:]), expected)
    with pytest.raises(ShapeError, match="targets are"):
        model.loss(tokens, tokens[:, 1:])
