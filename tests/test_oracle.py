"""The helper that judges accuracy must be able to fail."""

import pytest
import torch
from oracle import assert_as_accurate, draw, exactly

from sightline.attention import attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_passes_plain_attention_and_fails_what_is_five_percent_off(dtype):
    case = draw(dtype=dtype)
    plain, exact = attention(*case, implementation="sdpa"), exactly(case)
    assert_as_accurate(plain, exact, plain)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_as_accurate(plain * 1.05, exact, plain)
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate(plain / 0, exact, plain)
