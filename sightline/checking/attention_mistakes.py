"""The known wrong versions of attention: of its scores and softmax, its masks, its causality."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sightline.checking.definitions import Sizes, causal
from sightline.checking.mistakes import RESHAPED, Mistake, nothing, square

# --- Scores and softmax -------------------------------------------------------------------------------


def _divide(by: Callable[[Sizes], float]) -> dict[str, Any]:
    return {"divisor": by}


def _signed_shares(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True)


SCORES = [
    Mistake(
        name="softmax over the queries",
        what="the softmax runs over the queries: columns of the weights sum to 1, not rows",
        fix="take the softmax over the keys, the axis that value is summed over: dim=-1 of (queries keys)",
        steps={"softmax": lambda scores: scores.softmax(-2)},
    ),
    Mistake(
        name="softmax over the batch",
        what="the softmax runs over the batch: the weights of one query do not sum to 1",
        fix="take the softmax over the keys: dim=-1, whatever axes stand before",
        steps={"softmax": lambda scores: scores.softmax(0)},
    ),
    Mistake(
        name="softmax over the heads",
        what="the softmax runs over the heads: the weights of one query do not sum to 1",
        fix="take the softmax over the keys: dim=-1, whatever axes stand before",
        steps={"softmax": lambda scores: scores.softmax(1)},
    ),
    Mistake(
        name="softmax over everything",
        what="the softmax runs over queries and keys together: all weights sum to 1, not each row",
        fix="sum the exponentials over the keys alone: dim=-1, keepdim=True",
        steps={"softmax": lambda scores: scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])},
    ),
    Mistake(
        name="no softmax",
        what="the scores are used as weights: there is no softmax",
        fix="weights = softmax(scores, dim=-1)",
        steps={"softmax": lambda scores: scores},
    ),
    Mistake(
        name="exponentials not divided by their sum",
        what="the weights are exp(score): they are not divided by their sum over the keys",
        fix="weights = exp(scores) / exp(scores).sum(-1, keepdim=True)",
        steps={"softmax": lambda scores: scores.exp()},
    ),
    Mistake(
        name="no exponential",
        what="scores are divided by their sum without exp before: weights can be negative",
        fix="weights = exp(scores) / exp(scores).sum(-1, keepdim=True)",
        steps={"softmax": _signed_shares},
    ),
    Mistake(
        name="sigmoid for softmax",
        what="each score goes through a sigmoid: the keys do not compete, and rows do not sum to 1",
        fix="weights = softmax(scores, dim=-1)",
        steps={"softmax": lambda scores: scores.sigmoid()},
    ),
    Mistake(
        name="no scale",
        what="the scores are not divided by sqrt(width)",
        fix="scores = query @ key.T / sqrt(width), where width is the last axis of query",
        steps=_divide(lambda sizes: 1.0),
    ),
    Mistake(
        name="scale by d, not by its root",
        what="the scores are divided by width, not by sqrt(width)",
        fix="scores = query @ key.T / sqrt(width)",
        steps=_divide(lambda sizes: float(sizes.width)),
    ),
    Mistake(
        name="multiplied by the root",
        what="the scores are multiplied by sqrt(width), not divided by it",
        fix="scores = query @ key.T / sqrt(width)",
        steps=_divide(lambda sizes: sizes.width**-0.5),
    ),
    Mistake(
        name="scale applied twice",
        what="the scores are divided by sqrt(sqrt(width)): of query and key only one was scaled so, or a root too many",
        fix="divide the scores once by sqrt(width), or both query and key by its root",
        steps=_divide(lambda sizes: sizes.width**0.25),
    ),
    Mistake(
        name="scale of the whole width",
        what="the scores are divided by the root of d_model, not of one head's width",
        fix="divide by sqrt(d_k / num_heads): the width of what one head multiplies",
        steps=_divide(lambda sizes: sizes.whole**0.5),
    ),
    Mistake(
        name="scale of the values",
        what="the scores are divided by the root of the values' width",
        fix="divide by the root of query's last axis: its length is what makes the products grow",
        steps=_divide(lambda sizes: sizes.value_width**0.5),
    ),
    Mistake(
        name="scale by the number of keys",
        what="the scores are divided by the root of the number of keys",
        fix="divide by sqrt(width), query.shape[-1]; in columns that is query.shape[-2]",
        steps=_divide(lambda sizes: sizes.keys**0.5),
    ),
    Mistake(
        name="scale by the number of queries",
        what="the scores are divided by the root of the number of queries",
        fix="divide by sqrt(width), query.shape[-1]; in columns that is query.shape[-2]",
        steps=_divide(lambda sizes: sizes.queries**0.5),
    ),
    Mistake(
        name="reshape for transpose",
        what=f"of the keys, {RESHAPED}",
        fix="use key.transpose(-2, -1) (numpy: key.swapaxes(-2, -1)) in the place of key.reshape(...)",
        steps={"transpose": lambda key: key.reshape(*key.shape[:-2], key.shape[-1], key.shape[-2])},
    ),
    Mistake(
        name="reshape for transpose in columns",
        what=f"of the keys, {RESHAPED}",
        fix="use key.T in the place of key.reshape(...)",
        steps={"transpose": lambda key: key.mT.reshape(*key.shape).mT},
    ),
    Mistake(
        name="weights transposed",
        what="the values are mixed with the transposed weights: each value goes where it should have come from",
        fix="output = weights @ value, with weights (queries keys)",
        steps={"mix": lambda weights, value: weights.mT @ value if square(weights) else nothing(weights @ value)},
    ),
]

# --- Masks --------------------------------------------------------------------------------------------

MASKS = [
    Mistake(
        name="mask inverted",
        what="the mask is inverted: what may be seen is hidden, and what must be hidden is seen",
        fix="True means may attend: scores.masked_fill(~mask, -inf)",
        steps={"hide": lambda scores, allowed: scores.masked_fill(allowed, -torch.inf)},
    ),
    Mistake(
        name="mask added after the softmax",
        what="the mask is applied after the softmax: the rows no longer sum to 1",
        fix="hide scores, not weights: masked_fill with -inf first, then softmax",
        steps={
            "hide": lambda scores, allowed: scores,
            "after": lambda weights, allowed: weights if allowed is None else weights * allowed,
        },
    ),
    Mistake(
        name="mask added to the weights",
        what="the mask is added after the softmax: the weights are no shares any more",
        fix="hide scores, not weights: masked_fill with -inf first, then softmax",
        steps={
            "hide": lambda scores, allowed: scores,
            "after": lambda weights, allowed: weights if allowed is None else weights + allowed,
        },
    ),
    Mistake(
        name="masked weights are -1e9",
        what="a large negative number is put in after the softmax: it hides scores, but destroys weights",
        fix="hide scores, not weights: masked_fill with -inf first, then softmax",
        steps={
            "hide": lambda scores, allowed: scores,
            "after": lambda weights, allowed: weights if allowed is None else weights + (~allowed) * -1e9,
        },
    ),
    Mistake(
        name="masked with 0, not with -inf",
        what="hidden scores become 0, and exp(0) = 1: a hidden key still gets weight",
        fix="scores.masked_fill(~mask, -inf): exp(-inf) = 0",
        steps={"hide": lambda scores, allowed: scores.masked_fill(~allowed, 0.0)},
    ),
    Mistake(
        name="mask added to the scores as 0 and 1",
        what="the mask itself is added to the scores: 1 where a key may be seen is far from hiding the others",
        fix="scores.masked_fill(~mask, -inf)",
        steps={"hide": lambda scores, allowed: scores + allowed},
    ),
    Mistake(
        name="mask ignored",
        what="the mask changes nothing",
        fix="scores = scores.masked_fill(~mask, -inf) before the softmax, and keep the result",
        steps={"hide": lambda scores, allowed: scores},
    ),
    Mistake(
        name="mask transposed",
        what="the mask is read as (keys queries)",
        fix="a mask's rows are queries and its columns keys",
        steps={
            "hide": lambda scores, allowed: (
                scores.masked_fill(~allowed.mT, -torch.inf) if square(scores) else nothing(scores)
            )
        },
    ),
]

CAUSAL = [
    Mistake(
        name="causal off by one: sees the next token",
        what="each query sees one key of the future: the diagonal is off by one",
        fix="torch.ones(n, n).tril(); hide with triu(diagonal=1), and not with diagonal=2",
        steps={"pattern": lambda queries, keys: causal(queries, keys, shift=1)},
    ),
    Mistake(
        name="causal off by one: does not see itself",
        what="a query does not see its own key, and the first sees nothing: the diagonal is off by one",
        fix="torch.ones(n, n).tril(); hide with triu(diagonal=1), and not with diagonal=0",
        steps={"pattern": lambda queries, keys: causal(queries, keys, shift=-1)},
    ),
    Mistake(
        name="causal upside down",
        what="each query sees the future and not the past: triu where tril was meant",
        fix="torch.ones(n, n).tril() is what a query may see",
        steps={"pattern": lambda queries, keys: ~causal(queries, keys, shift=-1)},
    ),
    Mistake(
        name="causal inverted",
        what="each query sees the future alone, not even itself: the causal mask is inverted",
        fix="torch.ones(n, n).tril() is what a query may see; hide the rest",
        steps={"pattern": lambda queries, keys: ~causal(queries, keys)},
    ),
]

NOT_CAUSAL = Mistake(
    name="not causal",
    what="every query sees the future: nothing is hidden",
    fix="scores = scores.masked_fill(~torch.ones(n, n).tril().bool(), -inf) before the softmax",
    steps={"pattern": lambda queries, keys: None},
)

# --- Numbers ---

OVERFLOW = Mistake(
    name="softmax overflows",
    what="exp of a large score is infinite: the softmax does not subtract the row's maximum first",
    fix="weights = exp(scores - scores.max(-1, keepdim=True)), then divide by their sum; or the library's softmax",
    steps={},
)
