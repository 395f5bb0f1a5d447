"""The frozen `Capture`: what every head of every layer saw of one text, and what is drawn, tested and saved.

Holds queries, keys and logsumexp, never the matrix: exact weights are recomputed. Knows nothing of models, files
and browsers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any

import torch
from torch import Tensor

from sightline.masks import Mask
from sightline.observation import LIMIT_BYTES, Map, Observation

PAIRS = 2**14
"""Single weights that are computed at once."""
FRAME_HEIGHT = 760
"""Pixels of the page in a notebook: a fixed number, as frames that follow their content shrink in some of them."""

UNTRUSTED = "Sightline: run this cell, or trust the notebook, to see the map."

AXES = {
    "queries": "layers heads queries width",
    "keys": "layers groups keys width",
    "logsumexp": "layers heads queries",
    "entropy": "layers heads queries",
    "distance": "layers heads queries",
    "sink": "layers heads queries",
    "top_weights": "layers heads queries top",
    "top_keys": "layers heads queries top",
    "received": "layers heads keys",
    "map_sum": "layers heads query_blocks key_blocks",
    "map_max": "layers heads query_blocks key_blocks",
}
"""The tensors of a capture."""


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
    prompt: int | None = None
    """How many tokens were given; the model wrote the later ones. None: all were given."""
    layers: tuple[int, ...]
    """The captured layers, rising: row n of every tensor below is layer `layers[n]`."""
    chosen: tuple[tuple[int, int], ...] | None = field(default=None, repr=False)
    """(layer, head) of those to be shown; None: all."""

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
    """(layers heads queries top): the keys of `top_weights`, int32; -1 where there is none."""
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
    def shift(self) -> int:
        """Query i stands at position i + shift among the keys."""
        return len(self.key_tokens) - len(self.query_tokens)

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of those to be shown."""
        return self.chosen or tuple((layer, head) for layer in self.layers for head in range(self.num_heads))

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
        positions = torch.arange(self.shift, len(self.key_tokens))
        return self._mean_weight(positions - 1)

    @cached_property
    def induction(self) -> Tensor:
        """(layers heads): mean weight on the key that followed the query's token when it last came before.

        In "the cat .. the" the second "the" has the key "cat". 0 as for `previous_token`.

        Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
        """
        latest: dict[int, int] = {}
        followers = []
        for position, token in enumerate(self.ids):
            followers.append(latest.get(token, -2) + 1)
            latest[token] = position
        return self._mean_weight(torch.tensor(followers[self.shift :]))

    def _mean_weight(self, keys: Tensor) -> Tensor:
        """(layers heads): mean weight of each query on one key, over those whose key is not negative."""
        queries = (keys >= 0).nonzero().flatten()
        if not len(queries) or not self.same_text:
            return self.entropy.new_zeros(self.entropy.shape[:2])
        found = [
            [
                self.weights_at(layer, head, queries, keys[queries]).nan_to_num(0).mean()
                for head in range(self.num_heads)
            ]
            for layer in self.layers
        ]
        return torch.tensor(found, dtype=self.entropy.dtype)

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

        >>> from sightline.inspection import capture
        >>> from sightline.models import Decoder, DecoderConfig
        >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=1))
        >>> capture(model, [3, 1, 4, 1]).weights(0, 2, queries=slice(0, 1)).round(decimals=3).tolist()
        [[1.0, 0.0, 0.0, 0.0]]
        """
        return self._observation(layer, head).weights(queries=queries, keys=keys, limit_bytes=limit_bytes)[0, 0]

    def pooled(
        self, layer: int, head: int, *, queries: slice = slice(None), keys: slice = slice(None), block: int
    ) -> Map:
        """The weights of a window of one head pooled over squares, (query_blocks key_blocks), in O(N) memory.

        Raises: ValueError for a layer or head that is not here, a slice with a step, or a block below 1.
        """
        found = self._observation(layer, head).pooled(queries=queries, keys=keys, block=block)
        return Map(*(tensor[0, 0] for tensor in found))

    def weights_at(self, layer: int, head: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Exact weights of single pairs of a query and a key, (pairs), in float64; NaN where the mask hides one.

        Raises: ValueError for a layer or head that is not here.
        """
        mask, row = self.mask(layer, head), self.index(layer)
        query, key = self.queries[row, head], self.keys[row, self.group(head)]
        logsumexp = self.logsumexp[row, head]
        found = []
        for rows, columns in zip(queries.split(PAIRS), keys.split(PAIRS), strict=True):
            scores = (query[rows].double() * key[columns].double()).sum(-1) * self.scales[row]
            softcap = self.softcaps[row]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            bias, hidden = _at(mask, rows, columns, shift=self.shift)
            found.append((scores + bias - logsumexp[rows].double()).exp().masked_fill(hidden, torch.nan))
        return torch.cat(found)

    def select(self, heads: Sequence[tuple[int, int]]) -> "Capture":
        """The same capture with only these (layer, head) to be shown, in this order; nothing is copied.

        Raises: ValueError for none, or one that is not here.
        """
        if not heads:
            raise ValueError("capture: no head asked for; give pairs, select([(0, 1), (2, 3)]) for layer 0 head 1, ...")
        chosen = tuple(dict.fromkeys((int(layer), int(head)) for layer, head in heads))
        for layer, head in chosen:
            self.index(layer)
            self.check_head(head)
        return replace(self, chosen=chosen)

    def group(self, head: int) -> int:
        """Which group of keys a head reads."""
        return head * self.keys.shape[1] // self.num_heads

    def index(self, layer: int) -> int:
        """Which row of the stacked tensors is this layer.

        Raises: ValueError naming the captured layers.
        """
        if layer not in self.layers:
            there = ", ".join(map(str, self.layers))
            raise ValueError(f"capture: layer {layer} is not among the captured ones, {there}")
        return self.layers.index(layer)

    def mask(self, layer: int, head: int) -> Mask:
        """The mask as one head has it: an axis of heads, where there is one, has size 1."""
        self.check_head(head)
        mask = self.masks[self.index(layer)]
        narrow: dict[str, Any] = {}
        for name in ("allowed", "bias"):
            tensor = getattr(mask, name)
            if tensor is not None and tensor.ndim == 4 and tensor.shape[1] > 1:
                narrow[name] = tensor[:, head : head + 1]
        if mask.slopes is not None:
            narrow["slopes"] = mask.slopes[head : head + 1]
        return Mask(**(vars(mask) | narrow))

    def _repr_html_(self) -> str:
        """The page, in a frame of its own: nothing in it meets the notebook, and it works again after a reload."""
        # The one import of a viewer from below: a notebook asks the object itself how it looks.
        from sightline.viewer.page import page

        try:
            html = page(self)
        except ValueError as error:  # too large for a notebook: said in its place
            return f"<p>{escape(str(error))}</p>"
        style = f"width: 100%; height: {FRAME_HEIGHT}px; border: 0"
        # No browser shows the text in a frame; notebooks that are not trusted take frames away and leave their text.
        return f'<iframe title="Sightline" style="{style}" srcdoc="{escape(html)}">{UNTRUSTED}</iframe>'

    def check_head(self, head: int) -> None:
        """Raises ValueError for a head that is not there."""
        if not 0 <= head < self.num_heads:
            raise ValueError(f"capture: heads are 0 to {self.num_heads - 1}, got head {head}")

    def _observation(self, layer: int, head: int) -> Observation:
        """One head as `observe()` gave it, so that windows of weights are recomputed in one place."""
        mask, row, group = self.mask(layer, head), self.index(layer), self.group(head)
        one = slice(head, head + 1)
        return Observation(
            output=self.queries[row, one, :, :0][None],  # a capture keeps no output
            logsumexp=self.logsumexp[row, one][None],
            entropy=self.entropy[row, one][None],
            distance=self.distance[row, one][None],
            sink=self.sink[row, one][None],
            query=self.queries[row, one][None],
            key=self.keys[row, group : group + 1][None],
            mask=mask,
            scale=self.scales[row],
            softcap=self.softcaps[row],
        )


