"""What a block adds to the residual stream in a training step, in three steps of autograd around its attention.

The stream is in float32, the products in the dtype that autocast asks for; what stands between them reads the one and
writes the other, and the gradient of a norm is added to the stream's as it is made. On a CPU, by the native kernel,
where `passes.served` says so. There is no second derivative. Who listens to all modules, as torch's `FlopCounterMode`
does, has them called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sightline import passes
from sightline.kernels import cpu
from sightline.kernels.products import rows_of, shaped_like
from sightline.rows import NORMS, is_own

Parameters = Sequence[Tensor | None]
"""Of linear maps, each one's weight and bias."""


def parameters(*maps: nn.Linear) -> Parameters:
    """What `served` is asked about and a step takes."""
    return [parameter for linear in maps for parameter in (linear.weight, linear.bias)]


def served(x: Tensor, norm: nn.Module, *weights: Tensor | None) -> bool:
    """Whether a sublayer of these weights can be computed here, and nobody else has a say in its norm."""
    if not is_own(norm, NORMS) or x.dtype != torch.float32:
        return False
    weight, bias = _tensors(norm)
    return weight is not None and weight.shape == x.shape[-1:] and passes.served(x, weight, bias, *weights)


def projected(x: Tensor, norm: nn.Module, maps: Parameters, heads: passes.Heads) -> tuple[Tensor, ...]:
    """x (batch tokens d_model) as it goes on, and queries, keys and values (batch heads tokens width) of norm(x).

    Who goes on with that x has its gradient added to the norm's as that is made.
    """
    return _Projected.apply(x, *_tensors(norm), *heads.tensors, _numbers(norm), heads, *maps)  # pyright: ignore[reportReturnType]


def written(x: Tensor, heads: Tensor, output: Parameters, dropout: float) -> Tensor:
    """x + what the map makes of the heads (batch heads tokens width) side by side; `dropout` falls on what is added."""
    return _Written.apply(x, heads, cpu.seed(dropout), dropout, *output)  # pyright: ignore[reportReturnType]


def fed(
    x: Tensor,
    norm: nn.Module,
    ups: Parameters,
    activation: Callable[[Tensor], Tensor],
    down: Parameters,
    dropout: float,
) -> Tensor:
    """x + down(activation(ups(norm(x)))), the `ups` side by side; `dropout` falls on what is added."""
    numbers = _numbers(norm), passes.CURVES[activation][0], dropout
    return _Fed.apply(x, *_tensors(norm), cpu.seed(dropout), numbers, *down, *ups)  # pyright: ignore[reportReturnType]


