"""observe(): every fact against its formula on the dense float64 weights, the laws, and what was switched off."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import Case, draw
from test_attention import MASKS, OPTIONS

from sightline.attention import attention, observe
from sightline.kernels import cpu
from sightline.masks import ALiBi, Allowed, Bias, Causal, Mask, Padding, Segments, Window

FACTS = ("output", "logsumexp", "entropy", "distance", "sink", "top_weights", "received")


def dense(case: Case, mask=None, **options) -> torch.Tensor:
    """All weights in float64, read off the op itself: attention with the unit vectors as values."""
    q, k, _ = case.to(torch.float64)
    units = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:3], -1)
    return attention(q, k, units, mask, implementation="reference", **options)


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_facts_equal_their_formulas(name, mask, options):
    case = draw()
    weights = dense(case, mask, **options)
    seen = observe(*case, mask, top=3, map_block=4, sink_keys=2, implementation=name, **options)
    distance = (torch.arange(7)[:, None] + 4 - torch.arange(11)).abs()
    close = torch.testing.assert_close
    close(seen.output, attention(*case, mask, implementation="reference", **options))
    close(seen.entropy, torch.special.entr(weights).sum(-1))
    close(seen.distance, (weights * distance).sum(-1))
    close(seen.sink, weights[..., :2].sum(-1))
    close(seen.received, weights.sum(-2))
    close(seen.top_weights, weights.sort(-1, descending=True).values[..., :3])
    found = seen.top_keys.clamp(min=0)
    close(weights.gather(-1, found).masked_fill(seen.top_keys < 0, 0), seen.top_weights)
    padded = torch.nn.functional.pad(weights, (0, 1, 0, 1)).view(2, 4, 2, 4, 3, 4)
    close(seen.map.sum, padded.sum((3, 5)))
    close(seen.map.max, padded.amax((3, 5)))
    close(seen.weights(), weights)
    close(seen.weights(queries=slice(2, 5), keys=slice(3, None)), weights[:, :, 2:5, 3:])
    if "sinks" not in options:
        close(seen.logsumexp.exp(), _partition(case, mask, **options))


def _partition(case, mask, scale=None, softcap=None):
    """exp(logsumexp) by its own definition, from scores read off one-key calls: weight = exp(score) / partition."""
    q, k, _ = case
    scores = (q @ k.repeat_interleave(2, 1).transpose(-2, -1)) * (scale or 8**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        allowed, bias = mask.dense(7, 11, dtype=torch.float64)
        scores = scores if bias is None else scores + bias
        scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    return scores.exp().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_facts_of_lower_precision_are_float32_facts_of_the_rounded_inputs(dtype, mask):
    case = draw(dtype=dtype)
    exact = observe(*case.to(torch.float64), mask, map_block=4, implementation="reference")
    seen = observe(*case, mask, map_block=4, implementation="tiled")
    assert seen.output.dtype == dtype
    for fact in FACTS[1:]:
        assert getattr(seen, fact).dtype == torch.float32
        torch.testing.assert_close(getattr(seen, fact).double(), getattr(exact, fact), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen.top_keys, exact.top_keys)


lengths = st.integers(1, 9)


@given(st.integers(0, 99), lengths, lengths, st.integers(1, 5), st.sampled_from(["reference", "tiled"]))
def test_laws_of_received_and_map(seed, queries, keys, block, name):
    seen = observe(*draw(seed, queries=queries, keys=keys), Causal(), map_block=block, implementation=name)
    live = min(queries, keys)
    total = seen.received.sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, live))
    torch.testing.assert_close(seen.map.sum.sum((-2, -1)), total)
    torch.testing.assert_close(seen.weights().sum(-1)[:, :, queries - live :], torch.ones(2, 4, live).double())
    assert (seen.map.max <= seen.map.sum + 1e-12).all()


@given(st.integers(0, 99), st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 5))
def test_law_ties_go_to_the_lowest_key(seed, levels, top):
    key = torch.tensor(levels, dtype=torch.float64)[None, :, None]
    query = torch.ones(1, 1, 1, dtype=torch.float64)
    order = sorted(range(len(levels)), key=lambda i: (-levels[i], i))[:top]
    expected = order + [-1] * (top - len(order))
    for name in ("reference", "tiled"):
        assert observe(query, key, key, top=top, implementation=name).top_keys.flatten().tolist() == expected


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_an_empty_row_is_all_zeros(name):
    seen = observe(*draw(), Padding([11, 0]), implementation=name)
    assert (seen.logsumexp[1] == -torch.inf).all()
    assert (seen.top_keys[1] == -1).all()
    for fact in ("output", "entropy", "distance", "sink", "top_weights", "received"):
        assert (getattr(seen, fact)[1] == 0).all()
    assert (seen.map.sum[1] == 0).all()
    assert (seen.weights()[1] == 0).all()


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_entropy_does_not_cancel_when_scores_are_large(name):
    # Two keys alike at a score of 20,000, the third far below: log 2, although each score is 10^4 times it.
    q = torch.full((1, 1, 1), 100.0)
    k = torch.tensor([[[200.0], [200.0], [0.0]]])
    assert observe(q, k, k, implementation=name).entropy.item() == pytest.approx(math.log(2), abs=2e-3)


@pytest.mark.parametrize("block", [1, 3, 64, 200])
def test_small_strips_give_the_same_facts(monkeypatch, block):
    from sightline.kernels import tiled

    case, mask = draw(queries=150, keys=161), Window(before=70, after=5)
    whole = observe(*case, mask, map_block=block, implementation="reference")
    monkeypatch.setattr(tiled, "STRIP_SCORES", 8 * 161 * 7)
    seen = observe(*case, mask, map_block=block, implementation="tiled")
    for fact in FACTS:
        torch.testing.assert_close(getattr(seen, fact), getattr(whole, fact))
    assert torch.equal(seen.top_keys, whole.top_keys)
    torch.testing.assert_close(seen.map, whole.map)


def test_one_head_comes_back_without_its_axis():
    q, k, v = (t[:, 0] for t in draw(groups=4))
    seen = observe(q, k, v, Allowed(torch.rand(2, 7, 11) > 0.3), top=2, map_block=4)
    assert seen.output.shape == (2, 7, 5)
    assert seen.entropy.shape == (2, 7)
    assert seen.top_keys.shape == (2, 7, 2)
    assert seen.received.shape == (2, 11)
    assert seen.map.sum.shape == (2, 2, 3)
    assert seen.weights(queries=slice(1, 3)).shape == (2, 2, 11)


def test_the_output_carries_the_gradient_of_attention_and_facts_none():
    case = [t.requires_grad_() for t in draw()]
    seen = observe(*case, Causal())
    assert not seen.entropy.requires_grad
    assert not seen.weights().requires_grad
    got = torch.autograd.grad((seen.output**2).sum(), case)
    want = torch.autograd.grad((attention(*case, Causal()) ** 2).sum(), case)
    torch.testing.assert_close(got, want)


def test_a_fact_that_was_switched_off_says_how_to_switch_it_on():
    seen = observe(*draw(), top=0, received=False, map_block=0)
    for fact, option in (("top_weights", "top=8"), ("received", "received=True"), ("map", "map_block=64")):
        with pytest.raises(ValueError, match=f"switched off; call observe\\(..., {option}\\)"):
            getattr(seen, fact)


def test_a_matrix_beyond_the_limit_says_its_size_and_the_way_out():
    x = torch.zeros(1, 8, 32768, 1)
    seen = observe(x[:, :, :1], x, x, top=0, received=False, map_block=0)
    with pytest.raises(
        ValueError, match=r"1 x 8 x 1 x 32768 weights take 1 MB, more than .* 1,000 bytes; ask for a window"
    ):
        seen.weights(limit_bytes=1000)
    assert seen.weights(keys=slice(5, 9)).shape == (1, 8, 1, 4)
    with pytest.raises(ValueError, match="keys must be a slice without a step"):
        seen.weights(keys=slice(0, 9, 2))


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize("place", ["query", "key", "bias"])
def test_nan_is_named(name, place):
    case, bias = draw(groups=4), torch.zeros(2, 4, 7, 11)
    spoiled = {"query": case.query, "key": case.key, "bias": bias}[place]
    spoiled[1, 2, 3] = torch.nan
    where = "query 0" if place == "key" else "query 3"
    with pytest.raises(ValueError, match=rf"the scores of {where} \(sequence 1, head 2\) are NaN"):
        observe(*case, Bias(bias), implementation=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": -1}, "top must be 0 or more, got -1"),
        ({"map_block": -2}, "map_block must be 0 or more, got -2"),
        ({"map_block": None}, "map_block must be 0 or more, got None; 0 switches it off"),
        ({"implementation": "sdpa"}, "'sdpa' cannot observe"),
    ],
)
def test_bad_options_say_why(options, message):
    with pytest.raises(ValueError, match=message):
        observe(*draw(), **options)


def test_more_top_keys_than_keys_are_filled_with_none():
    seen = observe(*draw(keys=2), top=4)
    assert (seen.top_keys[..., 2:] == -1).all()
    assert (seen.top_weights[..., 2:] == 0).all()


@pytest.mark.parametrize("name", ["reference", "tiled"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_nothing_to_see(name, queries, keys):
    seen = observe(*draw(queries=queries, keys=keys), implementation=name)
    assert seen.entropy.shape == (2, 4, queries)
    assert seen.received.shape == (2, 4, keys)
    assert (seen.received == 0).all()


@pytest.mark.parametrize("implementation", ["native", "strips"])
@given(
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 90)),
    block=st.integers(1, 40),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    mask=st.sampled_from(
        [
            Mask(),
            Causal(),
            Window(before=20, after=3) & ALiBi(4),
            Padding([40, 1]),
            Bias(torch.linspace(-3, 3, 90)[None]) & Causal(),
            Segments(torch.arange(90)[None].expand(2, -1) // 20) & Causal(),
        ]
    ),
    softcap=st.sampled_from([None, 2.0]),
)
def test_pooled_windows_are_pooled_weights(implementation, lengths, block, corners, mask, softcap):
    if implementation == "native" and cpu.MISSING:
        pytest.skip(cpu.MISSING)
    queries, keys = lengths
    if mask.bias is not None:
        mask = Mask(**(vars(mask) | {"bias": mask.bias[:, :keys]}))
    if mask.segments is not None:
        mask, queries = Mask(**(vars(mask) | {"segments": mask.segments[:, :keys]})), min(queries, keys)
    case = draw(queries=queries, keys=keys)
    rows = slice(*sorted(round(corner * queries) for corner in corners[:2]))
    columns = slice(*sorted(round(corner * keys) for corner in corners[2:]))
    weights = observe(*case, mask, softcap=softcap, implementation="reference").weights(queries=rows, keys=columns)
    padded = F.pad(weights, (0, -weights.shape[-1] % block, 0, -weights.shape[-2] % block))
    squares = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    dtype = torch.float32 if implementation == "native" else torch.float64
    seen = observe(*case.to(dtype), mask, softcap=softcap, implementation="reference")
    found = seen.pooled(queries=rows, keys=columns, block=block)
    torch.testing.assert_close(found.sum.double(), squares.sum((-1, -3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.max.double(), squares.amax((-1, -3)), rtol=1e-5, atol=1e-6)


def test_pooling_by_nothing_is_an_error():
    seen = observe(*draw(), implementation="reference")
    with pytest.raises(ValueError, match="block must be 1 or more, got 0"):
        seen.pooled(block=0)


def test_one_row_is_a_slice_too():
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"queries must be a slice, got 2: one of them is slice\(i, i \+ 1\)"):
        observe(x, x, x).weights(queries=2)  # type: ignore[arg-type]
