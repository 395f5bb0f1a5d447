"""What a block adds to the residual stream in a training step, in three steps of autograd around its attention.

The stream is in float32, the products in the dtype that autocast asks for; what stands between them reads the one and
writes the other, and the gradient of a norm is added to the stream's as it is made. On a CPU, by the native kernel,
where `passes.served` says so. There is no second derivative.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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


def placed(x: Tensor, norm: nn.Module, maps: Sequence[nn.Linear], heads: passes.Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (batch heads tokens width) of norm(x), x (batch tokens d_model)."""
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
    numbers = _numbers(norm), activation, dropout
    return _Fed.apply(x, *_tensors(norm), down.weight, down.bias, seed, numbers, *_parameters(ups))  # pyright: ignore[reportReturnType]


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, *placing, ctx.norm, ctx.heads = arguments[:8]
        weights, biases = _halves(arguments[8:])
        dtype = _product_dtype(x)
        normed = passes.normed(x, weight, bias, *ctx.norm, dtype)
        joined_weight = _joined(weights, dtype)
        joined = F.linear(normed, joined_weight, _joined_bias(weights, biases, dtype)).view(*x.shape[:-1], -1)
        ctx.save_for_backward(x, weight, bias, normed, joined_weight, joined, *placing)
        ctx.sizes = [len(one) for one in weights]
        ctx.set_materialize_grads(True)
        return passes.place(joined, placing, ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, normed, joined_weight, joined, *placing = ctx.saved_tensors
        by_joined, *by_norms = passes.place_backward(grads, joined, placing, ctx.heads)
        by_joined = by_joined.flatten(0, 1)
        by_norm = passes.normed_backward(by_joined @ joined_weight, x, weight, bias, *ctx.norm, None)
        by_maps = _by_maps(ctx.needs_input_grad[9:], by_joined, normed, ctx.sizes)
        return *by_norm, *by_norms, None, None, None, None, *by_maps


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, heads: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, dropout: float
    ) -> Tensor:
        dtype = _product_dtype(x)
        rows = passes.rows_of(heads.transpose(1, 2).flatten(-2)).to(dtype)
        half = weight.to(dtype)
        added = F.linear(rows, half, None if bias is None else bias.to(dtype))
        ctx.save_for_backward(rows, half, seed)
        ctx.heads, ctx.dropout = (heads.shape, heads.dtype), dropout
        return _added(x, added, dropout, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, half, seed = ctx.saved_tensors
        (batch, heads, tokens, _), dtype = ctx.heads
        by_added = _by_added(grads[0], half.dtype, ctx.dropout, seed)
        by_heads = (by_added @ half).view(batch, tokens, heads, -1).transpose(1, 2).to(dtype)
        return grads[0], by_heads, *_by_maps(ctx.needs_input_grad[2:4], by_added, rows, [len(half)]), None, None


class _Fed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        weight, bias, down, down_bias, seed, (ctx.norm, ctx.activation, ctx.dropout) = arguments[:6]
        weights, biases = _halves(arguments[6:])
        dtype = _product_dtype(x)
        up, down = _joined(weights, dtype), down.to(dtype)
        normed = passes.normed(x, weight, bias, *ctx.norm, dtype)
        bent = F.linear(normed, up, _joined_bias(weights, biases, dtype))
        hidden = passes.bent(bent, ctx.activation)
        added = F.linear(hidden, down, None if down_bias is None else down_bias.to(dtype))
        ctx.save_for_backward(x, weight, bias, normed, up, bent, hidden, down, seed)
        ctx.sizes = [len(one) for one in weights]
        return _added(x, added, ctx.dropout, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, normed, up, bent, hidden, down, seed = ctx.saved_tensors
        by_added = _by_added(grads[0], down.dtype, ctx.dropout, seed)
        by_bent = passes.bent_backward(by_added @ down, bent, ctx.activation)
        by_norm = passes.normed_backward(by_bent @ up, x, weight, bias, *ctx.norm, grads[0])
        by_down = _by_maps(ctx.needs_input_grad[3:5], by_added, hidden, [len(down)])
        by_ups = _by_maps(ctx.needs_input_grad[7:], by_bent, normed, ctx.sizes)
        return *by_norm, *by_down, None, None, *by_ups


def _tensors(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    return norm.weight, getattr(norm, "bias", None)  # pyright: ignore[reportReturnType]


def _numbers(norm: nn.Module) -> tuple[float, bool]:
    """Epsilon, and whether the mean is subtracted."""
    epsilon = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return epsilon, isinstance(norm, nn.LayerNorm)  # pyright: ignore[reportReturnType]


def _parameters(maps: Sequence[nn.Linear]) -> list[Tensor | None]:
    return [linear.weight for linear in maps] + [linear.bias for linear in maps]


def _halves(both: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    return both[: len(both) // 2], both[len(both) // 2 :]


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (weights[0] if len(weights) == 1 else torch.cat(list(weights))).to(dtype)


def _joined_bias(weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs]).to(dtype)


def _added(x: Tensor, added: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    if dropout:
        added = torch.ops.sightline.drop.default(added, dropout, seed)
    return torch.ops.sightline.join.default(passes.rows_of(x), added).view_as(x)


def _by_added(grad: Tensor, dtype: torch.dtype, dropout: float, seed: Tensor | None) -> Tensor:
    grad = passes.rows_of(grad).to(dtype)
    return torch.ops.sightline.drop.default(grad, dropout, seed) if dropout else grad


def _by_maps(wanted: Sequence[bool], grad: Tensor, x: Tensor, sizes: list[int]) -> list[Tensor | None]:
    """The gradients of maps side by side, of their weights and then of their biases, in float32."""
    to_weights, to_biases = _halves(wanted)
    by_weights = (grad.t() @ x).float().split(sizes) if any(to_weights) else sizes
    by_biases = grad.sum(0, dtype=torch.float32).split(sizes) if any(to_biases) else sizes
    pairs = zip((*by_weights, *by_biases), (*to_weights, *to_biases), strict=True)
    return [by if want else None for by, want in pairs]  # pyright: ignore[reportReturnType]
