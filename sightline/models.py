"""The language model: token ids in, a score for every next token out. Knows nothing of text.

`DecoderConfig` says everything about a `Decoder` but its numbers; its defaults are the preset `modern`.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn

from sightline import passes
from sightline.attention import check_dropout
from sightline.blocks import Block
from sightline.cache import Cache
from sightline.counts import Counts
from sightline.feed_forward import Activation, FeedForward
from sightline.layers import MultiHeadAttention
from sightline.losses import next_token_loss
from sightline.mixture import Mixture
from sightline.positions import Learned, Rotary, RotaryScaling, Sinusoidal
from sightline.rows import EPSILON, Norm, linear_maps, make_norm, scores
from sightline.shapes import ShapeError, shaped

if TYPE_CHECKING:
    from sightline.tokenizers import Tokenizer

Positions = Literal["rotary", "sinusoidal", "learned", "alibi", "none"]

_ROTARY_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a `Decoder`. The defaults are `modern`, of about 5 million parameters beside the vocabulary's.

    A 0 is replaced by what it stands for when the config is built, so `dataclasses.replace` keeps the result;
    build a new config to have it derived again.

    Raises: ValueError for a number out of range, widths that do not divide, or an unknown choice.

    >>> config = DecoderConfig.modern(vocabulary=1000, d_model=128)
    >>> config.d_ff, config.num_groups, config.head_width
    (352, 4, 32)
    """

    vocabulary: int
    """How many tokens there are."""
    context: int = 256
    """The most tokens the model reads at once."""
    d_model: int = 256
    """Width of the residual stream."""
    num_layers: int = 6
    """Blocks."""
    num_heads: int = 4
    """Attention heads a block."""
    num_groups: int = 0
    """Heads of keys and values; 0: as many as num_heads."""
    head_width: int = 0
    """Width of queries, keys and values in one head; 0: d_model / num_heads."""
    d_ff: int = 0
    """Width inside the feed-forward; 0: 8/3 d_model to the nearest 32 for swiglu, else 4 d_model."""
    dropout: float = 0.0
    """On embeddings, on attention weights and on what each sublayer adds; in training only."""
    norm: Norm = "rms"
    """RMSNorm or LayerNorm."""
    norm_epsilon: float = 0.0
    """Added to the variance in every norm; 0: 1e-6 for rms, 1e-5 for layer."""
    norm_first: bool = True
    """Pre-norm and a final norm; otherwise post-norm, as in the paper."""
    positions: Positions = "rotary"
    """Where positions come from."""
    rotary_base: float = 10000.0
    """The base of the rotary angles."""
    rotary_scaling: tuple[float, ...] = ()
    """Slower rotary angles for a longer context: factor, low, high, original (see `Rotary`); (): none."""
    window_before: int = 0
    """A token sees so many tokens before its own; 0: all."""
    activation: Activation = "swiglu"
    """The feed-forward's."""
    bias: bool = False
    """On every linear map and LayerNorm, the head excepted."""
    query_key_value_bias: bool = False
    """On the maps to queries, keys and values, where `bias` puts none."""
    query_key_norm: bool = True
    """RMSNorm over each head's queries and keys."""
    tied: bool = True
    """The head shares the embedding's weights."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(d_model)."""
    counts: int = 0
    """Runs of up to so many tokens are counted in the training text and have a say; 0: none. Beyond, it is no Qwen3."""
    pointer: bool = False
    """One more head copies tokens of the window as the next one. With it, it is no Qwen3."""

    @classmethod
    def modern(cls, *, vocabulary: int, **changes: Any) -> "DecoderConfig":
        """The Qwen3 architecture: pre-norm RMSNorm, rotary, query-key norm, SwiGLU, no biases."""
        return cls(vocabulary=vocabulary, **changes)

    @classmethod
    def classic(cls, *, vocabulary: int, **changes: Any) -> "DecoderConfig":
        """The 2017 paper's: sinusoidal positions, scaled embeddings, post-norm LayerNorm, ReLU, biases, dropout."""
        paper: dict[str, Any] = {
            "norm": "layer",
            "norm_first": False,
            "positions": "sinusoidal",
            "activation": "relu",
            "bias": True,
            "query_key_norm": False,
            "scale_embeddings": True,
            "dropout": 0.1,
        }
        return cls(vocabulary=vocabulary, **(paper | changes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DecoderConfig":
        """The inverse of `to_dict`.

        Raises: ValueError for an unknown key, naming the nearest known one, or without a vocabulary.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
                raise ValueError(f"DecoderConfig: unknown key {key!r}; did you mean {nearest!r}?")
        if "vocabulary" not in values:
            raise ValueError("DecoderConfig: the key 'vocabulary' is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON can hold it."""
        return dataclasses.asdict(self)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rotary_scaling", _scaling(self.rotary_scaling))
        for field in dataclasses.fields(self):
            _check_field(field.name, getattr(self, field.name), field.type)
        for name in ("rotary_base", "rotary_scaling"):
            if getattr(self, name) != getattr(DecoderConfig, name) and self.positions != "rotary":
                raise ValueError(f"DecoderConfig: {name} has no effect with positions {self.positions!r}; drop it")
        if self.bias and self.query_key_value_bias:
            raise ValueError("DecoderConfig: query_key_value_bias has no effect beside bias; drop it")
        if not self.head_width:
            _check_divides("d_model", self.d_model, "num_heads", self.num_heads)
        swiglu = 32 * max(1, round(self.d_model * 8 / 3 / 32))
        derived = {
            "num_groups": self.num_heads,
            "head_width": self.d_model // self.num_heads,
            "d_ff": swiglu if self.activation == "swiglu" else 4 * self.d_model,
            "norm_epsilon": EPSILON[self.norm],
        }
        for name, number in derived.items():
            object.__setattr__(self, name, getattr(self, name) or number)
        _check_divides("num_heads", self.num_heads, "num_groups", self.num_groups)
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"DecoderConfig: rotary positions need an even head_width, got {self.head_width}")


class Decoder(nn.Module):
    """A stack of causal blocks over token embeddings, and a score for every token of the vocabulary.

    Linear maps and embeddings are drawn from normal(0, 0.02); those that write to the residual stream (attention's
    output, the feed-forward's down) from normal(0, 0.02 / sqrt(2 * num_layers)), so that the stream's variance does
    not grow with depth. Biases start at 0, norms at 1. With tied embeddings there is no head to hold.

    `tokenizer` is what `load` and training fill in; the model itself never uses it.

    Source: Vaswani et al. 2017, section 3; Radford et al. 2019, section 2.3 for the scaled initialisation.

    >>> model = Decoder(DecoderConfig.modern(vocabulary=100, d_model=32, num_layers=2))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 100])
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        self.positions = _positions(config)
        rotary = None
        if config.positions == "rotary":
            scaling = RotaryScaling(*config.rotary_scaling) if config.rotary_scaling else None
            length = min(config.context, _ROTARY_AT_ONCE)
            rotary = Rotary(config.head_width, config.rotary_base, length=length, scaling=scaling)
        self.blocks = nn.ModuleList(_block(config, layer, rotary) for layer in range(config.num_layers))
        self.norm = None
        if config.norm_first:
            self.norm = make_norm(config.norm, config.d_model, bias=config.bias, epsilon=config.norm_epsilon)
        self.mixture = None
        if config.counts or config.pointer:
            self.mixture = Mixture(config.vocabulary, config.d_model, counts=config.counts, pointer=config.pointer)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocabulary, bias=False)
        self._draw()

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def counts(self) -> Counts | None:
        """The counts that have a say, if any do."""
        return None if self.mixture is None else self.mixture.counts

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> Cache:
        """An empty cache for this model; `capacity` defaults to the context, which it cannot exceed."""
        capacity = capacity or self.config.context
        if capacity > self.config.context:
            raise ValueError(f"Decoder: a cache of {capacity} tokens is beyond the context of {self.config.context}")
        return Cache(self.config.num_layers + self.config.pointer, batch=batch, capacity=capacity)

    def forward(self, tokens: Tensor, *, cache: Cache | None = None, last: int | None = None) -> Tensor:
        """Logits (batch tokens vocabulary): at token i, the scores of token i + 1; `last`: of the last tokens alone."""
        past = None if cache is None else cache.recent
        x = self.features(tokens, cache=cache)
        logits = self._logits(x if last is None else x[:, -last:])
        return logits if self.mixture is None else self.mixture(x, logits, tokens, past, cache)

    def loss(self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None, *, last: int | None = None) -> Tensor:
        """Mean negative log-likelihood of `targets` (batch tokens), each the token after one of `tokens`, in nats.

        `starts` (batch) says where in the training text the windows are, for counts that leave out that part of it.
        `last` scores only that many targets at the end of each row. The logits of a large vocabulary are never there
        all at once (`losses.next_token_loss`).

        Raises: ShapeError or ValueError for tokens or targets that are not whole numbers (batch tokens) of the
        vocabulary.
        """
        if targets.shape != tokens.shape:
            raise ShapeError(f"Decoder: targets are {tuple(targets.shape)} but tokens {tuple(tokens.shape)}")
        x, mixed = self.features(tokens), None
        first = 0 if last is None else tokens.shape[1] - last
        if self.mixture is not None:
            shares = self.mixture.of_targets(x, tokens, targets, starts)
            mixed = (shares[0][:, first:].flatten(), shares[1][:, first:].flatten())
        return next_token_loss(x[:, first:].flatten(0, 1), self._head_weight, targets[:, first:].flatten(), mixed=mixed)

    def _logits(self, x: Tensor) -> Tensor:
        return scores(x, self.embedding.weight) if self.head is None else linear_maps(x, self.head)[0]

    @property
    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    @shaped
    def features(self, tokens: Annotated[Tensor, "batch tokens"], *, cache: Cache | None = None) -> Tensor:
        """What the head reads: (batch tokens d_model).

        With a cache, `tokens` are the newest ones, and the cache holds them too afterwards.

        Raises: ShapeError or ValueError for tokens that are not whole numbers (batch tokens), or more of them,
        those in the cache included, than the context.
        """
        start = 0 if cache is None else cache.length
        self._check(tokens, start)
        x = self.embedding(tokens)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.d_model)
        if self.positions is not None:
            x = self.positions(x, start)
        x = passes.dropped(x, self.config.dropout) if self.training else x
        for block in self.blocks:
            x = block(x, cache=cache)
        x = x if self.norm is None else self.norm(x)
        if cache is not None:
            if self.mixture is not None and self.mixture.pointer is not None:
                cache.append(self.config.num_layers, *self.mixture.pointer.keep(x, tokens))
            cache.advance(tokens.shape[1])
            cache.recent = tokens if cache.recent is None else torch.cat((cache.recent, tokens), dim=1)
            cache.recent = cache.recent[:, -max(1, self.config.counts) :]
        return x

    def _check(self, tokens: Tensor, start: int) -> None:
        if tokens.is_floating_point() or not tokens.shape[1]:
            raise ValueError(f"Decoder: expected at least one whole number, got {tokens.dtype} {tuple(tokens.shape)}")
        stop = start + tokens.shape[1]
        if stop > self.config.context:
            raise ValueError(
                f"Decoder: {stop} tokens are beyond the context of {self.config.context}; read the newest part alone"
            )

    @torch.no_grad()
    def _draw(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith(("attention.output", "feed_forward.down"))
                module.weight.normal_(std=0.02 / math.sqrt(2 * self.config.num_layers) if writes else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        if self.mixture is not None:
            self.mixture.trust_counts()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; then each module's own mode again, which `model.train(...)` would level."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _positions(config: DecoderConfig) -> Sinusoidal | Learned | None:
    if config.positions == "sinusoidal":
        return Sinusoidal(config.d_model, config.context)
    if config.positions == "learned":
        return Learned(config.d_model, config.context)
    return None


def _block(config: DecoderConfig, layer: int, rotary: Rotary | None) -> Block:
    attention = MultiHeadAttention(
        config.d_model,
        config.num_heads,
        d_k=config.num_heads * config.head_width,
        d_v=config.num_heads * config.head_width,
        num_groups=config.num_groups,
        causal=True,
        before=config.window_before or None,
        dropout=config.dropout,
        bias=config.bias or config.query_key_value_bias,
        output_bias=config.bias,
        query_key_norm=config.query_key_norm,
        norm_epsilon=config.norm_epsilon,
        rotary=rotary,
        alibi=config.positions == "alibi",
        layer=layer,
    )
    feed_forward = FeedForward(config.d_model, config.d_ff, activation=config.activation, bias=config.bias)
    return Block(
        attention,
        feed_forward,
        d_model=config.d_model,
        norm=config.norm,
        norm_epsilon=config.norm_epsilon,
        norm_first=config.norm_first,
        bias=config.bias,
        dropout=config.dropout,
    )


def _check_field(name: str, value: object, kind: Any) -> None:
    """A whole number of at least 1 (0 where that means derived), a number in range, a bool or a known choice."""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if choices and value not in choices:
        raise ValueError(f"DecoderConfig: {name} must be one of {', '.join(choices)}; got {value!r}")
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"DecoderConfig: {name} must be true or false, got {value!r}")
    if kind is int:
        least = 0 if name in ("num_groups", "head_width", "d_ff", "window_before", "counts") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"DecoderConfig: {name} must be a whole number of at least {least}, got {value!r}")
    if kind is float and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise ValueError(f"DecoderConfig: {name} must be a number, got {value!r}")
    if name == "dropout" and isinstance(value, int | float):
        check_dropout("DecoderConfig", value)
    if name == "norm_epsilon" and isinstance(value, int | float) and not 0 <= value < 1:
        raise ValueError(f"DecoderConfig: norm_epsilon must be at least 0 and below 1, got {value}")
    if name == "rotary_base" and isinstance(value, int | float) and not value > 1:
        raise ValueError(f"DecoderConfig: rotary_base must be above 1, got {value}")


def _scaling(numbers: Any) -> tuple[float, ...]:
    """As a tuple, since JSON gives a list."""
    scaling = tuple(numbers) if isinstance(numbers, list | tuple) else numbers
    whole = isinstance(scaling, tuple) and all(isinstance(n, int | float) and n > 0 for n in scaling)
    if not whole or len(scaling) not in (0, 4) or (scaling and not scaling[1] < scaling[2]):
        raise ValueError(
            f"DecoderConfig: rotary_scaling must be (factor, low, high, original), all above 0 and low below high; "
            f"got {numbers!r}"
        )
    return scaling


def _check_divides(name: str, number: int, part: str, parts: int) -> None:
    if number % parts:
        raise ValueError(f"DecoderConfig: {name} {number} is not divisible by {part} {parts}")
