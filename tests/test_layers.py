"""Layers against the digits of the specification and against loops over tokens and heads."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.attention import attention, observe
from sightline.blocks import Block
from sightline.feed_forward import FeedForward
from sightline.layers import MultiHeadAttention, SelfAttention
from sightline.masks import Allowed, Causal, Padding
from sightline.positions import Rotary
from sightline.rows import make_norm
from sightline.shapes import ShapeError

ONE_HEAD = """-.0166 -.4199 -.5860 .3721 .5411 .4073 .8418 .2554 -.2712 .6178 -.0495 -.0552 .6988 -.3643 .7696"""
EIGHT_HEADS = """.0275 -.1630 .1510 .3983 -.0111 -.4692 -.1411 .1411 .2040 .0587 .1210 -.1313 -.0088 .1773 -.0538"""
COLUMNS = """
    .94744244 1.64201168 1.61949281 -.24348429 -.08470004 -.06641533
    -.91310441 4.02764044 3.96863308 -.44522983 2.18690791 2.15858316"""
TWO_HEADS = """
    -21.207 -5.373 -20.933 -9.179 -11.319 -17.812   -1.995 7.906 -10.516 3.452 9.863 -7.24
    5.479 1.115 9.244 .453 5.656 7.089              -7.413 -7.416 .363 -5.573 -6.736 -.848
    -11.261 -9.937 -4.848 -8.915 -13.378 -5.761     3.548 10.036 -2.244 1.604 12.113 -2.557
    4.888 -5.814 2.407 3.228 -4.232 3.71            1.248 18.894 -6.409 3.224 19.717 -5.629"""


def numbers(text: str) -> torch.Tensor:
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def assert_printed(tensor: torch.Tensor, text: str, digits: int) -> None:
    assert torch.equal(tensor.detach().double().flatten().round(decimals=digits), numbers(text))


def test_one_head_to_the_printed_digit():
    torch.manual_seed(40)
    x = torch.ones(20, 5, 32)
    layer = SelfAttention(32, 512, 64)
    output, weights = layer(x, return_weights=True)
    assert output.shape == (20, 5, 64) and weights.shape == (20, 5, 5)
    assert_printed(output[-1, 1, :15], ONE_HEAD, 4)
    assert torch.equal(output, layer(x))


def test_assert_printed_can_fail():
    with pytest.raises(AssertionError):
        assert_printed(numbers(ONE_HEAD) + 1e-4, ONE_HEAD, 4)


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "replaced"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("context", [False, True])
def test_in_training_too_each_map_keeps_its_say(name, kind, context):
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(8, 2), torch.randn(1, 3, 8, requires_grad=True)
    source = torch.randn(1, 5, 8, requires_grad=True) if context else None
    before, heard, linear = layer(x, source), [], getattr(layer, name)
    if kind == "replaced":
        setattr(layer, name, torch.nn.Sequential(linear, torch.nn.Tanh()))
    elif kind == "backward":
        linear.register_full_backward_hook(lambda *_: heard.append(1))
    elif kind == "pre":
        linear.register_forward_pre_hook(lambda *_: heard.append(1))
    else:
        linear.register_forward_hook(lambda *_: heard.append(1))
    assert layer.training
    output = layer(x, source)
    output.sum().backward()
    assert heard if kind != "replaced" else not torch.allclose(output, before)
    if kind != "replaced":
        torch.testing.assert_close(output, before)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_map_put_in_the_place_of_another_may_have_no_bias(name):
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(8, 2), torch.randn(1, 3, 8)
    setattr(layer, name, torch.nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        wanted = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), wanted)


def column_convention() -> tuple[torch.Tensor, ...]:
    """Values, queries and keys of section 3, tokens in columns, drawn in the order it says."""
    generator = np.random.RandomState(3)
    x = np.concatenate([generator.normal(size=(4, 1)) for _ in range(3)], axis=1)
    generator = np.random.RandomState(0)
    omegas = [generator.normal(size=(4, 4)) for _ in range(3)]
    betas = [generator.normal(size=(4, 1)) for _ in range(3)]
    query, key, value = (double(omega @ x + beta) for omega, beta in zip(omegas, betas, strict=True))
    return value, query, key


def test_unscaled_columns_as_matrices_and_token_by_token():
    value, query, key = column_convention()
    matrices = attention(query.T[None], key.T[None], value.T[None], scale=1.0)[0].T
    loop = torch.stack(
        [value @ torch.softmax(torch.stack([key[:, m] @ query[:, n] for m in range(3)]), 0) for n in range(3)], dim=1
    )
    assert_printed(matrices, COLUMNS, 8)
    assert torch.allclose(matrices, loop, atol=1e-12)


@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_permuting_tokens_permutes_the_output(seed):
    torch.manual_seed(seed)
    order = torch.randperm(6)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    for layer in (SelfAttention(8, 4, 3).double(), MultiHeadAttention(8, 2).double()):
        assert torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-12)


def test_eight_heads_to_the_printed_digit():
    torch.manual_seed(40)
    x = torch.rand(32, 10, 256)
    layer = MultiHeadAttention(256, 8, d_k=512, d_v=64, d_out=64)
    output, weights = layer(x, return_weights=True)
    assert output.shape == (32, 10, 64) and weights.shape == (256, 10, 10)
    assert_printed(output[-1, 1, :15], EIGHT_HEADS, 4)


def test_heads_are_drawn_as_separate_linears_are():
    torch.manual_seed(7)
    layer = MultiHeadAttention(12, 4, d_k=8, d_v=16, num_groups=2)
    after = torch.rand(3)
    torch.manual_seed(7)
    output = torch.nn.Linear(16, 12)
    query, key, value = [], [], []
    for head in range(4):
        query.append(torch.nn.Linear(12, 2))
        if head % 2 == 0:
            key.append(torch.nn.Linear(12, 2))
            value.append(torch.nn.Linear(12, 4))
    assert torch.equal(after, torch.rand(3))
    for ours, theirs in ((layer.query, query), (layer.key, key), (layer.value, value), (layer.output, [output])):
        assert torch.allclose(ours.weight, torch.cat([linear.weight for linear in theirs]), atol=1e-7)
        assert torch.allclose(ours.bias, torch.cat([linear.bias for linear in theirs]), atol=1e-7)


def test_two_heads_in_columns():
    x = np.random.RandomState(3).normal(size=(8, 6))
    generator = np.random.RandomState(0)
    heads = []
    for _ in range(2):
        omegas = [generator.normal(size=(4, 8)) for _ in range(3)]
        heads.append((omegas, [generator.normal(size=(4, 1)) for _ in range(3)]))
    layer = MultiHeadAttention(8, 2).double()
    with torch.no_grad():
        for i, linear in enumerate((layer.query, layer.key, layer.value)):
            linear.weight.copy_(torch.cat([double(omegas[i]) for omegas, _ in heads]))
            linear.bias.copy_(torch.cat([double(betas[i]) for _, betas in heads]).flatten())
        layer.output.weight.copy_(double(generator.normal(size=(8, 8))))
        layer.output.bias.zero_()
    assert_printed(layer(double(x.T)[None])[0].T, TWO_HEADS, 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_groups", [4, 2, 1])
def test_heads_equal_a_loop_over_heads(causal, num_groups):
    torch.manual_seed(0)
    layer = MultiHeadAttention(
        12, 4, d_k=16, d_v=8, d_out=5, num_groups=num_groups, causal=causal, query_key_norm=True, rotary=Rotary(4)
    ).double()
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    assert layer.query_norm is not None and layer.key_norm is not None and layer.rotary is not None
    layer.query_norm.weight.data.uniform_(0.5, 2)
    layer.key_norm.weight.data.uniform_(0.5, 2)
    heads = []
    for head in range(4):
        group = head * num_groups // 4
        query = layer.rotary(layer.query_norm(layer.query(x)[..., 4 * head : 4 * head + 4])[:, None])[:, 0]
        key = layer.rotary(layer.key_norm(layer.key(x)[..., 4 * group : 4 * group + 4])[:, None])[:, 0]
        scores = query @ key.mT / 2
        if causal:
            scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ layer.value(x)[..., 2 * group : 2 * group + 2])
    assert torch.allclose(layer(x), layer.output(torch.cat(heads, -1)), atol=1e-12)


def test_weights_make_the_output():
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2, causal=True, alibi=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    output, weights = layer(x, mask=Padding([5, 3, 1]), return_weights=True)
    assert torch.allclose(weights.sum(-1), torch.ones(6, 5, dtype=torch.float64))
    assert not weights.triu(1).any() and not weights[4:, :, 1:].any()
    value = layer.value(x).unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1)
    heads = (weights @ value).unflatten(0, (3, 2)).transpose(1, 2).flatten(-2)
    assert torch.allclose(output, layer.output(heads), atol=1e-12)


def test_masks_meet_the_causal_one_and_tensors_mean_allowed():
    torch.manual_seed(0)
    causal, free = MultiHeadAttention(8, 2, causal=True), MultiHeadAttention(8, 2)
    free.load_state_dict(causal.state_dict())
    x = torch.randn(2, 5, 8)
    given = torch.rand(5, 5) > 0.3
    given.fill_diagonal_(True)
    expected = free(x, mask=Causal() & Allowed(given))
    assert torch.allclose(causal(x, mask=given), expected, atol=1e-6)
    assert torch.allclose(causal(x, mask=Allowed(given)), expected, atol=1e-6)
    for layer in (causal, free):
        with pytest.raises(ValueError, match="bool"):
            layer(x, mask=given.float())


@pytest.mark.parametrize("options", [{}, {"bias": False, "num_groups": 2}, {"d_k": 16, "d_v": 4}])
def test_training_joins_the_maps_without_changing_what_they_give(options):
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(8, 4, **options).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    joined = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    apart = torch.autograd.grad(layer.eval()(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(joined, apart)


def test_cross_attention_reads_the_context():
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2).eval()  # in training self-attention joins its maps, and rounds otherwise
    x, context = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    output, weights = layer(x, context, return_weights=True)
    assert output.shape == (2, 3, 8) and weights.shape == (4, 3, 6)
    assert torch.equal(layer(x, x), layer(x))
    with pytest.raises(ValueError, match="does not go with rotary"):
        MultiHeadAttention(8, 2, rotary=Rotary(4))(x, context)
    with pytest.raises(ShapeError, match="batch is 1 in context but 2"):
        layer(x, context[:1])


def test_dropout_falls_on_the_weights_in_training_only():
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2, dropout=0.5)
    x = torch.randn(2, 30, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    plain = MultiHeadAttention(8, 2)
    plain.load_state_dict(layer.state_dict())
    plain.eval()
    assert torch.equal(layer(x), plain(x))


def test_an_observer_takes_the_place_of_attention():
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2, causal=True)
    x = torch.randn(2, 5, 8)
    expected, seen = layer(x), []

    def observer(query, key, value, mask, *, scale, softcap, sinks):
        seen.append(observe(query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks))
        return seen[0].output

    layer.observer = observer
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert seen[0].entropy.shape == (2, 2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "d_k 8 is not divisible by num_heads 3"),
        ({"num_heads": 4, "d_v": 6}, "d_v 6 is not divisible by num_heads 4"),
        ({"num_heads": 4, "num_groups": 3}, "num_heads 4 is not divisible by num_groups 3"),
        ({"num_heads": 4, "num_groups": 0}, "num_heads 4 is not divisible by num_groups 0"),
        ({"num_heads": 2, "d_k": 0}, "d_k 0 is not divisible by num_heads 2"),
        ({"num_heads": 0}, "d_k 8 is not divisible by num_heads 0"),
        ({"num_heads": 2, "rotary": Rotary(8)}, "rotary has width 8 but a head has 4"),
    ],
)
def test_what_does_not_divide_names_both_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(8, **options)


@pytest.mark.parametrize("dropout", [-0.5, 1.0, float("nan")])
def test_what_is_no_dropout_is_refused(dropout):
    with pytest.raises(ValueError, match=f"MultiHeadAttention: dropout must be .* below 1, got {dropout}"):
        MultiHeadAttention(8, 2, dropout=dropout)
    with pytest.raises(ValueError, match=f"Block: dropout must be at least 0 and below 1, got {dropout}"):
        Block(MultiHeadAttention(8, 2), FeedForward(8, 16), d_model=8, dropout=dropout)


@pytest.mark.parametrize("build", [lambda: SelfAttention(8, 4, 4), lambda: MultiHeadAttention(8, 2)])
def test_a_tensor_of_another_rank_is_refused(build):
    with pytest.raises(ShapeError, match="x has 2 axes, not 3"):
        build()(torch.zeros(5, 8))


@pytest.mark.parametrize(
    ("activation", "function"),
    [("relu", lambda x: x.clamp(min=0)), ("gelu", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2)],
)
def test_feed_forward_of_two_maps(activation, function):
    layer = FeedForward(6, 10, activation=activation, bias=True).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = function(x @ layer.up.weight.T + layer.up.bias)
    assert torch.allclose(layer(x), hidden @ layer.down.weight.T + layer.down.bias, atol=1e-12)


def test_feed_forward_swiglu():
    layer = FeedForward(6, 10).double()
    assert layer.gate is not None
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate = x @ layer.gate.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * (x @ layer.up.weight.T)) @ layer.down.weight.T
    assert torch.allclose(layer(x), expected, atol=1e-12)


def block(**options) -> Block:
    return Block(MultiHeadAttention(8, 2), FeedForward(8, 16), d_model=8, **options)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_places_norms_and_residuals(norm, norm_first):
    layer = block(norm=norm, norm_first=norm_first)
    x = torch.randn(2, 5, 8)
    first, second = layer.attention_norm, layer.feed_forward_norm
    if norm_first:
        middle = x + layer.attention(first(x))
        expected = middle + layer.feed_forward(second(middle))
    else:
        middle = first(x + layer.attention(x))
        expected = second(middle + layer.feed_forward(middle))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_a_block_drops_what_a_sublayer_adds_and_never_the_residual():
    torch.manual_seed(0)
    layer = block(dropout=0.5)
    x = torch.randn(1, 400, 8)
    with torch.no_grad():
        layer.feed_forward.down.weight.zero_()
    untouched = (layer(x) == x).float().mean()
    assert 0.4 < untouched < 0.6
    assert not (layer.eval()(x) == x).any()


@pytest.mark.parametrize("bias", [True, False])
def test_norms_are_their_formulas(bias):
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    layer, rms = make_norm("layer", 6, bias=bias).double(), make_norm("rms", 6, bias=bias).double()
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    assert torch.allclose(layer(x), centred / (variance + 1e-5).sqrt(), atol=1e-12)
    assert torch.allclose(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-12)
    assert [len(list(norm.parameters())) for norm in (layer, rms)] == [1 + bias, 1]


def test_a_layer_is_torch_s_own_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(8, 2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([m.weight for m in (ours.query, ours.key, ours.value)]))
        theirs.in_proj_bias.copy_(torch.cat([m.bias for m in (ours.query, ours.key, ours.value)]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    x = torch.randn(2, 5, 8)
    output, weights = ours(x, return_weights=True)
    expected, expected_weights = theirs(x, x, x, average_attn_weights=False)
    assert torch.allclose(output, expected, atol=1e-6)
    assert torch.allclose(weights, expected_weights.flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize("layer", [MultiHeadAttention(16, 2), SelfAttention(16, 4, 4)])
def test_input_of_another_width_is_named(layer):
    with pytest.raises(ShapeError, match="is 17 in x but 16 here"):
        layer(torch.randn(1, 5, 17))
