"""The native CPU kernel against the definition, bit by bit against itself, and under what breaks such kernels."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import Case, draw, exactly

import sightline as sl
from sightline.attention import attention, choose, observe
from sightline.kernels import cpu
from sightline.masks import ALiBi, Allowed, Bias, Causal, Mask, Padding, Segments, Window
from sightline.observation import Observation

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING or "built")

FACTS = ("logsumexp", "entropy", "distance", "sink", "top_weights", "top_keys", "received")
TILE = 256
"""Keys a tile, as native/problem.h has it: the sizes of the tests stand around its multiples."""


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def native(case: Case, mask=None, **options) -> torch.Tensor:
    return attention(*case, mask, implementation="cpu", **options)


def saw(case: Case, mask=None, implementation="cpu", **options) -> Observation:
    return observe(*case, mask, implementation=implementation, **options)


def assert_within_budget(
    actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, *, most: float, mean: float
) -> None:
    """Largest and mean error at most so many times plain PyTorch's, and a rounding of the largest number."""
    rounding = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    ours, theirs = (actual.double() - exact).abs(), (plain.double() - exact).abs()
    assert ours.isfinite().all(), "not finite"
    assert ours.max() <= most * theirs.max() + 2 * rounding, f"largest {ours.max():.2e}, plain {theirs.max():.2e}"
    assert ours.mean() <= mean * theirs.mean() + rounding / 8, f"mean {ours.mean():.2e}, plain {theirs.mean():.2e}"


def test_the_budget_fails_where_it_must():
    exact = torch.ones(8, dtype=torch.float64)
    plain = exact.float() + 1e-6
    assert_within_budget(exact.float() + 1e-6, exact, plain, most=2, mean=1.5)
    with pytest.raises(AssertionError, match="largest"):
        assert_within_budget(exact.float() + 1e-5, exact, plain, most=2, mean=1.5)
    with pytest.raises(AssertionError, match="mean"):
        assert_within_budget(exact.float() + 1.9e-6, exact, plain, most=2, mean=1.5)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(exact.float() / 0, exact, plain, most=2, mean=1.5)


@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"),
    [
        (1, 1, 1, 1),
        (3, 2, 256, 1),
        (13, 15, 31, 17),
        (16, 17, 16, 192),
        (65, 63, 64, 64),
        (127, 64, 192, 128),
        (129, 257, 40, 80),
        (511, 513, 8, 256),
        (1023, 1025, 128, 96),
    ],
)
@pytest.mark.parametrize("mask", [Mask(), Causal(), Window(before=100, after=7)], ids=["all", "causal", "window"])
def test_float32_is_as_accurate_as_plain_torch(queries, keys, width, value_width, mask, instructions):
    sizes = {"queries": queries, "keys": keys, "width": width, "value_width": value_width}
    case = draw(**sizes, batch=1, heads=2, groups=1, dtype=torch.float32)
    exact, plain = exactly(case, mask), attention(*case, mask, implementation="reference")
    assert_within_budget(native(case, mask), exact, plain, most=2, mean=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 100])
def test_half_precision_is_as_accurate_as_sdpa(dtype, width, instructions):
    case = draw(queries=200, keys=300, width=width, value_width=width, groups=4, dtype=dtype)
    plain = F.scaled_dot_product_attention(*case)
    assert_within_budget(native(case), exactly(case), plain, most=1.5, mean=1.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_accurate_as_plain_torch(dtype, instructions):
    mask = Causal() & Window(before=150, after=None)
    case = draw(queries=190, keys=270, width=40, value_width=24, dtype=dtype)
    weight = torch.randn(2, 4, 190, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)

    def gradients(case: Case, implementation: Any) -> tuple[torch.Tensor, ...]:
        leaves = Case(*(t.requires_grad_() for t in case.to(case.query.dtype)))
        output = attention(*leaves, mask, implementation=implementation)
        return torch.autograd.grad((output * weight.to(output.dtype)).sum(), leaves)

    exact = gradients(case.to(torch.float64), "reference")
    plain = gradients(case, "reference")
    for ours, right, theirs in zip(gradients(case, "cpu"), exact, plain, strict=True):
        assert_within_budget(ours, right, theirs, most=2, mean=1.25)


@pytest.mark.parametrize("mask", [None, Causal()], ids=["all", "causal"])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"),
    [(1, 5, 3, 1), (13, 15, 1, 33), (113, 129, 33, 64), (225, 255, 64, 40), (301, 333, 100, 256), (130, 130, 256, 7)],
)
def test_half_precision_gradients_are_as_accurate_as_sdpa(queries, keys, width, value_width, mask, instructions):
    sizes = {"queries": queries, "keys": keys, "width": width, "value_width": value_width}
    case = draw(**sizes, dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 4, queries, value_width, generator=random, dtype=torch.float64).to(torch.bfloat16)
    seen = None if mask is None else torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (t.repeat_interleave(2, 1) for t in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)

    def gradients(call: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in case]
        return torch.autograd.grad(call(*leaves), leaves, weight.to(dtype))

    ours = gradients(lambda *leaves: native(Case(*leaves), mask), torch.bfloat16)
    exact, plain = gradients(sdpa, torch.float64), gradients(sdpa, torch.bfloat16)
    for gradient, right, theirs in zip(ours, exact, plain, strict=True):
        assert_within_budget(gradient, right, theirs, most=2, mean=1.25)


