"""Attention and what it saw in O(N) memory, in plain tensor operations: any device, any float dtype.

The work is cut into strips: a block of queries against the span of keys they may see. A strip knows the final
softmax of its rows, so every fact is exact after one pass; its size does not grow with the number of queries.
Gradients recompute the strip (checkpointing), so nothing of O(queries x keys) is ever kept.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Span = Callable[[int, int], tuple[int, int]]
"""First and last query of a strip -> first and last key it may see."""
TileOf = Callable[[tuple[int, int], tuple[int, int]], tuple[Tensor | None, Tensor | None]]
"""Queries and keys of a tile -> which may attend, and what is added to the scores."""

POOL_QUERIES, POOL_KEYS = 512, 4096
"""Weights that are pooled at once: 8 MB, which a CPU's last cache holds."""
NEVER = 1e30
"""In place of the logsumexp of a query that sees no key: all its weights become 0."""
STRIP_QUERIES = 128
STRIP_SCORES = 2**21
"""Scores a strip holds at most, as far as one query of one sequence allows: 8 MB in float32."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    tile: TileOf,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """query (batch heads queries width), key and value (batch groups keys width or value_width)."""

    def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, bias: Tensor | None) -> Tensor:
        scores = _scores(query, key, allowed, bias, scale, softcap)
        return _weigh(F.dropout(_weights(scores, sinks), dropout), value).to(query.dtype)

    rows: list[Tensor] = []
    for (first, last), (start, stop) in _strips(query, key, span, block=STRIP_QUERIES):
        strip = (
            query[..., first:last, :],
            key[..., start:stop, :],
            value[..., start:stop, :],
            *tile((first, last), (start, stop)),
        )
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*strip, sinks)):
            again = checkpoint(attend, *strip, use_reentrant=False, preserve_rng_state=dropout > 0)
            rows.append(cast(Tensor, again))
        else:
            rows.append(attend(*strip))
    return torch.cat(rows, dim=-2) if rows else query.new_zeros(*query.shape[:-1], value.shape[-1])


def observe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    tile: TileOf,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    top: int,
    received: bool,
    map_block: int,
    sink_keys: int,
) -> dict[str, Tensor]:
    """The output and the facts of the reference, none with a gradient."""
    queries, keys = query.shape[-2], key.shape[-2]
    exact = torch.promote_types(query.dtype, torch.float32)
    facts = _empty_facts(query, value, keys, exact, top=top, received=received, map_block=map_block)
    for (first, last), (start, stop) in _strips(query, key, span, block=map_block or STRIP_QUERIES):
        allowed, bias = tile((first, last), (start, stop))
        scores = _scores(query[..., first:last, :], key[..., start:stop, :], allowed, bias, scale, softcap)
        weights, logsumexp = _weights_and_logsumexp(scores, sinks)
        rows = slice(first, last)
        facts["output"][..., rows, :] = _weigh(weights, value[..., start:stop, :])
        facts["logsumexp"][..., rows] = logsumexp
        facts["entropy"][..., rows] = _entropy(scores, weights, logsumexp)
        facts["distance"][..., rows] = _distance(weights, first + keys - queries, start)
        facts["sink"][..., rows] = weights[..., : max(0, sink_keys - start)].sum(dim=-1)
        if top:
            _keep_top(facts, rows, scores, weights, start, top)
        if received or map_block:
            mass = weights.sum(dim=-2)
            if received:
                facts["received"][..., start:stop] += mass
            if map_block:
                _pool(facts, first // map_block, start, mass, weights.amax(dim=-2), map_block)
    return facts


def pool(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    tile: TileOf,
    *,
    before: int | None,
    after: int | None,
    position: int,
    scale: float,
    softcap: float | None,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Weights of a window summed, and the largest, over squares of `block`: (batch heads query_blocks key_blocks) each.

    The logsumexp of the whole rows is known: (batch heads queries). `position`: how far the window's first query
    stands behind its first key; `tile` says what the mask says beside `before` and `after`.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[-2]
    total = logsumexp.new_zeros(batch, heads, -(-queries // block), -(-keys // block))
    largest = total.clone()
    room = logsumexp.new_empty(max(block, POOL_QUERIES) * max(block, POOL_KEYS))
    for sequence, head in product(range(batch), range(heads)):
        at = sequence, head
        total_of_row = logsumexp[at].masked_fill(logsumexp[at] == -torch.inf, NEVER)[:, None]
        rows, columns = query[at].to(room.dtype) * scale, key[sequence, head * key.shape[1] // heads].to(room.dtype)
        if softcap is None:  # one more number of width subtracts the logsumexp within the product
            rows = torch.cat([rows, -total_of_row], dim=-1)
            columns = torch.cat([columns, columns.new_ones(keys, 1)], dim=-1)
        for (first, last), (start, stop) in _pool_strips(queries, keys, before, after, position, block):
            weights = room[: (last - first) * (stop - start)].view(last - first, stop - start)
            torch.mm(rows[first:last], columns[start:stop].T, out=weights)
            if softcap is not None:
                weights.div_(softcap).tanh_().mul_(softcap).sub_(total_of_row[first:last])
            allowed, bias = (
                None if t is None else t.expand(batch, heads, -1, -1)[at] for t in tile((first, last), (start, stop))
            )
            if bias is not None:
                weights.add_(bias)
            weights.exp_()
            if allowed is not None:
                weights.masked_fill_(~allowed, 0)
            # What a query may not see by position lies beyond a diagonal.
            if after is not None and first + position - start + after < stop - start - 1:
                weights.tril_(first + position - start + after)
            if before is not None and first + position - start - before > 1 - (last - first):
                weights.triu_(first + position - start - before)
            squares = F.pad(weights, (0, (start - stop) % block, 0, (first - last) % block))
            squares = squares.unflatten(1, (-1, block)).unflatten(0, (-1, block))
            place = *at, slice(first // block, -(-last // block)), slice(start // block, -(-stop // block))
            total[place] = squares.sum(1).sum(-1)
            largest[place] = squares.amax(1).amax(-1)
    return total, largest


def _pool_strips(
    queries: int, keys: int, before: int | None, after: int | None, position: int, block: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of queries and of keys that these may see, none across a square."""
    rows, columns = (max(1, size // block) * block for size in (POOL_QUERIES, POOL_KEYS))
    for first in range(0, queries, rows):
        last = min(first + rows, queries)
        start = 0 if before is None else max(0, first + position - before) // block * block
        stop = keys if after is None else min(keys, last + position + after)
        for left in range(start, stop, columns):
            yield (first, last), (left, min(left + columns, stop))


def _strips(query: Tensor, key: Tensor, span: Span, *, block: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of queries, none across a multiple of `block`, each with the keys they may see."""
    queries, keys = query.shape[-2], key.shape[-2]
    one_query = max(1, query.shape[0] * query.shape[1] * keys)
    size = max(1, min(block, STRIP_QUERIES, STRIP_SCORES // one_query))
    for edge in range(0, queries, block):
        end = min(edge + block, queries)
        for first in range(edge, end, size):
            last = min(first + size, end)
            yield (first, last), span(first, last)


def _scores(
    query: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    batch, heads, queries, _ = query.shape
    scores = _by_group(query.to(exact) * scale, key.shape[1]) @ key.to(exact).transpose(-2, -1)
    scores = scores.view(batch, heads, queries, key.shape[-2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """(batch heads queries x) -> (batch groups heads/groups*queries x): heads that share keys stand together."""
    batch, heads, queries, size = rows.shape
    return rows.reshape(batch, groups, heads // groups * queries, size)


def _weigh(weights: Tensor, value: Tensor) -> Tensor:
    batch, heads, queries, _ = weights.shape
    output = _by_group(weights, value.shape[1]) @ value.to(weights.dtype)
    return output.view(batch, heads, queries, value.shape[-1])


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over keys and the sink; an empty row is computed on zeros, then taken out again."""
    keys = scores.shape[-1]
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        return F.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :keys]
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return F.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)


def _weights_and_logsumexp(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    if scores.shape[-1]:
        largest = scores.amax(dim=-1, keepdim=True)
    else:
        largest = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.to(scores.dtype)[:, None, None])
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = (scores - largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total += (sinks.to(scores.dtype)[:, None, None] - largest).exp()
    logsumexp = (largest + total.log()).squeeze(-1)
    return weights.div_(total.masked_fill(total == 0, 1)), logsumexp


def _entropy(scores: Tensor, weights: Tensor, logsumexp: Tensor) -> Tensor:
    """sum w (logsumexp - s): the scores are taken relative to logsumexp first, or large ones would cancel."""
    surprise = logsumexp.masked_fill(logsumexp == -torch.inf, 0).unsqueeze(-1) - scores
    return surprise.clamp_(max=torch.finfo(scores.dtype).max).mul_(weights).sum(dim=-1)


def _distance(weights: Tensor, first: int, start: int) -> Tensor:
    queries, keys = weights.shape[-2:]
    query = torch.arange(first, first + queries, device=weights.device)[:, None]
    distance = (query - torch.arange(start, start + keys, device=weights.device)).abs()
    return (weights * distance.to(weights.dtype)).sum(dim=-1)


def _keep_top(facts: dict[str, Tensor], rows: slice, scores: Tensor, weights: Tensor, start: int, top: int) -> None:
    """The largest scores of each row, exactly, ties to the lowest key."""
    keys = scores.shape[-1]
    found = min(top, keys)
    # One more than asked for shows whether the last place is shared by keys that did not fit.
    best, index = scores.topk(min(top + 1, keys), dim=-1)
    index, order = index[..., :found].sort(dim=-1)
    best_kept, by_score = best[..., :found].gather(-1, order).sort(dim=-1, descending=True, stable=True)
    index = index.gather(-1, by_score)
    if keys > top:
        shared = (best[..., top] == best[..., top - 1]) & (best[..., top] > -torch.inf)
        if shared.any():
            ties = scores[shared].sort(dim=-1, descending=True, stable=True).indices[..., :top]
            index[shared] = ties
    gone = best_kept == -torch.inf
    facts["top_weights"][..., rows, :found] = weights.gather(-1, index).masked_fill_(gone, 0)
    facts["top_keys"][..., rows, :found] = (index + start).masked_fill_(gone, -1)


def _pool(facts: dict[str, Tensor], row: int, start: int, mass: Tensor, largest: Tensor, block: int) -> None:
    """Add one strip, already reduced over its queries, to its row of the map."""
    before = start % block
    after = -(before + mass.shape[-1]) % block
    columns = slice(start // block, (start + mass.shape[-1] + after) // block)
    mass, largest = (F.pad(t, (before, after)).unflatten(-1, (-1, block)) for t in (mass, largest))
    facts["map_sum"][..., row, columns] += mass.sum(dim=-1)
    kept = facts["map_max"][..., row, columns]
    torch.maximum(kept, largest.amax(dim=-1), out=kept)


def _empty_facts(
    query: Tensor, value: Tensor, keys: int, exact: torch.dtype, *, top: int, received: bool, map_block: int
) -> dict[str, Tensor]:
    batch, heads, queries, _ = query.shape

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, heads, *shape, dtype=exact, device=query.device)

    facts = {"output": query.new_zeros(batch, heads, queries, value.shape[-1])}
    facts |= {name: zeros(queries) for name in ("logsumexp", "entropy", "distance", "sink")}
    if top:
        facts["top_weights"] = zeros(queries, top)
        facts["top_keys"] = torch.full((batch, heads, queries, top), -1, device=query.device)
    if received:
        facts["received"] = zeros(keys)
    if map_block:
        blocks = (-(-queries // map_block), -(-keys // map_block))
        facts["map_sum"], facts["map_max"] = zeros(*blocks), zeros(*blocks)
    return facts
