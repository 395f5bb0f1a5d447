"""PyTorch's scaled_dot_product_attention under the contract of `attention()`, where it computes the same thing."""

import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Shapes as in the reference; `is_causal` only with as many queries as keys, and without a mask."""
    mask = allowed
    if bias is not None:
        mask = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