@st.composite
def calls(draw_):
    """Any mask and option on sizes around the edges of blocks."""
    some = draw_(st.sampled_from([1, 2, 15, 16, 17, 33]))
    queries = draw_(st.sampled_from([0, 1, some, 127]))
    keys = draw_(st.sampled_from([0, 1, some, 65, TILE - 1, TILE + 1, 5 * TILE + 3]))
    groups = draw_(st.sampled_from([1, 2]))
    heads = groups * draw_(st.sampled_from([1, 3]))
    sizes = {
        "batch": 2, "heads": heads, "groups": groups, "queries": queries, "keys": keys,
        "width": draw_(st.integers(1, 70)), "value_width": draw_(st.integers(1, 70)),
    }  # fmt: skip
    random = torch.Generator().manual_seed(draw_(st.integers(0, 99)))
    mask = Mask()
    if draw_(st.booleans()):
        mask &= Causal()
    if draw_(st.booleans()):
        mask &= Window(before=draw_(st.sampled_from([0, 5, 300])), after=draw_(st.sampled_from([None, 0, 20])))
    if draw_(st.booleans()):
        mask &= Padding(torch.randint(0, keys + 1, (2,), generator=random))
    if draw_(st.booleans()):
        shape = draw_(st.sampled_from([(queries, keys), (2, 1, 1, keys), (1, heads, queries, 1)]))
        mask &= Allowed(torch.rand(shape, generator=random) > 0.4)
    if draw_(st.booleans()):
        shape = draw_(
            st.sampled_from([(queries, keys), (2, heads, 1, keys), (2, 1, queries, keys), (heads, queries, 1)])
        )
        shape = (1, *shape) if len(shape) == 3 else shape
        mask &= Bias(
            torch.randn(shape, generator=random).masked_fill(torch.rand(shape, generator=random) < 0.1, -torch.inf)
        )
    if draw_(st.booleans()):
        mask &= ALiBi(heads)
    if queries <= keys and draw_(st.booleans()):
        numbers = torch.randint(-2, draw_(st.sampled_from([0, 3, 30])), (2, keys), generator=random)
        mask &= Segments(numbers.sort(-1).values if draw_(st.booleans()) else numbers)
    options: dict[str, Any] = {
        "softcap": draw_(st.sampled_from([None, 0.8, 30.0])),
        "sinks": draw_(st.sampled_from([None, torch.randn(heads, generator=random)])),
        "scale": draw_(st.sampled_from([None, 0.9])),
    }
    return draw(draw_(st.integers(0, 99)), **sizes, dtype=torch.float32), mask, options


@given(calls())
def test_every_mask_and_option_and_what_it_saw(call):
    case, mask, options = call
    top = 5
    seen = saw(case, mask, top=top, map_block=24, **options)
    assert torch.equal(native(case, mask, **options), seen.output)
    sinks = options["sinks"]
    exact = saw(
        case.to(torch.float64), mask, "reference", top=top + 1, map_block=24,
        **options | {"sinks": None if sinks is None else sinks.double()},
    )  # fmt: skip
    keys = case.key.shape[-2]
    bound = 3e-6 * (1 + 3 * (options["scale"] is not None))
    torch.testing.assert_close(seen.output.double(), exact.output, atol=5 * bound, rtol=1e-5)
    torch.testing.assert_close(seen.logsumexp.double(), exact.logsumexp, atol=2 * bound, rtol=1e-6)
    torch.testing.assert_close(seen.entropy.double(), exact.entropy, atol=5 * bound, rtol=1e-5)
    torch.testing.assert_close(seen.distance.double(), exact.distance, atol=bound * (1 + keys), rtol=1e-5)
    for name in ("sink", "received"):
        torch.testing.assert_close(getattr(seen, name).double(), getattr(exact, name), atol=3 * bound, rtol=2e-5)
    torch.testing.assert_close(seen.map.sum.double(), exact.map.sum, atol=3 * bound, rtol=2e-5)
    torch.testing.assert_close(seen.map.max.double(), exact.map.max, atol=bound, rtol=2e-5)
    torch.testing.assert_close(seen.top_weights.double(), exact.top_weights[..., :top], atol=bound, rtol=2e-5)
    # The keys are exact wherever neighbours in the order are further apart than rounding can bring them.
    weights = exact.top_weights.log()
    clear = (weights[..., :-1] - weights[..., 1:]).nan_to_num(nan=1.0, posinf=1.0) > 1e-4
    settled = clear & F.pad(clear[..., :-1], (1, 0), value=True)
    assert torch.equal(seen.top_keys[settled], exact.top_keys[..., :top][settled])


