"""The decoder: against a definition written here, step by step against one pass, and its bad inputs."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.causality import check_causal
from sightline.layers import MultiHeadAttention
from sightline.models import Decoder, DecoderConfig
from sightline.shapes import ShapeError

SMALL = {"vocabulary": 11, "context": 24, "d_model": 16, "num_layers": 2, "num_heads": 4}
KINDS = {
    "modern": DecoderConfig.modern(**SMALL),
    "grouped": DecoderConfig.modern(**SMALL, num_groups=2, head_width=8, tied=False),
    "classic": DecoderConfig.classic(**SMALL),
    "learned": DecoderConfig.modern(**SMALL, positions="learned", norm="layer", activation="gelu", bias=True),
    "alibi": DecoderConfig.modern(**SMALL, positions="alibi"),
    "none": DecoderConfig.modern(**SMALL, positions="none", norm_first=False),
    "window": DecoderConfig.modern(
        **SMALL, window_before=3, rotary_scaling=(4.0, 1.0, 4.0, 8.0), norm_epsilon=1e-3, query_key_value_bias=True
    ),
}


def decoder(kind: str = "modern", seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(KINDS[kind])


def bold(model: Decoder) -> Decoder:
    """The same model with large random numbers in all places, so that nothing hides behind a small one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 + (parameter.ndim == 1))
    return model


def some_tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(5))


def qwen3(weights: dict[str, torch.Tensor], config: DecoderConfig, tokens: torch.Tensor) -> torch.Tensor:
    """The Qwen3 architecture for one sequence, one head and one query at a time."""

    def rms(x, name):
        return weights[name] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    def rotate(x, position):
        half = len(x) // 2
        angle = position * config.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
        pairs = torch.complex(x[:half], x[half:]) * torch.complex(angle.cos(), angle.sin())
        return torch.cat((pairs.real, pairs.imag))

    x, width = weights["embedding.weight"][tokens], config.head_width
    for layer in range(config.num_layers):
        name = f"blocks.{layer}."
        normed = rms(x, name + "attention_norm.weight")
        query, key, value = (
            (normed @ weights[f"{name}attention.{part}.weight"].T).unflatten(-1, (-1, width))
            for part in ("query", "key", "value")
        )
        query = rms(query, name + "attention.query_norm.weight")
        key = rms(key, name + "attention.key_norm.weight")
        rows = []
        for i in range(len(tokens)):
            heads = []
            for head in range(config.num_heads):
                group = head // (config.num_heads // config.num_groups)
                q = rotate(query[i, head], i)
                scores = torch.stack([q @ rotate(key[j, group], j) for j in range(i + 1)]) / math.sqrt(width)
                heads.append(scores.softmax(0) @ value[: i + 1, group])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ weights[name + "attention.output.weight"].T
        normed = rms(x, name + "feed_forward_norm.weight")
        gate, up = (normed @ weights[f"{name}feed_forward.{part}.weight"].T for part in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[name + "feed_forward.down.weight"].T
    head = weights["embedding.weight"] if config.tied else weights["head.weight"]
    return rms(x, "norm.weight") @ head.T


@pytest.mark.parametrize("kind", ["modern", "grouped"])
def test_modern_is_the_qwen3_architecture(kind):
    model = bold(decoder(kind).double())
    tokens = some_tokens(batch=2, length=7)
    expected = torch.stack([qwen3(model.state_dict(), model.config, row) for row in tokens])
    assert torch.allclose(model(tokens), expected, atol=1e-10)


def test_classic_is_the_paper_s_stack():
    """PyTorch's own post-norm encoder layer under a causal mask, on the paper's embeddings."""
    model = bold(decoder("classic").double()).eval()
    tokens = some_tokens(length=9)
    position, pair = torch.arange(9.0, dtype=torch.float64)[:, None], torch.arange(0, 16, 2) / 16
    encoding = torch.stack(((position / 10000**pair).sin(), (position / 10000**pair).cos()), -1).flatten(-2)
    x = model.embedding.weight[tokens] * 4 + encoding
    for block in model.blocks:
        state, ours = {}, block.state_dict()
        for kind in ("weight", "bias"):
            state[f"self_attn.in_proj_{kind}"] = torch.cat(
                [ours[f"attention.{part}.{kind}"] for part in ("query", "key", "value")]
            )
            state[f"self_attn.out_proj.{kind}"] = ours[f"attention.output.{kind}"]
            state[f"linear1.{kind}"] = ours[f"feed_forward.up.{kind}"]
            state[f"linear2.{kind}"] = ours[f"feed_forward.down.{kind}"]
            state[f"norm1.{kind}"] = ours[f"attention_norm.{kind}"]
            state[f"norm2.{kind}"] = ours[f"feed_forward_norm.{kind}"]
        layer = torch.nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, batch_first=True, dtype=torch.float64)
        layer.load_state_dict(state)
        x = layer(x, src_mask=torch.ones(9, 9).triu(1).bool())
    assert torch.allclose(model(tokens), x @ model.embedding.weight.T, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=24))
