"""What a training step costs: arithmetic, memory, bytes between processes; and the share of a GPU's peak.

Plain numbers from the shape of a model. Knows nothing about how training works.
"""

from dataclasses import dataclass

from sightline.models import DecoderConfig

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 operations a second, as the makers give them; the first name that a GPU's name holds is its."""


def peak(name: str) -> float | None:
    """The peak of a GPU by its name; None for one that is not listed.

    >>> peak("NVIDIA H100 80GB HBM3"), peak("a toaster")
    (989000000000000.0, None)
    """
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def flops_per_token(config: DecoderConfig) -> float:
    """Operations of one token's forward and backward pass, a multiplication and an addition counted as two.

        6 * (numbers in matrix products, the head's among them) + 12 * layers * heads * head_width * context

    The second part is attention's two products over the whole context, also where a causal mask spares half of them:
    so the field counts, and so shares of peak compare.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.

    >>> flops_per_token(DecoderConfig(vocabulary=100, context=8, d_model=16, num_layers=1, num_heads=2, d_ff=32))
    26496.0
    """
    inner, keys = config.num_heads * config.head_width, config.num_groups * config.head_width
    attention = config.d_model * (2 * inner + 2 * keys)
    feed_forward = config.d_model * config.d_ff * (3 if config.activation == "swiglu" else 2)
    matrices = config.num_layers * (attention + feed_forward) + config.vocabulary * config.d_model
    return 6.0 * matrices + 12.0 * config.num_layers * inner * config.context


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a process computes and sends in a second."""

    flops: float
    """Operations that training reaches, not the peak."""
    bandwidth: float
    """Bytes that each process sends and receives."""
    latency: float
    """Seconds of one message."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a step, and bytes of a process."""

    compute: float
    communicate: float
    state_bytes: float

    @property
    def seconds(self) -> float:
        """Nothing overlaps: an upper bound."""
        return self.compute + self.communicate


def step_cost(
    flops: float, parameters: int, machine: Machine, *, processes: int, sharded: bool = False, bytes_each: int = 4
) -> StepCost:
    """A step of `flops` operations by so many processes.

    A ring sends each process 2 (n - 1) / n of the gradients (DDP), or 3 (n - 1) / n of the weights (FSDP2: gathered
    forward and backward, gradients scattered), in 2 (n - 1) or 3 (n - 1) messages.

    >>> machine = Machine(flops=1e12, bandwidth=1e9, latency=0.0)
    >>> step_cost(2e12, 10**6, machine, processes=2)
    StepCost(compute=1.0, communicate=0.004, state_bytes=16000000.0)
    """
    turns = (3 if sharded else 2) * (processes - 1)
    sent = turns / processes * parameters * bytes_each
    return StepCost(
        compute=flops / processes / machine.flops,
        communicate=sent / machine.bandwidth + turns * machine.latency,
        state_bytes=16.0 * parameters / (processes if sharded else 1),
    )