# The weights and biases of maps come last in each step, so that they are counted from the end.


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        cosine: Tensor | None,
        sine: Tensor | None,
        norm: tuple[float, bool],
        heads: passes.Heads,
        *maps: Any,
    ) -> tuple[Tensor, ...]:
        ctx.norm, ctx.heads, placing = norm, heads, (query_norm, key_norm, cosine, sine)
        normed, joined_weight, joined = torch.ops.sightline.heads.default(
            rows_of(x), weight, bias, *norm, *maps, _halves()
        )
        joined = joined.view(*x.shape[:-1], -1)
        ctx.save_for_backward(x, weight, bias, normed, joined_weight, joined, *placing)
        ctx.sizes = [len(one) for one in maps[::2]]
        ctx.set_materialize_grads(True)
        return x.view_as(x), *passes.place(joined, placing, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, normed, joined_weight, joined, *placing = ctx.saved_tensors
        by_joined, *by_norms = passes.place_backward(grads[1:], joined, placing, ctx.heads)
        wanted = ctx.needs_input_grad[-2 * len(ctx.sizes) :]
        by_x, by_weight, by_bias, by_weights, by_biases = torch.ops.sightline.heads_backward.default(
            rows_of(by_joined), rows_of(x), weight, bias, *ctx.norm, normed, joined_weight, rows_of(grads[0]),
            *_wanted(wanted),
        )  # fmt: skip
        by_maps = _by_maps(wanted, by_weights, by_biases, ctx.sizes)
        by_bias = None if bias is None else by_bias
        return by_x.view_as(x), by_weight, by_bias, *by_norms, None, None, None, None, *by_maps


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, heads: Tensor, seed: Tensor | None, dropout: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        rows = rows_of(heads.transpose(1, 2).flatten(-2))
        half = _halves()
        rows = rows.to(torch.bfloat16 if half else x.dtype)
        output, own = torch.ops.sightline.write.default(rows_of(x), rows, weight, bias, dropout, seed, half)
        ctx.save_for_backward(rows, own, seed)
        ctx.heads, ctx.dropout = (heads.shape, heads.dtype), dropout
        return shaped_like(x, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, own, seed = ctx.saved_tensors
        (batch, heads, tokens, _), dtype = ctx.heads
        wanted = ctx.needs_input_grad[-2:]
        by_rows, by_weight, by_bias = torch.ops.sightline.write_backward.default(
            rows_of(grads[0]), rows, own, ctx.dropout, seed, *wanted
        )
        by_heads = by_rows.view(batch, tokens, heads, -1).transpose(1, 2).to(dtype)
        return grads[0], by_heads, None, None, *_by_maps(wanted, by_weight, by_bias, [len(own)])


class _Fed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        numbers: tuple[tuple[float, bool], int, float],
        *maps: Any,
    ) -> Tensor:
        ctx.norm, ctx.curve, ctx.dropout = numbers
        (*down, first, first_bias), second = maps[:4], maps[4:] or (None, None)
        output, *made = torch.ops.sightline.feed.default(
            rows_of(x), weight, bias, *ctx.norm, first, first_bias, *second, *down, ctx.curve, ctx.dropout, seed,
            _halves(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, seed, *made)
        ctx.sizes = [len(one) for one in maps[::2]]
        return shaped_like(x, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, seed, *made = ctx.saved_tensors
        wanted = ctx.needs_input_grad[-2 * len(ctx.sizes) :]
        to_down, to_ups = wanted[:2], wanted[2:]
        by_x, by_weight, by_bias, by_up, by_up_bias, by_down, by_down_bias = torch.ops.sightline.feed_backward.default(
            rows_of(grads[0]), rows_of(x), weight, bias, *ctx.norm, *made, ctx.curve, ctx.dropout, seed,
            *_wanted(to_ups), *to_down,
        )  # fmt: skip
        by_own = _by_maps(to_down, by_down, by_down_bias, ctx.sizes[:1])
        by_ups = _by_maps(to_ups, by_up, by_up_bias, ctx.sizes[1:])
        by_bias = None if bias is None else by_bias
        return by_x.view_as(x), by_weight, by_bias, None, None, *by_own, *by_ups


def _tensors(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    return norm.weight, getattr(norm, "bias", None)  # pyright: ignore[reportReturnType]


def _numbers(norm: nn.Module) -> tuple[float, bool]:
    """Epsilon, and whether the mean is subtracted."""
    epsilon = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return epsilon, isinstance(norm, nn.LayerNorm)  # pyright: ignore[reportReturnType]


def _halves() -> bool:
    """Whether products are in bfloat16: `served` has asked which autocast it is."""
    return torch.is_autocast_enabled("cpu")


def _wanted(maps: Sequence[bool]) -> tuple[bool, bool]:
    """Whether the gradient of any weight is wanted, and of any bias."""
    return any(maps[::2]), any(maps[1::2])


def _by_maps(wanted: Sequence[bool], weights: Tensor, biases: Tensor, sizes: list[int]) -> list[Tensor | None]:
    """The gradients of maps side by side, each one's weight and bias."""
    if len(sizes) == 1:
        both = [weights, biases]
    else:
        grads = zip((weights, biases), _wanted(wanted), strict=True)
        each = [grad.split(sizes) if want else [None] * len(sizes) for grad, want in grads]
        both = [grad for pair in zip(*each, strict=True) for grad in pair]
    return [grad if want else None for grad, want in zip(both, wanted, strict=True)]
