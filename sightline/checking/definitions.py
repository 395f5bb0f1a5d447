"""What attention, several heads and the sinusoidal encoding are, as steps that a mistake can replace one by one.

Float64 and dense. Attention's tensors are (batch heads tokens width) throughout; `allowed` is (queries keys).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a scale could be made of; `whole` is the width of all heads together."""

    width: int
    whole: int
    queries: int
    keys: int
    value_width: int


def _transpose(key: Tensor) -> Tensor:
    return key.mT


def _divisor(sizes: Sizes) -> float:
    return sizes.width**0.5


def _pattern(queries: int, keys: int) -> Tensor | None:
    return None


def _hide(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, -torch.inf)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def _after(weights: Tensor, allowed: Tensor | None) -> Tensor:
    return weights


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    return weights @ value


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def _map(x: Tensor, weight: Tensor, bias: Tensor | None, role: str) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


def _finish(output: Tensor, x: Tensor) -> Tensor:
    return output


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The definition, a function a step; `wrong()` replaces some."""

    transpose: Callable[[Tensor], Tensor] = _transpose
    divisor: Callable[[Sizes], float] = _divisor
    pattern: Callable[[int, int], Tensor | None] = _pattern
    """What is hidden without being asked for: causal attention hides the future."""
    hide: Callable[[Tensor, Tensor], Tensor] = _hide
    softmax: Callable[[Tensor], Tensor] = _softmax
    after: Callable[[Tensor, Tensor | None], Tensor] = _after
    mix: Callable[[Tensor, Tensor], Tensor] = _mix
    split: Callable[[Tensor, int], Tensor] = _split
    join: Callable[[Tensor], Tensor] = _join
    map: Callable[[Tensor, Tensor, Tensor | None, str], Tensor] = _map
    roles: dict[str, str] = field(default_factory=dict)
    """Which map is used for which, where it is not its own."""
    finish: Callable[[Tensor, Tensor], Tensor] = _finish

    def wrong(self, **changes: Any) -> "Steps":
        return replace(self, **changes)


def causal(queries: int, keys: int, *, shift: int = 0) -> Tensor:
    """Query i stands at key i + keys - queries and sees what lies before it and, with shift 0, itself."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries + shift)


def causal_from_the_first(queries: int, keys: int) -> Tensor:
    """Query i stands at key i: the same where there are as many queries as keys."""
    return torch.ones(queries, keys, dtype=torch.bool).tril()


def attend(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, steps: Steps, *, whole: int | None = None
) -> tuple[Tensor, Tensor]:
    """Output and weights of (batch heads tokens width).

    >>> one = torch.eye(2, dtype=torch.float64)[None, None]
    >>> attend(one, one, one, causal(2, 2), Steps())[1]
    tensor([[[[1.0000, 0.0000],
              [0.3302, 0.6698]]]], dtype=torch.float64)
    """
    queries, keys, width = query.shape[-2], key.shape[-2], query.shape[-1]
    sizes = Sizes(
        width=width,
        whole=width if whole is None else whole,
        queries=queries,
        keys=keys,
        value_width=value.shape[-1],
    )
    scores = query @ steps.transpose(key) / steps.divisor(sizes)
    own = steps.pattern(queries, keys)
    if allowed is not None and own is not None:
        allowed = allowed & own
    elif allowed is None:
        allowed = own
    if allowed is not None:
        scores = steps.hide(scores, allowed)
    weights = steps.after(steps.softmax(scores), allowed)
    return steps.mix(weights, value), weights


@dataclass(frozen=True, kw_only=True)
class Maps:
    """A module's linear maps as (inputs outputs) and their biases, by role: query, key, value, output."""

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    heads: int
    interleaved: bool = False
    """Whether a head's numbers lie `heads` apart, and not side by side: as good, since maps are learned."""


def multi_head(x: Tensor, allowed: Tensor | None, maps: Maps, steps: Steps) -> tuple[Tensor, Tensor]:
    """Output (batch tokens d_out) and weights (batch heads queries keys) of x (batch tokens d_model)."""

    def through(x: Tensor, role: str) -> Tensor:
        used = steps.roles.get(role, role)
        return steps.map(x, maps.weights[used], maps.biases.get(used), role)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, maps.heads)).permute(0, 3, 1, 2) if maps.interleaved else steps.split(x, maps.heads)

    query, key, value = (through(x, role) for role in ("query", "key", "value"))
    heads, weights = attend(split(query), split(key), split(value), allowed, steps, whole=query.shape[-1])
    joined = heads.permute(0, 2, 3, 1).flatten(-2) if maps.interleaved else steps.join(heads)
    output = through(joined, "output") if "output" in maps.weights else joined
    return steps.finish(output, x), weights


# --- Positions ----------------------------------------------------------------------------------------


def _exponent(column: Tensor, d_model: int) -> Tensor:
    return 2 * (column // 2) / d_model


def _angle(position: Tensor, exponent: Tensor, base: float) -> Tensor:
    return position / base**exponent


def _wave(angle: Tensor, column: Tensor) -> Tensor:
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


def _order(table: Tensor) -> Tensor:
    return table


@dataclass(frozen=True, kw_only=True)
class EncodingSteps:
    """The sinusoidal encoding, a function a step."""

    exponent: Callable[[Tensor, int], Tensor] = _exponent
    angle: Callable[[Tensor, Tensor, float], Tensor] = _angle
    wave: Callable[[Tensor, Tensor], Tensor] = _wave
    order: Callable[[Tensor], Tensor] = _order
    first: int = 0
    base: float = 10000.0

    def wrong(self, **changes: Any) -> "EncodingSteps":
        return replace(self, **changes)


def encoding(length: int, d_model: int, steps: EncodingSteps, start: int = 0) -> Tensor:
    """Positions start to start + length - 1: (length d_model).

    >>> encoding(2, 4, EncodingSteps())
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 1.0000]], dtype=torch.float64)
    """
    position = torch.arange(start, start + length, dtype=torch.float64)[:, None] + steps.first
    column = torch.arange(d_model, dtype=torch.float64)
    angle = steps.angle(position, steps.exponent(column, d_model), steps.base)
    return steps.order(steps.wave(angle, column))
