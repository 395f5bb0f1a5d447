"""Linear maps, and a layer's work on few rows, by the native library.

The operators `sightline::multiply` (a linear map, by the faster of torch's two libraries) and, for few rows, `project`
(linear maps), `norm`, `feed_forward` and `attend` (attention with its maps).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from sightline.kernels import cpu

FEW_ROWS = 8
"""So many rows of a linear map read its weights faster here than in a matrix product by the library."""

Map = tuple[Tensor, Tensor | None]
"""A linear map: its weight (columns depth) and its bias."""
NO_MAP = (None, None)
Norm = tuple[Tensor | None, Tensor | None, float, bool]
"""Over the last axis: weight, bias, epsilon, and whether the mean is subtracted, as LayerNorm does and RMSNorm not."""
NO_NORM: Norm = (None, None, 0.0, False)
RELU, SILU = -1, 0
"""Numbers of activations; others are in `passes.CURVES`."""


def projects(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether `project` serves: the kernel is here, and x (... depth) has few rows, in float32, without a gradient."""
    if not _serves(x, *weights) or x.numel() > FEW_ROWS * x.shape[-1]:
        return False
    return all(weight is None or weight.is_contiguous() for weight in weights)


def multiplies(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether `multiply` serves, and torch itself would be slower: in float32, without a gradient."""
    return _serves(x, *weights) and cpu.multiplier() != "torch"


def _serves(x: Tensor, *weights: Tensor | None) -> bool:
    if transformed() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or cpu.MISSING:
        return False
    if type(x) is not Tensor or not is_dense(x) or x.dtype != torch.float32 or not x.numel():
        return False
    return all(weight is None or (weight.dtype == torch.float32 and is_dense(weight)) for weight in weights)


def is_dense(tensor: Tensor) -> bool:
    """On the CPU, of torch's own kinds, neither sparse nor of another layout."""
    return type(tensor) in _KINDS and tensor.is_cpu and tensor.layout is torch.strided


_KINDS = (nn.Parameter, Tensor)


def transformed() -> bool:
    """Whether what is computed is traced, compiled, or turned into something else by `torch.func`."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active()


def project(x: Tensor, *maps: Map) -> Sequence[Tensor]:
    """What up to three linear maps, (weight bias), make of x (... depth), where `projects` says so."""
    arguments = [part for weight_and_bias in maps for part in weight_and_bias]
    rows = torch.ops.sightline.project.default(rows_of(x), *arguments, *(None,) * (6 - len(arguments)))
    joined = shaped_like(x, rows)
    return (joined,) if len(maps) == 1 else joined.split([len(weight) for weight, _ in maps], dim=-1)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a linear map, weight (columns depth), makes of x (... depth), where `multiplies` says so."""
    bias = None if bias is None else bias.contiguous()
    return shaped_like(x, torch.ops.sightline.multiply.default(rows_of(x), weight.T, bias))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (rows depth) times right (depth columns), without a gradient, by whoever is the fastest."""
    if multiplies(left, right):
        return torch.ops.sightline.multiply.default(left, right, None)
    return left @ right


def rows_of(x: Tensor) -> Tensor:
    """x (... width) as (rows width), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def shaped_like(x: Tensor, rows: Tensor) -> Tensor:
    """Rows with the leading axes of x. No view, which could not be changed in place where a gradient is wanted."""
    return torch.ops.aten._unsafe_view.default(rows, (*x.shape[:-1], rows.shape[-1]))


def norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, where `projects` says so."""
    return shaped_like(x, torch.ops.sightline.norm.default(rows_of(x), weight, epsilon))


def feed_forward(
    x: Tensor, up: Map, down: Map, gate: Map | tuple[None, None] = NO_MAP, *, curve: int, norm: Norm = NO_NORM
) -> Tensor:
    """down(silu(gate x) * up x), or without a gate down(f(up x)), where `projects` says so.

    `curve` is the number of f, with a gate `SILU`. With a norm x + that of norm(x): a whole sublayer.
    """
    return shaped_like(x, torch.ops.sightline.feed_forward.default(rows_of(x), *norm, *gate, *up, *down, curve))


def attend(
    x: Tensor,
    maps: Sequence[Map],
    *,
    norms: tuple[Tensor | None, Tensor | None],
    epsilon: float,
    tables: tuple[Tensor, Tensor] | None,
    room: tuple[Tensor, Tensor],
    start: int,
    masks: cpu.Masks,
    norm: Norm = NO_NORM,
) -> Tensor:
    """Attention of few tokens (batch tokens depth) that follow `start` others, with its linear maps.

    The maps are to queries, to the output, and to keys and values, which are put into the room (batch groups capacity
    width); without the last two all keys are there already. `norms` and `tables` (cosine and sine, `Rotary`'s) are of
    queries and keys. With a `norm` x + that of norm(x): a whole sublayer. Where `projects` says so.
    """
    query, output, key, value = (*maps, NO_MAP, NO_MAP)[:4]
    before, after = (-1 if limit is None else limit for limit in masks[:2])
    rows = torch.ops.sightline.attend.default(
        x.contiguous(), *norm, *query, *key, *value, *output, *norms, epsilon, *(tables or (None, None)), *room, start,
        None if masks.lengths is None else masks.lengths.to(torch.int64).contiguous(),
        None if masks.slopes is None else masks.slopes.to(torch.float32).contiguous(),
        before, after,
    )  # fmt: skip
    return shaped_like(x, rows)


if not cpu.MISSING:

    @register_flop_formula(torch.ops.sightline.multiply)
    def _(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    @register_flop_formula(torch.ops.sightline.project)
    def _(x: Sequence[int], *maps: Sequence[int] | None, **_: Any) -> int:
        return sum(2 * x[0] * x[1] * weight[0] for weight in maps[::2] if weight is not None)