@settings(max_examples=5)
def test_decoding_in_chunks_equals_one_pass(kind, chunks):
    model = bold(decoder(kind).double()).eval()
    tokens = some_tokens()
    cache, parts, start = model.new_cache(batch=2), [], 0
    with torch.no_grad():
        for size in [*chunks, *[1] * 24]:
            chunk = tokens[:, start : start + size]
            if chunk.shape[1]:
                parts.append(model(chunk, cache=cache))
            start += size
        whole = model(tokens)
    assert cache.length == 24
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-11)


def test_a_cleared_cache_starts_again():
    model = decoder().eval()
    tokens, cache = some_tokens(batch=1), model.new_cache()
    with torch.no_grad():
        model(tokens, cache=cache)
        cache.clear()
        again = model(tokens[:, 12:], cache=cache)
        assert torch.allclose(again, model(tokens[:, 12:]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_causal(kind):
    model = bold(decoder(kind))
    state = torch.get_rng_state()
    check_causal(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_sees_its_future_is_caught(kind):
    model = decoder(kind)
    model.blocks[1].attention.causal = False
    with pytest.raises(RuntimeError, match="logits at position 0 moved"):
        check_causal(model)
    assert model.training


def test_a_leak_of_one_late_token_is_caught_where_it_is():
    class Leaky(MultiHeadAttention):
        def forward(self, x, **options):
            late = torch.zeros(x.shape[1], 1)
            late[15] = 1e-3
            return super().forward(x, **options) + late * x.roll(-1, dims=1)

    model = decoder()
    model.blocks[0].attention.__class__ = Leaky
    with pytest.raises(RuntimeError, match=r"position 15 moved when only tokens from position 16 on"):
        check_causal(model)


def test_logits_that_are_nan_do_not_pass_as_causal():
    model = decoder()
    with torch.no_grad():
        model.embedding.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="or its logits are NaN"):
        check_causal(model)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    model = bold(decoder(kind))
    tokens = some_tokens(batch=8)
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name


def test_initialisation_is_what_the_docstring_says():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig.modern(vocabulary=300, d_model=128, num_layers=8, bias=True, tied=False))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            writes = "output" in name or "down" in name
            assert parameter.detach().std().item() == pytest.approx(0.005 if writes else 0.02, rel=0.05), name


def test_dropout_moves_training_and_leaves_evaluation():
    model = Decoder(DecoderConfig.modern(**SMALL, dropout=0.3))
    tokens = some_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_head_on_features(kind):
    model = decoder(kind).eval()
    tokens = some_tokens()
    head = model.embedding.weight if model.head is None else model.head.weight
    assert torch.equal(model(tokens), model.features(tokens) @ head.T)
    assert (model.head is None) == model.config.tied


def test_num_parameters_counts_by_hand():
    attention, feed_forward, norms = 4 * 16 * 16 + 2 * 4, 3 * 16 * 32, 2 * 16
    config = dataclasses.replace(KINDS["modern"], d_ff=32)
    assert Decoder(config).num_parameters == 11 * 16 + 2 * (attention + feed_forward + norms) + 16
    untied = Decoder(dataclasses.replace(config, tied=False))
    assert untied.num_parameters == Decoder(config).num_parameters + 11 * 16


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_bf16_stays_near(kind):
    model = decoder(kind).eval()
    tokens = some_tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(tokens)
    assert half.dtype == torch.bfloat16
    exact = model(tokens).detach()
    assert (half - exact).abs().max() < 0.03 * exact.abs().max()


def test_a_model_in_bf16_runs_and_decodes():
    model = decoder().bfloat16().eval()
    tokens, cache = some_tokens(batch=1), model.new_cache()
    with torch.no_grad():
        logits = model(tokens)
        assert logits.dtype == torch.bfloat16
        assert torch.allclose(model(tokens, cache=cache), logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")  # from inside PyTorch's compiler
@pytest.mark.parametrize("kind", ["modern", "alibi", "classic"])
def test_compiles_to_one_graph(kind):
    torch.compiler.reset()
    model, tokens = decoder(kind).eval(), some_tokens()
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(tokens), model(tokens), atol=1e-5)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(compiled(tokens).square().sum(), parameters)
    for gradient, expected in zip(ours, torch.autograd.grad(model(tokens).square().sum(), parameters), strict=True):
        assert torch.allclose(gradient, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(1, 25, dtype=torch.int64), ValueError, "25 tokens are beyond the context of 24"),
        (torch.zeros(5, dtype=torch.int64), ShapeError, "tokens has 1 axes, not 2"),
        (torch.zeros(1, 5), ValueError, r"whole number, got torch\.float32 \(1, 5\)"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "at least one whole number"),
    ],
)
@pytest.mark.parametrize("kind", ["modern", "alibi", "classic"])
def test_tokens_that_cannot_be_read_are_refused(kind, tokens, error, message):
    with pytest.raises(error, match=message):
        decoder(kind)(tokens)


