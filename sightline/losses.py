"""The loss over a vocabulary without the logits of all tokens at once."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sightline.shapes import shaped

CHUNK_BYTES = 32 * 1024**2
"""Logits are there this many at a time: few enough for the last cache of a CPU, enough for a good matrix product."""


@shaped
def next_token_loss(
    features: Annotated[Tensor, "tokens d_model"],
    weight: Annotated[Tensor, "vocabulary d_model"],
    targets: Annotated[Tensor, "tokens"],
    *,
    smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy of `features @ weight.T` against `targets`, in nats; O(vocabulary) memory beside the inputs.

        loss = mean over tokens i of  logsumexp(logits_i) - logits_i[target_i]

    With `smoothing` s (label smoothing), a token is to have 1 - s of the probability more than its even share s /
    vocabulary: the second term is (1 - s) * logits_i[target_i] + s * mean(logits_i).

    The gradient of a chunk of logits is softmax - wanted, known as soon as the logits are: so it becomes gradients of
    features and weight at once, and neither logits nor their gradients wait for the backward pass. The products are
    those of `cross_entropy(linear(features, weight), targets)`, in the dtype that autocast asks for; the loss and the
    weight's gradient are summed in float32 or finer. Where all logits are one chunk, it is that expression. Where they
    are more, there is no second derivative.

    Source: the chunked loss of Hsu et al. 2024 (Liger Kernel, section 3.2); smoothing: Szegedy et al. 2016, section 7.

    Raises:
        ValueError: no tokens, targets that are not whole numbers of the vocabulary, or smoothing outside [0, 1).

    >>> round(float(next_token_loss(torch.zeros(3, 4), torch.ones(5, 4), torch.tensor([0, 4, 2]))), 4)  # log 5
    1.6094
    """
    if not targets.numel():
        raise ValueError("next_token_loss: there are no tokens to score; give at least one")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"next_token_loss: targets must be whole numbers, got {targets.dtype}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"next_token_loss: smoothing must be at least 0 and below 1, got {smoothing}")
    low, high = targets.min(), targets.max()
    if low < 0 or high >= len(weight):
        raise ValueError(f"next_token_loss: targets are 0 to {len(weight) - 1}, got {int(low)} to {int(high)}")
    if targets.numel() * len(weight) * torch.float32.itemsize <= CHUNK_BYTES:
        logits = F.linear(features, weight).to(_exact(features.dtype))
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    device = features.device.type
    if torch.is_autocast_enabled(device):
        features, weight = (t.to(torch.get_autocast_dtype(device)) for t in (features, weight))
    return _NextTokenLoss.apply(features, weight, targets, smoothing)  # pyright: ignore[reportReturnType]


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _NextTokenLoss(torch.autograd.Function):
    """Keeps the gradients themselves: they are no larger than what they belong to."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        exact = _exact(features.dtype)
        to_features, to_weight = ctx.needs_input_grad[:2]
        by_features = torch.empty_like(features) if to_features else None
        by_weight = torch.zeros_like(weight, dtype=exact) if to_weight else None
        total = torch.zeros((), dtype=exact, device=features.device)
        rows = max(1, CHUNK_BYTES // (len(weight) * exact.itemsize))
        for first in range(0, len(features), rows):
            chunk, wanted = features[first : first + rows], targets[first : first + rows, None]
            log_shares = (chunk @ weight.T).to(exact).log_softmax(-1)
            total -= (1 - smoothing) * log_shares.gather(1, wanted).sum()
            if smoothing:
                total -= smoothing * log_shares.sum() / len(weight)
            if not (to_features or to_weight):
                continue
            grads = log_shares.exp_().sub_(smoothing / len(weight)).div_(len(features))
            grads.scatter_add_(1, wanted, torch.full_like(grads[:, :1], (smoothing - 1) / len(features)))
            grads = grads.to(features.dtype)
            if by_features is not None:
                torch.mm(grads, weight, out=by_features[first : first + rows])
            if by_weight is not None:
                by_weight += grads.T @ chunk
        ctx.save_for_backward(by_features, by_weight)
        ctx.dtype = weight.dtype
        return total / len(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_features, by_weight = ctx.saved_tensors
        return (
            None if by_features is None else by_features * grads[0].to(by_features.dtype),
            None if by_weight is None else (by_weight * grads[0]).to(ctx.dtype),
            None,
            None,
        )
