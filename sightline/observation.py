"""What one call of attention saw: facts of every head and query, and exact weights of any window on demand."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sightline.kernels import cpu, tiled
from sightline.masks import Mask, Tile
from sightline.memory import shown

LIMIT_BYTES = 2 * 1024**3
"""A larger window of weights is refused unless asked for with `limit_bytes=`."""


class Map(NamedTuple):
    """The weights pooled over square blocks: (batch heads query_blocks key_blocks) each."""

    sum: Tensor
    max: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Observation:
    """What `observe()` returns. Facts are float32 (float64 for float64 inputs), whatever the inputs' dtype.

    A call on (batch length width) tensors gives facts without the heads axis. A query that may see no key has
    output 0, logsumexp -inf, entropy 0, top_weights 0 and top_keys -1.
    """

    output: Tensor
    """(batch heads queries value_width): the only part that carries a gradient."""
    logsumexp: Tensor
    """(batch heads queries): log of the sum of exponentiated scores; weights are exp(score - logsumexp)."""
    entropy: Tensor
    """(batch heads queries), in nats: 0 looks at one key, log(n) at n keys alike."""
    distance: Tensor
    """(batch heads queries): mean number of keys between the query and what it looks at."""
    sink: Tensor
    """(batch heads queries): weight on the first `sink_keys` keys."""
    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)
    mask: Mask = field(repr=False)
    scale: float = field(repr=False)
    softcap: float | None = field(default=None, repr=False)
    facts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The facts that can be switched off, by name."""

    @property
    def top_weights(self) -> Tensor:
        """(batch heads queries top): the largest weights of each query, in falling order."""
        return self._fact("top_weights", "top=8")

    @property
    def top_keys(self) -> Tensor:
        """(batch heads queries top): the keys of `top_weights`, ties to the lowest; -1 where there is none."""
        return self._fact("top_keys", "top=8")

    @property
    def received(self) -> Tensor:
        """(batch heads keys): the weight each key received, summed over queries."""
        return self._fact("received", "received=True")

    @property
    def map(self) -> Map:
        """The pooled picture: sums and largest weights over blocks of `map_block` queries and keys."""
        return Map(self._fact("map_sum", "map_block=64"), self._fact("map_max", "map_block=64"))

    @torch.no_grad()  # logsumexp carries none, so what flowed through the scores alone would be wrong
    def weights(
        self,
        *,
        queries: slice = slice(None),
        keys: slice = slice(None),
        limit_bytes: int = LIMIT_BYTES,
    ) -> Tensor:
        """Exact weights of a window, recomputed: exp(scale * q.k + bias - logsumexp), (batch heads queries keys).

        Slices count from 0 and have no step; the default is the whole matrix. They carry no gradient.

        Raises:
            ValueError: the window would take more than `limit_bytes`, or a slice has a step.

        >>> import sightline as sl
        >>> x = torch.ones(1, 4, 2)
        >>> sl.observe(x, x, x, sl.Causal()).weights(queries=slice(1, 2))
        tensor([[[0.5000, 0.5000, 0.0000, 0.0000]]])
        """
        query, key, logsumexp = (_with_heads(t, self.query.ndim) for t in (self.query, self.key, self.logsumexp))
        rows, columns = (
            _bounds(window, size, name)
            for window, size, name in ((queries, query.shape[-2], "queries"), (keys, key.shape[-2], "keys"))
        )
        shape = (*query.shape[:2], rows[1] - rows[0], columns[1] - columns[0])
        size = torch.Size(shape).numel() * logsumexp.element_size()
        if size > limit_bytes:
            raise ValueError(
                f"weights: {' x '.join(map(str, shape))} weights take {shown(size)}, more than the limit of "
                f"{shown(limit_bytes)}; ask for a window, weights(queries=slice(0, 64), keys=slice(0, 256)), "
                "or raise limit_bytes"
            )
        allowed, bias = self.mask.tile(
            rows,
            columns,
            queries=query.shape[-2],
            keys=key.shape[-2],
            device=query.device,
            dtype=logsumexp.dtype,
        )
        query = query[..., slice(*rows), :].to(logsumexp.dtype) * self.scale
        key = key[..., slice(*columns), :].to(logsumexp.dtype)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(-2, -1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if bias is not None:
            scores = scores + bias
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        # An empty row has logsumexp -inf and scores of -inf: the difference would be NaN.
        total = logsumexp[..., slice(*rows)].masked_fill(logsumexp[..., slice(*rows)] == -torch.inf, 0)
        weights = (scores - total.unsqueeze(-1)).exp()
        return weights.squeeze(1) if self.query.ndim == 3 else weights

    @torch.no_grad()
    def pooled(self, *, queries: slice = slice(None), keys: slice = slice(None), block: int) -> Map:
        """The weights of a window, pooled over squares of `block` queries and keys; O(N) memory beside the result.

        The first square begins where the window does. By the native kernel where it can.

        Raises:
            ValueError: a slice with a step, or a block below 1.

        >>> import sightline as sl
        >>> x = torch.ones(1, 4, 2)
        >>> sl.observe(x, x, x, sl.Causal()).pooled(queries=slice(2, 4), block=2).sum
        tensor([[[1.1667, 0.8333]]])
        """
        if block < 1:
            raise ValueError(f"pooled: block must be 1 or more, got {block}")
        query, key, logsumexp = (_with_heads(t, self.query.ndim) for t in (self.query, self.key, self.logsumexp))
        rows, columns = _bounds(queries, query.shape[-2], "queries"), _bounds(keys, key.shape[-2], "keys")
        mask = self.mask.window(rows, columns)
        segments, offset = self.mask.segments, key.shape[-2] - query.shape[-2]
        if segments is not None:
            own = segments[:, rows[0] + offset : rows[1] + offset]
            segments = torch.cat((own, segments[:, slice(*columns)]), dim=1)
        numbers = cpu.Masks(mask.before, mask.after, mask.lengths, segments, mask.allowed, mask.bias, mask.slopes)
        position = rows[0] + offset - columns[0]
        window = query[..., slice(*rows), :], key[..., slice(*columns), :], logsumexp[..., slice(*rows)]
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "position": position, "block": block}
        if cpu.refusal(query, key):
            found = tiled.pool(
                *window, self._rest(rows[0], columns[0]), before=mask.before, after=mask.after, **options
            )
        else:
            found = cpu.pool(*window, numbers, **options)
        return Map(*(t.squeeze(1) if self.query.ndim == 3 else t for t in found))

    def _rest(self, row: int, column: int) -> tiled.TileOf:
        """What the mask says beside `before` and `after`, in a window that begins with this query and key."""
        rest = Mask(**(vars(self.mask) | {"before": None, "after": None}))
        sizes = {"queries": self.query.shape[-2], "keys": self.key.shape[-2]}
        options: dict[str, Any] = {"device": self.query.device, "dtype": self.logsumexp.dtype, **sizes}

        def tile(rows: tuple[int, int], columns: tuple[int, int]) -> Tile:
            return rest.tile((row + rows[0], row + rows[1]), (column + columns[0], column + columns[1]), **options)

        return tile

    def _fact(self, name: str, option: str) -> Tensor:
        if name not in self.facts:
            raise ValueError(f"{name} was not recorded: this fact was switched off; call observe(..., {option})")
        return self.facts[name]


def _with_heads(tensor: Tensor, rank: int) -> Tensor:
    return tensor.unsqueeze(1) if rank == 3 else tensor


def _bounds(window: slice, size: int, name: str) -> tuple[int, int]:
    if not isinstance(window, slice):
        raise ValueError(f"weights: {name} must be a slice, got {window!r}: one of them is slice(i, i + 1)")
    start, stop, step = window.indices(size)
    if step != 1:
        raise ValueError(f"weights: {name} must be a slice without a step, got {window}")
    return start, max(start, stop)
