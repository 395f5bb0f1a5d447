"""The whole Transformer of 2017: an encoder that reads a source, a decoder that writes a target and sees both.

Token ids in, a score for every next token of the target out. Knows nothing of text, and not how targets are searched.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn

from sightline.blocks import Block
from sightline.cache import Cache
from sightline.encoder import (
    Embedding,
    Encoder,
    EncoderConfig,
    block_options,
    draw,
    make_attention,
    make_feed_forward,
    make_rotary,
)
from sightline.feed_forward import FeedForward
from sightline.layers import MultiHeadAttention
from sightline.losses import next_token_loss
from sightline.masks import Causal, Mask, Padding
from sightline.rows import linear_maps, make_norm, scores
from sightline.shapes import shaped

if TYPE_CHECKING:
    from sightline.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(EncoderConfig):
    """The shape of an `EncoderDecoder`. The defaults are `modern` and small; `classic` is the paper's base model.

    Source and target share one vocabulary, and the context is the most tokens of either.

    Raises: ValueError for a number out of range, widths that do not divide, or an unknown choice.

    >>> EncoderDecoder(EncoderDecoderConfig.classic(vocabulary=37_000)).num_parameters
    63082496
    """

    decoder_layers: int = 0
    """Blocks of the decoder; 0: as many as the encoder's num_layers."""
    tied: bool = True
    """Source, target and head share one embedding; otherwise each has its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "decoder_layers", self.decoder_layers or self.num_layers)


class TargetCache:
    """What a decoder has read: its own keys and values of the target, and those of the source, which never change.

    With `beams`, each source has so many targets, in rows beside one another.
    """

    def __init__(self, num_layers: int, *, sources: int, source_tokens: int, beams: int, capacity: int) -> None:
        self.own = Cache(num_layers, batch=sources * beams, capacity=capacity)
        self.source = Cache(num_layers, batch=sources, capacity=source_tokens)


class DecoderBlock(Block):
    """A block with a sublayer between its two: attention from the target to the encoded source.

    Source: Vaswani et al. 2017, section 3.1.
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        cross_attention: MultiHeadAttention,
        feed_forward: FeedForward,
        config: EncoderConfig,
    ) -> None:
        super().__init__(attention, feed_forward, **block_options(config))
        self.cross_attention_norm = make_norm(config.norm, config.d_model, bias=config.bias)
        self.cross_attention = cross_attention

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (a block that needs more)
        self,
        x: Tensor,
        memory: Tensor,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        cache: TargetCache | None = None,
    ) -> Tensor:
        own = None if cache is None else cache.own
        x = self._attend(x, mask, own)
        if self.norm_first:
            x = x + self._drop(self._cross(self.cross_attention_norm(x), memory, memory_mask, cache))
        else:
            x = self.cross_attention_norm(x + self._drop(self._cross(x, memory, memory_mask, cache)))
        return self._feed(x)

    def _cross(self, x: Tensor, memory: Tensor, mask: Mask | None, cache: TargetCache | None) -> Tensor:
        # Several targets of one source are several queries to its keys: nothing of the source is repeated.
        queries = x.reshape(len(memory), -1, x.shape[-1])
        source = None if cache is None else cache.source
        return self.cross_attention(queries, memory, mask, cache=source).view_as(x)


