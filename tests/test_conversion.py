"""The two stacks compute what `torch.nn.Transformer` computes with the same weights, both ways, under every mask."""

import pytest
import torch
from torch import nn

from sightline.conversion import from_torch, to_torch, torch_mask
from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

TOLERANCE = 1e-5


def peer(norm_first: bool, **changes) -> nn.Transformer:
    torch.manual_seed(0)
    settings = {"dim_feedforward": 48, "norm_first": norm_first, "batch_first": True} | changes
    transformer = nn.Transformer(32, 4, 2, 3, **settings)
    with torch.no_grad():  # away from the ones and zeros that norms and biases begin with
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return transformer.eval()


def read(model: EncoderDecoder, x, y, source=None, target=None, memory=None) -> torch.Tensor:
    return model.read(y, model.encoder.read(x, source), target, memory)


X, Y = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)), torch.randn(
    3, 5, 32, generator=torch.Generator().manual_seed(2)
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("changes", [{}, {"activation": "gelu", "bias": False}])
def test_without_masks(norm_first, changes):
    transformer = peer(norm_first, **changes)
    model = from_torch(transformer, vocabulary=11)
    assert model.config.norm_first == norm_first and model.config.decoder_layers == 3 and model.config.final_norm
    with torch.no_grad():
        torch.testing.assert_close(read(model, X, Y), transformer(X, Y), atol=TOLERANCE, rtol=0)


def masks(kind: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)

    def pattern(*shape: int) -> torch.Tensor:
        hidden = torch.rand(*shape, generator=draw) < 0.4
        hidden[..., 0] = False  # a query that sees nothing is NaN in PyTorch
        return hidden if kind == "bool" else torch.zeros(shape).masked_fill(hidden, -torch.inf)

    given = {"src_mask": pattern(7, 7), "tgt_mask": pattern(12, 5, 5), "memory_mask": pattern(5, 7)}
    given |= {"src_key_padding_mask": pattern(3, 7), "tgt_key_padding_mask": pattern(3, 5)}
    return given | {"memory_key_padding_mask": pattern(3, 7)}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_under_all_masks_at_once(norm_first, kind):
    transformer, given = peer(norm_first), masks(kind)
    ours = {
        name: torch_mask(given[f"{short}_mask"], given[f"{short}_key_padding_mask"], num_heads=4)
        for name, short in (("source", "src"), ("target", "tgt"), ("memory", "memory"))
    }
    with torch.no_grad():
        expected = transformer(X, Y, **given)
        found = read(from_torch(transformer, vocabulary=11), X, Y, **ours)
        assert not torch.allclose(found, read(from_torch(transformer, vocabulary=11), X, Y), atol=1e-2)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
def test_back_to_pytorch(norm_first, final_norm):
    torch.manual_seed(0)
    config = EncoderDecoderConfig.classic(
        vocabulary=11, d_model=32, num_heads=4, num_layers=2, norm_first=norm_first, final_norm=final_norm
    )
    model = EncoderDecoder(config).eval()
    source, target, lengths = torch.randint(11, (3, 7)), torch.randint(11, (3, 5)), torch.tensor([7, 4, 6])
    transformer = to_torch(model)
    padding = torch.arange(7) >= lengths[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        expected = transformer(
            model.encoder.embedding(source),
            model.embedding(target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        found = model.decode(target, model.encode(source, lengths), lengths)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    back = from_torch(transformer, vocabulary=11)
    assert back.config.final_norm == final_norm
    own = {name: tensor for name, tensor in model.state_dict().items() if "embedding" not in name}
    for name, tensor in own.items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_gradients_are_pytorchs():
    transformer = peer(False)
    model = from_torch(transformer, vocabulary=11)
    for found in (read(model, X, Y), transformer(X, Y)):
        found.square().mean().backward()
    theirs = transformer.decoder.layers[1].multihead_attn.in_proj_weight.grad.chunk(3)[1]
    torch.testing.assert_close(model.blocks[1].cross_attention.key.weight.grad, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_what_ours_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match=r"expected one known activation .* got None"):
        from_torch(peer(False, activation=torch.tanh), vocabulary=11)
    with pytest.raises(ValueError, match=r"eps 1e-05, got \[0.001\]"):
        from_torch(peer(False, layer_norm_eps=1e-3), vocabulary=11)
    other = peer(True)
    other.decoder.norm = None
    with pytest.raises(ValueError, match="expected one known final_norm"):
        from_torch(other, vocabulary=11)
    with pytest.raises(ValueError, match="no norm 'rms', only layer"):
        to_torch(EncoderDecoder(EncoderDecoderConfig(vocabulary=11)))
    with pytest.raises(ValueError, match="no positions 'rotary'"):
        to_torch(EncoderDecoder(EncoderDecoderConfig.classic(vocabulary=11, positions="rotary")))
