"""Positions against their formulas in float64, and the digits of the specification."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.positions import Learned, Rotary, RotaryScaling, Sinusoidal, sinusoidal

COLUMN_3 = [1.4000, 1.0479, 0.2396, -0.4558, -0.5485, 0.0267, 0.8648, 1.3756, 1.1994, 0.4603]


def formula(position: int, column: int, d_model: int) -> float:
    angle = position / 10000 ** ((column - column % 2) / d_model)
    return math.cos(angle) if column % 2 else math.sin(angle)


def test_column_three_of_the_sum_to_the_printed_digit():
    embeddings = (0.1 * torch.arange(1, 129)).expand(20, 10, 128)
    total = Sinusoidal(d_model=128, length=10)(embeddings)
    for row in total[..., 3]:
        assert [f"{number:.4f}" for number in row.tolist()] == [f"{number:.4f}" for number in COLUMN_3]


@given(position=st.integers(0, 100_000), d_model=st.integers(1, 33))
@settings(max_examples=20)
def test_every_position_and_width_is_right_to_1e_5(position, d_model):
    row = sinusoidal(position + 1, d_model)[position]
    expected = [formula(position, column, d_model) for column in range(d_model)]
    assert row.dtype == torch.float32
    assert row.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_the_float64_value_rounded_once(dtype):
    assert torch.equal(sinusoidal(300, 7, dtype=dtype), sinusoidal(300, 7, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 4), "got -1 and 4"), ((4, 0), "got 4 and 0")],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinusoidal(*arguments)


def test_a_whole_number_dtype_is_refused():
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int64"):
        sinusoidal(3, 4, dtype=torch.int64)


@pytest.mark.parametrize("layer", [Sinusoidal(6, 4), Rotary(6, length=4)])
def test_nothing_is_trained_or_saved(layer):
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert list(layer.buffers())


def test_sinusoidal_grows_and_starts_anywhere():
    layer = Sinusoidal(d_model=6, length=4)
    x = torch.randn(2, 9, 6)
    whole = layer(x)
    assert torch.equal(whole, x + sinusoidal(9, 6))
    assert torch.equal(layer(x[:, 5:], start=5), whole[:, 5:])


@pytest.mark.parametrize("build", [Sinusoidal, Learned])
def test_dropout_falls_on_the_sum_in_training_only(build):
    torch.manual_seed(0)
    layer = build(8, 100, dropout=0.5)
    x = torch.full((1, 100, 8), 3.0)
    dropped = layer(x)
    share = (dropped == 0).float().mean()
    assert 0.4 < share < 0.6
    kept = dropped != 0
    assert torch.allclose(dropped[kept], 2 * layer.eval()(x)[kept])


@pytest.mark.parametrize("build", [Sinusoidal, Learned])
def test_embeddings_of_another_width_are_refused(build):
    with pytest.raises(ValueError, match=r"d_model 8, got \(2, 3, 1\)"):
        build(8, 10)(torch.zeros(2, 3, 1))


def test_learned_adds_its_rows_and_refuses_what_it_never_learned():
    layer = Learned(d_model=3, length=5)
    x = torch.randn(2, 2, 3)
    assert torch.equal(layer(x, start=3), x + layer.weight[3:5])
    with pytest.raises(ValueError, match="6 positions but only 5 were learned"):
        layer(x, start=4)
    with pytest.raises(ValueError, match="got 0 and 3"):
        Learned(d_model=3, length=0)


def turned(x: torch.Tensor, position: int, base: float) -> torch.Tensor:
    """Each pair (x[i], x[i + half]) turned by its own 2 x 2 matrix."""
    half = len(x) // 2
    result = x.clone()
    for i in range(half):
        angle = position / base ** (2 * i / len(x))
        result[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        result[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return result


@pytest.mark.parametrize("start", [0, 3, 100_000])
@pytest.mark.parametrize("base", [10000.0, 1e6])
def test_rotary_turns_pairs_of_halves(start, base):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    result = Rotary(6, base)(x, start)
    for token in range(4):
        assert torch.allclose(result[1, 2, token], turned(x[1, 2, token], start + token, base), atol=1e-12)


@given(query=st.integers(0, 60), key=st.integers(0, 60), shift=st.integers(0, 2000))
@settings(max_examples=30)
def test_rotary_products_depend_on_distance_alone(query, key, shift):
    rotary = Rotary(8, length=2100)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    near = (rotary(q, query) * rotary(k, key)).sum()
    far = (rotary(q, query + shift) * rotary(k, key + shift)).sum()
    assert torch.allclose(near, far, atol=1e-10)


def test_rotary_scaling_slows_the_slow_pairs_alone():
    scaling = RotaryScaling(factor=8.0, low=1.0, high=4.0, original=64)
    x = torch.ones(1, 1, 1, 32, dtype=torch.float64)
    scaled, plain = (Rotary(32, scaling=s)(x, start=5)[0, 0, 0, :16] for s in (scaling, None))
    slower = Rotary(32)(x, start=0)[0, 0, 0, :16]
    for pair in range(16):
        turns = 64 / (2 * math.pi * 10000 ** (pair / 16))
        share = min(1, max(0, (turns - 1) / (4 - 1)))
        angle = 5 / 10000 ** (pair / 16) * (share + (1 - share) / 8)
        slower[pair] = math.cos(angle) - math.sin(angle)
    torch.testing.assert_close(scaled, slower, rtol=0, atol=1e-12)
    assert scaled[0] == plain[0] and (scaled - plain).abs().max() > 0.05


def test_rotary_tables_grow_by_doubling():
    rotary = Rotary(4, length=8)
    rotary(torch.zeros(1, 1, 1, 4), start=8)
    assert len(rotary.cosine) == 16
    rotary(torch.zeros(1, 1, 1, 4), start=99)
    assert len(rotary.cosine) == 100


def test_rotary_keeps_half_precision_angles_exact():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 16, dtype=torch.bfloat16)
    rotary = Rotary(16, length=8)
    rotary.bfloat16()  # what moving a whole model does to its buffers
    expected = Rotary(16)(x.double(), start=50_000)
    result = rotary(x, start=50_000)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected.bfloat16())
    in_range = rotary(x, start=2)
    assert torch.equal(in_range, Rotary(16)(x.double(), start=2).bfloat16())


def test_rotary_refuses_what_it_cannot_turn():
    with pytest.raises(ValueError, match="even width, since it turns pairs; got 5"):
        Rotary(5)
    with pytest.raises(ValueError, match="expected width 4, got 6"):
        Rotary(4)(torch.zeros(1, 1, 1, 6))
