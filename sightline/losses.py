"""The loss over a vocabulary without the logits of all tokens at once."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sightline.kernels.products import product
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
    mixed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean cross-entropy of `features @ weight.T` against `targets`, in nats; O(vocabulary) memory beside the inputs.

        loss = mean over tokens i of  logsumexp(logits_i) - logits_i[target_i]

    With `smoothing` s (label smoothing), a token is to have 1 - s of the probability more than its even share s /
    vocabulary: the second term is (1 - s) * logits_i[target_i] + s * mean(logits_i).

    With `mixed`, the softmax is one of several that have a say: (tokens) logarithms of its weight, and of what the
    others give the target; the loss is -log(exp(mixed[0]) softmax(logits_i)[target_i] + exp(mixed[1])). Its gradient
    goes to `mixed`; features and weight have that of the softmax's own loss, as if it were alone: in a mixture whoever
    is ahead is given all the blame, and a network that begins behind counts would never catch up.

    The gradient of a chunk of logits is softmax - wanted, known as soon as the logits are: so it becomes gradients of
    features and weight at once, and neither logits nor their gradients wait for the backward pass. The products are
    those of `cross_entropy(linear(features, weight), targets)`, in the dtype that autocast asks for; the loss and the
    weight's gradient are summed in float32 or finer. Where all logits are one chunk, it is that expression. Where they
    are more, there is no second derivative.

    Source: the chunked loss of Hsu et al. 2024 (Liger Kernel, section 3.2); smoothing: Szegedy et al. 2016, section 7.

    Raises:
        ValueError: no tokens, targets that are not whole numbers of the vocabulary, or smoothing outside [0, 1) or
            beside a mixture.

    >>> round(float(next_token_loss(torch.zeros(3, 4), torch.ones(5, 4), torch.tensor([0, 4, 2]))), 4)  # log 5
    1.6094
    """
    if not targets.numel():
        raise ValueError("next_token_loss: there are no tokens to score; give at least one")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"next_token_loss: targets must be whole numbers, got {targets.dtype}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"next_token_loss: smoothing must be at least 0 and below 1, got {smoothing}")
    if smoothing and mixed is not None:
        raise ValueError("next_token_loss: expected smoothing or a mixture, got both")
    low, high = targets.min(), targets.max()
    if low < 0 or high >= len(weight):
        raise ValueError(f"next_token_loss: targets are 0 to {len(weight) - 1}, got {int(low)} to {int(high)}")
    if targets.numel() * len(weight) * torch.float32.itemsize <= CHUNK_BYTES:
        logits = F.linear(features, weight).to(_exact(features.dtype))
        if mixed is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        alone = F.cross_entropy(logits, targets, reduction="none")
        loss = -torch.logaddexp(mixed[0] - alone.detach(), mixed[1]).mean()
        return loss + (alone.mean() - alone.mean().detach())
    device = features.device.type
    if torch.is_autocast_enabled(device):
        features, weight = (t.to(torch.get_autocast_dtype(device)) for t in (features, weight))
    return _NextTokenLoss.apply(features, weight, targets, smoothing, *(mixed or (None, None)))  # pyright: ignore[reportReturnType]


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _NextTokenLoss(torch.autograd.Function):
    """Keeps the gradients themselves: they are no larger than what they belong to."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        smoothing: float,
        share: Tensor | None,
        beside: Tensor | None,
    ) -> Tensor:
        exact = _exact(features.dtype)
        to_features, to_weight = ctx.needs_input_grad[:2]
        by_features = torch.empty_like(features) if to_features else None
        by_weight = torch.zeros_like(weight, dtype=exact) if to_weight else None
        total = torch.zeros((), dtype=exact, device=features.device)
        blame = None if share is None else torch.empty_like(share, dtype=exact)
        rows = max(1, CHUNK_BYTES // (len(weight) * exact.itemsize))
        step = 2 ** max(0, rows.bit_length() - 3)
        rows -= rows % step  # 4 to 7 times a power of two: a product takes so many rows as they are (products.h)
        for first in range(0, len(features), rows):
            here = slice(first, first + rows)
            chunk, wanted = features[here], targets[here, None]
            log_shares = product(chunk, weight.T).to(exact).log_softmax(-1)
            given = log_shares.gather(1, wanted)
            if blame is not None and share is not None and beside is not None:
                own = share[here, None] + given
                given = torch.logaddexp(own, beside[here, None])
                blame[here] = (own - given).exp()[:, 0]  # the part of the target's probability that is the softmax's
            total -= (1 - smoothing) * given.sum()
            if smoothing:
                total -= smoothing * log_shares.sum() / len(weight)
            if not (to_features or to_weight):
                continue
            grads = log_shares.exp_().sub_(smoothing / len(weight)).div_(len(features))
            grads.scatter_add_(1, wanted, torch.full_like(grads[:, :1], (smoothing - 1) / len(features)))
            grads = grads.to(features.dtype)
            if by_features is not None:
                by_features[here] = product(grads, weight)
            if by_weight is not None:
                by_weight += product(grads.T, chunk)
        ctx.save_for_backward(by_features, by_weight, blame)
        ctx.dtype, ctx.tokens = weight.dtype, len(features)
        return total / len(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_features, by_weight, blame = ctx.saved_tensors
        by_mixed = (None, None)
        if blame is not None:
            by_mixed = (-blame * grads[0] / ctx.tokens, (blame - 1) * grads[0] / ctx.tokens)
        return (
            None if by_features is None else by_features * grads[0].to(by_features.dtype),
            None if by_weight is None else (by_weight * grads[0]).to(ctx.dtype),
            None,
            None,
            *by_mixed,
        )
