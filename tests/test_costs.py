"""What a step costs, by hand, and against what a model holds."""

from types import SimpleNamespace

import pytest
import torch

from sightline.costs import PEAKS, Machine, flops_per_token, peak, step_cost
from sightline.models import Decoder, DecoderConfig
from sightline.trainer import Trainer


@pytest.mark.parametrize("change", [{}, {"num_groups": 1}, {"tied": False}, {"activation": "gelu"}])
def test_the_operations_of_a_token_are_those_of_the_matrices(change):
    shape = {"context": 8, "d_model": 16, "num_layers": 3, "num_heads": 2}
    config = DecoderConfig(vocabulary=50, **shape, **change)
    model = Decoder(config)
    inner = sum(p.numel() for block in model.blocks for p in block.parameters() if p.ndim == 2)
    assert flops_per_token(config) == 6 * (inner + 50 * 16) + 12 * 3 * 16 * 8


def test_a_step_by_hand():
    machine = Machine(flops=1e9, bandwidth=1e6, latency=0.5)
    alone = step_cost(4e9, 1000, machine, processes=1)
    assert (alone.compute, alone.communicate, alone.state_bytes) == (4.0, 0.0, 16_000)
    ring = step_cost(4e9, 1000, machine, processes=4)
    assert ring.compute == 1.0
    assert ring.communicate == pytest.approx(2 * 3 / 4 * 4000 / 1e6 + 6 * 0.5)
    shared = step_cost(4e9, 1000, machine, processes=4, sharded=True)
    assert shared.communicate == pytest.approx(3 * 3 / 4 * 4000 / 1e6 + 9 * 0.5)
    assert (shared.state_bytes, shared.seconds) == (4000, shared.compute + shared.communicate)


def test_the_longer_name_of_a_gpu_is_its():
    for name, flops in PEAKS.items():
        assert peak(f"NVIDIA {name} 80GB") == flops


def test_the_share_of_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    config = DecoderConfig(vocabulary=50, context=8, d_model=16, num_layers=3, num_heads=2)
    facts = {"tokens_per_second": 1e6, "model": SimpleNamespace(config=config), "team": SimpleNamespace(size=2)}

    def share(device: str, precision: torch.dtype) -> float | None:
        trainer = SimpleNamespace(device=torch.device(device), precision=precision, **facts)
        return Trainer.of_peak.fget(trainer)

    assert share("cuda", torch.bfloat16) == pytest.approx(1e6 * flops_per_token(config) / (2 * 312e12))
    assert share("cuda", torch.float32) is None
    assert share("cpu", torch.bfloat16) is None
