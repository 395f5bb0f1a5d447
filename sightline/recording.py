"""`Recorder`: calls of attention, as they come, become captures.

One pass over a text, a padded batch, a text that grows while it is written, queries of one text on keys of another.
Knows nothing of models: it is called in the place of `attention()`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sightline.attention import attention, observe
from sightline.captures import Capture
from sightline.masks import Allowed, Mask
from sightline.sequences import SeenSequence

SINK_KEYS = 4
"""How many first keys count as the sink."""
LEAST_BLOCK = 64
MOST_BLOCKS = 1024
"""Along the longer side of the pooled map, unless its blocks are given."""


class Observed(Protocol):
    """A layer that calls its observer in the place of `attention()`, as `MultiHeadAttention` does."""

    observer: Callable[..., Tensor] | None


class Recorder:
    """Takes the place of `attention()` in some layers, and keeps what each saw of each sequence of the batch.

    `layers` are the numbers that it is called with, of layers with the same heads, groups and widths. A layer may be
    called again and again: its new queries are added. With `same_text` queries are the newest of the keys' text, and
    a later call may leave the oldest keys out; without, all calls of a layer have the same keys.

    `keys` says which tokens of each sequence are its own: `slice(3, None)` where it begins with 3 of padding,
    `slice(0, 5)` where it ends after 5. `queries` says it of the queries of another text. What is beside them is
    attended to as the model would, and left out of the captures. Such a list is read at every call: a slice may be set
    until the first token in it comes.

    `top` and `map_block` are `observe()`'s; `map_block` None follows the length of the first call or, if that is more,
    `room`: the tokens that are expected in the end. With `file` the tensors of the one sequence lie in it.

    Raises: ValueError for top or map_block below 1, `queries` of the same text, or a slice that counts from the end.

    >>> x = torch.randn(2, 4, 5, 8)
    >>> recorder = Recorder([0], keys=[slice(0, 5), slice(0, 3)])
    >>> recorder(0, x, x, x, Mask(after=0)).shape
    torch.Size([2, 4, 5, 8])
    >>> recorder.capture(["the", "cat", "sat"], sequence=1).weights(0, 2).shape
    torch.Size([3, 3])
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        same_text: bool = True,
        keys: Sequence[slice] | None = None,
        queries: Sequence[slice] | None = None,
        top: int = 8,
        map_block: int | None = None,
        room: int = 0,
        file: Path | None = None,
    ) -> None:
        for option, number in (("top", top), ("map_block", map_block)):
            if number is not None and number < 1:
                raise ValueError(f"capture: {option} must be 1 or more, got {number}")
        if same_text and queries is not None:
            raise ValueError("recorder: queries are of the keys' text, so keys says which are padding; leave queries=")
        for own in (*(keys or ()), *(queries or ())):
            if min(own.start or 0, own.stop or 0) < 0 or own.step not in (None, 1):
                raise ValueError(f"recorder: a sequence's own tokens count from its first, without a step; got {own}")
        self.layers, self.same_text = tuple(layers), same_text
        self._own_keys, self._own_queries = keys, keys if same_text else queries
        self._top, self._block, self._room, self._file = top, map_block, room, file
        self._sequences: list[SeenSequence] = []
        self._counts = dict.fromkeys(self.layers, 0)

    @torch.no_grad()
    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | Tensor | None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """What `attention()` gives for (batch heads queries width), without a gradient; what it saw is kept.

        Raises:
            ValueError: a layer that is not among `layers`, tensors without heads, another batch than before, keys
                that are missing, or layers of different shape.
        """
        if layer not in self.layers or query.ndim != 4:
            there = ", ".join(map(str, self.layers))
            raise ValueError(
                f"recorder: expected (batch heads queries width) of one of the layers {there}; "
                f"got {tuple(query.shape)} of layer {layer}"
            )
        mask = Mask() if mask is None else Allowed(mask) if isinstance(mask, Tensor) else mask
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
        sequences = self._opened(query, key)
        first_query, first_key = self._positions(layer, query.shape[2], key.shape[2])
        outputs = []
        for number, sequence in enumerate(sequences):
            rows = _inside(self._own_queries, number, first_query, query.shape[2])
            columns = _inside(self._own_keys, number, first_key, key.shape[2])
            if rows[0] == rows[1]:
                continue
            window = _window(query, key, value, mask, number, rows, columns)
            start = 0 if self._own_keys is None else self._own_keys[number].start or 0
            position = first_key + columns[0] - start
            facts = {"top": self._top, "map_block": sequence.map_block, "sink_keys": max(0, SINK_KEYS - position)}
            seen = observe(*window, **options, **facts)
            sequence.keep(self.layers.index(layer), seen, position)
            if seen.output.shape[2] == query.shape[2] and columns == (0, key.shape[2]):
                outputs.append(seen.output)
        if len(outputs) < len(query):
            return attention(query, key, value, mask, **options)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _opened(self, query: Tensor, key: Tensor) -> list[SeenSequence]:
        """The sequences of the batch, begun with the first call."""
        if not self._sequences:
            longest = max(query.shape[2], key.shape[2], self._room)
            block = self._block or _block(longest)
            options = {"map_block": block, "same_text": self.same_text, "room": self._room, "file": self._file}
            self._sequences = [SeenSequence(len(self.layers), **options) for _ in query]
        for name, there in (("the call", query), ("keys=", self._own_keys), ("queries=", self._own_queries)):
            if there is not None and len(there) != len(self._sequences):
                raise ValueError(f"recorder: expected a batch of {len(self._sequences)}, got {len(there)} in {name}")
        return self._sequences

    def _positions(self, layer: int, queries: int, keys: int) -> tuple[int, int]:
        """Where the first query and the first key of a call stand, each in its text."""
        first = self._counts[layer]
        if not self.same_text:
            self._counts[layer] = first + queries
            return first, 0
        first = first or keys - queries
        if first < 0 or first + queries < keys:
            raise ValueError(f"recorder: layer {layer} has {keys} keys at position {first + queries} of its text")
        self._counts[layer] = first + queries
        return first, first + queries - keys

    def capture(
        self,
        key_tokens: Sequence[str],
        query_tokens: Sequence[str] | None = None,
        *,
        sequence: int = 0,
        model: str = "",
        ids: Sequence[int] | None = None,
        separator: str = " ",
        prompt: int | None = None,
    ) -> Capture:
        """What has been seen of one sequence so far. Tokens are its own ones, without padding.

        `query_tokens` are needed for queries of another text. `ids` None: tokens of the same text have the same id.
        The capture stays as it is when the recorder goes on.

        Raises:
            ValueError: nothing was recorded, a pass that is not through all layers, or another number of tokens than
                were recorded.
        """
        if not 0 <= sequence < len(self._sequences):
            raise ValueError(f"recorder: {len(self._sequences)} sequences were recorded, so there is no {sequence}")
        one = self._sequences[sequence]
        facts = one.facts()
        queries, keys = one.counts()
        if self.same_text and query_tokens is None:
            query_tokens = key_tokens[len(key_tokens) - queries :]
        for name, tokens, count in (("key", key_tokens, keys), ("query", query_tokens or (), queries)):
            if len(tokens) != count:
                raise ValueError(
                    f"recorder: expected {count} {name}_tokens, as many as were recorded; got {len(tokens)}"
                )
        numbers = {token: number for number, token in enumerate(dict.fromkeys(key_tokens))}
        return Capture(
            model=model,
            query_tokens=tuple(query_tokens or ()),
            key_tokens=tuple(key_tokens),
            same_text=self.same_text,
            ids=tuple(numbers[token] for token in key_tokens) if ids is None else tuple(ids),
            separator=separator,
            prompt=prompt,
            layers=self.layers,
            sink_keys=SINK_KEYS,
            map_block=one.map_block,
            **facts,
        )