class EncoderDecoder(nn.Module):
    """An encoder over the source, a causal decoder over the target that also sees the source, and a head.

    Source and target are (batch tokens), padded at their ends; `source_lengths` and `target_lengths` (batch) say how
    many tokens are real, None that all are. First weights as in `Encoder`.

    `tokenizer` is what `load` and training fill in; the model itself never uses it.

    Source: Vaswani et al. 2017, figure 1.

    >>> model = EncoderDecoder(EncoderDecoderConfig(vocabulary=100, d_model=32, num_layers=1))
    >>> source, target = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 2], [1, 3]])
    >>> model(source, target, torch.tensor([3, 2])).shape
    torch.Size([2, 2, 100])
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.encoder = Encoder(config)
        self.embedding = self.encoder.embedding if config.tied else Embedding(config)
        rotary = make_rotary(config)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                make_attention(config, layer, rotary),
                make_attention(config, layer, cross=True),
                make_feed_forward(config),
                config,
            )
            for layer in range(config.decoder_layers)
        )
        self.norm = make_norm(config.norm, config.d_model, bias=config.bias) if config.final_norm else None
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocabulary, bias=False)
        draw(self)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained; shared ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Logits (batch tokens vocabulary): at token i of the target, the scores of its token i + 1."""
        memory = self.encode(source, source_lengths)
        return self.logits(self.decode(target, memory, source_lengths))

    def logits(self, features: Tensor) -> Tensor:
        """What the head makes of what `decode` gives: (... vocabulary)."""
        return scores(features, self.head_weight) if self.head is None else linear_maps(features, self.head)[0]

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """What the decoder sees of the source: (batch tokens d_model)."""
        return self.encoder(source, source_lengths)

    @shaped
    def decode(
        self,
        target: Annotated[Tensor, "targets queries"],
        memory: Annotated[Tensor, "sources tokens d_model"],
        source_lengths: Annotated[Tensor, "sources"] | None = None,
        *,
        cache: TargetCache | None = None,
    ) -> Tensor:
        """What the head reads: (targets queries d_model).

        With a cache, `target` holds the newest tokens, and the cache holds them too afterwards; there may then be
        several targets a source, beside one another.
        """
        x = self.embedding(target, 0 if cache is None else cache.own.length)
        x = self.read(x, memory, Causal(), None if source_lengths is None else Padding(source_lengths), cache=cache)
        if cache is not None:
            cache.own.advance(target.shape[1])
            if not cache.source.length:
                cache.source.advance(memory.shape[1])
        return x

    def read(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        cache: TargetCache | None = None,
    ) -> Tensor:
        """The decoder's blocks from vectors (batch tokens d_model), under any masks; None hides nothing."""
        for block in self.blocks:
            x = block(x, memory, mask, memory_mask, cache=cache)
        return x if self.norm is None else self.norm(x)

    def loss(
        self,
        source: Annotated[Tensor, "batch source_tokens"],
        source_lengths: Annotated[Tensor, "batch"],
        target: Annotated[Tensor, "batch target_tokens"],
        target_lengths: Annotated[Tensor, "batch"],
        *,
        smoothing: float = 0.0,
    ) -> Tensor:
        """Mean negative log-likelihood, in nats, of each real token of `target` after its first.

        `smoothing` is label smoothing's (0.1 in the paper); scores are compared without.
        """
        features, wanted = self.predicted(source, source_lengths, target, target_lengths)
        return next_token_loss(features, self.head_weight, wanted, smoothing=smoothing)

    def predicted(
        self, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the head reads (tokens d_model) before each real token of `target` but its first, and those tokens."""
        memory = self.encode(source, source_lengths)
        features = self.decode(target[:, :-1], memory, source_lengths)
        real = torch.arange(1, target.shape[1], device=target.device) < target_lengths[:, None]
        return features[real], target[:, 1:][real]

    def new_cache(
        self, sources: int = 1, source_tokens: int | None = None, *, beams: int = 1, capacity: int | None = None
    ) -> TargetCache:
        """An empty cache; room for `source_tokens` and `capacity` tokens of target, None: the context."""
        context = self.config.context
        source_tokens, capacity = source_tokens or context, capacity or context
        if max(source_tokens, capacity) > context:
            raise ValueError(
                f"EncoderDecoder: {max(source_tokens, capacity)} tokens are beyond the context of {context}"
            )
        layers = self.config.decoder_layers
        return TargetCache(layers, sources=sources, source_tokens=source_tokens, beams=beams, capacity=capacity)

    @property
    def head_weight(self) -> Tensor:
        """(vocabulary d_model)"""
        return self.embedding.tokens.weight if self.head is None else self.head.weight
