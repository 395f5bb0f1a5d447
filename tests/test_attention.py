"""attention(): the numbers of the definition, every implementation against the reference, the laws, the errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import Case, assert_as_accurate, draw, exactly

from sightline.attention import attention, choose
from sightline.kernels import cpu
from sightline.masks import ALiBi, Allowed, Bias, Causal, Mask, Padding, Segments, Window
from sightline.shapes import ShapeError

MASKS = {
    "none": None,
    "causal": Causal(),
    "window": Window(before=3, after=1),
    "causal window": Causal() & Window(before=2, after=None),
    "padding with an empty sequence": Padding([4, 0]),
    "causal padding": Causal() & Padding([11, 5]),
    "allowed": Allowed(torch.rand(7, 11, generator=torch.Generator().manual_seed(1)) > 0.5),
    "allowed a key": Allowed(torch.arange(11)[None, None, None] % 3 > 0),
    "bias": Bias(torch.randn(2, 1, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(2))),
    "bias of -inf": Bias(torch.zeros(7, 11).masked_fill(torch.arange(11) < 4, -torch.inf)),
    "alibi": ALiBi(4) & Causal(),
    "segments": Segments(torch.tensor([[0] * 6 + [1] * 5, [3] * 9 + [2] * 2])) & Causal(),
}
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


def test_the_worked_example():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 4) for _ in range(3))
    expected = torch.tensor(
        [
            [
                [0.2957, 0.3332, 0.0674, 0.2081],
                [0.2628, 0.4036, 0.0423, 0.2148],
                [0.3083, 0.4486, 0.2576, 0.2905],
            ],
            [
                [-0.1859, -0.8284, -0.5916, -1.0532],
                [-0.1266, -0.8076, -0.5838, -1.1651],
                [0.1222, -0.4625, -0.4709, -0.1724],
            ],
        ]
    )
    hidden = torch.tensor(
        [
            [-0.5912, -1.0937, -0.6829, -0.9884],
            [-0.6886, -1.1866, -0.7139, -1.1376],
            [0.0322, -0.4995, -0.4843, -0.0339],
        ]
    )
    may = torch.tensor([[[True, True, True]], [[True, True, False]]])
    for name in ("reference", "tiled", "sdpa", "auto"):
        torch.testing.assert_close(attention(q, k, v, implementation=name), expected, atol=5.1e-5, rtol=0)
        for mask in (Padding([3, 2]), Allowed(may), may):
            masked = attention(q, k, v, mask, implementation=name)
            torch.testing.assert_close(masked, torch.stack([expected[0], hidden]), atol=5.1e-5, rtol=0)


def test_values_may_be_narrower_than_keys():
    torch.manual_seed(0)
    q, k, v = torch.randn(20, 5, 512), torch.randn(20, 5, 512), torch.randn(20, 5, 64)
    output = attention(q, k, v)
    assert output.shape == (20, 5, 64)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v), atol=1e-6, rtol=0)


def test_causal_equals_the_lower_triangle_of_torch():
    q, k, v = draw(queries=9, keys=9, groups=4, dtype=torch.float32)
    triangle = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=triangle)
    for name in ("reference", "tiled", "sdpa"):
        torch.testing.assert_close(attention(q, k, v, Causal(), implementation=name), expected, atol=1e-6, rtol=0)


def test_the_reference_by_hand():
    # Scores [0, log 3]: weights [1/4, 3/4].
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    key = torch.tensor([[[0.0], [3.0]]], dtype=torch.float64).log1p() * torch.tensor([[[0.0], [1.0]]])
    key = key * torch.log(torch.tensor(3.0, dtype=torch.float64)) / torch.log(torch.tensor(4.0, dtype=torch.float64))
    value = torch.tensor([[[4.0], [8.0]]], dtype=torch.float64)
    assert attention(one, key, value, implementation="reference").item() == pytest.approx(7.0, abs=1e-12)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_reference_is_differentiable(mask, options):
    case = [t.requires_grad_() for t in draw()]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, mask, implementation="reference", **options), case, fast_mode=True
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tiled", "sdpa"])
def test_implementations_equal_the_reference_with_gradients(name, dtype, options, mask):
    if name == "sdpa" and {"softcap", "sinks"} & options.keys():
        with pytest.raises(ValueError, match="'sdpa' has neither softcap nor sinks"):
            attention(*draw(), mask, implementation=name, **options)
        return
    case = Case(*(t.requires_grad_() for t in draw(dtype=dtype)))
    exact_case = Case(*(t.detach().double().requires_grad_() for t in case))
    exact = exactly(exact_case, mask, **options)
    actual = attention(*case, mask, implementation=name, **options)
    plain = attention(*case, mask, implementation="reference", **options)
    triples = zip(gradients(actual, case), gradients(exact, exact_case), gradients(plain, case), strict=True)
    for got, want, beside in ((actual, exact, plain), *triples):
        if dtype == torch.float64:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        else:
            assert_as_accurate(got, want, beside)


def gradients(output, case):
    return torch.autograd.grad((output.double() ** 2).sum(), case)


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_gradients_reach_bias_and_sinks(name):
    case = draw()
    bias = torch.zeros(7, 11, dtype=torch.float64, requires_grad=True)
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda bias, sinks: attention(*case, Bias(bias) & Causal(), sinks=sinks, implementation=name),
        (bias, sinks),
        fast_mode=True,
    )


@pytest.mark.parametrize("name", ["reference", "tiled", "sdpa"])
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(name):
    case = [t.requires_grad_() for t in draw(queries=4, keys=2)]
    output = attention(*case, Causal(), implementation=name)
    assert (output[:, :, :2] == 0).all()
    assert (output[:, :, 2:] != 0).any()
    for gradient in torch.autograd.grad(output.sum(), case):
        assert gradient.isfinite().all()
    (of_query, *_) = torch.autograd.grad(attention(*case, Causal(), implementation=name)[:, :, :2].sum(), case)
    assert (of_query == 0).all()


@pytest.mark.parametrize("name", ["reference", "tiled", "auto"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_lengths_of_zero_and_one(name, queries, keys):
    q, k, v = draw(queries=queries, keys=keys)
    output = attention(q, k, v, Causal(), implementation=name)
    assert output.shape == (2, 4, queries, 5)
    assert torch.equal(output, v.repeat_interleave(2, 1).expand_as(output) if keys == 1 and queries else output * 0)


@pytest.mark.parametrize("name", ["reference", "tiled", "sdpa"])
def test_large_scores_stay_finite_and_pick_the_largest(name):
    q, k, v = draw(groups=4, dtype=torch.float32)
    output = attention(q * 1e4, k, v, implementation=name)
    best = (q @ k.transpose(-2, -1)).argmax(-1, keepdim=True)
    torch.testing.assert_close(output, v.gather(2, best.expand(-1, -1, -1, 5)), atol=1e-5, rtol=1e-5)


def test_strips_off_every_edge_equal_one_strip(monkeypatch):
    from sightline.kernels import tiled

    case, mask = draw(queries=130, keys=141), Causal() & Window(before=17, after=None)
    whole = attention(*case, mask, implementation="tiled")
    monkeypatch.setattr(tiled, "STRIP_SCORES", 1)
    torch.testing.assert_close(attention(*case, mask, implementation="tiled"), whole)
    torch.testing.assert_close(whole, exactly(case, mask))


lengths = st.integers(1, 6)


@given(st.integers(0, 9), lengths, lengths, st.sampled_from(["reference", "tiled", "sdpa"]))
def test_law_a_future_key_changes_nothing(seed, queries, extra, name):
    q, k, v = draw(seed, queries=queries, keys=queries + extra)
    changed = Case(q, k.clone(), v.clone())
    changed.key[:, :, -1] += 1
    changed.value[:, :, -1] -= 3
    before, after = (attention(*case, Causal(), implementation=name) for case in (Case(q, k, v), changed))
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])
    assert not torch.equal(before[:, :, -1], after[:, :, -1])


@given(st.integers(0, 9), lengths, lengths, st.permutations(range(4)), st.sampled_from(["reference", "tiled"]))
def test_law_permuting_heads_or_keys_permutes_or_keeps_the_output(seed, queries, keys, order, name):
    q, k, v = draw(seed, groups=4, queries=queries, keys=keys)
    output = attention(q, k, v, implementation=name)
    torch.testing.assert_close(attention(q[:, order], k[:, order], v[:, order], implementation=name), output[:, order])
    back = list(range(keys))[::-1]
    torch.testing.assert_close(attention(q, k[:, :, back], v[:, :, back], implementation=name), output)
    torch.testing.assert_close(attention(q.flip(0), k.flip(0), v.flip(0), implementation=name), output.flip(0))


@given(st.integers(0, 9), st.integers(1, 8), st.sampled_from(["reference", "tiled", "sdpa"]))
def test_law_one_query_at_a_time_equals_one_pass(seed, length, name):
    q, k, v = draw(seed, queries=length, keys=length)
    whole = attention(q, k, v, Causal(), implementation=name)
    for i in range(length):
        step = attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], Causal(), implementation=name)
        torch.testing.assert_close(step, whole[:, :, i : i + 1])


@given(st.integers(0, 9), lengths, lengths, st.sampled_from(["reference", "tiled", "sdpa"]))
def test_law_a_window_at_least_as_long_as_the_keys_is_none(seed, queries, keys, name):
    case = draw(seed, queries=queries, keys=keys)
    far = max(queries, keys)
    wide = attention(*case, Window(before=far, after=far), implementation=name)
    torch.testing.assert_close(wide, attention(*case, implementation=name))


@given(st.integers(0, 9), st.sampled_from(["reference", "tiled", "sdpa"]))
def test_law_values_of_one_give_one_so_weights_sum_to_one(seed, name):
    q, k, v = draw(seed)
    output = attention(q, k, torch.ones_like(v), Window(before=4, after=4), implementation=name)
    torch.testing.assert_close(output, torch.ones_like(output))


def test_groups_are_heads_that_share():
    q, k, v = draw()
    shared = attention(q, k, v)
    torch.testing.assert_close(shared, attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


@pytest.mark.parametrize("name", ["reference", "tiled", "sdpa"])
def test_dropout_drops_and_keeps_the_mean(name):
    torch.manual_seed(0)
    q, k = torch.zeros(1, 1, 400, 4), torch.zeros(1, 1, 400, 4)
    v = torch.ones(1, 1, 400, 4)
    output = attention(q, k, v, dropout=0.5, implementation=name)
    assert 0 < output.std() < 0.1
    assert output.mean() == pytest.approx(1.0, abs=0.01)


def test_tiled_dropout_recomputes_the_same_weights_for_the_gradient():
    torch.manual_seed(0)
    q, k, v = (t.requires_grad_() for t in draw(queries=5, keys=5))
    output = attention(q, k, v, dropout=0.5, implementation="tiled")
    # The output is linear in value, so value . gradient is the output's own sum.
    (gradient,) = torch.autograd.grad(output.sum(), v)
    torch.testing.assert_close((gradient * v).sum(), output.sum())


@pytest.mark.parametrize("name", ["auto", "reference", "tiled"])
@pytest.mark.parametrize("mask", [None, Causal(), Causal() & Padding([4, 2])], ids=["none", "causal", "padding"])
def test_compiles_to_one_graph_with_gradients(name, mask):
    def call(q, k, v):
        return attention(q, k, v, mask, implementation=name)

    torch.compiler.reset()
    case = [t.requires_grad_() for t in draw(queries=6, keys=6)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case), call(*case))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*case).sum(), case), torch.autograd.grad(call(*case).sum(), case)
    )


def test_compiled_code_may_make_its_mask_inside():
    def call(q, k, v):
        return attention(q, k, v, Causal() & Window(before=2, after=None))

    case = draw()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case), exactly(case, Window(before=2, after=0)))


@pytest.mark.parametrize("name", ["auto", "reference", "tiled"])
def test_autocast_computes_in_its_dtype(name):
    case = draw(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attention(*case, implementation=name)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, attention(*case.to(torch.bfloat16), implementation=name))


def test_auto_without_the_native_kernel_keeps_memory_linear(monkeypatch):
    monkeypatch.setattr(cpu, "MISSING", "not built")

    def chosen(mask=None, *, length=4096, value_width=64, **options):
        q = torch.empty(1, 1, length, 64)
        return choose(q, q, torch.empty(1, 1, length, value_width), mask or Mask(), **options).implementation

    assert chosen() == chosen(Causal()) == chosen(Padding([5])) == "sdpa"
    assert chosen(Window(before=9, after=0)) == chosen(ALiBi(1)) == "tiled"
    assert chosen(value_width=32) == chosen(dropout=0.1) == chosen(softcap=1.0) == "tiled"
    assert chosen(Bias(torch.zeros(4096, 4096, requires_grad=True))) == "tiled"
    assert chosen(Allowed(torch.ones(4096, 4096, dtype=torch.bool)) & Causal()) == "sdpa"
    assert chosen(Window(before=9, after=0), length=2048) == chosen(length=64, value_width=3) == "sdpa"
    assert chosen(observing=True) == "tiled"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, v: attention(q, k[..., :4], v), ShapeError, "width is 4 in key but 8 before it"),
        (lambda q, k, v: attention(q, k, v[:, :, :3]), ShapeError, "keys is 3 in value but 11 before it"),
        (lambda q, k, v: attention(q[:1], k, v), ShapeError, "batch is 2 in key but 1 before it"),
        (lambda q, k, v: attention(q[:, :3], k, v), ShapeError, "3 heads cannot share 2 groups"),
        (lambda q, k, v: attention(q[0, 0], k, v), ShapeError, "query has 2 axes, not 4"),
        (lambda q, k, v: attention(q, k, v, torch.ones(7, 11)), ValueError, r"mask.bool\(\).*or Bias\(mask\)"),
        (lambda q, k, v: attention(q, k, v, "causal"), TypeError, "mask must be a Mask"),
        (lambda q, k, v: attention(q, k.float(), v), ValueError, "one dtype, got float64, float32, float64"),
        (lambda q, k, v: attention(q.int(), k.int(), v.int()), ValueError, "expected float tensors, got torch.int32"),
        (lambda q, k, v: attention(q, k, v, dropout=1.0), ValueError, "dropout must be at least 0 and below 1, got 1"),
        (lambda q, k, v: attention(q, k, v, softcap=0.0), ValueError, "softcap must be above 0, got 0"),
        (lambda q, k, v: attention(q, k, v, sinks=torch.ones(3)), ShapeError, "heads is 3 in sinks but 4"),
        (lambda q, k, v: attention(q[..., :0], k[..., :0], v), ShapeError, "width is 0 in query and key"),
        (lambda q, k, v: attention(q, k, v, implementation="fast"), ValueError, "unknown implementation 'fast'; exp"),
        (lambda q, k, v: attention(q, k, v, implementation="triton"), ValueError, "'triton' is not part of this build"),
    ],
)
def test_a_bad_call_says_what_was_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(*draw())


@pytest.mark.parametrize("name", ["reference", "tiled"])
def test_nan_is_not_hidden(name):
    q, k, v = draw(groups=4)
    q[0, 0, 0, 0] = torch.nan
    assert attention(q, k, v, implementation=name)[0, 0, 0].isnan().all()


@pytest.mark.parametrize("implementation", ["auto", "reference", "tiled", "sdpa"])
@pytest.mark.parametrize("mask", [None, Causal()])
def test_shapes_alone_go_through(implementation, mask):
    query, key = torch.empty(2, 4, 5, 8, device="meta"), torch.empty(2, 2, 9, 8, device="meta")
    value = torch.empty(2, 2, 9, 6, device="meta")
    output = attention(query, key, value, mask, implementation=implementation)
    assert (output.shape, output.device.type) == ((2, 4, 5, 6), "meta")


def test_a_mask_that_is_none_is_told_what_to_be():
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(
        TypeError, match=r"a Mask such as Causal\(\), a bool tensor or None, got Causal itself: call it"
    ):
        attention(x, x, x, Causal)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got str"):
        attention(x, x, x, "causal")  # type: ignore[arg-type]
