"""Weights to and from `torch.nn.Transformer`, and its masks as ours.

PyTorch's Transformer is the two stacks alone: embeddings, positions and the head are added by who uses it.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from sightline.layers import MultiHeadAttention
from sightline.masks import Allowed, Bias, Mask

_Pairs = list[tuple[Tensor | None, Tensor | None]]
_Part = tuple[str, str | None, str]  # our name, their attention, their norm

_ACTIVATIONS: dict[Any, str] = {nn.functional.relu: "relu", nn.functional.gelu: "gelu"}


def from_torch(transformer: nn.Transformer, *, vocabulary: int, **changes: Any) -> EncoderDecoder:
    """An `EncoderDecoder` whose stacks hold a copy of these weights; embeddings and head are drawn anew.

    `changes` are fields of the config that PyTorch's Transformer does not have, such as context and positions.
    What it computes: `model.read(y, model.encoder.read(x, mask), ...)` for vectors (batch tokens d_model), with
    `torch_mask` for the masks.

    Raises: ValueError for a Transformer that ours cannot be: another activation, eps or dropout than one for all, an
        own encoder or decoder, a bias or final norm in one place alone.

    >>> peer = nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()
    >>> model = from_torch(peer, vocabulary=10).eval()
    >>> x, y = torch.randn(1, 5, 32), torch.randn(1, 3, 32)
    >>> torch.allclose(model.read(y, model.encoder.read(x)), peer(x, y), atol=1e-5)
    True
    """
    config = _config(transformer, vocabulary, changes)
    dtype = next(transformer.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        model = EncoderDecoder(config).to(dtype)
    with torch.no_grad():
        for own, theirs in _partners(model, transformer):
            own.copy_(theirs)
    return model.train(transformer.training)


def to_torch(model: EncoderDecoder) -> nn.Transformer:
    """A `torch.nn.Transformer` (batch_first) with a copy of the weights of this model's stacks.

    Raises: ValueError for a setting that PyTorch's Transformer does not have, naming it.

    >>> model = EncoderDecoder(EncoderDecoderConfig.classic(vocabulary=10, d_model=32, num_layers=1))
    >>> to_torch(model.eval())(torch.randn(1, 5, 32), torch.randn(1, 3, 32)).shape
    torch.Size([1, 3, 32])
    """
    config = model.config
    for name, choices in (
        ("norm", ("layer",)),
        ("activation", ("relu", "gelu")),
        ("positions", ("sinusoidal", "learned", "none")),
    ):
        if getattr(config, name) not in choices:
            raise ValueError(
                f"torch.nn.Transformer has no {name} {getattr(config, name)!r}, only {' or '.join(choices)}"
            )
    with warnings.catch_warnings():  # that its prototype of nested tensors does not go with these settings
        warnings.filterwarnings("ignore", "enable_nested_tensor")
        transformer = nn.Transformer(
            config.d_model,
            config.num_heads,
            config.num_layers,
            config.decoder_layers,
            config.d_ff,
            config.dropout,
            config.activation,
            batch_first=True,
            norm_first=config.norm_first,
            bias=config.bias,
        ).to(next(model.parameters()).dtype)
    transformer.encoder.enable_nested_tensor = transformer.encoder.use_nested_tensor = False
    if not config.final_norm:
        transformer.encoder.norm = transformer.decoder.norm = None
    with torch.no_grad():
        for own, theirs in _partners(model, transformer):
            theirs.copy_(own)
    return transformer.train(model.training)


def torch_mask(mask: Tensor | None = None, key_padding: Tensor | None = None, *, num_heads: int = 1) -> Mask | None:
    """The masks of `torch.nn.Transformer` as one of ours, where True means the opposite.

    `mask` is (queries keys) or (batch * heads queries keys), `key_padding` (batch keys); bool tensors are True where a
    key is hidden, float tensors are added to the scores.

    >>> print(torch_mask(nn.Transformer.generate_square_subsequent_mask(3)).draw(queries=3, keys=3))
    # . .
    # # .
    # # #
    """
    found: Mask | None = None
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, num_heads))
    for tensor in (mask, None if key_padding is None else key_padding[:, None, None, :]):
        if tensor is not None:
            own = Allowed(~tensor) if tensor.dtype == torch.bool else Bias(tensor)
            found = own if found is None else found & own
    return found


def _config(transformer: nn.Transformer, vocabulary: int, changes: dict[str, Any]) -> EncoderDecoderConfig:
    encoder, decoder = transformer.encoder, transformer.decoder
    if type(encoder) is not nn.TransformerEncoder or type(decoder) is not nn.TransformerDecoder:
        raise ValueError("from_torch: expected PyTorch's own encoder and decoder, got a custom one")
    layers: list[Any] = [*encoder.layers, *decoder.layers]
    if not all(type(layer) in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer) for layer in layers):
        raise ValueError("from_torch: expected PyTorch's own layers, got custom ones")
    facts = {
        "num_heads": [layer.self_attn.num_heads for layer in layers],
        "d_ff": [layer.linear1.out_features for layer in layers],
        "norm_first": [layer.norm_first for layer in layers],
        "activation": [_ACTIVATIONS.get(getattr(layer, "activation", None)) for layer in layers],
        "bias": [layer.linear1.bias is not None for layer in layers],
        "final_norm": [stack.norm is not None for stack in (encoder, decoder)],
        "dropout": [m.p for layer in layers for m in layer.modules() if isinstance(m, nn.Dropout)],
    }
    facts["dropout"] += [m.dropout for m in transformer.modules() if isinstance(m, nn.MultiheadAttention)]
    for name, values in facts.items():
        if len(set(values)) != 1 or values[0] is None:
            got = " and ".join(sorted(set(map(str, values))))
            raise ValueError(f"from_torch: expected one known {name} for all layers of both stacks, got {got}")
    eps = {module.eps for module in transformer.modules() if isinstance(module, nn.LayerNorm)}
    if eps != {1e-5}:
        raise ValueError(f"from_torch: expected LayerNorms with eps 1e-05, got {sorted(eps)}")
    return EncoderDecoderConfig(
        vocabulary=vocabulary,
        d_model=transformer.d_model,
        num_layers=len(encoder.layers),
        decoder_layers=len(decoder.layers),
        norm="layer",
        **({"positions": "sinusoidal", "scale_embeddings": True} | {n: v[0] for n, v in facts.items()} | changes),
    )


def _partners(model: EncoderDecoder, transformer: nn.Transformer) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of ours with its partner; parts of PyTorch's joined maps are views."""
    found: _Pairs = []
    for own, theirs in zip(model.encoder.blocks, transformer.encoder.layers, strict=True):
        found += _block(own, theirs, [("attention", "self_attn", "norm1"), ("feed_forward", None, "norm2")])
    parts = [
        ("attention", "self_attn", "norm1"),
        ("cross_attention", "multihead_attn", "norm2"),
        ("feed_forward", None, "norm3"),
    ]
    for own, theirs in zip(model.blocks, transformer.decoder.layers, strict=True):
        found += _block(own, theirs, parts)
    for own, theirs in ((model.encoder.norm, transformer.encoder.norm), (model.norm, transformer.decoder.norm)):
        if own is not None:
            found += _weights(own, theirs)
    return [(own, theirs) for own, theirs in found if own is not None and theirs is not None]


def _block(own: Any, theirs: Any, parts: list[tuple[str, str | None, str]]) -> _Pairs:
    found = _weights(own.feed_forward.up, theirs.linear1) + _weights(own.feed_forward.down, theirs.linear2)
    for name, attention, norm in parts:
        found += _weights(getattr(own, f"{name}_norm"), getattr(theirs, norm))
        if attention is not None:
            found += _attention(getattr(own, name), getattr(theirs, attention))
    return found


def _attention(own: MultiHeadAttention, theirs: nn.MultiheadAttention) -> _Pairs:
    found = _weights(own.output, theirs.out_proj)
    joined = theirs.in_proj_weight, theirs.in_proj_bias
    for part, linear in enumerate((own.query, own.key, own.value)):
        found += [
            (tensor, None if whole is None else whole.chunk(3)[part])
            for tensor, whole in zip((linear.weight, linear.bias), joined, strict=True)
        ]
    return found


def _weights(own: Any, theirs: Any) -> _Pairs:
    return [(own.weight, theirs.weight), (own.bias, theirs.bias)]