def gradients_of_all(call, dtype: torch.dtype, implementation: Any) -> list[torch.Tensor]:
    """Of the inputs and of what can be learned beside them, which stays in float32 at least."""
    case, mask, options = call
    leaves = [t.to(dtype).requires_grad_() for t in case]
    learned = {"bias": mask.bias, "slopes": mask.slopes, "sinks": options["sinks"]}
    wide = torch.promote_types(dtype, torch.float32)
    learned = {name: t.to(wide).requires_grad_() for name, t in learned.items() if t is not None}
    own = Mask(**(vars(mask) | {name: t for name, t in learned.items() if name != "sinks"}))
    output = attention(*leaves, own, implementation=implementation, **options | {"sinks": learned.get("sinks")})
    return list(torch.autograd.grad(output.square().sum(), [*leaves, *learned.values()]))


@given(calls())
def test_gradients_of_every_mask_and_option(call):
    ours, right = gradients_of_all(call, torch.float32, "cpu"), gradients_of_all(call, torch.float64, "reference")
    for gradient, exact in zip(ours, right, strict=True):
        atol = 1e-4 * (1 + float(exact.abs().sum() > 0))
        torch.testing.assert_close(gradient.double(), exact, atol=atol, rtol=2e-4)


@given(calls())
def test_half_precision_gradients_of_every_mask_and_option(call):
    case, *rest = call
    call = (case.to(torch.bfloat16), *rest)
    ours, right = gradients_of_all(call, torch.bfloat16, "cpu"), gradients_of_all(call, torch.float64, "reference")
    plain = gradients_of_all(call, torch.bfloat16, "reference")
    # What is learned beside the inputs is left out: it sums over all keys what the output's rounding puts into each.
    rounding = torch.finfo(torch.bfloat16).eps * max((float(t.abs().max()) for t in right[:3] if t.numel()), default=0)
    for gradient, exact, theirs in list(zip(ours, right, plain, strict=True))[:3]:
        if exact.numel():
            error, budget = (float((t.double() - exact).abs().max()) for t in (gradient, theirs))
            assert error <= 2 * (budget + rounding)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = {
    "a head": {"batch": 1, "heads": 1, "groups": 1, "queries": 300, "keys": 700},
    "groups": {"batch": 2, "heads": 4, "groups": 2, "queries": 91, "keys": 531},
    "decoding": {"batch": 2, "heads": 8, "groups": 2, "queries": 1, "keys": 6 * TILE + 9},
}


def everything(case: Case, mask=None) -> list[torch.Tensor]:
    """Output, facts and gradients of a call."""
    seen = saw(case, mask)
    leaves = [t.detach().requires_grad_() for t in case]
    gradients = torch.autograd.grad(native(Case(*leaves), mask).square().sum(), leaves)
    return [native(case, mask), *(getattr(seen, name) for name in FACTS), *seen.map, seen.output, *gradients]


def assert_same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for i, (one, other) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(one, other), f"tensor {i} differs"


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bits_do_not_depend_on_runs_threads_strides_or_company(shape, dtype, threads, instructions):
    case = draw(**shape, width=24, value_width=40, dtype=dtype)
    first = everything(case, Causal())
    for number in (1, 2, 3, 4):
        threads(number)
        assert_same_bits(everything(case, Causal()), first)
    assert_same_bits(everything(case, Causal()), first)
    # (batch length heads width) in memory, as layers have it.
    strided = Case(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in case))
    assert_same_bits(everything(strided, Causal()), first)
    scattered = Case(*(torch.stack([t, t], dim=-1)[..., 0] for t in case))
    assert scattered.key.stride(-1) != 1
    assert_same_bits(everything(scattered, Causal()), first)
    alone = everything(Case(*(t[:1] for t in case)), Causal())
    assert_same_bits(alone, [t[:1] for t in first])


