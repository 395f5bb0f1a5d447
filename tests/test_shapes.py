"""Axis words: one word, one size, and errors that show both."""

from typing import Annotated

import pytest
import torch
from torch import Tensor

from sightline.shapes import ShapeError, shaped


@shaped
def together(
    left: Annotated[Tensor, "batch (heads) width"],
    right: Annotated[Tensor, "batch (heads) width"],
    extra: Annotated[Tensor, "heads"] | None = None,
) -> int:
    return left.ndim


def test_agreeing_shapes_pass_by_position_and_by_name():
    x = torch.ones(2, 3, 4)
    assert together(x, right=x, extra=torch.ones(3)) == 3
    assert together(torch.ones(2, 4), torch.ones(2, 4)) == 2


def test_a_mismatch_names_the_axis_and_both_sizes():
    with pytest.raises(ShapeError, match="together: width is 5 in right but 4 before it") as caught:
        together(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    assert "left     (2, 3, 4)" in str(caught.value)
    assert "batch heads width" in str(caught.value)


def test_an_axis_in_parentheses_is_absent_from_all_or_none():
    with pytest.raises(ShapeError, match="right has 3 axes, not 2"):
        together(torch.ones(2, 4), torch.ones(2, 3, 4))


def test_a_wrong_rank_says_what_was_expected():
    with pytest.raises(ShapeError, match="left has 1 axes, not 3"):
        together(torch.ones(4), torch.ones(4))


def test_something_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="right must be a tensor, got list"):
        together(torch.ones(2, 4), [1, 2])
