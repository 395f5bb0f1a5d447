"""The encoder: tokens in, a vector for each out, every token seeing all; and what it can do without a decoder.

`MaskedWords` fills in words that were hidden, `Classifier` tells texts apart. Knows nothing of text.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.blocks import Block
from sightline.feed_forward import Activation, FeedForward
from sightline.layers import MultiHeadAttention
from sightline.losses import next_token_loss
from sightline.masks import Mask, Padding
from sightline.models import Positions
from sightline.positions import Learned, Rotary, Sinusoidal
from sightline.rows import Norm, make_norm
from sightline.shapes import shaped

Config = TypeVar("Config", bound="EncoderConfig")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of an `Encoder`. The defaults are `modern` and small; `classic` is the paper's base model.

    A 0 or None is replaced by what it stands for when the config is built.

    Raises: ValueError for a number out of range, widths that do not divide, or an unknown choice.

    >>> EncoderConfig.classic(vocabulary=37_000).d_ff
    2048
    """

    vocabulary: int
    """How many tokens there are."""
    context: int = 256
    """The most tokens of a sequence."""
    d_model: int = 128
    """Width of the residual stream."""
    num_layers: int = 3
    """Blocks."""
    num_heads: int = 4
    """Attention heads a block."""
    d_ff: int = 0
    """Width inside the feed-forward; 0: 8/3 d_model to the nearest 32 for swiglu, else 4 d_model."""
    dropout: float = 0.0
    """On embeddings, on attention weights and on what each sublayer adds; in training only."""
    norm: Norm = "rms"
    """RMSNorm or LayerNorm."""
    norm_first: bool = True
    """Pre-norm; otherwise post-norm, as in the paper."""
    final_norm: bool | None = None
    """A norm after the last block. None: as pre-norm needs it; PyTorch's Transformer has it always."""
    positions: Positions = "rotary"
    """Where positions come from."""
    activation: Activation = "swiglu"
    """The feed-forward's."""
    bias: bool = False
    """On every linear map and LayerNorm, the head excepted."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(d_model)."""

    @classmethod
    def modern(cls: type[Config], *, vocabulary: int, **changes: Any) -> Config:
        """Pre-norm RMSNorm, rotary, SwiGLU, no biases: the defaults."""
        return cls(vocabulary=vocabulary, **changes)

    @classmethod
    def classic(cls: type[Config], *, vocabulary: int, **changes: Any) -> Config:
        """The base model of Vaswani et al. 2017, table 3: six layers of width 512, eight heads, post-norm."""
        paper: dict[str, Any] = {
            "d_model": 512,
            "num_layers": 6,
            "num_heads": 8,
            "norm": "layer",
            "norm_first": False,
            "positions": "sinusoidal",
            "activation": "relu",
            "bias": True,
            "scale_embeddings": True,
            "dropout": 0.1,
        }
        return cls(vocabulary=vocabulary, **(paper | changes))

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`.

        Raises: ValueError for an unknown key, naming the nearest known one, or without a vocabulary.
        """
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
                raise ValueError(f"{cls.__name__}: unknown key {key!r}; did you mean {nearest!r}?")
        if "vocabulary" not in values:
            raise ValueError(f"{cls.__name__}: the key 'vocabulary' is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON can hold it."""
        return asdict(self)

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field(type(self).__name__, field.name, getattr(self, field.name), field.type)
        if self.d_model % self.num_heads:
            raise ValueError(
                f"{type(self).__name__}: d_model {self.d_model} is not divisible by num_heads {self.num_heads}"
            )
        if self.positions == "rotary" and self.d_model // self.num_heads % 2:
            raise ValueError(
                f"{type(self).__name__}: rotary positions need an even width of heads, got "
                f"{self.d_model // self.num_heads}"
            )
        swiglu = 32 * max(1, round(self.d_model * 8 / 3 / 32))
        derived = {"d_ff": swiglu if self.activation == "swiglu" else 4 * self.d_model}
        for name, number in derived.items():
            object.__setattr__(self, name, getattr(self, name) or number)
        if self.final_norm is None:
            object.__setattr__(self, "final_norm", self.norm_first)


class Embedding(nn.Module):
    """Vectors of tokens at their positions, with dropout: what a stack of blocks begins with.

    >>> Embedding(EncoderConfig(vocabulary=9, d_model=16, num_heads=2))(torch.tensor([[1, 2]])).shape
    torch.Size([1, 2, 16])
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.d_model)
        self.positions: nn.Module | None = None
        if config.positions == "sinusoidal":
            self.positions = Sinusoidal(config.d_model, config.context)
        elif config.positions == "learned":
            self.positions = Learned(config.d_model, config.context)

    @shaped
    def forward(self, tokens: Annotated[Tensor, "batch tokens"], start: int = 0) -> Tensor:
        """(batch tokens d_model); the first token stands at position `start`."""
        config, stop = self.config, start + tokens.shape[1]
        if tokens.is_floating_point() or not tokens.shape[1]:
            raise ValueError(f"expected at least one whole number a sequence, got {tokens.dtype} {tuple(tokens.shape)}")
        if stop > config.context:
            raise ValueError(f"expected sequences of at most {config.context} tokens, the context, got {stop}")
        x = self.tokens(tokens)
        if config.scale_embeddings:
            x = x * math.sqrt(config.d_model)
        if self.positions is not None:
            x = self.positions(x, start)
        return F.dropout(x, config.dropout, self.training)


class Encoder(nn.Module):
    """A stack of blocks in which every token of a sequence sees every other, before and after it.

    Linear maps are drawn as Glorot and Bengio 2010 say, embeddings from normal(0, 1 / sqrt(d_model)), so that scaled
    ones have variance 1; biases start at 0, norms at 1.

    Source: Vaswani et al. 2017, section 3.1; the first weights: those of its authors' tensor2tensor.

    >>> model = Encoder(EncoderConfig(vocabulary=100, d_model=32, num_layers=2))
    >>> model(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2])).shape
    torch.Size([2, 3, 32])
    """

    def __init__(self, config: EncoderConfig, embedding: Embedding | None = None) -> None:
        """`embedding` is one to share; None makes one."""
        super().__init__()
        self.config = config
        self.embedding = Embedding(config) if embedding is None else embedding
        rotary = make_rotary(config)
        self.blocks = nn.ModuleList(
            Block(make_attention(config, layer, rotary), make_feed_forward(config), **block_options(config))
            for layer in range(config.num_layers)
        )
        self.norm = make_norm(config.norm, config.d_model, bias=config.bias) if config.final_norm else None
        draw(self)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """A vector for every token, (batch tokens d_model).

        Sequence b has `lengths[b]` tokens, and padding after them, which no token sees; None: as many as there are.

        Raises: ShapeError or ValueError for tokens that are not whole numbers (batch tokens), or beyond the context.
        """
        return self.read(self.embedding(tokens), None if lengths is None else Padding(lengths))

    def read(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """The same from vectors (batch tokens d_model), under any mask."""
        for block in self.blocks:
            x = block(x, mask)
        return x if self.norm is None else self.norm(x)


class MaskedWords(nn.Module):
    """An encoder that says what stood where tokens were hidden: masked-word training.

    The head shares the embedding's weights.

    Source: Devlin et al. 2019, section 3.1.

    >>> model = MaskedWords(Encoder(EncoderConfig(vocabulary=100, d_model=32, num_layers=1)))
    >>> tokens = torch.tensor([[5, 6, 7, 8]])
    >>> hidden, where = hide_tokens(tokens, mask_token=99, share=0.5, generator=torch.Generator().manual_seed(2))
    >>> model.loss(hidden, where, tokens).shape
    torch.Size([])
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (batch tokens vocabulary) of what stands at every place."""
        return F.linear(self.encoder(tokens, lengths), self.encoder.embedding.tokens.weight)

    def loss(
        self,
        tokens: Annotated[Tensor, "batch tokens"],
        where: Annotated[Tensor, "batch tokens"],
        targets: Annotated[Tensor, "batch tokens"],
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Mean negative log-likelihood in nats of `targets` at the places `where` (bool)."""
        if not where.any():
            raise ValueError("MaskedWords: no token is hidden; hide at least one")
        features = self.encoder(tokens, lengths)
        return next_token_loss(features[where], self.encoder.embedding.tokens.weight, targets[where])


def hide_tokens(
    tokens: Tensor,
    *,
    mask_token: int,
    share: float = 0.15,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide a share of the tokens: the tokens with `mask_token` in their place, and where (bool).

    Padding is never hidden. Source: Devlin et al. 2019, section 3.1, without its one in five that is not masked.

    Raises: ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"hide_tokens: share must be above 0 and at most 1, got {share}")
    where = torch.rand(tokens.shape, generator=generator) < share
    if lengths is not None:
        where &= torch.arange(tokens.shape[1]) < lengths.cpu()[:, None]
    where = where.to(tokens.device)
    return tokens.masked_fill(where, mask_token), where


class Classifier(nn.Module):
    """An encoder that tells texts apart: the mean of its vectors over the real tokens, and one linear map.

    >>> model = Classifier(Encoder(EncoderConfig(vocabulary=100, d_model=32, num_layers=1)), num_classes=3)
    >>> model(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])).shape
    torch.Size([2, 3])
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"Classifier: num_classes must be at least 2, got {num_classes}")
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.d_model, num_classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (batch num_classes)."""
        x = self.encoder(tokens, lengths)
        if lengths is None:
            return self.head(x.mean(1))
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return self.head((x * real[..., None]).sum(1) / lengths.clamp(min=1)[:, None])

    def loss(self, tokens: Tensor, classes: Annotated[Tensor, "batch"], lengths: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the classes, in nats."""
        return F.cross_entropy(self(tokens, lengths), classes)


def make_rotary(config: EncoderConfig) -> Rotary | None:
    """The rotary positions of a stack, if it has them."""
    width = config.d_model // config.num_heads
    return Rotary(width, length=config.context) if config.positions == "rotary" else None


def make_attention(
    config: EncoderConfig, layer: int, rotary: Rotary | None = None, *, cross: bool = False
) -> MultiHeadAttention:
    """Attention of one block, which hides nothing by itself; `cross`: to another text, so without positions."""
    return MultiHeadAttention(
        config.d_model,
        config.num_heads,
        dropout=config.dropout,
        bias=config.bias,
        rotary=rotary,
        alibi=config.positions == "alibi" and not cross,
        layer=layer,
    )


def make_feed_forward(config: EncoderConfig) -> FeedForward:
    """The feed-forward of one block."""
    return FeedForward(config.d_model, config.d_ff, activation=config.activation, bias=config.bias)


def block_options(config: EncoderConfig) -> dict[str, Any]:
    """What a block takes beside its parts."""
    return {name: getattr(config, name) for name in ("d_model", "norm", "norm_first", "bias", "dropout")}


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """The first weights, as `Encoder` says."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=module.embedding_dim**-0.5)
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                module.bias.zero_()


def _check_field(where: str, name: str, value: object, kind: Any) -> None:
    choices = get_args(kind)
    if type(None) in choices:
        choices = (None, True, False)
    if choices and value not in choices:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(str, choices))}; got {value!r}")
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{where}: {name} must be true or false, got {value!r}")
    if kind is int:
        least = 0 if name in ("d_ff", "decoder_layers") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{where}: {name} must be a whole number of at least {least}, got {value!r}")
    if kind is float and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1):
        raise ValueError(f"{where}: {name} must be at least 0 and below 1, got {value!r}")
