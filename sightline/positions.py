"""Where a token stands: added to its embedding (`Sinusoidal`, `Learned`) or turned into its query and key (`Rotary`).

Angles are computed in float64, so that position 100,000 is as exact as position 1. Knows nothing of attention:
ALiBi, which is a bias on the scores, is a mask.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RotaryScaling(NamedTuple):
    """How rotary angles are slowed down for a longer context (see `Rotary`)."""

    factor: float
    low: float
    high: float
    original: float


def sinusoidal(
    length: int, d_model: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The sinusoidal encoding of positions 0 to length - 1: (length d_model).

        PE(pos, 2i)     = sin(pos / 10000^(2i / d_model))
        PE(pos, 2i + 1) = cos(pos / 10000^(2i / d_model))

    An odd d_model ends with a sine.

    Raises: ValueError for a negative length, d_model below 1, or a dtype that is not floating point.

    Source: Vaswani et al. 2017, section 3.5.

    >>> sinusoidal(2, 4)
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])
    """
    if length < 0 or d_model < 1:
        raise ValueError(f"sinusoidal: expected length >= 0 and d_model >= 1, got {length} and {d_model}")
    if not dtype.is_floating_point:
        raise ValueError(f"sinusoidal: expected a floating-point dtype, got {dtype}")
    angles = _angles(length, d_model, base=10000.0)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[:, :d_model].to(device, dtype)


class Sinusoidal(nn.Module):
    """Adds the sinusoidal encoding to embeddings, then applies dropout. Nothing is trained.

    `length` positions are computed at once; more are computed when they are asked for.

    >>> Sinusoidal(d_model=4, length=10)(torch.zeros(1, 2, 4))
    tensor([[[0.0000, 1.0000, 0.0000, 1.0000],
             [0.8415, 0.5403, 0.0100, 0.9999]]])
    """

    encoding: Tensor

    def __init__(self, d_model: int, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.d_model = d_model
        self.dropout = dropout
        self.register_buffer("encoding", sinusoidal(length, d_model), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Embeddings (batch tokens d_model), the first of them at position `start`, plus their encoding."""
        _check_embeddings("Sinusoidal", x, self.d_model)
        stop = start + x.shape[-2]
        dtype = _table_dtype(x)
        if stop > len(self.encoding) or self.encoding.dtype != dtype or self.encoding.device != x.device:
            length = max(stop, len(self.encoding))
            self.encoding = sinusoidal(length, self.d_model, dtype=dtype, device=x.device)
        total = (x + self.encoding[start:stop]).to(x.dtype)
        return F.dropout(total, self.dropout, self.training)


class Learned(nn.Module):
    """Adds one trained vector a position to embeddings, then applies dropout; drawn from normal(0, 0.02).

    Raises: ValueError where a position lies beyond `length`: there is nothing learned to add.

    >>> Learned(d_model=4, length=10)(torch.zeros(3, 2, 4)).shape
    torch.Size([3, 2, 4])
    """

    def __init__(self, d_model: int, length: int, dropout: float = 0.0) -> None:
        super().__init__()
        if length < 1 or d_model < 1:
            raise ValueError(f"Learned: expected length >= 1 and d_model >= 1, got {length} and {d_model}")
        self.dropout = dropout
        self.weight = nn.Parameter(torch.empty(length, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Embeddings (batch tokens d_model), the first of them at position `start`, plus their vectors."""
        length, d_model = self.weight.shape
        _check_embeddings("Learned", x, d_model)
        stop = start + x.shape[-2]
        if stop > length:
            raise ValueError(
                f"Learned: asked for {stop} positions but only {length} were learned; shorten the input or "
                "build it longer"
            )
        return F.dropout(x + self.weight[start:stop], self.dropout, self.training)


class Rotary(nn.Module):
    """Turns each pair of numbers of a query or key by an angle that grows with its position.

    Pair i is (x[i], x[i + width/2]) and turns by position / base^(2i / width), so the product of a turned query
    and a turned key depends on the distance of their positions alone. (The halves layout, which Qwen3 and Llama
    checkpoints have in `transformers`.) Nothing is trained.

    `scaling` slows the slow pairs, for contexts longer than the `original` one that they were trained on: those
    that turn fewer than `low` times in it turn `factor` times slower, those with more than `high` as before, those
    between by the linear mean of both.

    Raises: ValueError for an odd width.

    Source: Su et al. 2021, section 3.2; the scaling is Llama 3.1's.

    >>> rotary = Rotary(width=2)
    >>> rotary(torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]), start=0)
    tensor([[[[1.0000, 0.0000],
              [0.5403, 0.8415]]]])
    """

    cosine: Tensor
    sine: Tensor

    def __init__(
        self, width: int, base: float = 10000.0, *, length: int = 0, scaling: RotaryScaling | None = None
    ) -> None:
        """`length` positions are computed at once; more are computed when they are asked for."""
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"Rotary: expected an even width, since it turns pairs; got {width}")
        self.width = width
        self.base = base
        self.scaling = scaling
        cosine, sine = self._tables(length, torch.float32)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Queries or keys (batch heads tokens width), the first token at position `start`, turned."""
        if x.shape[-1] != self.width:
            raise ValueError(f"Rotary: expected width {self.width}, got {x.shape[-1]} in {tuple(x.shape)}")
        stop = start + x.shape[-2]
        cosine, sine = (table[start:stop] for table in self.tables(stop, x))
        # Rolling by half the width swaps the halves; the table of sines carries the sign.
        return torch.addcmul(x * cosine, x.roll(self.width // 2, -1).to(cosine.dtype), sine).to(x.dtype)

    def tables(self, stop: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of positions 0 to `stop` - 1, or more of them: (positions width), to turn x with."""
        dtype, cosine, sine = _table_dtype(x), self.cosine, self.sine
        if stop > len(cosine) or cosine.dtype != dtype or cosine.device != x.device:
            # At least twice as many as before, so that a text growing token by token asks seldom.
            length = len(cosine) if stop <= len(cosine) else max(stop, 2 * len(cosine))
            cosine, sine = self.cosine, self.sine = [table.to(x.device) for table in self._tables(length, dtype)]
        return cosine, sine

    def _tables(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = _angles(length, self.width, self.base, self.scaling)
        cosine = torch.cat((angles.cos(), angles.cos()), dim=-1)
        sine = torch.cat((-angles.sin(), angles.sin()), dim=-1)
        return cosine.to(dtype), sine.to(dtype)


def _angles(length: int, width: int, base: float, scaling: RotaryScaling | None = None) -> Tensor:
    """position / base^(2i / width), float64, on the CPU since not every device has float64."""
    position = torch.arange(length, dtype=torch.float64, device="cpu")
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    wavelengths = base**exponent
    if scaling is not None:
        turns = scaling.original / (2 * math.pi * wavelengths)
        share = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        wavelengths = 1 / (share / wavelengths + (1 - share) / (scaling.factor * wavelengths))
    return position[:, None] / wavelengths


def _table_dtype(x: Tensor) -> torch.dtype:
    """Tables stay in float32 when a model moves to bfloat16: the sum is rounded once, at its end."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_embeddings(name: str, x: Tensor, d_model: int) -> None:
    if x.ndim < 2 or x.shape[-1] != d_model:
        raise ValueError(f"{name}: expected (batch tokens d_model) with d_model {d_model}, got {tuple(x.shape)}")
