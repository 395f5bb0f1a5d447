"""Muon is its definition in float64, and the optimisers of a model are saved and restored as one."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sightline.models import Decoder, DecoderConfig
from sightline.optimizers import Muon, Optimizers, orthogonalized, stored
from sightline.schedule import TrainConfig

SHAPE = {"vocabulary": 11, "context": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 48}


def definition(matrix: torch.Tensor) -> torch.Tensor:
    """The rounds of the paper, one matrix in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 3), rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_orthogonalized_is_its_definition(count, rows, columns, seed):
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([definition(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalized(matrices).double(), expected, rtol=1e-3, atol=1e-3)


def test_orthogonalized_keeps_directions_and_levels_sizes():
    matrix = torch.randn(1, 12, 20, dtype=torch.float64)
    left, sizes, right = torch.linalg.svd(matrix[0], full_matrices=False)
    assert sizes.max() / sizes.min() > 1.5
    inner = left.T @ orthogonalized(matrix)[0] @ right.T
    assert inner.diagonal().min() > 0.65 and inner.diagonal().max() < 1.25
    torch.testing.assert_close(inner, inner.diagonal().diag(), rtol=0, atol=1e-9)


def test_orthogonalized_zeros_stay_zeros():
    assert not orthogonalized(torch.zeros(2, 3, 4)).any()


def steps_of(make, matrices: list[torch.Tensor], count: int = 4) -> list[torch.Tensor]:
    """The weights after a few steps down gradients that follow from nothing but the seed."""
    weights = [nn.Parameter(matrix.clone()) for matrix in matrices]
    optimizer = make(weights)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_muon_is_its_definition(dtype, tolerance):
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5)]  # some alike, tall and wide
    matrices = [torch.randn(*shape) for shape in shapes]
    moved = steps_of(lambda weights: Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.5, dtype=dtype), matrices)
    generator = torch.Generator().manual_seed(1)
    expected, buffers = [matrix.double() for matrix in matrices], [torch.zeros(shape).double() for shape in shapes]
    for _ in range(4):
        for i, shape in enumerate(shapes):
            gradient = torch.randn(shape, generator=generator).double()
            buffers[i] = 0.9 * buffers[i] + 0.1 * gradient
            move = math.sqrt(max(1, shape[0] / shape[1])) * definition(0.9 * buffers[i] + 0.1 * gradient)
            expected[i] = expected[i] - 0.1 * (0.5 * expected[i] + move)
    for one, other in zip(moved, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_muon_is_that_of_torch_but_for_bfloat16():
    matrices = [torch.randn(6, 4), torch.randn(4, 6)]
    ours = steps_of(lambda weights: Muon(weights, lr=0.1, weight_decay=0.5), matrices)
    theirs = steps_of(lambda weights: torch.optim.Muon(weights, lr=0.1, weight_decay=0.5), matrices)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)


def test_muon_leaves_what_has_no_gradient():
    moved, still = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))
    moved.grad = torch.ones(3, 3)
    Muon([moved, still], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(still.detach(), torch.eye(3)) and not torch.equal(moved.detach(), torch.eye(3))


def test_muon_moves_matrices_only():
    with pytest.raises(ValueError, match=r"expected matrices, got a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.ones(3))], lr=0.1)


def test_many_matrices_are_moved_as_one_by_one(monkeypatch):
    matrices = [torch.randn(4, 6) for _ in range(5)]
    together = steps_of(lambda weights: Muon(weights, lr=0.1), matrices)
    monkeypatch.setattr("sightline.optimizers._TOGETHER", 48)  # two at a time
    for one, other in zip(together, steps_of(lambda weights: Muon(weights, lr=0.1), matrices), strict=True):
        torch.testing.assert_close(one, other)


# --- A model's -----------------------------------------------------------------------------------------


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig.modern(tied=False, **SHAPE))


def moved(optimizers: Optimizers, decoder: Decoder, seed: int) -> None:
    tokens = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed))
    optimizers.zero_grad()
    decoder.loss(tokens, tokens.roll(-1, 1)).backward()
    optimizers.step(1e-3)


@pytest.mark.parametrize(
    ("tied", "decayed", "tables"),
    [(False, {"head.weight"}, [{"embedding.weight"}]), (True, {"embedding.weight"}, [])],
)
def test_who_moves_what(tied, decayed, tables):
    decoder = Decoder(DecoderConfig.modern(tied=tied, **SHAPE))
    adamw, muon = Optimizers(decoder, TrainConfig()).each
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    inner, head, gains, *rows = (
        {names[p] for p in group["params"]} for group in (*muon.param_groups, *adamw.param_groups)
    )
    assert inner == {
        f"blocks.{layer}.{part}.weight"
        for layer in range(2)
        for part in (
            *(f"attention.{name}" for name in ("query", "key", "value", "output")),
            *(f"feed_forward.{name}" for name in ("gate", "up", "down")),
        )
    }
    assert head == decayed
    assert rows == tables
    assert inner | head | gains | set().union(*rows) == set(names.values()) and all("norm" in name for name in gains)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, *[0.0] * (1 + len(rows))]


def test_adamw_alone_moves_everything():
    decoder = model()
    (adamw,) = Optimizers(decoder, TrainConfig(optimizer="adamw")).each
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(decoder.parameters()))


def test_rates_keep_their_proportion():
    optimizers = Optimizers(model(), TrainConfig(learning_rate=0.01, embedding_rate=0.1, matrix_rate=0.04))
    optimizers.step(0.005)
    assert [group["lr"] for each in optimizers.each for group in each.param_groups] == [0.005, 0.005, 0.05, 0.02]


def restore(optimizers: Optimizers, saved: dict[str, torch.Tensor]) -> None:
    for name, tensor in optimizers.blank_state().items():
        tensor.copy_(stored(saved, name, tensor))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_what_is_restored_goes_on_bit_for_bit(name):
    config = TrainConfig(optimizer=name)
    straight, again = model(), model()
    optimizers = Optimizers(straight, config)
    for seed in range(3):
        moved(optimizers, straight, seed)
    other = Optimizers(again, config)
    again.load_state_dict(straight.state_dict())
    saved = {key: value.clone() for key, value in optimizers.state().items()}
    restore(other, saved)
    for seed in range(3, 6):
        moved(optimizers, straight, seed)
        moved(other, again, seed)
    for one, two in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert other.state().keys() == optimizers.state().keys()


def test_the_state_of_another_optimizer_is_refused():
    decoder = model()
    optimizers = Optimizers(decoder, TrainConfig())
    moved(optimizers, decoder, 0)
    with pytest.raises(ValueError, match=r"blocks.0.attention.output.weight.step of shape \(\) .*, got nothing"):
        restore(Optimizers(model(), TrainConfig(optimizer="adamw")), optimizers.state())


@pytest.mark.parametrize("setting", [{"matrix_rate": 0.01}, {"embedding_rate": 0.01}, {"momentum": 0.9}])
def test_a_setting_without_effect_is_an_error(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} has no effect with the optimizer adamw"):
        TrainConfig(optimizer="adamw", **setting)
    dataclasses.replace(TrainConfig(), **setting)
