"""What every head of every layer saw of one text: `capture()` and the frozen `Capture` it returns.

Between the model and whatever draws it: a `Capture` is what is drawn, tested and saved. Knows nothing of browsers
and figures.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sightline.attention import observe
from sightline.layers import MultiHeadAttention
from sightline.masks import Mask
from sightline.models import Decoder, evaluating
from sightline.observation import LIMIT_BYTES, Observation

if TYPE_CHECKING:
    from sightline.tokenizers import Tokenizer

SINK_KEYS = 4
"""How many first keys count as the sink."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Capture:
    """What the heads of some layers saw, all on the CPU. `layer` is everywhere the model's own number of a layer.

    Queries and keys have tokens of their own, so that cross-attention and generated text fit: where
    `query_tokens` is shorter than `key_tokens` and `same_text`, the queries are the newest.
    """

    model: str
    """The model in a few words."""
    query_tokens: tuple[str, ...] = field(repr=False)
    """The text of each query's token; bytes that are only a part of a character as in \\xe2."""
    key_tokens: tuple[str, ...] = field(repr=False)
    ids: tuple[int, ...] = field(repr=False)
    """Token ids of the keys."""
    separator: str
    """What stands between two tokens in the text: a space for words, else nothing."""
    same_text: bool = True
    """Queries and keys are tokens of one text."""
    layers: tuple[int, ...]
    """The captured layers, rising: row n of every tensor below is layer `layers[n]`."""

    queries: Tensor = field(repr=False)
    """(layers heads queries width)"""
    keys: Tensor = field(repr=False)
    """(layers groups keys width)"""
    masks: tuple[Mask, ...] = field(repr=False)
    """(layers)"""
    scales: tuple[float, ...] = field(repr=False)
    """(layers)"""
    softcaps: tuple[float | None, ...] = field(repr=False)
    """(layers)"""

    logsumexp: Tensor = field(repr=False)
    """(layers heads queries)"""
    entropy: Tensor = field(repr=False)
    """(layers heads queries), in nats."""
    distance: Tensor = field(repr=False)
    """(layers heads queries): mean number of keys between the query and what it looks at."""
    sink: Tensor = field(repr=False)
    """(layers heads queries): weight on the first `sink_keys` keys."""
    sink_keys: int
    top_weights: Tensor = field(repr=False)
    """(layers heads queries top), in falling order."""
    top_keys: Tensor = field(repr=False)
    """(layers heads queries top): the keys of `top_weights`; -1 where there is none."""
    received: Tensor = field(repr=False)
    """(layers heads keys): weight each key received, summed over queries."""
    map_sum: Tensor = field(repr=False)
    """(layers heads query_blocks key_blocks): weights summed over squares of `map_block`."""
    map_max: Tensor = field(repr=False)
    """(layers heads query_blocks key_blocks): the largest weight of each square."""
    map_block: int

    @property
    def tokens(self) -> tuple[str, ...]:
        """The text, token by token: the keys'."""
        return self.key_tokens

    @property
    def num_heads(self) -> int:
        return self.queries.shape[1]

    @property
    def mean_entropy(self) -> Tensor:
        """(layers heads): mean over queries, in nats."""
        return self.entropy.mean(-1)

    @property
    def mean_sink(self) -> Tensor:
        """(layers heads): mean weight on the first `sink_keys` keys."""
        return self.sink.mean(-1)

    @property
    def mean_distance(self) -> Tensor:
        """(layers heads): mean distance over queries, in tokens."""
        return self.distance.mean(-1)

    @cached_property
    def previous_token(self) -> Tensor:
        """(layers heads): mean weight on the key just before the query, over the queries that have one.

        0 where there is no such query, or where queries and keys are of different texts.
        """
        shift = len(self.key_tokens) - len(self.query_tokens)
        first = max(0, 1 - shift)
        found = []
        for start in range(first, len(self.query_tokens), 128):
            stop = min(start + 128, len(self.query_tokens))
            rows, columns = slice(start, stop), slice(start + shift - 1, stop + shift - 1)
            windows = [self._observation(layer).weights(queries=rows, keys=columns)[0] for layer in self.layers]
            found.append(torch.stack(windows).diagonal(dim1=-2, dim2=-1))
        if not found or not self.same_text:
            return self.entropy.new_zeros(self.entropy.shape[:2])
        return torch.cat(found, dim=-1).mean(-1)

    def weights(
        self,
        layer: int,
        head: int,
        *,
        queries: slice = slice(None),
        keys: slice = slice(None),
        limit_bytes: int = LIMIT_BYTES,
    ) -> Tensor:
        """Exact weights of a window of one head, (queries keys): exp(scale * q.k + bias - logsumexp).

        The default is the whole matrix.

        Raises:
            ValueError: a layer or head that is not here, a slice with a step, or a window of more than
                `limit_bytes`; the message gives its size.

        >>> from sightline.models import DecoderConfig
        >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=1))
        >>> capture(model, [3, 1, 4, 1]).weights(0, 2, queries=slice(0, 1)).round(decimals=3).tolist()
        [[1.0, 0.0, 0.0, 0.0]]
        """
        if not 0 <= head < self.num_heads:
            raise ValueError(f"capture: heads are 0 to {self.num_heads - 1}, got head {head}")
        one = self._observation(layer, head)
        return one.weights(queries=queries, keys=keys, limit_bytes=limit_bytes)[0, 0]

    def index(self, layer: int) -> int:
        """Which row of the stacked tensors is this layer.

        Raises: ValueError naming the captured layers.
        """
        if layer not in self.layers:
            raise ValueError(f"capture: layer {layer} is not among the captured ones, {_listed(self.layers)}")
        return self.layers.index(layer)

    def mask(self, layer: int, head: int) -> Mask:
        """The mask as one head has it: an axis of heads, where there is one, has size 1."""
        mask = self.masks[self.index(layer)]
        narrow: dict[str, Any] = {}
        for name in ("allowed", "bias"):
            tensor = getattr(mask, name)
            if tensor is not None and tensor.ndim == 4 and tensor.shape[1] > 1:
                narrow[name] = tensor[:, head : head + 1]
        if mask.slopes is not None:
            narrow["slopes"] = mask.slopes[head : head + 1]
        return Mask(**(vars(mask) | narrow))

    def _observation(self, layer: int, head: int | None = None) -> Observation:
        """One layer, or one head of it, as `observe()` gave it, so that weights are recomputed in one place."""
        row = self.index(layer)
        group = None if head is None else head * self.keys.shape[1] // self.num_heads
        heads = slice(None) if head is None else slice(head, head + 1)
        groups = slice(None) if group is None else slice(group, group + 1)
        return Observation(
            output=self.queries[row, heads, :, :0][None],  # a capture keeps no output
            logsumexp=self.logsumexp[row, heads][None],
            entropy=self.entropy[row, heads][None],
            distance=self.distance[row, heads][None],
            sink=self.sink[row, heads][None],
            query=self.queries[row, heads][None],
            key=self.keys[row, groups][None],
            mask=self.masks[row] if head is None else self.mask(layer, head),
            scale=self.scales[row],
            softcap=self.softcaps[row],
        )


