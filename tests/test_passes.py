"""What stands between the products of a training step: as accurate as the definition, and only where it serves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from sightline import passes
from sightline.blocks import Block
from sightline.feed_forward import FeedForward
from sightline.kernels import cpu
from sightline.layers import MultiHeadAttention
from sightline.models import Decoder, DecoderConfig
from sightline.positions import Rotary
from sightline.rows import RMSNorm
from sightline.shapes import ShapeError

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING or "built")

ACTIVATIONS = [F.gelu, passes.gelu_tanh, passes.gated_silu]
SHAPES = [(1, 2), (3, 7, 6), (5, 130), (700, 66)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function, *inputs, dtype=torch.float32):
    """What the function gives, and the gradients of a weighted sum of it."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return output, *torch.autograd.grad(output, inputs, drawn(*output.shape, seed=9).to(dtype))


def assert_as_accurate(ours, definition, *inputs):
    """Each number within twice the largest error that the definition has in float32."""
    sides = with_gradients(ours, *inputs), with_gradients(definition, *inputs)
    exact = with_gradients(definition, *inputs, dtype=torch.float64)
    for tried, known, true in zip(*sides, exact, strict=True):
        assert tried.shape == true.shape
        budget = 2 * (known - true).abs().max() + 5e-7 * true.abs().max().clamp_min(1)
        assert (tried - true).abs().max() <= budget


def assert_as_accurate_in_bfloat16(ours, definition, *inputs):
    """Within 1.5 times the largest error that the definition has in bfloat16, and 1.1 times the mean error."""
    inputs = [tensor.bfloat16() for tensor in inputs]
    sides = [with_gradients(function, *inputs, dtype=torch.bfloat16) for function in (ours, definition)]
    exact = with_gradients(definition, *inputs, dtype=torch.float64)
    for tried, known, true in zip(*sides, exact, strict=True):
        assert tried.dtype == torch.bfloat16 and tried.shape == true.shape
        errors, allowed = (tried - true).abs(), (known - true).abs()
        assert errors.max() <= 1.5 * allowed.max() + 1e-6 and errors.mean() <= 1.1 * allowed.mean() + 1e-6


@pytest.mark.parametrize("judge", [assert_as_accurate, assert_as_accurate_in_bfloat16])
def test_the_judges_see_a_wrong_gradient_and_a_rough_output(judge):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return F.silu(x)

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            return grad

    with pytest.raises(AssertionError):
        judge(Wrong.apply, F.silu, drawn(4, 4))
    with pytest.raises(AssertionError):
        judge(lambda x: F.silu(x) * 1.01, F.silu, drawn(40, 40))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_an_activation_is_its_definition(function, shape, instructions):
    x = 3 * drawn(*shape)
    assert passes.served(x.requires_grad_())
    assert_as_accurate(lambda x: passes.activated(function, x), function, x)


@pytest.mark.parametrize("shape", SHAPES[2:])
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_an_activation_in_bfloat16_is_its_definition(function, shape, instructions):
    x = 3 * drawn(*shape)
    assert passes.served(x.bfloat16().requires_grad_())
    assert_as_accurate_in_bfloat16(lambda x: passes.activated(function, x), function, x)


@pytest.mark.parametrize("function", ACTIVATIONS[:2])
def test_all_of_bfloat16_is_activated(function, instructions):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[(x.abs() < 1e9) & (x.abs() > 1e-30)].requires_grad_()
    exact = x.detach().double().requires_grad_()
    output, true = passes.activated(function, x), function(exact)
    output.sum().backward()
    true.sum().backward()
    assert x.grad is not None and exact.grad is not None
    # Half of the last bit, and an eighth; far out where next to nothing is left a little more of that.
    assert ((output - true).abs() <= (2**-8 + 2**-11) * true.abs() + 1e-5).all()
    assert ((x.grad - exact.grad).abs() <= (2**-8 + 2**-11) * exact.grad.abs() + 1e-3).all()


@pytest.mark.parametrize("function", ACTIVATIONS[:2])
def test_an_activation_far_out_and_of_what_is_no_number(function, instructions):
    x = torch.tensor([-1e18, -200.0, -13.0, -1.25, -0.0, 1.25, 13.0, 200.0, 1e18, torch.nan])
    assert_as_accurate(lambda x: passes.activated(function, x), function, x[1:-2])
    ends = with_gradients(lambda x: passes.activated(function, x), x)
    assert [tensor[-1].isnan().item() for tensor in ends] == [True, True]
    assert ends[0][0].abs() < 1e-18 and ends[0][-2] == 1e18


