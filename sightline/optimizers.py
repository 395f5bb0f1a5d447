"""What moves the weights: Muon for the matrices inside the blocks, AdamW for all else; their state by name.

Knows nothing about when a rate is how high, about text and about folders.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sightline.checkpoints import Model
from sightline.distributed import part, whole
from sightline.models import Decoder
from sightline.schedule import TrainConfig, has_bfloat16

# Matrices of one shape go through a product together, up to so many numbers: beyond, a product is large by itself.
_TOGETHER = 1 << 22
# Slope 3.4 at zero, and all singular values within 0.7 and 1.2 after five rounds: Jordan et al. 2024.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to (count rows columns), roughly: singular values of 0.7 to 1.2.

    Five rounds of X <- 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X, from X over its Frobenius norm. A singular
    value below a thousandth of the norm ends lower; zeros stay zeros.

    Source: Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks.

    >>> orthogonalized(torch.tensor([[[0.0, 300.0, 0.0]], [[0.0, 0.0, -2.0]]])).round(decimals=1)
    tensor([[[ 0.0000,  0.7000,  0.0000]],
    <BLANKLINE>
            [[ 0.0000,  0.0000, -0.7000]]])
    """
    a, b, c = _QUINTIC
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the products X X^T are over the longer side
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix moves equally far.

        m <- momentum m + (1 - momentum) g
        W <- W - lr (weight_decay W + sqrt(max(1, rows / columns)) orthogonalized(momentum m + (1 - momentum) g))

    `torch.optim.Muon` is the same rule, one matrix at a time and in bfloat16 on every machine, which a CPU without
    bfloat16 products emulates: 17 times slower than matrices of one shape together in float32. Of a matrix that is
    shared out (FSDP2) every process gathers the momentum and does the same rounds on it. `dtype` is that of the rounds.

    Source: Jordan et al. 2024.

    Raises: ValueError for a parameter that is no matrix.

    >>> weight = nn.Parameter(torch.eye(2))
    >>> weight.grad = torch.tensor([[0.0, 5.0], [0.0, 0.0]])
    >>> Muon([weight], lr=0.1).step()
    >>> weight.detach().round(decimals=1)
    tensor([[ 1.0000, -0.1000],
            [ 0.0000,  1.0000]])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"Muon: expected matrices, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Moves the matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrices in _alike([p for p in group["params"] if p.grad is not None]):
                self._move(matrices, group)
        return loss

    def _move(self, matrices: Sequence[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        ahead = []
        for matrix in matrices:
            assert matrix.grad is not None
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
            ahead.append(matrix.grad.lerp(state["momentum_buffer"], momentum))
        together = torch.stack([whole(each) for each in ahead])
        moves = orthogonalized(together.to(self.dtype)).to(matrices[0].dtype)
        rows, columns = matrices[0].shape
        for matrix, move in zip(matrices, moves, strict=True):
            matrix.mul_(1 - lr * group["weight_decay"])
            matrix.add_(part(move, matrix), alpha=-lr * math.sqrt(max(1, rows / columns)))


def _alike(matrices: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """The matrices by shape, in lists short enough to be copied."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, same in by_shape.items():
        most = max(1, _TOGETHER // shape.numel())
        yield from (same[first : first + most] for first in range(0, len(same), most))


class Optimizers:
    """The optimisers of one model, as one.

    With `config.optimizer` "muon": Muon for the weights of linear maps inside the blocks; AdamW for the rest, with a
    rate of its own for embeddings, of which a step sees few rows (but not where the embedding is the head too). Those
    do not decay: a rare row would fade until it is read again. With "adamw": AdamW for all, at one rate.
    Gains and biases never decay.
    """

    def __init__(self, model: Model, config: TrainConfig) -> None:
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        muon = config.optimizer == "muon"
        matrices = _inner_matrices(model) if muon else []
        tables = _tables(model) if muon else []
        apart = {*matrices, *tables}
        rest = [parameter for parameter in model.parameters() if parameter not in apart]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            {"params": tables, "weight_decay": 0.0, "share": config.embedding_rate / config.learning_rate},
        ]
        adamw = torch.optim.AdamW(
            [{"share": 1.0, **group} for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )
        self.each: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            group = {"params": matrices, "share": config.matrix_rate / config.learning_rate}
            half = config.precision != "float32" and has_bfloat16(matrices[0].device)
            dtype = torch.bfloat16 if half else torch.float32
            momentum, decay = config.momentum, config.weight_decay
            self.each.append(Muon([group], lr=config.matrix_rate, momentum=momentum, weight_decay=decay, dtype=dtype))

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for optimizer in self.each:
            optimizer.zero_grad()

    def step(self, rate: float) -> None:
        """Moves every weight; `rate` is that of `learning_rate`, and the other rates keep their proportion to it."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """What each parameter's optimiser remembers, as `parameter.exp_avg`, `parameter.momentum_buffer` and so on."""
        return {
            f"{self.names[parameter]}.{key}": value.contiguous()
            for optimizer in self.each
            for parameter, kept in optimizer.state.items()
            for key, value in kept.items()
        }

    def blank_state(self) -> dict[str, Tensor]:
        """The same as a first step finds it: zeros, to be filled with what was saved."""
        blank = {}
        for optimizer in self.each:
            keys = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                for key in keys:
                    zeros = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                    optimizer.state[parameter][key] = blank[f"{self.names[parameter]}.{key}"] = zeros
        return blank


def stored(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor of a saved training state.

    Raises:
        ValueError: it is missing, or not of the shape and dtype of `like`.
    """
    value = tensors.get(name)
    if value is None or (value.shape, value.dtype) != (like.shape, like.dtype):
        came = "nothing" if value is None else f"{tuple(value.shape)} of {value.dtype}"
        raise ValueError(
            f"expected the training state {name} of shape {tuple(like.shape)} and {like.dtype}, got {came}: "
            "the checkpoint's files belong to different models"
        )
    return value


def _inner_matrices(model: Model) -> list[Tensor]:
    named = model.named_modules()
    return [module.weight for name, module in named if isinstance(module, nn.Linear) and "blocks" in name.split(".")]


def _tables(model: Model) -> list[Tensor]:
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    shared = model.embedding.weight if isinstance(model, Decoder) else model.embedding.tokens.weight
    return [table for table in tables if model.head is not None or table is not shared]
