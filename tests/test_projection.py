"""Linear maps of few rows by the native kernel: as accurate as the library's, and only where nobody else has a say."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sightline.generation import SampleConfig, sample_tokens
from sightline.kernels import cpu
from sightline.layers import linear_maps, scores
from sightline.models import Decoder, DecoderConfig

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING or "built")


@pytest.fixture(params=cpu.available())
def instructions(request):
    before = cpu.instructions()
    cpu.use_instructions(request.param)
    yield request.param
    cpu.use_instructions(before)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 7, 64, 515])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_each_map_is_as_accurate_as_the_librarys(rows, depth, instructions):
    x = drawn(rows, depth)
    maps = [
        (drawn(columns, depth, seed=columns), drawn(columns, seed=2) if with_bias else None)
        for columns, with_bias in ((37, True), (1, False), (66, True))
    ]
    for given in (maps, maps[:2], maps[:1]):
        errors = {"ours": 1e-7, "library": 0.0}
        for result, (weight, bias) in zip(cpu.project(x, *given), given, strict=True):
            exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            assert result.shape == exact.shape
            for name, tried in (("ours", result), ("library", F.linear(x, weight, bias))):
                errors[name] = max(errors[name], (tried - exact).abs().max().item())
        assert errors["ours"] <= 2 * errors["library"] + 1e-6


@torch.no_grad()
def test_a_rows_bits_are_its_own(instructions):
    x, weight = drawn(8, 100), drawn(130, 100, seed=1)
    (together,) = cpu.project(x, (weight, None))
    for row in range(8):
        assert torch.equal(cpu.project(x[row], (weight, None))[0], together[row])
    beside = cpu.project(x, (weight[:33], None), (weight[33:], None))
    assert torch.equal(torch.cat(tuple(beside), dim=-1), together)


@torch.no_grad()
def test_leading_axes_stay():
    x, linear = drawn(2, 3, 16), nn.Linear(16, 5)
    (result,) = linear_maps(x, linear)
    torch.testing.assert_close(result, linear(x))
    assert scores(x[0, 0], linear.weight).shape == (5,)


def test_only_few_rows_in_float32_without_a_gradient():
    weight = drawn(5, 16)
    assert not cpu.projects(drawn(1, 16), weight)  # a gradient may be wanted
    with torch.no_grad():
        assert cpu.projects(drawn(8, 16), weight)
        assert not cpu.projects(drawn(9, 16), weight)
        assert not cpu.projects(drawn(0, 16), weight)
        assert not cpu.projects(drawn(1, 16).double(), weight.double())
        assert not cpu.projects(drawn(1, 16), weight.bfloat16())
        assert not cpu.projects(drawn(1, 16), drawn(16, 5).T)
        with torch.autocast("cpu"):
            assert not cpu.projects(drawn(1, 16), weight)


@torch.no_grad()
def test_a_hook_and_another_module_are_called():
    linear, seen = nn.Linear(16, 5), []
    hook = linear.register_forward_hook(lambda *_: seen.append("hook"))
    linear_maps(drawn(1, 16), linear)
    hook.remove()
    linear_maps(drawn(1, 16), linear)

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    other = Doubled(16, 5)
    assert seen == ["hook"]
    assert torch.equal(linear_maps(drawn(1, 16), other)[0], 2 * F.linear(drawn(1, 16), other.weight, other.bias))


def test_the_operator_checks_what_it_is_given():
    x, weight = drawn(2, 16), drawn(5, 16)
    for bad in ((x[0], weight), (x.double(), weight), (x, weight.T), (x, weight[:, :8]), (x, weight.bfloat16())):
        with pytest.raises(RuntimeError, match=r"sightline: (x|weights) must be float32"):
            torch.ops.sightline.project(*bad, None, None, None, None, None)
    with pytest.raises(RuntimeError, match="a bias must be float32"):
        torch.ops.sightline.project(x, weight, drawn(4), None, None, None, None)


@pytest.mark.parametrize("kind", ["modern", "classic"])
def test_the_same_tokens_with_the_kernel_and_without(kind, monkeypatch):
    torch.manual_seed(0)
    model = Decoder(getattr(DecoderConfig, kind)(vocabulary=50, context=64, d_model=32, num_layers=2)).eval()
    greedy = SampleConfig(tokens=40, top_k=1)
    tokens = list(sample_tokens(model, [1, 2, 3], greedy))
    monkeypatch.setattr(cpu, "projects", lambda *_: False)
    assert list(sample_tokens(model, [1, 2, 3], greedy)) == tokens