@contextmanager
def record(modules: Sequence[Observed], layers: Sequence[int] | None = None, **options: Any) -> Iterator[Recorder]:
    """Record what some attention modules see while the block runs: self-attention or cross-attention, any batch.

    Module n is layer `layers[n]` of the captures; None: layer n. `options` are `Recorder`'s. The modules are
    afterwards as they were, also after an error.

    Raises: ValueError for no module, or another number of layers.

    >>> from sightline.layers import MultiHeadAttention
    >>> cross = MultiHeadAttention(d_model=16, num_heads=2)
    >>> with record([cross], same_text=False) as recorder:
    ...     output = cross(torch.randn(1, 2, 16), torch.randn(1, 3, 16))
    >>> recorder.capture(["le", "chat", "noir"], ["black", "cat"]).weights(0, 1).shape
    torch.Size([2, 3])
    """
    layers = tuple(range(len(modules))) if layers is None else tuple(layers)
    if not modules or len(layers) != len(modules):
        raise ValueError(
            f"record: expected a module for each of {len(layers)} layers, one at least; got {len(modules)}"
        )
    recorder = Recorder(layers, **options)
    before = [module.observer for module in modules]
    try:
        for layer, module in zip(layers, modules, strict=True):
            module.observer = partial(recorder, layer)
        yield recorder
    finally:
        for module, observer in zip(modules, before, strict=True):
            module.observer = observer


def _block(tokens: int) -> int:
    block = LEAST_BLOCK
    while block * MOST_BLOCKS < tokens:
        block *= 2
    return block


def _inside(own: Sequence[slice] | None, number: int, first: int, count: int) -> tuple[int, int]:
    """Which of `count` tokens, the first of which stands at `first`, are a sequence's own."""
    if own is None:
        return 0, count
    start, stop, _ = own[number].indices(first + count)
    return min(max(start - first, 0), count), max(min(stop - first, count), 0)


def _window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    number: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Mask]:
    """One sequence's own queries and keys, as a batch of one, with the mask that they have."""
    if columns[0] == columns[1]:
        raise ValueError(f"recorder: sequence {number} has queries but no key of its own; look at keys=")
    if mask.is_positional and key.shape[2] - columns[1] != query.shape[2] - rows[1]:
        raise ValueError("recorder: where a mask follows positions, queries and keys must have the same padding after")
    own = slice(number, number + 1)
    parts: dict[str, Any] = {
        name: tensor[own]
        for name, axes in (("lengths", 1), ("segments", 2), ("allowed", 4), ("bias", 4))
        if (tensor := getattr(mask, name)) is not None and tensor.ndim == axes and len(tensor) > 1
    }
    mask = Mask(**(vars(mask) | parts)).window(rows, columns)
    if mask.lengths is not None and int(mask.lengths) >= columns[1] - columns[0]:
        mask = replace(mask, lengths=None)
    if mask.allowed is not None and bool(mask.allowed.all()):
        mask = replace(mask, allowed=None)
    return query[own, :, slice(*rows)], key[own, :, slice(*columns)], value[own, :, slice(*columns)], mask
