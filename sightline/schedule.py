"""How to train: `TrainConfig`, the learning rate along the run, and what `auto` means here.

Knows nothing about models, text or files.
"""

import importlib.util
import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

Precision = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
OptimizerName = Literal["muon", "adamw"]
Parallel = Literal["auto", "replicate", "shard"]
Compile = Literal["auto", "always", "never"]
Decay = Literal["level", "inverse-sqrt"]

DEFAULT_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, on what, and how fast the weights move."""

    steps: int | None = None
    """Steps to take. None: 2,000 when minutes is not given either, else as many as the time allows."""
    minutes: float | None = None
    """Time limit with every evaluation included, summed over resumed sessions. None: no limit."""
    batch: int = 16
    """Windows of text in one step, of all processes and micro-batches together."""
    accumulate: int = 1
    """Micro-batches that a process takes its part of a step in: less memory, the same step."""
    optimizer: OptimizerName = "muon"
    """muon: Muon for the matrices inside the blocks, AdamW for all else; adamw: AdamW for everything."""
    learning_rate: float = 5e-3
    """Highest learning rate of AdamW."""
    embedding_rate: float = 0.1
    """Highest learning rate of AdamW for embeddings that are not the head too. Not with adamw."""
    matrix_rate: float = 0.02
    """Highest learning rate of Muon; it rises and falls with AdamW's. Not with adamw."""
    momentum: float = 0.95
    """Muon's decay rate of the running mean of the gradient. Not with adamw."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises from 0."""
    cooldown: float = 0.5
    """Share of the run, at its end, in which the learning rate falls to 0."""
    decay: Decay = "level"
    """Between the two: level, or falling with the root of the step, as in the 2017 paper (whose cooldown is 0)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and of the head; what embedding_rate moves, gains and biases have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the running mean of the gradient and of its square."""
    clip: float | None = 1.0
    """Gradients are scaled down to this norm. None: never."""
    smoothing: float = 0.0
    """Label smoothing of translation: a share of the probability that all tokens get alike; 0.1 in the 2017 paper."""
    evaluate_every: int = 250
    """Steps between two evaluations; each one writes a checkpoint."""
    evaluate_batches: int | None = None
    """Batches of validation text in an evaluation. None: the whole validation text."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a new best. None: never."""
    seed: int = 0
    """Draws the batches and the dropout, and in `train` the first weights."""
    precision: Precision = "auto"
    """Arithmetic of matrix products; weights are float32. auto: bfloat16 where the hardware has it."""
    device: Device = "auto"
    """auto: cuda where there is one, else cpu."""
    parallel: Parallel = "auto"
    """Of several processes, whether each holds the model (replicate, DDP) or a part of it (shard, FSDP2). auto:
    shard where 16 bytes a parameter would fill more than half of a GPU's memory."""
    compile: Compile = "auto"
    """Whether torch.compile makes the blocks faster. auto: on a GPU that it can compile for."""

    NOT_WITH_ADAMW: ClassVar = ("embedding_rate", "matrix_rate", "momentum")

    def __post_init__(self) -> None:
        kinds = {
            "precision": Precision,
            "device": Device,
            "parallel": Parallel,
            "compile": Compile,
            "optimizer": OptimizerName,
            "decay": Decay,
        }
        for name, choices in ((name, get_args(kind)) for name, kind in kinds.items()):
            if getattr(self, name) not in choices:
                raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch", "accumulate", "evaluate_every", "evaluate_batches", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"expected a whole number of {name} of at least 1, got {value}")
        for name in ("minutes", "learning_rate", "embedding_rate", "matrix_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"expected {name} above 0, got {value}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"expected weight_decay of at least 0, got {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"expected a seed from 0 to 2**63 - 1, got {self.seed}")
        if not (self.warmup >= 0 and self.cooldown >= 0 and self.warmup + self.cooldown <= 1):
            raise ValueError(
                "expected shares warmup and cooldown of at least 0 that sum to at most 1, "
                f"got {self.warmup} and {self.cooldown}"
            )
        for name in TrainConfig.NOT_WITH_ADAMW if self.optimizer == "adamw" else ():
            if getattr(self, name) != getattr(TrainConfig, name):
                raise ValueError(f"{name} has no effect with the optimizer adamw: drop it, or take muon")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"expected smoothing of at least 0 and under 1, got {self.smoothing}")
        if self.decay == "inverse-sqrt" and not self.warmup:
            raise ValueError("expected a warmup above 0 with the decay inverse-sqrt, which starts at its end; got 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"expected momentum of at least 0 and under 1, got {self.momentum}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected two betas of at least 0 and under 1, got {self.betas}")

    @property
    def step_limit(self) -> int | None:
        """The number of steps that ends the run, if any does."""
        return DEFAULT_STEPS if self.steps is None and self.minutes is None else self.steps

    def rate(self, done: float) -> float:
        """The learning rate when a share `done` of the run is over: up, level, down to 0.

        >>> config = TrainConfig(learning_rate=1.0, warmup=0.2, cooldown=0.5)
        >>> [round(config.rate(done), 2) for done in (0.0, 0.1, 0.2, 0.5, 0.75, 1.0)]
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]

        The 2017 paper's d_model^-0.5 min(step^-0.5, step warmup_steps^-1.5) is the decay inverse-sqrt, without cooldown
        and with a learning rate of (d_model warmup_steps)^-0.5.
        """
        up = done / self.warmup if done < self.warmup else 1.0
        down = (1 - done) / self.cooldown if 1 - done < self.cooldown else 1.0
        level = math.sqrt(self.warmup / done) if self.decay == "inverse-sqrt" and done > self.warmup else 1.0
        return self.learning_rate * max(0.0, min(up, level * down))


def choose_device(device: Device) -> torch.device:
    """The device that a name stands for.

    Raises:
        ValueError: this machine, or this build of PyTorch, has none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        raise ValueError(
            f"expected a device that this machine has, got {device!r}: "
            f"choose {' or '.join(name for name, there in available.items() if there)}"
        )
    return torch.device(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself (on a CPU: AVX512_BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; asking for bfloat16 where it is emulated warns that it is slow."""
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if precision == "bfloat16" and not has_bfloat16(device):
        warnings.warn(
            f"this {device.type} has no bfloat16 arithmetic: it is emulated, and slower than float32", stacklevel=2
        )
    return torch.float32 if precision == "float32" else torch.bfloat16


def choose_compile(choice: Compile, device: torch.device) -> bool:
    """Whether the blocks of a model are compiled.

    >>> choose_compile("auto", torch.device("cpu"))
    False
    """
    if choice == "auto":
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return choice == "always"


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """The context in which a model computes in that precision."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)
