"""Dropout in the native kernel: the weights it drops are read off its output, the rest follows from the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, assert_as_accurate, draw
from test_cpu_kernel import native, threads  # noqa: F401 (a fixture)

from sightline.kernels import cpu, reference
from sightline.masks import Causal, Mask, Padding, Window

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING or "built")


def stays(case: Case, mask=None, *, dropout: float, seed: int) -> torch.Tensor:
    """Which weights stay, (batch heads queries keys): with the unit vectors for values the output is the weights."""
    batch, groups, keys, _ = case.key.shape
    units = torch.eye(keys, dtype=case.value.dtype).expand(batch, groups, keys, keys)
    even = Case(torch.zeros_like(case.query), torch.zeros_like(case.key), units)  # no weight is too small to tell
    return seeded(even, mask, dropout=dropout, seed=seed) > 0


def seeded(case: Case, mask=None, *, seed: int = 5, **options) -> torch.Tensor:
    torch.manual_seed(seed)
    return native(case, mask, **options)


def defined(case: Case, mask: Mask | None, stays: torch.Tensor, dropout: float) -> torch.Tensor:
    """The output in float64 with these weights staying."""
    q, k, v = case.to(torch.float64)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    allowed = (mask or Mask()).dense(q.shape[-2], k.shape[-2], device=q.device, dtype=q.dtype)[0]
    options = {"scale": q.shape[-1] ** -0.5, "softcap": None, "sinks": None, "dropout": 0.0}
    _, weights, _ = reference.attention(q, k, v, allowed, None, **options)
    return (weights * stays / (1 - dropout)) @ v


@pytest.mark.parametrize("queries", [1, 3, 90])  # read in place, one row group, blocks
@pytest.mark.parametrize("mask", [None, Causal(), Window(before=40, after=3)], ids=["all", "causal", "window"])
def test_output_and_gradients_are_those_of_the_weights_that_stay(queries, mask, instructions):
    case = draw(queries=queries, keys=150, width=16, value_width=24, dtype=torch.float32)
    left = stays(case, mask, dropout=0.3, seed=1)
    leaves = Case(*(t.clone().requires_grad_() for t in case))
    exact = Case(*(t.double().requires_grad_() for t in case))
    output, expected = seeded(leaves, mask, dropout=0.3, seed=1), defined(exact, mask, left, 0.3)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(output, leaves, pull)
    for found, wanted in zip(ours, torch.autograd.grad(expected, exact, pull.double()), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, instructions):
    case = Case(*(t.requires_grad_() for t in draw(queries=61, keys=201, width=64, value_width=64, dtype=dtype)))
    exact = Case(*(t.detach().double().requires_grad_() for t in case))
    with torch.no_grad():
        left = stays(case, None, dropout=0.2, seed=4)
    # What plain arithmetic in that dtype makes of the same weights.
    weights = torch.softmax(case.query @ case.key.repeat_interleave(2, 1).mT * 64**-0.5, -1) * left / 0.8
    plain = weights.to(dtype) @ case.value.repeat_interleave(2, 1)
    ours, right = seeded(case, dropout=0.2, seed=4), defined(exact, None, left, 0.2)
    assert_as_accurate(ours, right, plain)
    pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = torch.autograd.grad(ours, case, pull)
    expected = torch.autograd.grad(plain, case, pull)
    for gradient, wanted, theirs in zip(found, torch.autograd.grad(right, exact, pull.double()), expected, strict=True):
        assert_as_accurate(gradient, wanted, theirs)


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_as_many_weights_stay_as_should_everywhere(dropout, instructions):
    left = stays(draw(batch=3, heads=4, queries=100, keys=256, dtype=torch.float32), dropout=dropout, seed=0).double()
    for axis in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):  # of each sequence, head, query, key
        share = left.mean(axis)
        deviation = math.sqrt(dropout * (1 - dropout) * len(share) / left.numel())
        assert (share - (1 - dropout)).abs().max() < 5 * deviation


def test_rows_and_seeds_are_independent():
    case = draw(batch=2, heads=2, queries=64, keys=256, dtype=torch.float32)
    rows = torch.cat([stays(case, dropout=0.5, seed=seed).flatten(0, 2) for seed in (0, 1)]).float() * 2 - 1
    alike = (rows @ rows.T / 256).fill_diagonal_(0)
    assert alike.abs().max() < 6 / 16  # 6 standard deviations of independent coins
    for shift in (1, 2, 7, 64):
        assert ((rows[:, shift:] @ rows[:, :-shift].T) / (256 - shift)).abs().max() < 6 / math.sqrt(256 - shift)


@given(queries=st.integers(1, 70), keys=st.integers(1, 600), dropout=st.floats(0, 0.95), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_a_seed_gives_the_same_bits_again(queries, keys, dropout, seed):
    case = draw(queries=queries, keys=keys, dtype=torch.float32)
    mask = Padding([keys, keys // 2])
    assert torch.equal(*(seeded(case, mask, dropout=dropout, seed=seed) for _ in range(2)))


def test_the_same_bits_for_any_number_of_threads(threads):  # noqa: F811
    case = Case(*(t.requires_grad_() for t in draw(queries=300, keys=700, width=32, dtype=torch.float32)))
    found = []
    for count in (1, 2, 3, 4):
        threads(count)
        output = seeded(case, Causal(), dropout=0.2)
        found.append((output, *torch.autograd.grad(output.square().sum(), case)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_mean_over_seeds_is_the_output_without():
    case = draw(batch=1, queries=20, keys=40, dtype=torch.float32)
    outputs = torch.stack([seeded(case, dropout=0.4, seed=seed) for seed in range(600)]).double()
    deviation = outputs.std(0) / math.sqrt(600)
    assert ((outputs.mean(0) - native(case).double()).abs() < 5 * deviation + 1e-6).all()


def test_nothing_is_drawn_without_dropout():
    case = draw(dtype=torch.float32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    native(case)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch's tracer does
def test_compiles_whole_with_its_gradient():
    case = Case(*(t.requires_grad_() for t in draw(queries=30, keys=30, dtype=torch.float32)))
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    output = seeded_by(compiled, case)
    torch.testing.assert_close(output, seeded_by(native, case))
    for a, b in zip(
        torch.autograd.grad(output.sum(), case), torch.autograd.grad(seeded_by(native, case).sum(), case), strict=True
    ):
        torch.testing.assert_close(a, b)


def seeded_by(call, case: Case) -> torch.Tensor:
    torch.manual_seed(3)
    return call(case, Causal(), dropout=0.3)


def test_checkpointing_draws_the_same_again():
    case = Case(*(t.requires_grad_() for t in draw(queries=30, keys=30, dtype=torch.float32)))
    wanted = torch.autograd.grad(seeded(case, dropout=0.3).square().sum(), case)
    torch.manual_seed(5)
    output = torch.utils.checkpoint.checkpoint(native, case, dropout=0.3, use_reentrant=False)
    torch.rand(3)  # the generator has moved on when the recomputation begins
    for a, b in zip(torch.autograd.grad(output.square().sum(), case), wanted, strict=True):
        assert torch.equal(a, b)


def test_bad_calls_of_the_operator_are_refused():
    case, nothing = draw(queries=3, keys=3, groups=4, dtype=torch.float32), [None] * 6
    for dropout, seed, line in (
        (0.5, None, "needs a seed"),
        (0.5, torch.zeros(1), "needs a seed"),
        (1.0, None, "below 1"),
    ):
        with pytest.raises(RuntimeError, match=line):
            torch.ops.sightline.forward(*case, *nothing, -1, -1, 1.0, 0.0, dropout, seed)