def _at(mask: Mask, queries: Tensor, keys: Tensor, *, shift: int) -> tuple[Tensor, Tensor]:
    """For single pairs under one head's mask: what is added to the score, and whether the key is hidden."""
    distance = queries + shift - keys
    bias, hidden = torch.zeros(len(queries), dtype=torch.float64), torch.zeros(len(queries), dtype=torch.bool)
    if mask.before is not None:
        hidden |= distance > mask.before
    if mask.after is not None:
        hidden |= -distance > mask.after
    if mask.lengths is not None:
        hidden |= keys >= mask.lengths[0]
    if mask.segments is not None:
        hidden |= mask.segments[0, queries + shift] != mask.segments[0, keys]
    if mask.slopes is not None:
        bias -= mask.slopes[0].double() * distance.abs()
    for name in ("allowed", "bias"):
        tensor = getattr(mask, name)
        if tensor is None:
            continue
        plane = tensor if tensor.ndim == 2 else tensor[0, 0]
        picked = plane[queries if plane.shape[0] > 1 else 0, keys if plane.shape[1] > 1 else 0].expand(len(queries))
        if name == "allowed":
            hidden |= ~picked
        else:
            bias, hidden = bias + picked.double(), hidden | (picked == -torch.inf)
    return bias, hidden
