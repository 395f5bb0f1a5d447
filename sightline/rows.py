"""Linear maps and norms; of few rows, as when one token is written, by the native kernel.

A library's matrix product packs, or reads weights at a third of what memory gives; few rows are all reading. Of many
rows it is the library's, where torch has two the faster one. Knows nothing of attention.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sightline import passes
from sightline.kernels import products
from sightline.positions import Rotary

Norm = Literal["rms", "layer"]

EPSILON: dict[Norm, float] = {"rms": 1e-6, "layer": 1e-5}
"""What a norm adds to the variance, unless told otherwise."""


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm`, on a CPU by the native kernel.

    >>> RMSNorm(2, eps=0.0)(torch.tensor([[1.0, 7.0]])).tolist()
    [[0.20000000298023224, 1.399999976158142]]
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight is None or weight.shape != x.shape[-1:]:
            return super().forward(x)
        if products.projects(x, weight):
            return products.norm(x, weight, _epsilon(self, x))
        return passes.rms_norm(x, weight, _epsilon(self, x))


def make_norm(kind: Norm, d_model: int, *, bias: bool = False, epsilon: float | None = None) -> nn.Module:
    """RMSNorm (never a bias) or LayerNorm over d_model; `epsilon` None is the kind's own, `EPSILON`."""
    epsilon = EPSILON[kind] if epsilon is None else epsilon
    return RMSNorm(d_model, eps=epsilon) if kind == "rms" else nn.LayerNorm(d_model, eps=epsilon, bias=bias)


def normed(x: Tensor, norm: RMSNorm | None) -> Tensor:
    """x by the norm, if there is one: in the norm's dtype, where under autocast maps gave another."""
    weight = getattr(norm, "weight", None)  # a module in the norm's place may have none
    return x if norm is None else norm(x if weight is None else x.to(weight.dtype))


def forwards(*kinds: type[nn.Module]) -> dict[type[nn.Module], Callable[..., Any]]:
    """Kinds of modules that may be computed without a call, and how each is called, as it is at import."""
    return {kind: kind.forward for kind in kinds}


_OURS = forwards(nn.Linear, RMSNorm, Rotary)
NORMS = forwards(RMSNorm, nn.LayerNorm)


def linear_maps(x: Tensor, *linears: nn.Linear) -> Sequence[Tensor]:
    """What each of up to three maps makes of x; of few rows all of them together."""
    maps = kernel_maps(x, *linears)
    return [_mapped(x, linear) for linear in linears] if maps is None else products.project(x, *maps)


def _mapped(x: Tensor, linear: nn.Linear) -> Tensor:
    if plain(linear) and products.multiplies(x, linear.weight, linear.bias):
        return products.multiply(x, linear.weight, linear.bias)
    return linear(x)


def joined_map(x: Tensor, *linears: nn.Linear) -> Tensor:
    """What the maps make of x, side by side: for a copy of the weights one product, and two in the backward.

    For training; the modules are not called.
    """
    weights, biases, bias = [linear.weight for linear in linears], [linear.bias for linear in linears], None
    if any(one is not None for one in biases):  # one map may have none, put in the place of another
        pairs = zip(weights, biases, strict=True)
        bias = torch.cat([weight.new_zeros(len(weight)) if one is None else one for weight, one in pairs])
    return F.linear(x, torch.cat(weights), bias)


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """A head's: x (... d_model) against every row of `weight` (vocabulary d_model)."""
    if products.projects(x, weight):
        return products.project(x, (weight, None))[0]
    return products.multiply(x, weight) if products.multiplies(x, weight) else F.linear(x, weight)


def kernel_maps(x: Tensor, *linears: nn.Linear) -> list[products.Map] | None:
    """The maps for the kernel to compute in their place; None unless x has few rows, and nobody else has a say."""
    if not plain(*linears):
        return None
    maps: list[products.Map] = [(linear.weight, linear.bias) for linear in linears]
    return maps if products.projects(x, *[weight for weight, _ in maps]) else None


def kernel_norm(x: Tensor, norm: nn.Module) -> products.Norm | None:
    """The norm for the kernel to compute in its place; None unless it is over x's last axis, and nobody has a say."""
    if not isinstance(norm, RMSNorm | nn.LayerNorm) or not is_own(norm, NORMS):
        return None
    centered = isinstance(norm, nn.LayerNorm)
    weight, bias = norm.weight, norm.bias if centered else None
    if weight is None or weight.shape != x.shape[-1:] or not products.projects(x, weight, bias):
        return None
    return weight, bias, _epsilon(norm, x), centered


def plain(*modules: nn.Module | None) -> bool:
    """No module of another kind in the place of ours, and none in whose call somebody has a say."""
    return all(module is None or is_own(module, _OURS) for module in modules)


def is_own(module: nn.Module, kinds: dict[type[nn.Module], Callable[..., Any]]) -> bool:
    """One of these `forwards`, which nobody replaced, and no hook, on it or on all modules, would have to be called."""
    kind = type(module)
    if kind.forward is not kinds.get(kind) or "forward" in module.__dict__ or _has_any_global_hook():
        return False
    if module._compiled_call_impl is not None:
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _epsilon(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
