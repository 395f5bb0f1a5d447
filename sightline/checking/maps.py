"""Which of a module's parameters map to queries, keys, values and the output, read off their names and shapes."""

import itertools
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from sightline.checking.definitions import Maps
from sightline.checking.subject import CheckError

_ROLES = {
    "query": ("q", "query", "queries", "wq", "bq"),
    "key": ("k", "key", "keys", "wk", "bk"),
    "value": ("v", "value", "values", "wv", "bv"),
    "output": ("o", "out", "output", "wo", "bo", "wout", "unify", "unifyheads"),
}
_WORDS = {word: role for role, words in _ROLES.items() for word in words}
_FUSED = ("qkv", "wqkv", "bqkv")


def readings(weights: dict[str, Tensor], *, d_model: int | None, heads: int | None) -> Iterator[Maps]:
    """Every way in which the parameters can be meant, the likeliest first: all of them are as good as one another.

    Raises: CheckError where there are no maps to query, key and value.

    >>> names = ("query.weight", "key.weight", "value.weight")
    >>> maps = next(readings({name: torch.ones(6, 4) for name in names}, d_model=4, heads=2))
    >>> maps.weights["key"].shape, maps.heads
    (torch.Size([4, 6]), 2)
    """
    found, biases = _by_role(weights)
    missing = [role for role in ("query", "key", "value") if role not in found and "fused" not in found]
    if missing:
        raise CheckError(
            f"found no map to {' and '.join(missing)} among its parameters {', '.join(weights)}; "
            "name them like query, key, value and output"
        )
    own = _heads(found, heads)
    if d_model is None:
        d_model = _inputs(found["query" if "query" in found else "fused"])
    for straight in (True, False):
        maps = {role: _matrix(parts, d_model if role != "output" else None, straight) for role, parts in found.items()}
        added = {role: torch.cat([part.flatten() for _, part in parts]) for role, parts in biases.items()}
        for count in [own] if own else [1, 2, 4, 8, 3, 6, 12, 16]:
            for some, others in _unfused(maps, added, count):
                if all(some[role].shape[-1] % count == 0 for role in ("query", "key", "value")):
                    for interleaved in (False, True) if count > 1 else (False,):
                        yield Maps(weights=some, biases=others, heads=count, interleaved=interleaved)


def strangers(weights: dict[str, Tensor]) -> list[str]:
    """The parameters that are part of no map: the definition has no place for them.

    >>> strangers({"query.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)})
    ['norm.weight']
    """
    found = [part[0] for group in _by_role(weights) for parts in group.values() for part in parts]
    return [name for name in weights if name not in found]


_Parts = list[tuple[str, Tensor]]


def _by_role(weights: dict[str, Tensor]) -> tuple[dict[str, _Parts], dict[str, _Parts]]:
    found: dict[str, _Parts] = {}
    biases: dict[str, _Parts] = {}
    for name, weight in weights.items():
        words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
        role = next((_WORDS[word] for word in reversed(words) if word in _WORDS), None)
        is_bias = any(word in ("bias", "beta", "b") or word in ("bq", "bk", "bv", "bo", "bqkv") for word in words)
        is_bias = is_bias or weight.ndim < 2
        if any(word in _FUSED for word in words) or {"in", "proj"} <= set(words) or {"c", "attn"} <= set(words):
            role = "fused"
        elif role is None and "proj" in words:
            role = "output"
        if role is not None:
            (biases if is_bias else found).setdefault(role, []).append((name, weight.double()))
    return (found, biases) if found else _in_order(weights)


def _in_order(weights: dict[str, Tensor]) -> tuple[dict[str, _Parts], dict[str, _Parts]]:
    """Maps without names, as in a list of three or four: query, key, value, output."""
    matrices = [(name, weight.double()) for name, weight in weights.items() if weight.ndim == 2]
    vectors = [(name, weight.double()) for name, weight in weights.items() if weight.ndim == 1]
    roles = tuple(_ROLES)[: len(matrices)]
    if len(matrices) not in (3, 4) or len(vectors) not in (0, len(matrices)):
        return {}, {}
    found, biases = ({role: [part] for role, part in zip(roles, parts, strict=False)} for parts in (matrices, vectors))
    return found, biases


def _heads(found: dict[str, _Parts], heads: int | None) -> int | None:
    """One matrix a head tells how many there are."""
    parts = found["query" if "query" in found else "fused"]
    if len(parts) > 1:
        return len(parts)
    return len(parts[0][1]) if parts[0][1].ndim == 3 else heads


def _inputs(parts: _Parts) -> int:
    name, weight = parts[0]
    return weight.shape[-1] if name.endswith("weight") else weight.shape[-2]


def _matrix(parts: _Parts, d_model: int | None, straight: bool) -> Tensor:
    """(inputs outputs): an nn.Linear holds the transpose, other parameters may hold either."""
    whole = []
    for name, weight in parts:
        if weight.ndim == 3:
            whole.append(weight.permute(1, 0, 2).flatten(1))
        elif name.endswith("weight"):
            whole.append(weight.mT)
        elif d_model in weight.shape and weight.shape[0] != weight.shape[1]:
            whole.append(weight if weight.shape[0] == d_model else weight.mT)
        else:
            whole.append(weight if straight else weight.mT)
    return torch.cat(whole, dim=-1)


def _unfused(
    maps: dict[str, Tensor], biases: dict[str, Tensor], heads: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """One matrix for all three may hold them in any order, whole or head by head."""
    if "fused" not in maps:
        yield maps, biases
        return
    others = (
        {role: weight for role, weight in maps.items() if role != "fused"},
        {role: bias for role, bias in biases.items() if role != "fused"},
    )
    weight, bias = maps["fused"], biases.get("fused")
    if weight.shape[-1] % (3 * heads):
        return
    for by_head in (False, True) if heads > 1 else (False,):
        for order in itertools.permutations(("query", "key", "value")):
            yield (
                {**others[0], **dict(zip(order, _thirds(weight, heads if by_head else 1), strict=True))},
                others[1]
                if bias is None
                else {**others[1], **dict(zip(order, _thirds(bias, heads if by_head else 1), strict=True))},
            )


def _thirds(joined: Tensor, groups: int) -> list[Tensor]:
    parts = joined.unflatten(-1, (groups, 3, -1))
    return [parts[..., i, :].flatten(-2) for i in range(3)]
