"""Few rows by the native kernel: as accurate as the library's, and only where nobody else has a say."""

from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sightline import passes
from sightline.blocks import Block
from sightline.cache import Cache
from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from sightline.feed_forward import FeedForward
from sightline.generation import SampleConfig, sample_tokens
from sightline.kernels import cpu, products
from sightline.layers import MultiHeadAttention
from sightline.masks import Causal, Padding
from sightline.models import Decoder, DecoderConfig
from sightline.positions import Rotary
from sightline.rows import RMSNorm, linear_maps, scores
from sightline.shapes import ShapeError

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING or "built")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 7, 64, 515])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_each_map_is_as_accurate_as_the_librarys(rows, depth, instructions):
    x = drawn(rows, depth)
    maps = [
        (drawn(columns, depth, seed=columns), drawn(columns, seed=2) if with_bias else None)
        for columns, with_bias in ((37, True), (1, False), (66, True))
    ]
    for given in (maps, maps[:2], maps[:1]):
        errors = {"ours": 1e-7, "library": 0.0}
        for result, (weight, bias) in zip(products.project(x, *given), given, strict=True):
            exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            assert result.shape == exact.shape
            for name, tried in (("ours", result), ("library", F.linear(x, weight, bias))):
                errors[name] = max(errors[name], (tried - exact).abs().max().item())
        assert errors["ours"] <= 2 * errors["library"] + 1e-6


@torch.no_grad()
def test_rows_may_share_memory_or_lie_apart(instructions):
    weight, up, down = drawn(9, seed=1), drawn(12, 9, seed=2), drawn(9, 12, seed=3)
    for x in (drawn(9).expand(3, 9), drawn(3, 18)[:, ::2], drawn(9, 3).T):
        held = x.contiguous()
        for of in (
            lambda x: products.norm(x, weight, 1e-6),
            lambda x: products.project(x, (up, None))[0],
            lambda x: products.feed_forward(x, (up, None), (down, None), curve=products.RELU),
        ):
            assert torch.equal(of(x), of(held))


@torch.no_grad()
def test_a_rows_bits_are_its_own(instructions):
    x, weight = drawn(8, 100), drawn(130, 100, seed=1)
    (together,) = products.project(x, (weight, None))
    for row in range(8):
        assert torch.equal(products.project(x[row], (weight, None))[0], together[row])
    beside = products.project(x, (weight[:33], None), (weight[33:], None))
    assert torch.equal(torch.cat(tuple(beside), dim=-1), together)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 7, 515])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_as_accurate_as_torchs(depth, bias, multiplier):
    """Of any strides. oneDNN adds a row up in one chain and MKL in several, so that its error may be twice theirs."""
    added = drawn(37, seed=2) if bias else None
    for left in (drawn(130, depth), drawn(depth, 130).T, drawn(130, 2 * depth)[:, ::2]):
        for right in (drawn(37, depth, seed=1).T, drawn(depth, 37, seed=1)):
            result = torch.ops.sightline.multiply(left, right, added)
            exact = F.linear(left.double(), right.T.double(), None if added is None else added.double())
            of_torch = F.linear(left, right.T, added)
            assert result.shape == exact.shape and result.is_contiguous()
            assert (result - exact).abs().max() <= 4 * (of_torch - exact).abs().max() + 1e-6


@torch.no_grad()
def test_a_product_of_nothing_is_the_bias(multiplier):
    assert torch.ops.sightline.multiply(drawn(0, 5), drawn(5, 3), None).shape == (0, 3)
    assert torch.equal(torch.ops.sightline.multiply(drawn(2, 0), drawn(0, 3), torch.ones(3)), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("left", "right", "bias"),
    [
        (drawn(2, 3), drawn(4, 5), None),
        (drawn(2, 3), drawn(3, 5).double(), None),
        (drawn(3), drawn(3, 5), None),
        (drawn(2, 3), drawn(3, 5), drawn(4)),
        (drawn(2, 3), drawn(3, 5), drawn(5).double()),
        (drawn(2, 3), drawn(3, 5), drawn(1, 5)),
        (drawn(2, 3), drawn(3, 5), drawn(10)[::2]),
    ],
)
def test_a_product_of_what_does_not_belong_together_is_refused(left, right, bias, multiplier):
    with pytest.raises(RuntimeError, match=r"sightline: (the shapes or dtypes of a product|a bias must have)"):
        torch.ops.sightline.multiply(left, right, bias)