@torch.no_grad()
def capture(
    model: Decoder,
    text_or_tokens: str | Sequence[int] | Tensor,
    *,
    layers: Sequence[int] | None = None,
    top: int = 8,
    map_block: int = 64,
) -> Capture:
    """Run the model once over a text, and keep what every head saw: O(N) numbers a head, never the matrix.

    `layers` None means all; `top` and `map_block` are `observe()`'s. The model reads in evaluation mode, and is
    afterwards as it was, also after an error.

    Raises:
        ValueError: a text for a model without tokenizer, an empty one, one longer than the model's context, words
            that the vocabulary lacks, ids outside of it, a layer that the model does not have, or top or
            map_block below 1.

    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2))
    >>> seen = capture(model, [3, 1, 4, 1, 5], layers=[1])
    >>> seen.layers, tuple(seen.entropy.shape)
    ((1,), (1, 4, 5))
    """
    for option, number in (("top", top), ("map_block", map_block)):
        if number < 1:
            raise ValueError(f"capture: {option} must be 1 or more, got {number}")
    modules = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    chosen = _chosen(layers, len(modules))
    ids = _ids(model, text_or_tokens)
    recorders = [_Recorder(top=top, map_block=map_block) for _ in chosen]
    with evaluating(model), _observed([modules[layer] for layer in chosen], recorders):
        model.features(torch.tensor([ids], device=model.embedding.weight.device))
    seen = [recorder.seen for recorder in recorders]
    tokens = _texts(model.tokenizer, ids)
    words = model.tokenizer is None or model.tokenizer.kind == "words"
    return Capture(
        model=_description(model),
        query_tokens=tokens,
        key_tokens=tokens,
        ids=tuple(ids),
        separator=" " if words else "",
        layers=chosen,
        queries=_stack([one.query for one in seen]),
        keys=_stack([one.key for one in seen]),
        masks=tuple(_on_cpu(one.mask) for one in seen),
        scales=tuple(one.scale for one in seen),
        softcaps=tuple(one.softcap for one in seen),
        logsumexp=_stack([one.logsumexp for one in seen]),
        entropy=_stack([one.entropy for one in seen]),
        distance=_stack([one.distance for one in seen]),
        sink=_stack([one.sink for one in seen]),
        sink_keys=SINK_KEYS,
        top_weights=_stack([one.top_weights for one in seen]),
        top_keys=_stack([one.top_keys for one in seen]),
        received=_stack([one.received for one in seen]),
        map_sum=_stack([one.map.sum for one in seen]),
        map_max=_stack([one.map.max for one in seen]),
        map_block=map_block,
    )


