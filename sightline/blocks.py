"""The block: attention and the feed-forward network, joined with norms and residuals.

Tensors are (batch tokens d_model). Knows nothing of vocabularies or of how many layers there are.
"""

from torch import Tensor, nn

from sightline import passes
from sightline.attention import check_dropout
from sightline.cache import Cache
from sightline.feed_forward import FeedForward
from sightline.layers import MultiHeadAttention
from sightline.masks import Mask
from sightline.rows import Norm, forwards, is_own, make_norm


class Block(nn.Module):
    """Attention, then feed-forward, each with a norm and a residual.

        norm_first (pre-norm):  x = x + sublayer(norm(x))
        otherwise (post-norm):  x = norm(x + sublayer(x))

    `dropout` falls on what a sublayer adds.

    Source: Vaswani et al. 2017, section 3.1 (post-norm); Xiong et al. 2020 (pre-norm).
    """

    _KINDS = forwards(MultiHeadAttention, FeedForward)

    def __init__(
        self,
        attention: MultiHeadAttention,
        feed_forward: FeedForward,
        *,
        d_model: int,
        norm: Norm = "rms",
        norm_epsilon: float | None = None,
        norm_first: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_dropout("Block", dropout)
        self.attention_norm = make_norm(norm, d_model, bias=bias, epsilon=norm_epsilon)
        self.attention = attention
        self.feed_forward_norm = make_norm(norm, d_model, bias=bias, epsilon=norm_epsilon)
        self.feed_forward = feed_forward
        self.norm_first = norm_first
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Mask | None = None, *, cache: Cache | None = None) -> Tensor:
        return self._feed(self._attend(x, mask, cache))

    def _attend(self, x: Tensor, mask: Mask | None, cache: Cache | None) -> Tensor:
        if not self.norm_first:
            return self.attention_norm(x + self._drop(self.attention(x, mask=mask, cache=cache)))
        if self._steps(self.attention):
            added = self.attention.added(x, self.attention_norm, mask, self.dropout, cache)
            if added is not None:
                return added
        return x + self._drop(self.attention(self.attention_norm(x), mask=mask, cache=cache))

    def _feed(self, x: Tensor) -> Tensor:
        if not self.norm_first:
            return self.feed_forward_norm(x + self._drop(self.feed_forward(x)))
        if self._steps(self.feed_forward):
            added = self.feed_forward.added(x, self.feed_forward_norm, self.dropout)
            if added is not None:
                return added
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x)))

    def _steps(self, sublayer: nn.Module) -> bool:
        """Whether the sublayer may be computed without calling it."""
        return self.training == sublayer.training and is_own(sublayer, self._KINDS)

    def _drop(self, x: Tensor) -> Tensor:
        return passes.dropped(x, self.dropout) if self.training else x