@DTYPES
def test_heads_whose_gradients_do_not_fit_together_have_the_bits_of_each_alone(dtype, threads, instructions):
    case = draw(batch=2, heads=4, groups=4, queries=1100, keys=1030, width=64, value_width=40, dtype=dtype)
    slopes = torch.rand(4, generator=torch.Generator().manual_seed(1))

    def gradients(case: Case, slopes: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (*case, slopes)]
        output = native(Case(*leaves[:3]), Mask(slopes=leaves[3]) & Causal())
        return list(torch.autograd.grad(output.square().sum(), leaves))

    for number in (1, 3):
        threads(number)
        *together, to_slopes = gradients(case, slopes)
        apart = torch.zeros(4)
        for batch in range(2):
            for head in range(4):
                one = Case(*(t[batch : batch + 1, head : head + 1] for t in case))
                *alone, to_slope = gradients(one, slopes[head : head + 1])
                assert_same_bits([t[batch : batch + 1, head : head + 1] for t in together], alone)
                apart[head] += to_slope[0]
        torch.testing.assert_close(to_slopes, apart)


def texts(keys: int, *, scattered: bool) -> torch.Tensor:
    """Numbers of segments (2 keys): texts of some hundred keys in another order in each row, or of single keys."""
    cuts = torch.tensor([[7, 290, 300, 611], [120, 121, 512, 700]])
    packed = (torch.arange(keys)[None, :, None] >= cuts[:, None]).sum(-1) * torch.tensor([[1], [-3]])
    return packed if not scattered else packed * (torch.arange(keys) % 3 > 0)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_segments_have_the_bits_of_the_same_mask_written_out(shape, scattered, instructions, threads):
    case = draw(**shape | {"batch": 2}, width=24, value_width=40, dtype=torch.float32)
    queries, keys = shape["queries"], shape["keys"]
    mask = Segments(texts(keys, scattered=scattered)) & Causal()
    allowed = mask.dense(queries, keys).allowed
    assert allowed is not None
    written_out = everything(case, Allowed(allowed) & Causal())
    for number in (1, 3):
        threads(number)
        assert_same_bits(everything(case, mask), written_out)


@pytest.mark.parametrize("scattered", [False, True])
def test_what_stands_in_other_segments_is_not_met(scattered, instructions):
    length = 4 * TILE
    case = draw(queries=length, keys=length, dtype=torch.float32)
    numbers = (torch.arange(length) >= 2 * TILE).long()
    numbers[5] = scattered  # makes the second segment's span begin in the first
    mask = Segments(numbers.expand(2, -1)) & Causal()
    clean, own = everything(case, mask), slice(6, 2 * TILE)
    for t in (case.key, case.value):
        t[:, :, 2 * TILE + 32 :] = torch.nan  # the rows of a register tile may stand in both segments
    leaves = [t.requires_grad_() for t in case]
    output = native(Case(*leaves), mask)
    gradients = torch.autograd.grad(output[:, :, own].square().sum(), leaves)
    assert torch.equal(output[:, :, own], clean[0][:, :, own])
    for gradient in gradients[: 1 if scattered else 3]:  # scattered, a row of NaN reaches keys of another segment
        assert gradient[:, :, own].isfinite().all() and (gradient[:, :, own] != 0).any()


def test_packed_texts_are_each_alone(instructions):
    lengths = (300, 1, 45, 700)
    case = draw(queries=sum(lengths), keys=sum(lengths), batch=1, width=24, dtype=torch.float32)
    numbers = torch.repeat_interleave(torch.tensor([3, 9, -1, 3 + 2**40]), torch.tensor(lengths))[None]
    packed = saw(case, Segments(numbers) & Causal())
    alone = [saw(Case(*part), Causal()) for part in zip(*(t.split(lengths, dim=2) for t in case), strict=True)]
    for fact in ("output", "logsumexp", "entropy", "distance", "received", "top_weights"):
        apart = torch.cat([getattr(seen, fact) for seen in alone], dim=-1 if fact in (*FACTS[:3], "received") else 2)
        torch.testing.assert_close(getattr(packed, fact), apart, rtol=2e-5, atol=2e-5)


def test_seeing_changes_no_bit():
    for shape in SHAPES.values():
        case = draw(**shape, width=24, value_width=40, dtype=torch.float32)
        for options in ({}, {"received": False, "map_block": 0}, {"map_block": 1000}, {"top": 0}, {"top": 40}):
            assert torch.equal(saw(case, Causal(), **options).output, native(case, Causal()))


