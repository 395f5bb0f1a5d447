"""What a block adds to the residual stream in a training step, in three steps of autograd around its attention.

The stream is in float32, the products in the dtype that autocast asks for; what stands between them reads the one and
writes the other, and the gradient of a norm is added to the stream's as it is made. On a CPU, by the native kernel,
where `passes.served` says so. There is no second derivative.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sightline import passes
from sightline.rows import RMSNorm, unhooked


def served(x: Tensor, norm: nn.Module, *weights: Tensor) -> bool:
    """Whether a sublayer of these can be computed here, and nobody else has a say in its norm."""
    if type(norm) not in (RMSNorm, nn.LayerNorm) or not unhooked(norm) or norm.weight is None:
        return False
    if x.ndim != 3 or x.dtype != torch.float32 or norm.weight.shape != x.shape[-1:]:
        return False
    return passes.served(x, norm.weight, *weights)  # pyright: ignore[reportArgumentType]


def placed(x: Tensor, norm: nn.Module, maps: Sequence[nn.Linear], heads: passes.Heads) -> tuple[Tensor, ...]:
    """x (batch tokens d_model) as it goes on, and queries, keys and values (batch heads tokens width) of norm(x).

    Who goes on with that x has its gradient added to the norm's as that is made.
    """
    return _Placed.apply(x, *_tensors(norm), *heads.tensors, _numbers(norm), heads, *_parameters(maps))  # pyright: ignore[reportReturnType]


def written(x: Tensor, heads: Tensor, output: nn.Linear, dropout: float) -> Tensor:
    """x + what the map makes of the heads (batch heads tokens width) side by side; `dropout` falls on what is added."""
    seed = torch.randint(2**63 - 1, ()) if dropout else None
    return _Written.apply(x, heads, output.weight, output.bias, seed, dropout)  # pyright: ignore[reportReturnType]


def fed(
    x: Tensor,
    norm: nn.Module,
    ups: Sequence[nn.Linear],
    activation: Callable[[Tensor], Tensor],
    down: nn.Linear,
    dropout: float,
) -> Tensor:
    """x + down(activation(ups(norm(x)))), the `ups` side by side; `dropout` falls on what is added."""
    seed = torch.randint(2**63 - 1, ()) if dropout else None
    numbers = _numbers(norm), passes.CURVES[activation][0], dropout
    return _Fed.apply(x, *_tensors(norm), down.weight, down.bias, seed, numbers, *_parameters(ups))  # pyright: ignore[reportReturnType]


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        weight, bias, *placing, ctx.norm, ctx.heads = arguments[:8]
        normed, joined_weight, joined = torch.ops.sightline.heads.default(
            passes.rows_of(x), weight, bias, *ctx.norm, *arguments[8:], _halves()
        )
        joined = joined.view(*x.shape[:-1], -1)
        ctx.save_for_backward(x, weight, bias, normed, joined_weight, joined, *placing)
        ctx.sizes = [len(one) for one in arguments[8::2]]
        ctx.set_materialize_grads(True)
        return x.view_as(x), *passes.place(joined, placing, ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, normed, joined_weight, joined, *placing = ctx.saved_tensors
        by_joined, *by_norms = passes.place_backward(grads[1:], joined, placing, ctx.heads)
        to_weights, to_biases = _wanted(ctx.needs_input_grad[9:])
        by_x, by_weight, by_bias, by_weights, by_biases = torch.ops.sightline.heads_backward.default(
            by_joined.flatten(0, 1), passes.rows_of(x), weight, bias, *ctx.norm, normed, joined_weight,
            passes.rows_of(grads[0]), to_weights, to_biases,
        )  # fmt: skip
        by_maps = _by_maps(ctx.needs_input_grad[9:], by_weights, by_biases, ctx.sizes)
        by_bias = None if bias is None else by_bias
        return by_x.view_as(x), by_weight, by_bias, *by_norms, None, None, None, None, *by_maps


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, heads: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, dropout: float
    ) -> Tensor:
        rows = passes.rows_of(heads.transpose(1, 2).flatten(-2))
        half = _halves()
        rows = rows.to(torch.bfloat16 if half else x.dtype)
        output, own = torch.ops.sightline.write.default(passes.rows_of(x), rows, weight, bias, dropout, seed, half)
        ctx.save_for_backward(rows, own, seed)
        ctx.heads, ctx.dropout = (heads.shape, heads.dtype), dropout
        return output.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, own, seed = ctx.saved_tensors
        (batch, heads, tokens, _), dtype = ctx.heads
        wanted = ctx.needs_input_grad[2:4]
        by_rows, by_weight, by_bias = torch.ops.sightline.write_backward.default(
            passes.rows_of(grads[0]), rows, own, ctx.dropout, seed, *wanted
        )
        by_heads = by_rows.view(batch, tokens, heads, -1).transpose(1, 2).to(dtype)
        return grads[0], by_heads, *_by_maps(wanted, by_weight, by_bias, [len(own)]), None, None


class _Fed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        weight, bias, *down, seed, (ctx.norm, ctx.curve, ctx.dropout) = arguments[:6]
        ups = (*arguments[6:], None, None)[:4]
        output, *made = torch.ops.sightline.feed.default(
            passes.rows_of(x), weight, bias, *ctx.norm, *ups, *down, ctx.curve, ctx.dropout, seed, _halves()
        )
        ctx.save_for_backward(x, weight, bias, seed, *made)
        ctx.sizes = [len(one) for one in arguments[6::2]]
        return output.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, seed, *made = ctx.saved_tensors
        to_down, to_ups = ctx.needs_input_grad[3:5], ctx.needs_input_grad[7:]
        by_x, by_weight, by_bias, by_up, by_up_bias, by_down, by_down_bias = torch.ops.sightline.feed_backward.default(
            passes.rows_of(grads[0]), passes.rows_of(x), weight, bias, *ctx.norm, *made, ctx.curve, ctx.dropout, seed,
            *_wanted(to_ups), *to_down,
        )  # fmt: skip
        by_ups = _by_maps(to_ups, by_up, by_up_bias, ctx.sizes)
        by_own = _by_maps(to_down, by_down, by_down_bias, [x.shape[-1]])
        by_bias = None if bias is None else by_bias
        return by_x.view_as(x), by_weight, by_bias, *by_own, None, None, *by_ups


def _tensors(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    return norm.weight, getattr(norm, "bias", None)  # pyright: ignore[reportReturnType]


def _numbers(norm: nn.Module) -> tuple[float, bool]:
    """Epsilon, and whether the mean is subtracted."""
    epsilon = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return epsilon, isinstance(norm, nn.LayerNorm)  # pyright: ignore[reportReturnType]


def _parameters(maps: Sequence[nn.Linear]) -> list[Tensor | None]:
    return [parameter for linear in maps for parameter in (linear.weight, linear.bias)]


def _halves() -> bool:
    """Whether products are in bfloat16."""
    return torch.is_autocast_enabled("cpu")


def _wanted(maps: Sequence[bool]) -> tuple[bool, bool]:
    """Whether the gradient of any weight is wanted, and of any bias."""
    return any(maps[::2]), any(maps[1::2])


def _by_maps(wanted: Sequence[bool], weights: Tensor, biases: Tensor, sizes: list[int]) -> list[Tensor | None]:
    """The gradients of maps side by side, each one's weight and bias."""
    if len(sizes) == 1:
        both = [weights, biases]
    else:
        to_weights, to_biases = _wanted(wanted)
        each = zip(
            *(grad.split(sizes) if want else sizes for grad, want in ((weights, to_weights), (biases, to_biases))),
            strict=True,
        )
        both = [grad for pair in each for grad in pair]
    return [grad if want else None for grad, want in zip(both, wanted, strict=True)]  # pyright: ignore[reportReturnType]