class _Recorder:
    """Takes the place of `attention()` in one layer, and keeps what it saw."""

    def __init__(self, *, top: int, map_block: int) -> None:
        self.top, self.map_block = top, map_block
        self.calls: list[Observation] = []

    @property
    def seen(self) -> Observation:
        assert len(self.calls) == 1, f"a layer was called {len(self.calls)} times in one pass"
        return self.calls[0]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | Tensor | None,
        *,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        seen = observe(
            query,
            key,
            value,
            mask,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            top=self.top,
            map_block=self.map_block,
            sink_keys=SINK_KEYS,
        )
        self.calls.append(seen)
        return seen.output


@contextmanager
def _observed(modules: Sequence[MultiHeadAttention], recorders: Sequence[_Recorder]) -> Iterator[None]:
    before = [module.observer for module in modules]
    try:
        for module, recorder in zip(modules, recorders, strict=True):
            module.observer = recorder
        yield
    finally:
        for module, observer in zip(modules, before, strict=True):
            module.observer = observer


def _chosen(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not chosen:
        raise ValueError(f"capture: no layer asked for; layers are 0 to {count - 1}, and None means all")
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(f"capture: layers are 0 to {count - 1}, got {layer}")
    return chosen


def _ids(model: Decoder, source: str | Sequence[int] | Tensor) -> list[int]:
    ids = _encoded(model, source) if isinstance(source, str) else _listed_ids(source)
    if not ids:
        raise ValueError("capture: the text holds no token; give at least one")
    if len(ids) > model.config.context:
        raise ValueError(
            f"capture: {len(ids)} tokens are beyond the model's context of {model.config.context}; "
            f"give a shorter text, or tokens[:{model.config.context}]"
        )
    for token in ids:
        if not 0 <= token < model.config.vocabulary:
            raise ValueError(f"capture: token ids are 0 to {model.config.vocabulary - 1}, got {token}")
    return ids


def _encoded(model: Decoder, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError(
            "capture: this model has no tokenizer to read text with; set model.tokenizer, or give token ids"
        )
    unknown = model.tokenizer.unknown_words(text)
    if unknown:
        named = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"capture: not in the vocabulary: {named} ({len(unknown)} in all); "
            "use other words, or accept <unk> for them with capture(model, model.tokenizer.encode(text))"
        )
    return model.tokenizer.encode(text)


def _listed_ids(tokens: Sequence[int] | Tensor) -> list[int]:
    if not isinstance(tokens, Tensor):
        return [int(token) for token in tokens]
    if tokens.is_floating_point() or tokens.ndim not in (1, 2) or (tokens.ndim == 2 and len(tokens) != 1):
        raise ValueError(
            f"capture: expected whole numbers (tokens) or (1 tokens), got {tokens.dtype} {tuple(tokens.shape)}; "
            "one text at a time"
        )
    return tokens.flatten().tolist()


def _texts(tokenizer: "Tokenizer | None", ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as it stands in the text; a token that is no whole character as its bytes."""
    if tokenizer is None:
        return tuple(map(str, ids))
    texts = {}
    for token in set(ids):
        text = tokenizer.decode([token])
        texts[token] = tokenizer.pieces([token])[0] if "\ufffd" in text else text
    return tuple(texts[token] for token in ids)


def _description(model: Decoder) -> str:
    config = model.config
    return f"Decoder, {config.num_layers} x {config.num_heads} heads, d_model {config.d_model}"


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """One row a layer, of the only sequence there is."""
    return torch.stack([tensor.detach()[0] for tensor in tensors]).cpu()


def _on_cpu(mask: Mask) -> Mask:
    tensors = {name: value.detach().cpu() for name, value in vars(mask).items() if isinstance(value, Tensor)}
    return Mask(before=mask.before, after=mask.after, **tensors)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
