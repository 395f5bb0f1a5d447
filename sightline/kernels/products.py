"""Linear maps, and a layer's work on few rows, by the native library.

The operators `sightline::multiply` (a linear map, by the faster of torch's two libraries) and, for few rows, `project`
(linear maps), `norm`, `feed_forward` and `attend` (attention with its maps).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    if x.numel() > FEW_ROWS * x.shape[-1] or not _serves(x, *weights):
        return False
    return all(weight is None or weight.is_contiguous() for weight in weights)


def multiplies(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether `multiply` serves, and torch itself would be slower: in float32, without a gradient."""
    return _serves(x, *weights) and cpu.multiplier() != "torch"


def _serves(x: Tensor, *weights: Tensor | None) -> bool:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or transformed():
        return False
    if cpu.MISSING or type(x) is not Tensor or x.dtype != torch.float32 or not x.is_cpu or not x.numel():
        return False
    return all(weight is None or weight.dtype == torch.float32 for weight in weights)


def transformed() -> bool:
    """Whether what is computed is traced, compiled, or turned into something else by `torch.func`."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active()


def project(x: Tensor, *maps: Map) -> Sequence[Tensor]:
    """What up to three linear maps, (weight bias), make of x (... depth), where `projects` says so."""
    arguments = [part for weight_and_bias in maps for part in weight_and_bias]
    joined = torch.ops.sightline.project.default(rows_of(x), *arguments, *(None,) * (6 - len(arguments)))
    joined = joined.view(*x.shape[:-1], -1)
    return (joined,) if len(maps) == 1 else joined.split([len(weight) for weight, _ in maps], dim=-1)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a linear map, weight (columns depth), makes of x (... depth), where `multiplies` says so."""
    bias = None if bias is None else bias.contiguous()
    return torch.ops.sightline.multiply.default(rows_of(x), weight.T, bias).view(*x.shape[:-1], -1)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (rows depth) times right (depth columns), without a gradient, by whoever is the fastest."""
    if multiplies(left, right):
        return torch.ops.sightline.multiply.default(left, right, None)
    return left @ right


def rows_of(x: Tensor) -> Tensor:
    """x (... width) as (rows width), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, where `projects` says so."""
    return torch.ops.sightline.norm.default(rows_of(x), weight, epsilon).view_as(x)


def feed_forward(
    x: Tensor, up: Map, down: Map, gate: Map | tuple[None, None] = NO_MAP, *, curve: int, norm: Norm = NO_NORM
) -> Tensor:
    """down(silu(gate x) * up x), or without a gate down(f(up x)), where `projects` says so.

    `curve` is the number of f, with a gate `SILU`. With a norm x + that of norm(x): a whole sublayer.
    """
    return torch.ops.sightline.feed_forward.default(rows_of(x), *norm, *gate, *up, *down, curve).view_as(x)


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
    joined = torch.ops.sightline.attend.default(
        x.contiguous(), *norm, *query, *key, *value, *output, *norms, epsilon, *(tables or (None, None)), *room, start,
        None if masks.lengths is None else masks.lengths.to(torch.int64).contiguous(),
        None if masks.slopes is None else masks.slopes.to(torch.float32).contiguous(),
        before, after,
    )  # fmt: skip
    return joined.view(*x.shape[:-1], -1)


if not cpu.MISSING:

    @torch.library.register_fake("sightline::project")
    def _(x: Tensor, *maps: Tensor | None) -> Tensor:
        return x.new_empty(len(x), sum(len(weight) for weight in maps[::2] if weight is not None))
