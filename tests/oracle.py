"""What every implementation is held against: the reference in float64, and an error budget taken from data."""

from typing import NamedTuple

import torch
from torch import Tensor

from sightline.attention import attention


class Case(NamedTuple):
    """Inputs of one call."""

    query: Tensor
    key: Tensor
    value: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(*(t.to(dtype) for t in self))


def draw(
    seed: int = 0, *, batch=2, heads=4, groups=2, queries=7, keys=11, width=8, value_width=5, dtype=torch.float64
) -> Case:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    return Case(
        normal(batch, heads, queries, width),
        normal(batch, groups, keys, width),
        normal(batch, groups, keys, value_width),
    )


def exactly(case: Case, mask=None, **options) -> Tensor:
    """The reference in float64, on inputs already rounded to the dtype under test."""
    return attention(*case.to(torch.float64), mask, implementation="reference", **options)


def assert_as_accurate(actual: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0) -> None:
    """`actual` may be at most `factor` times as wrong as plain PyTorch in the same dtype, and one rounding."""
    assert actual.isfinite().all(), "not finite"
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
    budget = factor * ((plain.double() - exact).abs().max() + rounding)
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"error {error:.2e} exceeds the budget of {budget:.2e}"