def test_only_a_multiplier_that_is_there():
    with pytest.raises(ValueError, match=r"multiplier must be one of torch.* here, got 'abacus'"):
        cpu.use_multiplier("abacus")


@torch.no_grad()
def test_many_rows_are_the_modules(multiplier, monkeypatch):
    """Maps and scores of many rows, by the multiplier in use where it is not torch's own choice."""
    multiply = Mock(wraps=products.multiply)
    monkeypatch.setattr(products, "multiply", multiply)
    x, linear, other = drawn(2, 50, 16), nn.Linear(16, 5), nn.Linear(16, 7, bias=False)
    for result, module in zip(linear_maps(x, linear, other), (linear, other), strict=True):
        torch.testing.assert_close(result, module(x))
    torch.testing.assert_close(scores(x, other.weight), other(x))
    assert multiply.call_count == (0 if multiplier == "torch" else 3)
    seen = []
    linear.register_forward_hook(lambda *_: seen.append("hook"))
    linear_maps(x, linear)
    with torch.enable_grad():
        assert linear_maps(x, other)[0].requires_grad
    linear_maps(x.double(), other.double())
    assert seen == ["hook"] and multiply.call_count == (0 if multiplier == "torch" else 3)


@torch.no_grad()
def test_rows_go_through_transforms(multiplier):
    x, linear = drawn(3, 20, 16), nn.Linear(16, 5)
    one_by_one = torch.func.vmap(lambda x: linear_maps(x, linear)[0])
    torch.testing.assert_close(one_by_one(x), linear(x))
    torch.testing.assert_close(one_by_one(x[:, :1]), linear(x[:, :1]))


@torch.no_grad()
def test_leading_axes_stay():
    x, linear = drawn(2, 3, 16), nn.Linear(16, 5)
    (result,) = linear_maps(x, linear)
    torch.testing.assert_close(result, linear(x))
    assert scores(x[0, 0], linear.weight).shape == (5,)


def test_only_few_rows_in_float32_without_a_gradient():
    weight = drawn(5, 16)
    assert not products.projects(drawn(1, 16), weight)  # a gradient may be wanted
    with torch.no_grad():
        assert products.projects(drawn(8, 16), weight)
        assert not products.projects(drawn(9, 16), weight)
        assert not products.projects(drawn(0, 16), weight)
        assert not products.projects(drawn(1, 16).double(), weight.double())
        assert not products.projects(drawn(1, 16), weight.bfloat16())
        assert not products.projects(drawn(1, 16), drawn(16, 5).T)
        with torch.autocast("cpu"):
            assert not products.projects(drawn(1, 16), weight)


@torch.no_grad()
def test_a_hook_and_another_module_are_called():
    linear, seen = nn.Linear(16, 5), []
    hook = linear.register_forward_hook(lambda *_: seen.append("hook"))
    linear_maps(drawn(1, 16), linear)
    hook.remove()
    linear_maps(drawn(1, 16), linear)

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    other = Doubled(16, 5)
    assert seen == ["hook"]
    with nn.modules.module.register_module_forward_hook(lambda *_: seen.append("all")):
        linear_maps(drawn(1, 16), linear)
    linear.forward = Mock(return_value="own")
    assert linear_maps(drawn(1, 16), linear) == ["own"] and seen == ["hook", "all"]
    assert torch.equal(linear_maps(drawn(1, 16), other)[0], 2 * F.linear(drawn(1, 16), other.weight, other.bias))


def test_the_operator_checks_what_it_is_given():
    x, weight = drawn(2, 16), drawn(5, 16)
    for bad in ((x[0], weight), (x.double(), weight), (x, weight.T), (x, weight[:, :8]), (x, weight.bfloat16())):
        with pytest.raises(RuntimeError, match=r"sightline: (x|weights) must be float32"):
            torch.ops.sightline.project(*bad, None, None, None, None, None)
    with pytest.raises(RuntimeError, match="a bias must be float32"):
        torch.ops.sightline.project(x, weight, drawn(4), None, None, None, None)


