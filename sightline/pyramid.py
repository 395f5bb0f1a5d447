"""A `Capture` as a pyramid of pictures: tiles of weights at every zoom, tracks, the wall of all heads, single weights.

A pixel of level l covers a square of 2^l queries and keys; a tile is at most 256 x 256 pixels. Low levels are
recomputed from queries, keys and logsumexp; from the pooled map's blocks on, the map is pooled further. Numbers in,
arrays out: knows nothing of HTTP.
"""

import math
import struct
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.captures import Capture
from sightline.masks import Mask

TILE = 256
TRACK = 1024
THUMBNAIL = 64
POOLS = ("max", "sum")
KINDS = ("tile", "track", "wall")
TRACKS = ("received", "entropy", "top", "sink", "distance")
LOOKERS = 16
"""How many queries are named that look most at a key."""
EXACT_LEVEL = 6
"""Below this level a tile costs milliseconds."""
STRIP_QUERIES = 512
"""Of a mask that is written out."""
FACTOR = 4096
"""What weights are multiplied by before they become half floats: a power of two, so that small ones lose no digit."""


class Pyramid:
    """The pictures of one capture, computed when asked for.

    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=1))
    >>> Pyramid(capture(model, [3, 1, 4])).tile(0, 2, "max", level=0, row=0, column=0).isnan().tolist()
    [[False, True, True], [False, False, True], [False, False, False]]
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.queries, self.keys = len(capture.query_tokens), len(capture.key_tokens)
        longest = max(self.queries, self.keys)
        self.levels = max(0, math.ceil(math.log2(longest / TILE))) + 1
        """Level `levels - 1` is one tile."""
        block = capture.map_block
        self.map_level = block.bit_length() - 1 if block & (block - 1) == 0 else None
        """From this level on tiles come from the pooled map; None: the map's blocks are no power of two."""
        self.thumbnail_level = max(0, math.ceil(math.log2(longest / THUMBNAIL)))
        self._reach: dict[tuple[int, int], Tensor] = {}

    def tile(self, layer: int, head: int, pool: str, level: int, row: int, column: int) -> Tensor:
        """Weights of one tile, (rows columns), NaN where the mask or the edge leaves nothing to see.

        `max` is the largest weight of a square; `sum` the weight that one query of the square gives to all its keys,
        the mean over the queries that see anything.

        Raises:
            ValueError: a layer, head, pool, level or tile that is not there.
        """
        if pool not in POOLS:
            raise ValueError(f"pool must be {' or '.join(POOLS)}, got {pool!r}")
        self._check_level(level)
        side = TILE << level
        if not (0 <= row * side < self.queries and 0 <= column * side < self.keys):
            rows, columns = -(-self.queries // side), -(-self.keys // side)
            raise ValueError(f"level {level} has {rows} x {columns} tiles, got row {row} and column {column}")
        queries = (row * side, min((row + 1) * side, self.queries))
        keys = (column * side, min((column + 1) * side, self.keys))
        return self._pool(layer, head, pool, level, queries, keys)

    def whole(self, layer: int, head: int, pool: str, level: int) -> Tensor:
        """All tiles of a level as one; for levels that leave few pixels."""
        return self._pool(layer, head, pool, level, (0, self.queries), (0, self.keys))

    def _pool(
        self, layer: int, head: int, pool: str, level: int, queries: tuple[int, int], keys: tuple[int, int]
    ) -> Tensor:
        """The weights of a range of queries and keys that begins at multiples of 2^level."""
        if self.map_level is None or level < self.map_level:
            values = self.capture.pooled(layer, head, queries=slice(*queries), keys=slice(*keys), block=1 << level)
            values = values.max if pool == "max" else values.sum
        else:
            values = self._from_map(layer, head, pool, level, queries, keys)
        if pool == "sum":
            live = self.capture.logsumexp[self._at(layer, head)][slice(*queries)] > -torch.inf
            values = values / _blocks(live.to(values.dtype), level).sum(-1, keepdim=True).clamp(min=1)
        return values.masked_fill(~self._visible(layer, head, level, queries, keys), torch.nan)

    def _from_map(
        self, layer: int, head: int, pool: str, level: int, queries: tuple[int, int], keys: tuple[int, int]
    ) -> Tensor:
        assert self.map_level is not None
        capture, block = self.capture, self.capture.map_block
        rows, columns = (slice(start // block, -(-stop // block)) for start, stop in (queries, keys))
        blocks = (capture.map_max if pool == "max" else capture.map_sum)[self._at(layer, head)][rows, columns]
        squares = _squares(blocks.contiguous(), 1 << (level - self.map_level))
        return squares.amax((1, 3)) if pool == "max" else squares.sum((1, 3))

    def _visible(self, layer: int, head: int, level: int, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        """Which squares hold a pair that the mask allows, (rows columns)."""
        mask, side = self.capture.mask(layer, head), 1 << level
        if _by_query(mask):
            return self._visible_by_query(mask, level, queries, keys)
        shift, first = self.capture.shift, torch.arange(*queries, side)[:, None]
        last = (first + side).clamp(max=queries[1]) - 1
        start = torch.arange(*keys, side)
        stop = (start + side).clamp(max=keys[1])
        # The keys that one of the queries may see by position are a span: what matters is whether one of them exists.
        if mask.before is not None:
            start = torch.maximum(start, first + shift - mask.before)
        if mask.after is not None:
            stop = torch.minimum(stop, last + shift + mask.after + 1)
        existing = self._existing(layer, head, mask)
        return existing[torch.maximum(start, stop).clamp(0, self.keys)] > existing[start.clamp(0, self.keys)]

    def _existing(self, layer: int, head: int, mask: Mask) -> Tensor:
        """How many of the first n keys any query may see, as far as tensors say, for n from 0 to keys."""
        if (layer, head) not in self._reach:
            exists = torch.ones(self.keys, dtype=torch.bool)
            if mask.lengths is not None:
                exists[int(mask.lengths[0]) :] = False
            for allowed in (mask.allowed, None if mask.bias is None else mask.bias > -torch.inf):
                if allowed is not None:
                    exists &= allowed.flatten()
            self._reach[layer, head] = F.pad(exists.cumsum(0), (1, 0))
        return self._reach[layer, head]

    def _visible_by_query(self, mask: Mask, level: int, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        """The same where tensors speak of each query: they hold every pair, so every pair is asked."""
        found, strip = [], max(1 << level, STRIP_QUERIES)
        for first in range(*queries, strip):
            last = min(first + strip, queries[1])
            sizes = {"queries": self.queries, "keys": self.keys, "device": torch.device("cpu"), "dtype": torch.float32}
            allowed, bias = mask.tile((first, last), keys, **sizes)
            seen = torch.ones(1, 1, last - first, keys[1] - keys[0], dtype=torch.bool)
            seen = seen if allowed is None else seen & allowed
            seen = seen if bias is None else seen & (bias > -torch.inf)
            found.append(_squares(seen[0, 0].float(), 1 << level).amax((1, 3)) > 0)
        return torch.cat(found)

    def track(self, layer: int, head: int, name: str, level: int, index: int) -> Tensor:
        """One fact along the text: (2 values), mean and largest over 2^level tokens; 1,024 values a piece at most.

        `received` goes along the keys, the others along the queries.

        Raises:
            ValueError: a layer, head, track, level or piece that is not there.
        """
        if name not in TRACKS:
            raise ValueError(f"track must be one of {', '.join(TRACKS)}, got {name!r}")
        self._check_level(level)
        at = self._at(layer, head)
        values = self.capture.top_weights[at][:, 0] if name == "top" else getattr(self.capture, name)[at]
        size = TRACK << level
        if not 0 <= index * size < len(values):
            raise ValueError(f"{name} has {-(-len(values) // size)} pieces at level {level}, got {index}")
        piece = values[index * size : (index + 1) * size].float()
        counts = _blocks(torch.ones_like(piece), level).sum(-1)
        # What is padded must not be the largest, and no fact is below 0.
        return torch.stack([_blocks(piece, level).sum(-1) / counts, _blocks(piece, level).amax(-1)])

    @cached_property
    def wall(self) -> Tensor:
        """(heads rows columns): a small max-pooled map of every head to be shown, all pixels 2^thumbnail_level wide."""
        return torch.stack([self.whole(*one, "max", self.thumbnail_level) for one in self.capture.heads])

    @property
    def thumbnail_shape(self) -> tuple[int, int]:
        """Rows and columns of one small map of the wall."""
        rows, columns = (-(-count // (1 << self.thumbnail_level)) for count in (self.queries, self.keys))
        return rows, columns

    def weight(self, layer: int, head: int, query: int, key: int) -> float | None:
        """One exact weight, in float64 arithmetic; None where the mask hides the key.

        Raises: ValueError for a layer, head, query or key that is not there.
        """
        self._check_token("query", query, self.queries)
        self._check_token("key", key, self.keys)
        weight = float(self.capture.weights_at(layer, head, torch.tensor([query]), torch.tensor([key])))
        return None if math.isnan(weight) else weight

    def query_facts(self, layer: int, head: int, query: int) -> dict[str, Any]:
        """What one query looks at: its facts, and its top keys with their weights.

        Raises: ValueError for a layer, head or query that is not there.
        """
        self._check_token("query", query, self.queries)
        capture = self.capture
        at = *self._at(layer, head), query
        facts: dict[str, Any] = {name: float(getattr(capture, name)[at]) for name in ("entropy", "sink", "distance")}
        logsumexp, keys = float(capture.logsumexp[at]), capture.top_keys[at]
        facts["logsumexp"] = logsumexp if math.isfinite(logsumexp) else None
        facts["keys"] = keys[keys >= 0].tolist()
        facts["weights"] = capture.top_weights[at][keys >= 0].tolist()
        return facts

    def key_facts(self, layer: int, head: int, key: int) -> dict[str, Any]:
        """What looks at one key: the weight it received, and the queries that give it most.

        Raises: ValueError for a layer, head or key that is not there.
        """
        self._check_token("key", key, self.keys)
        column = self.capture.weights(layer, head, keys=slice(key, key + 1))[:, 0]
        most = column.topk(min(LOOKERS, self.queries)).indices
        weights = self.capture.weights_at(layer, head, most, torch.full_like(most, key)).nan_to_num(0)
        weights, order = weights.sort(descending=True, stable=True)
        return {
            "received": float(self.capture.received[self._at(layer, head)][key]),
            "queries": most[order][weights > 0].tolist(),
            "weights": weights[weights > 0].tolist(),
        }

    def _at(self, layer: int, head: int) -> tuple[int, int]:
        """Where one head stands in the tensors of the capture."""
        self.capture.check_head(head)
        return self.capture.index(layer), head

    def _check_level(self, level: int) -> None:
        if not 0 <= level < self.levels:
            raise ValueError(f"levels are 0 to {self.levels - 1}, got {level}")

    def _check_token(self, name: str, index: int, count: int) -> None:
        if not 0 <= index < count:
            raise ValueError(f"{name} must be from 0 to {count - 1}, got {index}")


def encode(values: Tensor, *, kind: str, level: int) -> bytes:
    """A tile, a track or the wall with a header, little endian: 20 bytes and the numbers, NaN where nothing is seen.

        SLT1  u8 kind  u8 level  u16 0  u32 rows  u32 columns  f32 factor  numbers times factor

    Tracks are float32 and have factor 1; the others are float16.

    >>> encode(torch.ones(1, 2), kind="tile", level=3).hex(" ", 4)
    '534c5431 00030000 01000000 02000000 00008045 006c006c'
    """
    factor = 1 if kind == "track" else FACTOR
    head = struct.pack("<4sBBHIIf", b"SLT1", KINDS.index(kind), level, 0, *values.shape, factor)
    numbers = (values * factor).numpy()
    return head + numbers.astype("<f4" if kind == "track" else "<f2").tobytes()


def _squares(plane: Tensor, side: int) -> Tensor:
    """(rows side columns side), zeros where the edge cuts a square."""
    rows, columns = plane.shape
    if rows % side or columns % side:
        plane = F.pad(plane, (0, -columns % side, 0, -rows % side))
    return plane.view(-(-rows // side), side, -(-columns // side), side)


def _blocks(values: Tensor, level: int) -> Tensor:
    """(blocks 2^level), zeros where the edge cuts a block."""
    return F.pad(values, (0, -len(values) % (1 << level))).unflatten(0, (-1, 1 << level))


def _by_query(mask: Mask) -> bool:
    """A tensor of the mask tells queries apart."""
    return mask.segments is not None or any(
        tensor is not None and tensor.shape[-2] > 1 for tensor in (mask.allowed, mask.bias)
    )
