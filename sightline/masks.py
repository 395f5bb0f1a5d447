"""Which query may attend to which key, and what is added to their score.

A mask is a recipe of O(1) size, never a matrix: any tile of it can be computed on demand, and for a range of
queries it says which span of keys can matter. True means "may attend". Knows nothing of kernels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sightline.shapes import ShapeError


class Tile(NamedTuple):
    """A window of a mask; None where it has nothing to say."""

    allowed: Tensor | None
    """bool, broadcastable to (batch heads queries keys)."""
    bias: Tensor | None
    """Added to the scaled scores, broadcastable likewise."""


TENSORS = ("lengths", "allowed", "bias", "slopes", "segments")
"""The fields of a mask that are tensors."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Mask:
    """What `Causal()`, `Window()` and the others fill in, and `&` merges field by field.

    Query i of `queries` stands at position i + keys - queries: with fewer queries than keys, the queries are
    the newest.

    >>> print((Causal() & Window(before=2, after=0)).draw(queries=3, keys=5))
    # # # . .
    . # # # .
    . . # # #
    """

    before: int | None = None
    """A query sees at most this many keys before its own position."""
    after: int | None = None
    """A query sees at most this many keys after its own position."""
    lengths: Tensor | None = None
    """(batch): keys from this index on do not exist."""
    allowed: Tensor | None = None
    """bool, broadcastable to (batch heads queries keys)."""
    bias: Tensor | None = None
    """float, added to the scaled scores, broadcastable likewise."""
    slopes: Tensor | None = None
    """(heads): -slope * distance is added to the scaled scores."""
    segments: Tensor | None = None
    """(batch keys): a query sees the keys of the segment that its own position is in, and no others."""

    def __and__(self, other: "Mask") -> "Mask":
        """Attend where both masks allow it; biases and slopes add up."""
        return Mask(
            before=_least(self.before, other.before),
            after=_least(self.after, other.after),
            lengths=_merge(self.lengths, other.lengths, torch.minimum),
            allowed=_merge(self.allowed, other.allowed, torch.logical_and),
            bias=_merge(self.bias, other.bias, torch.add),
            slopes=_merge(self.slopes, other.slopes, torch.add),
            segments=_merge(self.segments, other.segments, _intersections),
        )

    def __str__(self) -> str:
        """The first 8 queries and keys, or as many as the tensors have."""
        given = [tensor for tensor in (self.allowed, self.bias) if tensor is not None]
        of_queries = max((tensor.shape[-2] for tensor in given), default=1)
        given += [] if self.segments is None else [self.segments]
        of_keys = max((tensor.shape[-1] for tensor in given), default=1)
        # An axis of 1 is of any size.
        queries = of_queries if of_queries > 1 else of_keys if of_keys > 1 else 8
        keys = of_keys if of_keys > 1 else queries
        return self._picture((0, min(queries, 8)), (0, min(keys, 8)), queries=queries, keys=keys)

    @property
    def is_empty(self) -> bool:
        """Nothing is hidden and nothing is added."""
        return not self.is_positional and not self.has_tensors

    @property
    def is_positional(self) -> bool:
        """Something depends on where the query and the key stand."""
        return any(part is not None for part in (self.before, self.after, self.slopes, self.segments))

    @property
    def has_tensors(self) -> bool:
        return any(t is not None for t in (self.lengths, self.allowed, self.bias, self.segments))

    def with_heads(self) -> "Mask":
        """The mask of a call on (batch length width) tensors, for the same call with an axis of one head.

        There, `allowed` and `bias` of three axes are (batch queries keys).
        """
        allowed, bias = (t.unsqueeze(1) if t is not None and t.ndim == 3 else t for t in (self.allowed, self.bias))
        return replace(self, allowed=allowed, bias=bias)

    def to(self, device: torch.device) -> "Mask":
        """The same mask with its tensors on a device."""
        moved = {name: tensor.to(device) for name in TENSORS if (tensor := getattr(self, name)) is not None}
        return Mask(**(vars(self) | moved)) if moved else self

    def span(self, first: int, last: int, *, queries: int, keys: int) -> tuple[int, int]:
        """The keys [start, stop) that queries [first, last) can see by position; start == stop for none."""
        offset = keys - queries
        start = 0 if self.before is None else max(0, first + offset - self.before)
        stop = keys if self.after is None else min(keys, last + offset + self.after)
        if self.segments is not None and start < stop:
            own = self.segments[:, first + offset : last + offset]
            least, most = own.amin(1, keepdim=True), own.amax(1, keepdim=True)
            seen = (self.segments[:, start:stop] >= least) & (self.segments[:, start:stop] <= most)
            near = seen.any(0).nonzero().flatten()
            start, stop = (start + int(near[0]), start + int(near[-1]) + 1) if len(near) else (0, 0)
        return (start, stop) if start < stop else (0, 0)

    def tile(
        self,
        rows: tuple[int, int],
        columns: tuple[int, int],
        *,
        queries: int,
        keys: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tile:
        """The mask for queries [rows) and keys [columns) of a call with so many queries and keys."""
        first, last = rows[0] + keys - queries, rows[1] + keys - queries
        start, stop = columns
        allowed, bias = _cut(self.allowed, rows, columns), _cut(self.bias, rows, columns)
        # The distances in the tile run from first - (stop - 1) to (last - 1) - start.
        too_old = self.before is not None and last - 1 - start > self.before
        too_new = self.after is not None and first - (stop - 1) < -self.after
        if too_old or too_new or self.slopes is not None:
            key = torch.arange(start, stop, device=device)
            distance = torch.arange(first, last, device=device)[:, None] - key
            if too_old and self.before is not None:
                allowed = _merge(allowed, distance <= self.before, torch.logical_and)
            if too_new and self.after is not None:
                allowed = _merge(allowed, distance >= -self.after, torch.logical_and)
            if self.slopes is not None:
                bias = _merge(bias, -self.slopes.to(dtype)[:, None, None] * distance.abs().to(dtype), torch.add)
        if self.lengths is not None:
            exists = torch.arange(start, stop, device=device) < self.lengths[:, None, None, None]
            allowed = _merge(allowed, exists, torch.logical_and)
        if self.segments is not None:
            own = self.segments[:, None, first:last, None] == self.segments[:, None, None, start:stop]
            allowed = _merge(allowed, own, torch.logical_and)
        return Tile(allowed, None if bias is None else bias.to(dtype))

    def window(self, rows: tuple[int, int], columns: tuple[int, int]) -> "Mask":
        """The mask of queries [rows) and keys [columns) alone; where they stand is the caller's to know.

        Segments are those of the keys: right where the queries are the newest of them.
        """
        lengths = None if self.lengths is None else (self.lengths - columns[0]).clamp(0, columns[1] - columns[0])
        allowed, bias = _cut(self.allowed, rows, columns), _cut(self.bias, rows, columns)
        segments = None if self.segments is None else self.segments[:, slice(*columns)]
        return replace(self, lengths=lengths, allowed=allowed, bias=bias, segments=segments)

    def dense(
        self,
        queries: int,
        keys: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tile:
        """The whole mask as tensors: O(queries x keys) memory."""
        device = device or torch.device("cpu")
        return self.tile((0, queries), (0, keys), queries=queries, keys=keys, device=device, dtype=dtype)

    def draw(self, *, queries: int, keys: int, batch: int = 0, head: int = 0) -> str:
        """The mask as text: `#` may attend, `.` may not.

        >>> print(Causal().draw(queries=2, keys=4))
        # # # .
        # # # #
        """
        return self._picture((0, queries), (0, keys), queries=queries, keys=keys, batch=batch, head=head)

    def _picture(
        self, rows: tuple[int, int], columns: tuple[int, int], *, queries: int, keys: int, batch: int = 0, head: int = 0
    ) -> str:
        device = torch.device("cpu")
        allowed, bias = self.tile(rows, columns, queries=queries, keys=keys, device=device, dtype=torch.float64)
        seen = torch.ones(1, 1, rows[1] - rows[0], columns[1] - columns[0], dtype=torch.bool)
        if allowed is not None:
            seen = seen & allowed.cpu()
        if bias is not None:
            seen = seen & (bias.cpu() > -math.inf)
        picture = seen[min(batch, len(seen) - 1), min(head, seen.shape[1] - 1)]
        return "\n".join(" ".join("#" if may else "." for may in row) for row in picture.tolist())

    def check(self, *, batch: int, heads: int, queries: int, keys: int, device: torch.device) -> None:
        """Raise ShapeError or ValueError where this mask cannot belong to such a call."""
        full = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
        for name in ("allowed", "bias"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.ndim not in (2, 4):
                words = "(queries keys) or (batch heads queries keys)"
                raise ShapeError(f"mask: {name} has {tensor.ndim} axes, {tuple(tensor.shape)}; expected {words}")
            for axis, size in zip(tuple(full)[-tensor.ndim :], tensor.shape, strict=True):
                if size not in (1, full[axis]):
                    raise ShapeError(f"mask: {axis} is {size} in {name} but {full[axis]} in the call")
        if self.lengths is not None and self.lengths.shape != (batch,):
            raise ShapeError(f"mask: Padding has {len(self.lengths)} lengths but the call has batch {batch}")
        if self.slopes is not None and self.slopes.shape != (heads,):
            raise ShapeError(f"mask: ALiBi has {len(self.slopes)} slopes but the call has {heads} heads")
        if self.segments is not None:
            if self.segments.shape != (batch, keys):
                words = f"{tuple(self.segments.shape)} but the call has batch {batch} and {keys} keys"
                raise ShapeError(f"mask: Segments has numbers of shape {words}")
            if queries > keys:
                raise ShapeError(
                    f"mask: Segments needs a key at every query's position: {queries} queries, {keys} keys"
                )
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                raise ValueError(f"mask: {name} is on {tensor.device} but query on {device}; move it there")


def Causal() -> Mask:
    """A query sees its own position and what came before it.

    >>> print(Causal().draw(queries=3, keys=3))
    # . .
    # # .
    # # #
    """
    return Mask(after=0)


def Window(*, before: int | None, after: int | None) -> Mask:
    """A query sees `before` keys before its own position, its own, and `after` keys after it.

    None means no limit on that side. `Window(before=2, after=0)` is the newest three keys, the query's own
    included; other libraries call that a window of 2 or of 3, so the sides are named here.

    >>> print(Window(before=1, after=1).draw(queries=3, keys=3))
    # # .
    # # #
    . # #
    """
    for name, limit in (("before", before), ("after", after)):
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise ValueError(f"Window: {name} must be a whole number of keys, 0 or more, or None; got {limit!r}")
    return Mask(before=before, after=after)


def Padding(lengths: Tensor | Sequence[int]) -> Mask:
    """Sequence b has `lengths[b]` keys; the keys after them do not exist, for every query.

    >>> print(Padding([2]).draw(queries=1, keys=4))
    # # . .
    """
    tensor = lengths if isinstance(lengths, Tensor) else torch.tensor(lengths)
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(
            f"Padding: lengths must be whole numbers, one a sequence; got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return Mask(lengths=tensor)


def Segments(segments: Tensor) -> Mask:
    """Texts that stand one behind the other in a row of tokens, or chunks of one: none sees another.

    A query sees the keys whose number is that of its own position. Compose with `Causal()`. Keys of other segments
    cost nothing: a long row of short texts takes the sum of their squares, not the square of their sum.

    >>> print((Causal() & Segments(torch.tensor([[0, 0, 1, 1]]))).draw(queries=4, keys=4))
    # . . .
    # # . .
    . . # .
    . . # #
    """
    if segments.ndim != 2 or segments.is_floating_point() or segments.dtype == torch.bool:
        raise ValueError(f"Segments: expected whole numbers (batch keys), got {segments.dtype} {tuple(segments.shape)}")
    return Mask(segments=segments)


def Allowed(allowed: Tensor) -> Mask:
    """An explicit bool tensor, True where the query may attend; broadcastable to (batch heads queries keys)."""
    if allowed.dtype != torch.bool:
        raise ValueError(
            f"Allowed: expected a bool tensor, got {allowed.dtype}; "
            "use .bool() if nonzero means 'may attend', or Bias(...) to add it to the scores"
        )
    return Mask(allowed=allowed)


def Bias(bias: Tensor) -> Mask:
    """Numbers added to the scaled scores; broadcastable to (batch heads queries keys). -inf hides a key."""
    if not bias.is_floating_point():
        raise ValueError(f"Bias: expected a float tensor, got {bias.dtype}; use Allowed(...) for bool masks")
    return Mask(bias=bias)


def ALiBi(num_heads: int) -> Mask:
    """Attention with linear biases: -slope * distance on every score, one slope a head.

    For a power of two of heads the slopes are 2^(-8/heads), 2^(-16/heads), ...; for other numbers those of the
    power of two below, and then every second one of the power of two above. Compose with `Causal()`.

    Source: Press et al. 2022, section 3 and its reference code for other numbers of heads.
    """
    if num_heads < 1:
        raise ValueError(f"ALiBi: expected at least one head, got {num_heads}")
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * (num_heads - power), 2)]
    return Mask(slopes=torch.tensor(slopes))


def _least(left: int | None, right: int | None) -> int | None:
    if left is None or right is None:
        return right if left is None else left
    return min(left, right)


def _merge(left: Tensor | None, right: Tensor | None, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return combine(left, right)


def _intersections(left: Tensor, right: Tensor) -> Tensor:
    """Numbers that are equal where both are, in the order of the left ones."""
    return left * (right.amax() - right.amin() + 1) + right - right.amin()


def _cut(tensor: Tensor | None, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor | None:
    """The window of a broadcastable tensor; an axis of size 1 stays as it is."""
    if tensor is None:
        return None
    if tensor.ndim == 2:
        tensor = tensor[None, None]
    if tensor.shape[-2] > 1:
        tensor = tensor[..., rows[0] : rows[1], :]
    if tensor.shape[-1] > 1:
        tensor = tensor[..., columns[0] : columns[1]]
    return tensor