def test_a_cache_counts_towards_the_context():
    model = decoder()
    cache = model.new_cache(batch=2)
    with torch.no_grad():
        model(some_tokens(length=20), cache=cache)
        with pytest.raises(ValueError, match="25 tokens are beyond the context of 24"):
            model(some_tokens(length=5), cache=cache)
    with pytest.raises(ValueError, match="cache of 25 tokens is beyond the context of 24"):
        model.new_cache(capacity=25)


def test_derived_sizes():
    modern = DecoderConfig.modern(vocabulary=5)
    assert (modern.num_groups, modern.head_width, modern.d_ff) == (4, 64, 672)
    assert DecoderConfig.classic(vocabulary=5, d_model=64).d_ff == 256
    assert DecoderConfig.classic(vocabulary=5).scale_embeddings
    assert DecoderConfig.modern(vocabulary=5) == DecoderConfig(vocabulary=5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_survives_json(kind):
    assert DecoderConfig.from_dict(json.loads(json.dumps(KINDS[kind].to_dict()))) == KINDS[kind]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 10}, "d_model 10 is not divisible by num_heads 4"),
        ({"num_groups": 3}, "num_heads 4 is not divisible by num_groups 3"),
        ({"head_width": 5}, "rotary positions need an even head_width, got 5"),
        ({"norm": "batch"}, "norm must be one of rms, layer; got 'batch'"),
        ({"positions": "rope"}, "positions must be one of rotary, sinusoidal, learned, alibi, none; got 'rope'"),
        ({"activation": "tanh"}, "activation must be one of swiglu, gelu, gelu_tanh, relu; got 'tanh'"),
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ({"d_ff": -1}, "d_ff must be a whole number of at least 0, got -1"),
        ({"context": 2.5}, "context must be a whole number of at least 1, got 2.5"),
        ({"d_model": True}, "d_model must be a whole number of at least 1, got True"),
        ({"bias": "yes"}, "bias must be true or false, got 'yes'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": "low"}, "dropout must be a number, got 'low'"),
        ({"rotary_base": 0.5}, "rotary_base must be above 1, got 0.5"),
        ({"rotary_base": 5e5, "positions": "none"}, "rotary_base has no effect with positions 'none'"),
        ({"rotary_scaling": (4.0, 1.0, 4.0)}, r"rotary_scaling must be \(factor, low, high, original\), .* got \(4.0"),
        ({"rotary_scaling": (4.0, 4.0, 1.0, 8.0)}, "rotary_scaling must be .* low below high"),
        ({"rotary_scaling": "yarn"}, "rotary_scaling must be .* got 'yarn'"),
        ({"norm_epsilon": 1.0}, "norm_epsilon must be at least 0 and below 1, got 1.0"),
        ({"window_before": -1}, "window_before must be a whole number of at least 0, got -1"),
        ({"bias": True, "query_key_value_bias": True}, "query_key_value_bias has no effect beside bias"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**({"vocabulary": 5} | changes))


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match="unknown key 'num_head'; did you mean 'num_heads'"):
        DecoderConfig.from_dict({"vocabulary": 5, "num_head": 4})
    with pytest.raises(ValueError, match="key 'vocabulary' is missing"):
        DecoderConfig.from_dict({"d_model": 64})
