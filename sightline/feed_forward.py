"""The feed-forward network of a block."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline import passes, sublayers
from sightline.kernels import products
from sightline.rows import joined_map, kernel_maps, kernel_norm, linear_maps, plain

Activation = Literal["swiglu", "gelu", "gelu_tanh", "relu"]


class FeedForward(nn.Module):
    """The same two-layer network on every token.

        relu, gelu: W_down f(W_up x)          swiglu: W_down (silu(W_gate x) * W_up x)

    gelu_tanh is the approximation that GPT-2 was trained with.

    Source: Vaswani et al. 2017, section 3.3; Shazeer 2020 for swiglu.

    >>> import torch
    >>> FeedForward(d_model=8, d_ff=32)(torch.ones(1, 2, 8)).shape
    torch.Size([1, 2, 8])
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: Activation = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)
        self.activation = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": passes.gelu_tanh, "relu": F.relu}[activation]

    def forward(self, x: Tensor) -> Tensor:
        if (output := self._step(x)) is not None:
            return output
        if self.gate is None:
            (up,) = linear_maps(x, self.up)
            hidden = passes.activated(self.activation, up)
        elif self.training and plain(self.gate, self.up) and self._joins():
            hidden = passes.activated(passes.gated_silu, joined_map(x, self.gate, self.up))
        else:
            gate, up = linear_maps(x, self.gate, self.up)
            hidden = F.silu(gate, inplace=True).mul_(up) if self._owns(gate, up) else self.activation(gate) * up
        (output,) = linear_maps(hidden, self.down)
        return output

    def added(self, x: Tensor, norm: nn.Module, dropout: float) -> Tensor | None:
        """x + the network's of norm(x), in training or of few tokens; None where the modules must be called.

        `dropout` falls on what is added, in training.
        """
        if not self.training:
            before = kernel_norm(x, norm)
            return None if before is None else self._step(x, before)
        ups = (self.up,) if self.gate is None else (self.gate, self.up)
        activation = self.activation if self.gate is None else passes.gated_silu
        if activation not in passes.CURVES or not plain(*ups, self.down) or not self._joins():
            return None
        weights, down = sublayers.parameters(*ups), sublayers.parameters(self.down)
        if not sublayers.served(x, norm, *weights, *down):
            return None
        return sublayers.fed(x, norm, weights, activation, down, dropout)

    def _step(self, x: Tensor, norm: products.Norm = products.NO_NORM) -> Tensor | None:
        """The network of few tokens in one call of the native kernel, with a norm x + that of norm(x); None: not so."""
        gate = () if self.gate is None else (self.gate,)
        curve, maps = self._curve(), kernel_maps(x, self.up, self.down, *gate)
        return None if curve is None or maps is None else products.feed_forward(x, *maps, curve=curve, norm=norm)

    def _curve(self) -> int | None:
        """The kernel's number of the activation; None: it has none."""
        if self.gate is not None:
            return products.SILU if self.activation is F.silu else None
        return products.RELU if self.activation is F.relu else passes.CURVES.get(self.activation, (None,))[0]

    def _owns(self, gate: Tensor, up: Tensor) -> bool:
        """Whether silu and product may be written over the gate: nobody else has it, and no gradient wants it."""
        if torch.is_grad_enabled() or products.transformed() or self.activation is not F.silu:
            return False
        return plain(self.gate, self.up) and gate.dtype == up.dtype and gate.shape == up.shape

    def _joins(self) -> bool:
        """Whether gate and up may be one map, of one width, and silu stands between them."""
        return self.gate is None or (self.activation is F.silu and self.gate.weight.shape == self.up.weight.shape)
