"""`SeenSequence`: what several calls of attention saw of one sequence, put together into the tensors of a capture.

Knows nothing of models, batches and texts.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.captures import AXES
from sightline.masks import Mask
from sightline.observation import Observation
from sightline.store import Store


@dataclass(frozen=True)
class _Call:
    """The mask of one call, and where the call's queries and keys stand."""

    mask: Mask
    queries: slice
    keys: slice


class SeenSequence:
    """Tensors of the layers of one sequence, with room for queries and keys to come.

    With `same_text` the queries are the newest of the keys' text. `room` is how many of each to expect; what is beyond
    it is copied. With `file` the tensors lie there, and have room for one call of each layer alone.
    """

    def __init__(self, layers: int, *, map_block: int, same_text: bool, room: int, file: Path | None) -> None:
        self.map_block = map_block
        self._layers, self._same_text, self._room, self._file = layers, same_text, room, file
        self._store: Store | None = None
        self._sizes: dict[str, int] = {}
        self._calls: list[list[_Call]] = [[] for _ in range(layers)]
        self._ways: dict[int, tuple[float, float | None]] = {}

    def keep(self, row: int, seen: Observation, first_key: int) -> None:
        """Add what one layer, row `row`, saw of its next queries, with keys that begin at `first_key`.

        Raises: ValueError for keys that are missing, another shape than the other layers', another scale or softcap.
        """
        first, known = self.counts(row)
        last, stop = first + seen.query.shape[2], first_key + seen.key.shape[2]
        if first_key > known:
            raise ValueError(f"recorder: expected keys from position {known} on, got them from {first_key}: some miss")
        if self._ways.setdefault(row, (seen.scale, seen.softcap)) != (seen.scale, seen.softcap):
            raise ValueError("recorder: a layer has another scale or softcap than before; record such calls apart")
        store = self._reserve(seen, last, stop)
        for name in AXES:
            kept = store.tensors[name][row]
            if name == "queries":
                kept[:, first:last].copy_(seen.query[0])
            elif name == "keys":
                kept[:, known:stop].copy_(seen.key[0, :, known - first_key :])
            elif name == "received":
                kept[:, first_key:stop] += seen.received[0].to(kept.device)
            elif not name.startswith("map"):
                kept[:, first:last].copy_(getattr(seen, name)[0])
        self._add_map(store, row, seen, first, first_key)
        store.release()
        self._calls[row].append(_Call(_on_cpu(seen.mask), slice(first, last), slice(first_key, stop)))

    def counts(self, row: int = 0) -> tuple[int, int]:
        """How many queries and keys of a layer there are."""
        calls = self._calls[row]
        return (calls[-1].queries.stop, calls[-1].keys.stop) if calls else (0, 0)

    def facts(self) -> dict[str, Any]:
        """What a `Capture` is made of beside the text; it stays as it is when calls are added.

        Raises: ValueError where some layers have seen more than others, or nothing was seen.
        """
        queries, keys = self.counts()
        if self._store is None or any(self.counts(row) != (queries, keys) for row in range(self._layers)):
            raise ValueError("recorder: expected each layer to have been called as often as the others; end the pass")
        sizes = self._lengths(queries, keys)
        tensors = {}
        for name, axes in AXES.items():
            tensor = self._store.tensors[name][tuple(slice(sizes.get(axis)) for axis in axes.split())]
            # Later queries are written beside the earlier ones, but add to these; a full store is replaced.
            grows = name in ("received", "map_sum", "map_max") and queries < self._sizes["queries"]
            tensors[name] = tensor.clone() if grows else tensor
        ways = [self._ways[row] for row in range(self._layers)]
        return {
            "masks": tuple(
                _joined(calls, self._sizes["heads"], queries, keys, same_text=self._same_text) for calls in self._calls
            ),
            "scales": tuple(scale for scale, _ in ways),
            "softcaps": tuple(softcap for _, softcap in ways),
            **tensors,
        }

    def _lengths(self, queries: int, keys: int) -> dict[str, int]:
        blocks = {"query_blocks": -(-queries // self.map_block), "key_blocks": -(-keys // self.map_block)}
        return {"queries": queries, "keys": keys, **blocks}

    def _reserve(self, seen: Observation, queries: int, keys: int) -> Store:
        """The store, made or grown so that it holds so many queries and keys."""
        heads, groups, width, top = seen.query.shape[1], *seen.key.shape[1::2], seen.top_keys.shape[-1]
        shape = {"layers": self._layers, "heads": heads, "groups": groups, "width": width, "top": top}
        if self._store is None:
            room = self._room if self._same_text else 0
            self._sizes = shape | {"queries": max(queries, self._room), "keys": max(keys, room)}
        elif any(self._sizes[axis] != size for axis, size in shape.items()):
            raise ValueError(
                f"recorder: expected layers of one shape, but one has {heads} heads, {groups} groups and width {width} "
                f"after {self._sizes['heads']}, {self._sizes['groups']} and {self._sizes['width']}; record it apart"
            )
        elif queries <= self._sizes["queries"] and keys <= self._sizes["keys"]:
            return self._store
        else:
            assert self._file is None, "a file has room for one pass"
            for axis, size in (("queries", queries), ("keys", keys)):
                if size > self._sizes[axis]:
                    self._sizes[axis] = max(size, 2 * self._sizes[axis])
        sizes = self._sizes | self._lengths(self._sizes["queries"], self._sizes["keys"])
        dtypes = {"queries": seen.query.dtype, "keys": seen.key.dtype, "top_keys": torch.int32}
        shapes = {
            name: (dtypes.get(name, seen.logsumexp.dtype), [sizes[axis] for axis in axes.split()])
            for name, axes in AXES.items()
        }
        before, self._store = self._store, Store(shapes, self._file)
        for name, tensor in (before.tensors if before else {}).items():
            self._store.tensors[name][tuple(map(slice, tensor.shape))] = tensor
        return self._store

    def _add_map(self, store: Store, row: int, seen: Observation, query: int, key: int) -> None:
        """Add to the pooled map; its squares begin at multiples of its block, and calls anywhere."""
        block = self.map_block
        rows = _pieces(query, seen.query.shape[2], block)
        columns = _pieces(key, seen.key.shape[2], block)
        whole = len(rows) == len(columns) == 1
        for some in rows:
            for others in columns:
                found = seen.map if whole else seen.pooled(queries=some, keys=others, block=block)
                corner = (query + some.start) // block, (key + others.start) // block
                for name, values in (("map_sum", found.sum[0].cpu()), ("map_max", found.max[0].cpu())):
                    place = tuple(slice(at, at + size) for at, size in zip(corner, values.shape[1:], strict=True))
                    kept = store.tensors[name][row][(slice(None), *place)]
                    kept.copy_(kept + values if name == "map_sum" else torch.maximum(kept, values))


def _pieces(first: int, count: int, block: int) -> list[slice]:
    """`count` tokens from `first` on, cut at the first multiple of the block if they do not begin at one."""
    edge = min(-first % block, count)
    return [piece for piece in (slice(0, edge), slice(edge, count)) if piece.start < piece.stop]


def _joined(calls: list[_Call], heads: int, queries: int, keys: int, *, same_text: bool) -> Mask:
    """One mask for the queries of all calls: a recipe, where the calls agree on one; else written out."""
    if len(calls) == 1:
        return calls[0].mask
    masks = [_from_here(call, same_text) for call in calls]
    first = masks[0]
    # Keys of the same text grow, and tensors do not grow with them.
    lasting = first.after == 0 and not first.has_tensors
    if not same_text:
        lasting = not first.is_positional and not _by_query(first)
    if lasting and all(_equal(first, mask) for mask in masks) and not any(map(_hides_by_absence, calls, masks)):
        return first
    return _written_out(calls, heads, queries, keys)


def _from_here(call: _Call, same_text: bool) -> Mask:
    """A newest query alone sees no key after it, whether its mask says so or not."""
    alone = same_text and call.queries.stop - call.queries.start == 1
    return replace(call.mask, after=0) if alone and call.mask.after is None else call.mask


def _hides_by_absence(call: _Call, mask: Mask) -> bool:
    """Oldest keys were left out, and the mask does not say that they are hidden."""
    if not call.keys.start:
        return False
    first = call.keys.stop - (call.queries.stop - call.queries.start)
    return mask.before is None or first - mask.before < call.keys.start


def _equal(one: Mask, other: Mask) -> bool:
    for name, left in vars(one).items():
        right = getattr(other, name)
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            if not torch.equal(left, right):
                return False
        elif left is not right and left != right:
            return False
    return True


def _by_query(mask: Mask) -> bool:
    return any(tensor is not None and tensor.shape[-2] > 1 for tensor in (mask.allowed, mask.bias))


def _written_out(calls: list[_Call], heads: int, queries: int, keys: int) -> Mask:
    """What each query may see, and what is added to its scores, as tensors of (1, heads or 1, queries, keys)."""
    tiles = [call.mask.dense(*(own.stop - own.start for own in (call.queries, call.keys))) for call in calls]
    planes = [tensor for tile in tiles for tensor in tile if tensor is not None]
    heads = heads if any(tensor.ndim > 2 and tensor.shape[-3] > 1 for tensor in planes) else 1
    allowed = torch.zeros(1, heads, queries, keys, dtype=torch.bool)
    bias = torch.zeros(1, heads, queries, keys) if any(tile.bias is not None for tile in tiles) else None
    for call, tile in zip(calls, tiles, strict=True):
        allowed[:, :, call.queries, call.keys] = True if tile.allowed is None else tile.allowed
        if bias is not None and tile.bias is not None:
            bias[:, :, call.queries, call.keys] = tile.bias
    return Mask(allowed=allowed, bias=bias)


def _on_cpu(mask: Mask) -> Mask:
    tensors = {name: value.detach().cpu() for name, value in vars(mask).items() if isinstance(value, Tensor)}
    return Mask(before=mask.before, after=mask.after, **tensors)
