"""The definition of attention, in the fewest plain tensor operations: every other kernel is tested against it.

Any float dtype (half precision is computed in float32), O(queries x keys) memory. Knows nothing of recipes:
the mask comes as dense tensors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weights and logsumexp.

    query (batch heads queries width), key (batch groups keys width), value (batch groups keys value_width);
    weights (batch heads queries keys), logsumexp (batch heads queries), both before dropout.
    """
    scores = _scores(query, key, allowed, bias, scale, softcap)
    weights, logsumexp = _softmax(scores, sinks)
    value = value.to(weights.dtype).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    output = F.dropout(weights, dropout) @ value
    return output.to(query.dtype), weights, logsumexp


def observe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    top: int,
    received: bool,
    map_block: int,
    sink_keys: int,
) -> dict[str, Tensor]:
    """The output and every fact, each straight from its formula."""
    output, weights, logsumexp = attention(
        query, key, value, allowed, bias, scale=scale, softcap=softcap, sinks=sinks, dropout=0.0
    )
    scores = _scores(query, key, allowed, bias, scale, softcap)
    queries, keys = weights.shape[-2:]
    position = torch.arange(queries, device=query.device)[:, None] + keys - queries
    distance = (position - torch.arange(keys, device=query.device)).abs().to(weights.dtype)
    facts = {
        "output": output,
        "logsumexp": logsumexp,
        "entropy": torch.special.entr(weights).sum(dim=-1),
        "distance": (weights * distance).sum(dim=-1),
        "sink": weights[..., :sink_keys].sum(dim=-1),
    }
    if top:
        facts["top_weights"], facts["top_keys"] = _top(scores, weights, top)
    if received:
        facts["received"] = weights.sum(dim=-2)
    if map_block:
        pad = (0, -keys % map_block, 0, -queries % map_block)
        blocks = F.pad(weights, pad).unflatten(-1, (-1, map_block)).unflatten(-3, (-1, map_block))
        facts["map_sum"], facts["map_max"] = blocks.sum(dim=(-3, -1)), blocks.amax(dim=(-3, -1))
    return facts


def _scores(
    query: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    key = key.to(exact).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = scale * query.to(exact) @ key.transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and logsumexp; a sink is one more logit that takes weight and is left out of the result."""
    keys = scores.shape[-1]
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    # A row of -inf has no softmax: it is computed on zeros, then taken out again.
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    weights = F.softmax(scores, dim=-1).masked_fill(empty, 0)[..., :keys]
    return weights, scores.logsumexp(dim=-1).masked_fill(empty.squeeze(-1), -torch.inf)


def _top(scores: Tensor, weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row, ties to the lowest key; weight 0 and key -1 where no key is left."""
    pad = (0, max(0, top - scores.shape[-1]))
    scores, keys = F.pad(scores, pad, value=-torch.inf).sort(dim=-1, descending=True, stable=True)
    scores, keys = scores[..., :top], keys[..., :top]
    gone = scores == -torch.inf
    return F.pad(weights, pad).gather(-1, keys).masked_fill(gone, 0), keys.masked_fill(gone, -1)