@DTYPES
def test_what_lies_around_the_buffers_is_never_read(dtype, instructions):
    def poisoned(t: torch.Tensor) -> torch.Tensor:
        room = torch.full((t.shape[0], t.shape[1], t.shape[2] + 2, t.shape[3] + 40), torch.nan, dtype=t.dtype)
        room[:, :, 1:-1, 20 : 20 + t.shape[3]] = t
        return room[:, :, 1:-1, 20 : 20 + t.shape[3]]

    case = draw(queries=37, keys=291, width=19, value_width=21, dtype=dtype)
    bias, allowed = torch.randn(1, 1, 37, 291), torch.rand(1, 1, 37, 291) > 0.3
    mask = Bias(bias) & Allowed(allowed)
    everywhere = Bias(poisoned(bias)) & Allowed(allowed)
    assert_same_bits(everything(Case(*map(poisoned, case)), everywhere), everything(case, mask))


@DTYPES
def test_padding_may_hold_nan(dtype, instructions):
    case = draw(queries=40, keys=300, dtype=dtype)
    mask = Padding([271, 3])
    dirty = Case(case.query, case.key.clone(), case.value.clone())
    for t in (dirty.key, dirty.value):
        t[0, :, 271:], t[1, :, 3:] = torch.nan, torch.nan
    for clean, other in zip(everything(case, mask), everything(dirty, mask), strict=True):
        assert torch.equal(clean, other)


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (300, 300), (70, 600), (257, 514), (3, 1100)])
def test_a_future_key_changes_no_bit(queries, keys, instructions):
    case = draw(queries=queries, keys=keys, width=16, dtype=torch.float32)
    seen = saw(case, Causal())
    for row in (0, queries // 2, queries - 2):
        future = keys - queries + row + 1
        other = Case(case.query, case.key.clone(), case.value.clone())
        other.key[:, :, future:] += 50
        other.value[:, :, future:] += 1e3
        changed = saw(other, Causal())
        for fact in ("output", *FACTS[:-1]):
            assert torch.equal(getattr(changed, fact)[:, :, : row + 1], getattr(seen, fact)[:, :, : row + 1]), fact
        assert not torch.equal(changed.output, seen.output)


@pytest.mark.parametrize("hides", [Allowed, Bias])
def test_hundreds_of_hidden_keys_before_the_first_seen(hides, instructions):
    case = Case(*(t.requires_grad_() for t in draw(queries=20, keys=900, dtype=torch.float32)))
    first = 2 * TILE + 90
    allowed = (torch.arange(900) >= first).expand(20, 900)
    mask = hides(allowed if hides is Allowed else torch.zeros(20, 900).masked_fill(~allowed, -torch.inf))
    output = native(case, mask)
    torch.testing.assert_close(output, native(Case(case.query, case.key[:, :, first:], case.value[:, :, first:])))
    to_query, *to_rest = torch.autograd.grad(output.square().sum(), case)
    assert to_query.isfinite().all()
    for gradient in to_rest:
        assert gradient.isfinite().all() and (gradient[:, :, :first] == 0).all()


def test_a_hidden_key_never_wins_over_very_low_scores(instructions):
    case = draw(queries=9, keys=700, dtype=torch.float32)
    seen_keys = (torch.arange(700) >= 650) & (torch.arange(700) < 660)
    mask = Bias(torch.full((9, 700), -1e30)) & Allowed(seen_keys.expand(9, 700))
    seen = saw(case, mask, top=10)
    mean = case.value[:, :, 650:660].mean(2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(seen.output, mean[:, :, None].expand_as(seen.output), atol=1e-6, rtol=1e-5)
    assert torch.equal(seen.top_keys, torch.arange(650, 660).expand(2, 4, 9, 10))
    assert (seen.received[..., ~seen_keys] == 0).all() and (seen.logsumexp < -1e29).all()


@DTYPES
@pytest.mark.parametrize("queries", [1, 20])
def test_the_least_number_in_place_of_minus_infinity_hides(queries, dtype, instructions):
    case = draw(queries=queries, keys=900, dtype=dtype)
    first = 2 * TILE + 30  # two tiles and more hold nothing else
    bias = torch.zeros(queries, 900)
    bias[:, :first] = torch.finfo(dtype).min
    seen = saw(case, Bias(bias), top=3)
    rest = saw(Case(case.query, case.key[:, :, first:], case.value[:, :, first:]), top=3)
    torch.testing.assert_close(seen.output, rest.output, atol=2 * torch.finfo(dtype).eps, rtol=0)
    torch.testing.assert_close(seen.top_weights, rest.top_weights, atol=1e-5, rtol=1e-4)
    assert torch.equal(seen.top_keys, rest.top_keys + first)


@DTYPES
@pytest.mark.parametrize("bias", [-1e30, -1e10, 1e10])
def test_scores_that_a_bias_makes_all_alike(bias, dtype, instructions):
    case = draw(queries=20, keys=600, dtype=dtype)
    seen = saw(case, Bias(torch.full((20, 600), bias)))
    exact = torch.full_like(seen.top_weights, 1 / 600)
    torch.testing.assert_close(seen.top_weights, exact, atol=0, rtol=1e-5)
    torch.testing.assert_close(seen.entropy, torch.full_like(seen.entropy, math.log(600)), atol=0, rtol=1e-5)


@DTYPES
@pytest.mark.parametrize("bias", [0.0, -1e4, 1e6])
def test_the_weight_of_an_only_key_is_one(bias, dtype, instructions):
    case = draw(queries=300, keys=300, dtype=dtype)
    mask = Allowed(torch.eye(300, dtype=torch.bool)) & Bias(torch.full((300, 300), bias))
    torch.testing.assert_close(saw(case, mask, top=1).top_weights, torch.ones(2, 4, 300, 1), atol=2e-6, rtol=0)


@DTYPES
def test_what_an_earlier_call_left_behind_changes_nothing(dtype, instructions):
    case, mask = draw(queries=37, keys=291, dtype=dtype), Causal() & Padding([291, 101])
    first = everything(case, mask)
    sizes = draw(queries=90, keys=2000, width=64, dtype=dtype)
    dirty = Case(*(torch.full_like(t, torch.nan).requires_grad_() for t in sizes))
    native(dirty).sum().backward()
    with pytest.raises(ValueError, match="NaN"):
        saw(dirty)
    assert_same_bits(everything(case, mask), first)


def test_top_keys_are_exact_where_scores_are(instructions):
    random = torch.Generator().manual_seed(5)
    sizes = {"queries": (2, 4, 50, 6), "keys": (2, 2, 800, 6)}
    query, key = (torch.randint(-3, 4, shape, generator=random).float() for shape in sizes.values())
    scores = torch.einsum("bhqw,bhkw->bhqk", query, key.repeat_interleave(2, dim=1)).masked_fill(
        torch.ones(50, 800, dtype=torch.bool).triu(751), -torch.inf
    )
    order = scores.argsort(dim=-1, descending=True, stable=True)  # small whole numbers: hundreds of ties
    for top in (1, 8, 16, 40):
        seen = saw(Case(query, key, key), Causal(), scale=1.0, top=top)
        assert torch.equal(seen.top_keys, order[..., :top])


def test_top_keys_are_exact_where_scores_are_four_ulps_apart(instructions):
    order = torch.randperm(900, generator=torch.Generator().manual_seed(6))
    key = 1 + 4 * torch.finfo(torch.float32).eps * order.float()
    case = Case(torch.ones(1, 1, 1, 1), key.view(1, 1, -1, 1), key.view(1, 1, -1, 1))
    falling = order.argsort(descending=True)
    for queries in (1, 20):  # few rows are read where they lie, more in panels
        for top in (8, 30):
            seen = saw(Case(case.query.expand(1, 1, queries, 1), *case[1:]), scale=1.0, top=top)
            assert torch.equal(seen.top_keys[0, 0], falling[:top].expand(queries, top))


def test_large_scores_keep_their_facts():
    case = draw(queries=50, keys=600, width=32, dtype=torch.float32)
    big = Case(case.query * 1e4, case.key, case.value)
    seen, exact = saw(big, Causal()), saw(big.to(torch.float64), Causal(), "reference")
    assert seen.output.isfinite().all()
    for name in ("logsumexp", "entropy", "sink", "top_weights"):
        torch.testing.assert_close(getattr(seen, name).double(), getattr(exact, name), atol=2e-2, rtol=1e-6)
    torch.testing.assert_close(seen.received.sum(-1), torch.full((2, 4), 50.0), atol=1e-3, rtol=0)


def test_conservation():
    case = draw(queries=333, keys=777, width=16, dtype=torch.float32)
    mask = Causal() & Padding([777, 500])
    seen = saw(case, mask, map_block=50)
    live = (seen.logsumexp > -math.inf).sum(-1).float()
    torch.testing.assert_close(seen.received.sum(-1), live, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(seen.map.sum.sum((-1, -2)), live, rtol=1e-6, atol=1e-3)
    by_block = F.pad(seen.received, (0, -777 % 50)).unflatten(-1, (-1, 50)).sum(-1)
    torch.testing.assert_close(seen.map.sum.sum(-2), by_block, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Causal(),
        Window(before=300, after=0),  # blocks see other tiles than the blocks before them
        Causal() & Segments(torch.arange(1500).expand(1, -1) // 420),
        Allowed((torch.arange(1200)[:, None] + torch.arange(1500)) // 700 % 2 == 0),  # tiles that a block passes over
    ],
    ids=["all", "causal", "window", "segments", "allowed"],
)
@pytest.mark.parametrize("map_block", [0, 70, 500])  # many bands, bands of several blocks
def test_blocks_that_follow_in_one_strip(mask, map_block, instructions, threads):
    case = draw(batch=1, heads=1, groups=1, queries=1200, keys=1500, width=8, value_width=8, dtype=torch.float32)
    exact = saw(case.to(torch.float64), mask, "reference", map_block=map_block)
    bits = []
    for number in (1, 3):
        threads(number)
        seen = saw(case, mask, map_block=map_block)
        torch.testing.assert_close(seen.received.double(), exact.received, atol=1e-5, rtol=2e-5)
        if map_block:
            torch.testing.assert_close(seen.map.sum.double(), exact.map.sum, atol=1e-5, rtol=2e-5)
            torch.testing.assert_close(seen.map.max.double(), exact.map.max, atol=3e-6, rtol=2e-5)
        bits.append([seen.output, seen.received, *(seen.map if map_block else ())])
    assert_same_bits(*bits)
    assert torch.equal(bits[0][0], native(case, mask))


def test_ties_go_to_the_lowest_key(instructions):
    case = Case(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 600, 4), torch.randn(1, 1, 600, 4))
    for top in (1, 8, 20):
        assert torch.equal(saw(case, top=top).top_keys[0, 0], torch.arange(top).expand(3, top))


def test_empty_rows_and_no_keys():
    case = draw(queries=5, keys=3, dtype=torch.float32)  # the first two queries stand before all keys
    seen = saw(case, Causal())
    assert (seen.output[:, :, :2] == 0).all() and (seen.logsumexp[:, :, :2] == -math.inf).all()
    assert (seen.top_keys[:, :, :2] == -1).all() and (seen.entropy[:, :, :2] == 0).all()
    hidden = saw(case, Bias(torch.full((5, 3), -torch.inf)))
    assert (hidden.output == 0).all() and (hidden.received == 0).all()
    nothing = saw(draw(queries=5, keys=0, dtype=torch.float32))
    assert nothing.output.shape == (2, 4, 5, 5) and (nothing.output == 0).all()


def test_nan_is_not_swallowed():
    for place in ("query", "key", "value"):
        case = draw(queries=20, keys=300, dtype=torch.float32)
        getattr(case, place)[1, 0, 7, 2] = torch.nan
        assert native(case).isnan().any(), place
    with pytest.raises(ValueError, match="NaN"):
        case = draw(queries=20, keys=300, dtype=torch.float32)
        case.query[0, 1, 3, 0] = torch.nan
        saw(case)


def test_subnormal_weights_cost_no_precision_elsewhere(instructions):
    case = Case(
        torch.tensor([[[[1.0]]]]), torch.tensor([0.0, -80.0, -95.0, -1e30]).view(1, 1, 4, 1), torch.eye(4)[None, None]
    )
    weights = native(case, scale=1.0)[0, 0, 0]
    torch.testing.assert_close(weights[:2], torch.tensor([1.0, math.exp(-80)]), rtol=3e-6, atol=0)
    assert weights[2] < 1e-38 and weights[3] == 0


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    case = draw(queries=20, keys=30, width=8, value_width=8, dtype=torch.float32)
    masks = (
        torch.tensor([30, 4]),
        torch.arange(50).expand(2, 50) // 9 % 2,
        torch.rand(1, 1, 20, 30) > 0.2,
        torch.randn(2, 1, 1, 30),
        torch.ones(4),
        torch.zeros(4),
    )
    arguments = (*case, *masks, -1, 0, 0.3, 0.0)
    if not grad:
        torch.library.opcheck(torch.ops.sightline.forward.default, arguments)
        torch.library.opcheck(torch.ops.sightline.forward.default, (*arguments, 0.2, torch.tensor(7)))
        torch.library.opcheck(torch.ops.sightline.observe.default, (*arguments, 3, True, 8, 2))
        window = (*case[:2], torch.zeros(2, 4, 20), *masks[:5], -1, 0, 0.3, 0.0, 10, 8)
        torch.library.opcheck(torch.ops.sightline.pool.default, window)
        return
    output, logsumexp = torch.ops.sightline.forward(*arguments)
    torch.library.opcheck(torch.ops.sightline.backward.default, (output, output, logsumexp, *arguments, True, True))
    dropping = (*arguments, True, True, 0.2, torch.tensor(7))
    torch.library.opcheck(torch.ops.sightline.backward.default, (output, output, logsumexp, *dropping))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch's tracer does
@pytest.mark.parametrize("implementation", ["cpu", "auto"])
def test_compiles_whole_with_its_gradient(implementation):
    case, mask = draw(queries=20, keys=20, dtype=torch.float32), Window(before=9, after=0)

    def step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        once = attention(query, key, value, mask, implementation=implementation)
        return once.sum() + attention(query, key, value, implementation=implementation).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        leaves = [t.clone().requires_grad_() for t in case]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attention(x, x, x, Causal(), implementation="cpu")

    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(torch.export.export(Module(), (x,)).module()(x), Module()(x))


def test_autocast():
    case = draw(queries=20, keys=20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = native(case)
    assert torch.equal(output, native(case.to(torch.bfloat16)))


def test_auto_takes_it_where_it_can():
    case = draw(dtype=torch.float32, queries=600, keys=1200, width=16)
    assert choose(*case, Mask()).implementation == "cpu"
    assert choose(*draw(dtype=torch.float32), Mask()).implementation == "sdpa"
    assert choose(*draw(dtype=torch.float32), Mask(), softcap=1.0).implementation == "cpu"
    assert choose(*draw(dtype=torch.bfloat16), Mask()).implementation == "cpu"
    assert "native kernel" in choose(*case, Mask(), observing=True).reason
    assert choose(*case.to(torch.float64), Mask()).implementation != "cpu"
    assert choose(*draw(dtype=torch.float32), Mask(), dropout=0.5).implementation == "cpu"
    assert choose(*case, Bias(torch.zeros(7, 11, requires_grad=True))).implementation == "cpu"


def test_asking_for_what_it_has_not_is_an_error():
    with pytest.raises(ValueError, match="float64"):
        attention(*draw(dtype=torch.float64), implementation="cpu")


def test_without_the_library_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(cpu, "MISSING", f"the native kernel is not built; {cpu.HOW_TO_GET_IT}")
    case = draw(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"python -m sightline\.kernels\.build"):
        native(case)
    assert sl.attention(*case).shape == (2, 4, 7, 5)


def test_unknown_instructions_are_an_error():
    with pytest.raises(ValueError, match="instructions must be one of"):
        cpu.use_instructions("sparc")


@pytest.mark.slow
def test_a_hundred_runs_have_the_same_bits():
    case = draw(batch=3, queries=97, keys=1025, width=33, dtype=torch.float32)
    first = everything(case, Causal())
    for _ in range(100):
        assert_same_bits(everything(case, Causal()), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 3, 4])
@pytest.mark.parametrize("keys", [1, 30, 257, 1500])
@pytest.mark.parametrize(("width", "value_width"), [(64, 96), (16, 16)])
def test_few_rows_read_keys_and_values_where_they_lie(dtype, queries, keys, width, value_width, instructions):
    case = draw(queries=queries, keys=keys, width=width, value_width=value_width, dtype=dtype)
    strided = Case(case.query, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in case[1:]))
    bias = torch.randn(1, 4, queries, keys, generator=torch.Generator().manual_seed(1))
    for mask in (Mask(), Window(before=200, after=0) & ALiBi(4), Padding(torch.tensor([keys, keys // 2])) & Bias(bias)):
        exact, plain = exactly(case, mask), attention(*case, mask, implementation="reference")
        found = saw(case, mask)
        assert_within_budget(found.output, exact, plain, most=2, mean=1.5)
        assert torch.equal(found.output, native(strided, mask))
        right = saw(case.to(torch.float64), mask, "reference")
        for name in FACTS:
            expected = getattr(right, name)
            torch.testing.assert_close(
                getattr(found, name), expected.to(getattr(found, name).dtype), rtol=2e-5, atol=2e-5
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 1, 6, 7, 40])
def test_few_rows_meet_no_key_beside_their_window(dtype, before, instructions):
    case = draw(queries=1, keys=301, width=16, value_width=48, dtype=dtype)
    first = 300 - before
    alone = native(Case(case.query, case.key[:, :, first:], case.value[:, :, first:]))
    for tensor in (case.key, case.value):
        tensor[:, :, :first] = torch.nan
    exact = exactly(Case(case.query, case.key[:, :, first:], case.value[:, :, first:]), Mask())
    output = native(case, Window(before=before, after=0))
    assert_within_budget(output, exact, alone, most=2, mean=1.5)


def test_seeing_carries_the_same_gradient_from_one_forward():
    case = [t.requires_grad_() for t in draw(queries=40, keys=300, dtype=torch.float32)]
    bias = torch.zeros(4, 40, 300)[None].requires_grad_()
    seen = saw(Case(*case), Bias(bias) & Causal())
    assert not any(getattr(seen, fact).requires_grad for fact in FACTS)
    leaves = [*case, bias]
    got = torch.autograd.grad(seen.output.square().sum(), leaves)
    want = torch.autograd.grad(native(Case(*case), Bias(bias) & Causal()).square().sum(), leaves)
    assert_same_bits(list(got), list(want))
