"""What stands between the matrix products of a training step, each in one pass over memory forward and one backward.

Activations, dropout, RMSNorm, and heads put in their place, by the native kernel; on a CPU, in float32 or bfloat16.
Everything else is by the definition, which stands beside them; so are second derivatives.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sightline.kernels import cpu
from sightline.kernels.products import is_dense, rows_of, shaped_like, transformed


def gelu_tanh(x: Tensor) -> Tensor:
    """The approximation of gelu that GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


def gated_silu(joined: Tensor) -> Tensor:
    """silu(gate) * up of the two side by side (... 2 * d_ff).

    >>> gated_silu(torch.tensor([0.0, 2.0, 5.0, 10.0])).round(decimals=4)
    tensor([ 0.0000, 17.6159])
    """
    gate, up = joined.chunk(2, dim=-1)
    return F.silu(gate) * up


_DTYPES = (torch.float32, torch.bfloat16)
# The kernel's number of an activation, and whether it joins two halves.
CURVES: dict[Callable[[Tensor], Tensor], tuple[int, bool]] = {
    gated_silu: (0, True),
    F.gelu: (1, False),
    gelu_tanh: (2, False),
}


def served(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the native kernel serves: all of it plain tensors on a CPU, and nobody traces or transforms.

    x in float32 or bfloat16, as autocast has it, weights in float32; not under autocast to anything else. With a
    gradient or without: what is dropped must be the same where a step is computed again.
    """
    if transformed():
        return False
    if cpu.MISSING or type(x) is not Tensor or not is_dense(x) or x.dtype not in _DTYPES or not x.numel():
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return all(
        weight is None or (weight.dtype == torch.float32 and is_dense(weight) and weight.is_contiguous())
        for weight in weights
    )


def activated(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), an activation."""
    return _Activated.apply(x, function) if function in CURVES and served(x) else function(x)  # pyright: ignore[reportReturnType]


def dropped(x: Tensor, dropout: float) -> Tensor:
    """Each number is 0 with the probability `dropout`, else divided by 1 - dropout: for training.

    By the kernel, what is dropped is a hash of a number drawn from torch's generator, so that no mask is kept.
    """
    if not dropout or not served(x):
        return F.dropout(x, dropout)
    return _Dropped.apply(x, dropout, cpu.seed(dropout))  # pyright: ignore[reportReturnType]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis.

    >>> rms_norm(torch.tensor([[1.0, 7.0]]), torch.ones(2), 0.0).tolist()
    [[0.20000000298023224, 1.399999976158142]]
    """
    if x.dtype == torch.float32 and weight.shape == x.shape[-1:] and served(x, weight):
        return _Normed.apply(x, weight, epsilon)  # pyright: ignore[reportReturnType]
    return _by_library(x, weight, epsilon)


class Heads(NamedTuple):
    """How a row of a map joined of three falls into queries, keys and values.

    Queries and keys are normed over the width of a head, if there are norms, and turned by `Rotary`'s tables, if there
    are any.
    """

    heads: int
    groups: int
    width: int
    norms: tuple[Tensor | None, Tensor | None]
    epsilon: float
    tables: tuple[Tensor, Tensor] | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd must be shown: both norms, both tables."""
        return *self.norms, *(self.tables or (None, None))


def placed(joined: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (batch heads tokens width) of their joined map (batch tokens columns).

    Where `served` says so.
    """
    return _Placed.apply(joined, *heads.tensors, heads)  # pyright: ignore[reportReturnType]


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return shaped_like(x, torch.ops.sightline.bend.default(rows_of(x), *CURVES[function]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        if torch.is_grad_enabled():
            return *_by_definition(ctx.function, grad, x), None
        by_x = torch.ops.sightline.bend_backward.default(rows_of(grad), rows_of(x), *CURVES[ctx.function])
        return by_x.view_as(x), None


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.dropout = dropout
        return shaped_like(x, torch.ops.sightline.drop.default(rows_of(x), dropout, seed))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _Dropped.apply(grads[0], ctx.dropout, *ctx.saved_tensors)), None, None


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return shaped_like(x, torch.ops.sightline.row_norm.default(rows_of(x), weight, None, epsilon, False, False))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        if torch.is_grad_enabled():
            definition = functools.partial(_by_library, epsilon=ctx.epsilon)
            return *_by_definition(definition, grad, x, weight), None
        by_x, by_weight, _ = torch.ops.sightline.row_norm_backward.default(
            rows_of(grad), rows_of(x), weight, None, ctx.epsilon, False, None
        )
        return by_x.view_as(x), by_weight, None


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, ctx.heads = arguments
        ctx.save_for_backward(joined, *tensors)
        ctx.set_materialize_grads(True)
        return place(joined, tensors, ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        joined, *tensors = ctx.saved_tensors
        return *place_backward(grads, joined, tensors, ctx.heads), None, None, None


def place(joined: Tensor, tensors: Sequence[Tensor | None], heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """What `placed` gives; `tensors` are those of the heads."""
    of_both = (heads.heads + heads.groups) * heads.width
    both = joined[..., :of_both].unflatten(-1, (-1, heads.width))
    if any(tensor is not None for tensor in tensors):
        both = torch.ops.sightline.place.default(*_placing(joined, tensors, heads))
    value = joined[..., of_both:].unflatten(-1, (heads.groups, -1))
    return both[:, :, : heads.heads].transpose(1, 2), both[:, :, heads.heads :].transpose(1, 2), value.transpose(1, 2)


def place_backward(
    grads: Sequence[Tensor], joined: Tensor, tensors: Sequence[Tensor | None], heads: Heads
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the joined map and of both norms."""
    by_joined, *by_norms = torch.ops.sightline.place_backward.default(
        *(grad.transpose(1, 2).contiguous() for grad in grads), *_placing(joined, tensors, heads)
    )
    by_query_norm, by_key_norm = (
        None if norm is None else grad for norm, grad in zip(tensors[:2], by_norms, strict=True)
    )
    return by_joined, by_query_norm, by_key_norm


def _placing(joined: Tensor, tensors: Sequence[Tensor | None], heads: Heads) -> tuple[Any, ...]:
    """The arguments of both operators, as they take them."""
    query_norm, key_norm, cosine, sine = tensors
    return joined, heads.heads, heads.groups, heads.width, query_norm, key_norm, heads.epsilon, cosine, sine


def _by_definition(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor | None]:
    """The gradients of function(*inputs) by autograd, so that they have gradients too."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    with torch.enable_grad():
        by_wanted = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return [next(by_wanted) if tensor.requires_grad else None for tensor in inputs]


def _by_library(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)