@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_is_its_definition(shape, instructions):
    x, weight = drawn(*shape), drawn(shape[-1], seed=1)

    def definition(x, weight):
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    assert_as_accurate(lambda x, weight: passes.rms_norm(x, weight, 1e-6), definition, x, weight)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"query_key_norm": True, "num_groups": 2, "d_v": 12},
        {"query_key_norm": True, "key_norm": None},
        {"rotary": Rotary(6), "bias": False},
        {"rotary": Rotary(6), "query_key_norm": True, "num_groups": 1, "dropout": 0.2},
    ],
    ids=["plain", "norms", "query", "rotary", "both"],
)
def test_heads_in_their_place_are_the_modules_own(settings, instructions, monkeypatch):
    torch.manual_seed(0)
    layer = MultiHeadAttention(24, 4, causal=True, **{k: v for k, v in settings.items() if k != "key_norm"})
    layer.key_norm = settings.get("key_norm", layer.key_norm)
    for norm in (layer.query_norm, layer.key_norm):
        if norm is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, names = drawn(2, 37, 24), [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        torch.manual_seed(1)  # what dropout drops
        twin = copy.deepcopy(layer).to(x.dtype)
        for name, weight in zip(names, weights, strict=True):
            module, _, last = name.rpartition(".")
            owner = twin.get_submodule(module)
            del owner._parameters[last]
            setattr(owner, last, weight)
        return twin(x)

    def by_definition(*inputs):
        with monkeypatch.context() as patch:
            patch.setattr(passes, "served", lambda *_: False)
            return run(*inputs)

    if layer.dropout:  # the kernel's dropout, which float64 has not
        inputs = [x, *layer.parameters()]
        for tried, known in zip(with_gradients(run, *inputs), with_gradients(by_definition, *inputs), strict=True):
            torch.testing.assert_close(tried, known, rtol=1e-4, atol=2e-5)
    else:
        assert_as_accurate(run, by_definition, x, *layer.parameters())


def test_a_norm_or_a_map_with_a_hook_is_called():
    seen = []
    attention = MultiHeadAttention(8, 2, query_key_norm=True, causal=True)
    assert attention.query_norm is not None
    attention.query_norm.register_forward_hook(lambda *_: seen.append("norm"))
    network = FeedForward(8, 16)
    network.up.register_forward_hook(lambda *_: seen.append("up"))
    x = drawn(1, 5, 8).requires_grad_()
    attention(x)
    network(x)
    assert seen == ["norm", "up"]


def test_a_map_of_another_width_is_refused_as_ever():
    layer = MultiHeadAttention(8, 2, causal=True)
    layer.key, layer.value = nn.Linear(8, 12), nn.Linear(8, 4)  # together as wide as before
    with pytest.raises(ShapeError, match="width"):
        layer(drawn(1, 5, 8))


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
def test_where_it_serves_a_gradient_has_no_say():
    class Other(torch.Tensor):
        pass

    x, seen = drawn(3, 4), []
    assert passes.served(x) and passes.served(x, None, drawn(4), nn.Parameter(drawn(4)))
    x.requires_grad_()
    assert passes.served(x)
    with torch.no_grad():
        assert passes.served(x)
    for weight in (drawn(4).bfloat16(), drawn(4).to("meta"), drawn(8)[::2], drawn(4).as_subclass(Other)):
        assert not passes.served(x, drawn(4), weight)
    with forward_ad.dual_level():
        assert not passes.served(x)
    torch.jit.trace(lambda x: seen.append(passes.served(x)) or x + 1, x.detach(), check_trace=False)
    assert seen == [False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert passes.served(x) and passes.served(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.float16):
        assert not passes.served(x)
    assert not passes.served(x.double()) and not passes.served(x.half()) and not passes.served(x[:0])
    assert not passes.served(x, drawn(4, 3).T) and passes.served(drawn(3, 4), drawn(4).requires_grad_())
    norm = RMSNorm(4)
    directional = torch.func.vmap(torch.func.grad(lambda row: norm(row).sum()))(x.detach())
    (known,) = torch.autograd.grad(norm(x).sum(), x)
    torch.testing.assert_close(directional, known)


@pytest.mark.parametrize("function", [*ACTIVATIONS, "norm"])
def test_second_derivatives_are_the_definitions(function):
    def curvature(apply, x):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(apply(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), x)[0]

    def ours(x):
        return passes.rms_norm(x, weight, 1e-6) if function == "norm" else passes.activated(function, x)

    def definition(x):
        return F.rms_norm(x, (6,), weight.double(), 1e-6) if function == "norm" else function(x)

    weight = drawn(6, seed=1)
    tried, true = curvature(ours, drawn(5, 6)).double(), curvature(definition, drawn(5, 6).double())
    torch.testing.assert_close(tried, true, rtol=1e-5, atol=1e-5)


def test_a_step_has_the_same_bits_with_any_number_of_threads():
    ids, threads = torch.randint(50, (8, 33), generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    config, steps = DecoderConfig(vocabulary=50, d_model=96, num_layers=1, context=32), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            model = Decoder(config)
            x = model.embedding(ids[:, :-1]).detach().requires_grad_()
            block = model.blocks[0]
            assert isinstance(block, Block)
            normed = block.attention_norm(x)
            hidden = passes.activated(passes.gated_silu, torch.cat((normed, x), dim=-1))
            placed = passes.placed(torch.cat((x, normed, x), dim=-1), block.attention._heads(x))
            (hidden.sin().sum() + torch.stack([part.cos().sum() for part in placed]).sum()).backward()
            steps.append([x.grad, *(weight.grad for weight in block.parameters() if weight.grad is not None)])
    finally:
        torch.set_num_threads(threads)
    assert len(steps[0]) == 4  # x, the norm, the heads' two norms
    for other in steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[0], other, strict=True))


@given(rows=st.integers(1, 70), half=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_rows_bits_are_its_own(rows, half, seed):
    x = drawn(rows, 2 * half, seed=seed).requires_grad_()
    for function in ACTIVATIONS:
        whole = passes.activated(function, x)
        (by_x,) = torch.autograd.grad(whole.sum(), x)
        last = x[-1:].detach().requires_grad_()
        alone = passes.activated(function, last)
        assert torch.equal(alone, whole[-1:])
        assert torch.equal(torch.autograd.grad(alone.sum(), last)[0], by_x[-1:])


def test_the_operators_refuse_what_does_not_belong_together():
    operators, x, joined = torch.ops.sightline, drawn(4, 6), drawn(1, 4, 24)
    for call in (
        lambda: operators.bend(x, 3, False),
        lambda: operators.bend(drawn(4, 5), 0, True),
        lambda: operators.bend_backward(x, x, 0, True),
        lambda: operators.bend(x.double(), 0, False),
        lambda: operators.drop(x, 1.0, torch.tensor(1)),
        lambda: operators.drop(x, 0.5, torch.tensor(1.0)),
        lambda: operators.drop(x, 0.5, torch.tensor(1, device="meta")),
        lambda: operators.bend(x.half(), 0, False),
        lambda: operators.bend_backward(x.bfloat16(), x, 0, False),
        lambda: operators.row_norm(x, drawn(5), None, 1e-6, False, False),
        lambda: operators.row_norm(x, drawn(6), drawn(6), 1e-6, False, False),
        lambda: operators.row_norm_backward(drawn(3, 6), x, drawn(6), None, 1e-6, False, None),
        lambda: operators.row_norm_backward(x, x, drawn(6), None, 1e-6, False, drawn(4, 5)),
        lambda: operators.place(joined, 2, 2, 12, None, None, 1e-6, None, None),
        lambda: operators.place(joined, 2**61, 1, 8, None, None, 1e-6, None, None),
        lambda: operators.place(joined, 2, 1, 6, drawn(5), drawn(6), 1e-6, None, None),
        lambda: operators.place(joined, 2, 1, 6, None, None, 1e-6, drawn(3, 6), drawn(3, 6)),
    ):
        with pytest.raises(RuntimeError, match="sightline:"):
            call()


def test_what_is_dropped_is_dropped_in_the_gradient_too(instructions):
    for shape in ((40, 1000), (7, 3, 33)):
        x = (drawn(*shape).abs() + 1).requires_grad_()
        torch.manual_seed(3)
        output = passes.dropped(x, 0.25)
        (by_x,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        kept = output != 0
        torch.testing.assert_close(output, torch.where(kept, x / 0.75, 0), rtol=1e-6, atol=0)
        assert torch.equal(by_x, kept / 0.75)
        torch.manual_seed(3)
        assert torch.equal(passes.dropped(x, 0.25), output)
        assert not torch.equal(passes.dropped(x, 0.25), output)
        if x.numel() > 1000:  # five standard deviations
            assert abs(kept.float().mean() - 0.75) < 5 * (0.75 * 0.25 / x.numel()) ** 0.5
            rows = kept.float() - 0.75
            assert (rows[1:] * rows[:-1]).mean().abs() < 5 * 0.1875 / x.numel() ** 0.5
            assert (rows[:, 1:] * rows[:, :-1]).mean().abs() < 5 * 0.1875 / x.numel() ** 0.5
    assert passes.dropped(x, 0.0) is x


def test_what_is_dropped_is_so_without_a_gradient_too():
    x, dropped = drawn(7, 33), []
    for wanted in (True, False):
        torch.manual_seed(3)
        dropped.append(passes.dropped(x.requires_grad_(wanted), 0.25))
    torch.manual_seed(3)
    with torch.no_grad(), torch.device("meta"):
        dropped.append(passes.dropped(x.requires_grad_(), 0.25))
    assert torch.equal(dropped[0], dropped[1]) and torch.equal(dropped[0], dropped[2])


STEPS = {
    "dropped": lambda x: passes.dropped(x, 0.25),
    "norm": lambda x: passes.rms_norm(x, torch.ones(6), 1e-6),
    "gelu": lambda x: passes.activated(F.gelu, x),
    "gated": lambda x: passes.activated(passes.gated_silu, x),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_what_it_gives_may_be_changed_in_place(step):
    x = drawn(2, 3, 6).requires_grad_()
    slopes = []
    for in_place in (True, False):
        torch.manual_seed(3)
        output = step(x)
        first = output[0].mul_(2).add_(1) if in_place else 2 * output[0] + 1
        slopes.append(torch.autograd.grad(first.sum(), x)[0])
    assert torch.equal(*slopes)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_gradients_in_a_batch_are_those_one_by_one(step):
    def slopes(vectorize):
        torch.manual_seed(3)
        return torch.autograd.functional.jacobian(step, drawn(3, 6), vectorize=vectorize)

    torch.testing.assert_close(slopes(True), slopes(False))