@pytest.mark.parametrize("kind", ["modern", "classic"])
def test_the_same_tokens_with_the_kernel_and_without(kind, monkeypatch):
    torch.manual_seed(0)
    model = Decoder(getattr(DecoderConfig, kind)(vocabulary=50, context=64, d_model=32, num_layers=2)).eval()
    greedy = SampleConfig(tokens=40, top_k=1)
    tokens = list(sample_tokens(model, [1, 2, 3], greedy))
    monkeypatch.setattr(products, "projects", lambda *_: False)
    assert list(sample_tokens(model, [1, 2, 3], greedy)) == tokens


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 7, 64, 515])
def test_a_norm_is_its_definition(width, instructions):
    norm, x = RMSNorm(width, eps=1e-5), drawn(2, 3, width)
    norm.weight.copy_(drawn(width, seed=1))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("rows", [2, 20])
def test_a_norm_of_other_axes_or_without_a_weight_is_torchs(rows, gradient):
    x = drawn(rows, 4, 8)
    with torch.set_grad_enabled(gradient):
        for options in ({"normalized_shape": 8, "elementwise_affine": False}, {"normalized_shape": (4, 8)}):
            torch.testing.assert_close(RMSNorm(**options)(x), nn.RMSNorm(**options)(x))
        with pytest.raises(RuntimeError, match=r"normalized_shape=\[4\]"):
            RMSNorm(4)(x)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["swiglu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "d_ff", "bias"), [(1, 33, True), (8, 70, False), (3, 5, True)])
def test_a_feed_forward_is_its_definition(rows, d_ff, bias, activation, instructions):
    layer, x = FeedForward(19, d_ff, activation=activation, bias=bias), 4 * drawn(rows, 19)
    with patch.object(products, "feed_forward", wraps=products.feed_forward) as called:
        made = layer(x)
    assert called.call_count == 1
    torch.testing.assert_close(made.double(), layer.double()(x.double()), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_activation_knows_great_numbers_and_none(instructions):
    x = torch.tensor([[0.0], [90.0], [-90.0], [1e4], [-1e4], [torch.nan]])
    one = (torch.ones(1, 1), None)
    gelu, tanh = (passes.CURVES[curve][0] for curve in (F.gelu, passes.gelu_tanh))
    for gate, curve, exact in (
        (one, products.SILU, F.silu(x) * x),
        (products.NO_MAP, products.RELU, F.relu(x)),
        (products.NO_MAP, gelu, F.gelu(x)),
        (products.NO_MAP, tanh, passes.gelu_tanh(x)),
    ):
        made = products.feed_forward(x, one, one, gate, curve=curve)
        torch.testing.assert_close(made, exact, rtol=1e-6, atol=1e-30, equal_nan=True)


KINDS = {
    "plain": {},
    "modern": {"num_groups": 2, "bias": False, "query_key_norm": True, "rotary": True},
    "a window": {"before": 3, "num_groups": 1, "rotary": True},
    "alibi": {"alibi": True},
    "wide values": {"d_v": 36, "d_out": 7},
}


def steps(kind: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer makes of 11 tokens without a cache in float64, and step by step with one."""
    torch.manual_seed(0)
    options = dict(KINDS[kind])
    if options.pop("rotary", False):
        options["rotary"] = Rotary(6)
    layer, x = MultiHeadAttention(24, 4, causal=True, **options), drawn(2, 11, 24)
    cache = Cache(1, batch=2, capacity=12)
    parts = []
    for part in x.split([3, *[tokens] * (8 // tokens)], dim=1):
        parts.append(layer(part, cache=cache))
        cache.advance(part.shape[1])
    return layer.double()(x.double()), torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_step_by_step_is_the_whole(kind, tokens, instructions, monkeypatch):
    attend = Mock(wraps=products.attend)
    monkeypatch.setattr(products, "attend", attend)
    whole, stepped = steps(kind, tokens)
    assert attend.call_count == 8 // tokens
    torch.testing.assert_close(stepped.double(), whole, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_source_is_read_from_its_cache(instructions):
    torch.manual_seed(0)
    layer, source = MultiHeadAttention(24, 4), drawn(2, 5, 24)
    cache = Cache(1, batch=2, capacity=5)
    layer(drawn(2, 2, 24), source, Padding([5, 3]), cache=cache)
    cache.advance(5)
    x = drawn(2, 3, 24, seed=1)
    stepped = layer(x, source, Padding([5, 3]), cache=cache)
    whole = layer.double()(x.double(), source.double(), Padding([5, 3]))
    torch.testing.assert_close(stepped.double(), whole, rtol=1e-5, atol=1e-6)


def test_who_listens_to_a_head_is_called():
    decoder = Decoder(DecoderConfig(vocabulary=7, context=8, d_model=16, num_layers=1, num_heads=2, tied=False))
    translator = EncoderDecoder(EncoderDecoderConfig(vocabulary=7, context=8, d_model=16, num_layers=1, tied=False))
    one, heard = torch.tensor([[1, 2, 3]]), []
    for model, given in ((decoder, (one,)), (translator, (one, one))):
        before = model(*given)
        model.head.register_forward_hook(lambda *_: heard.append(1))
        torch.testing.assert_close(model(*given), before)
        with torch.no_grad():
            model(*given)
    assert len(heard) == 4


@torch.no_grad()
def test_a_mask_of_another_batch_is_refused_as_ever():
    layer, cache, source = MultiHeadAttention(24, 4), Cache(1, batch=1, capacity=5), drawn(1, 5, 24)
    layer(drawn(1, 1, 24), source, cache=cache)
    cache.advance(5)
    with pytest.raises(ShapeError, match="2 lengths but the call has batch 1"):
        layer(drawn(1, 1, 24), source, Padding([5, 3]), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("listening", ["query", "rotary", "query_norm", "observer", "mask"])
def test_who_listens_to_a_step_is_called(listening, monkeypatch):
    layer = MultiHeadAttention(24, 4, causal=True, query_key_norm=True, rotary=Rotary(6)).eval()
    cache, heard = Cache(1, batch=1, capacity=4), []
    layer(drawn(1, 2, 24), cache=cache)
    cache.advance(2)
    given = torch.ones(1, 3, dtype=torch.bool) if listening == "mask" else None
    if listening == "observer":
        layer.observer = lambda query, *_, **__: heard.append(1) or query
    elif listening != "mask":
        getattr(layer, listening).register_forward_hook(lambda *_: heard.append(1))
    monkeypatch.setattr(products, "attend", lambda *_, **__: pytest.fail("passed over"))
    layer(drawn(1, 1, 24), mask=given, cache=cache)
    assert heard or listening == "mask"


@torch.no_grad()
def test_a_step_beyond_the_room_is_refused():
    layer, cache = MultiHeadAttention(24, 4, causal=True), Cache(1, batch=1, capacity=3)
    layer(drawn(1, 2, 24), mask=Causal(), cache=cache)
    cache.advance(2)
    with pytest.raises(ValueError, match="beyond its capacity of 3"):
        layer(drawn(1, 2, 24), mask=Causal(), cache=cache)
    with pytest.raises(ValueError, match="built for a batch of 1"):
        layer(drawn(2, 1, 24), mask=Causal(), cache=cache)
    room = torch.zeros(1, 4, 3, 6)
    query = (layer.query.weight, layer.query.bias)
    with pytest.raises(RuntimeError, match="do not belong together"):
        products.attend(
            drawn(1, 2, 24), [query] * 4, norms=(None, None), epsilon=0.0, tables=None,
            room=(room, room), start=2, masks=cpu.Masks(),
        )  # fmt: skip


BLOCKS = {
    "modern": {"activation": "swiglu", "bias": False},
    "relu": {"activation": "relu", "bias": True},
    "its own epsilon": {"activation": "swiglu", "bias": False, "epsilon": None},
    "gpt2": {"activation": "gelu_tanh", "bias": True, "norm": "layer"},
    "layer norm without a bias": {"activation": "gelu", "bias": False, "norm": "layer"},
}


def make_block(activation="swiglu", *, bias=False, norm="rms", norm_first=True, dropout=0.0, **changes) -> Block:
    torch.manual_seed(0)
    attention = MultiHeadAttention(24, 4, causal=True, bias=bias, rotary=Rotary(6), query_key_norm=True)
    block = Block(
        attention,
        FeedForward(24, 40, activation=activation, bias=bias),
        d_model=24,
        bias=bias,
        norm=norm,
        norm_first=norm_first,
        dropout=dropout,
    ).eval()
    for name, parameter in block.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for layer in (block.attention_norm, block.feed_forward_norm):
        layer.eps = changes.get("epsilon", layer.eps)
    return block


def through(block: Block, x: torch.Tensor, tokens: int) -> torch.Tensor:
    """What a block makes of x, the first three tokens at once and then so many at a time."""
    cache, parts = Cache(1, batch=len(x), capacity=x.shape[1]), []
    for part in x.split([3, *[tokens] * ((x.shape[1] - 3) // tokens)], dim=1):
        parts.append(block(part, cache=cache))
        cache.advance(part.shape[1])
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_step_by_step_is_the_whole(kind, tokens, instructions, monkeypatch):
    block, x = make_block(**BLOCKS[kind]), drawn(2, 11, 24)
    given = []
    for name in ("attend", "feed_forward"):
        ours = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, f=ours, **k: given.append(k["norm"]) or f(*a, **k))
    stepped = through(block, x, tokens)
    # The network of the first three tokens, whose attention has no past, is one more.
    assert len(given) == 1 + 2 * 8 // tokens and all(norm[0] is not None for norm in given)
    if BLOCKS[kind].get("epsilon", 0) is None:
        for layer in (block.attention_norm, block.feed_forward_norm):
            layer.eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(stepped.double(), block.double()(x.double()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "place",
    [
        "attention",
        "feed_forward",
        "attention_norm",
        "feed_forward_norm",
        "attention.query",
        "attention.output",
        "attention.key_norm",
        "feed_forward.gate",
        "feed_forward.down",
    ],
)
def test_who_listens_to_a_part_of_a_block_hears_every_step(place):
    block, x, heard = make_block(), drawn(1, 6, 24), []
    silent = through(block, x, 1)
    block.get_submodule(place).register_forward_hook(lambda *_: heard.append(1))
    torch.testing.assert_close(through(block, x, 1), silent, rtol=1e-5, atol=1e-6)
    assert len(heard) == 4


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"norm_first": False}, {"dropout": 0.5}])
def test_a_block_of_another_kind_has_its_modules_called(changes):
    """Norms after a sublayer, and dropout, in training alone."""
    block, x = make_block(**changes), drawn(1, 6, 24)
    torch.testing.assert_close(through(block, x, 1), block(x), rtol=1e-5, atol=1e-5)
    if block.dropout:
        block.train()
        assert not torch.equal(through(block, x, 1), through(block, x, 1))


@torch.no_grad()
def test_another_module_in_a_norms_place_is_called():
    unlearned = nn.LayerNorm(24, elementwise_affine=False)
    for other in (nn.Identity(), RMSNorm(24, elementwise_affine=False), nn.RMSNorm(24), unlearned):
        block, x = make_block(), drawn(1, 6, 24)
        block.attention_norm = block.feed_forward_norm = other
        torch.testing.assert_close(through(block, x, 1), block(x), rtol=1e-5, atol=1e-5)


def test_a_sublayers_norm_and_width_are_checked():
    x, maps = drawn(1, 24), [(drawn(8, 24), None), (drawn(24, 8), None)]
    for norm in ((drawn(23), None), (drawn(24), drawn(23)), (drawn(24).double(), None)):
        with pytest.raises(RuntimeError, match=r"a norm's weight \(width\) and LayerNorm's bias"):
            products.feed_forward(x, *maps, curve=products.RELU, norm=(*norm, 0.0, True))
    with pytest.raises(RuntimeError, match="RMSNorm has no bias"):
        products.feed_forward(x, *maps, curve=products.RELU, norm=(drawn(24), drawn(24), 0.0, False))
    with pytest.raises(RuntimeError, match="must be as wide as x"):
        products.feed_forward(x, maps[0], (drawn(5, 8), None), curve=0, norm=(drawn(24), None, 0.0, False))
    for gate, curve in ((maps[0], products.RELU), (products.NO_MAP, 3), (products.NO_MAP, -2)):
        with pytest.raises(RuntimeError, match="no such activation, or a gate without silu"):
            products.feed_forward(x, *maps, gate, curve=curve)


@torch.no_grad()
def test_a_gate_is_written_over_only_where_nobody_else_has_it():
    layer, x, kept = FeedForward(24, 40), drawn(20, 24), []
    plain, gate = layer(x), layer.gate(x)
    layer.gate.register_forward_hook(lambda *given: kept.append(given[-1]))
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(kept[0], gate)
    layer = FeedForward(24, 40)
    batched = {name: torch.stack([parameter, 2 * parameter]) for name, parameter in layer.named_parameters()}
    both = torch.func.vmap(lambda given: torch.func.functional_call(layer, given, (x,)))(batched)
    torch.testing.assert_close(both[0], layer(x))
    shared = torch.ones(20, 40)
    layer.gate = Same(shared)
    layer(x)
    assert torch.equal(shared, torch.ones(20, 40))


class Same(nn.Module):
    """Gives the same tensor every time."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self.tensor = tensor

    def forward(self, x):
        return self.tensor
