"""A training step of a block: what its modules would give, in float32 and under autocast, where nobody has a say."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sightline import passes, sublayers
from sightline.blocks import Block
from sightline.feed_forward import Activation, FeedForward
from sightline.kernels import cpu
from sightline.layers import MultiHeadAttention
from sightline.masks import Padding
from sightline.positions import Rotary
from sightline.rows import Norm, RMSNorm

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING or "built")

SETTINGS: dict[str, dict[str, Any]] = {
    "modern": {"norm": "rms", "attention": {"rotary": Rotary(8), "query_key_norm": True, "num_groups": 2}},
    "gpt2": {"norm": "layer", "activation": "gelu", "bias": True},
    "tanh": {"norm": "layer", "activation": "gelu_tanh", "attention": {"d_v": 16, "query_key_norm": True}},
}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_block(
    *, norm: Norm = "rms", activation: Activation = "swiglu", bias=False, dropout=0.0, attention=None
) -> Block:
    torch.manual_seed(0)
    heads = MultiHeadAttention(32, 4, causal=True, bias=bias, dropout=dropout, **copy.deepcopy(attention or {}))
    network = FeedForward(32, 72, activation=activation, bias=bias)
    block = Block(heads, network, d_model=32, norm=norm, bias=bias, dropout=dropout)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return block


def step(block: Block, x: torch.Tensor, *, half: bool, **call) -> list[torch.Tensor]:
    """The output, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        torch.manual_seed(1)  # what dropout drops
        output = block(x, **call)
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    return [output, *torch.autograd.grad(output, [x, *parameters], drawn(*output.shape, seed=9).to(output.dtype))]


def by_modules(monkeypatch, *arguments, by=sublayers, **options):
    """The same by the modules, which take the native kernel's passes, or (`by` passes) the library's operators."""
    with monkeypatch.context() as patch:
        patch.setattr(by, "served", lambda *_: False)
        return step(*arguments, **options)


def assert_as_accurate(tried, known, true, *, largest: float, mean: float):
    for ours, theirs, exact in zip(tried, known, true, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == exact.shape
        errors, allowed = (ours - exact).abs(), (theirs - exact).abs()
        slack = 5e-7 * exact.abs().max().clamp_min(1)
        assert errors.max() <= largest * allowed.max() + slack
        if exact.numel() > 500:  # of fewer, chance has its say
            assert errors.mean() <= mean * allowed.mean() + slack


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_that_of_the_modules(name, half, instructions, multiplier, monkeypatch):
    block, x = make_block(**SETTINGS[name]), drawn(3, 45, 32)
    exact = step(copy.deepcopy(block).double(), x.double(), half=False)
    known = by_modules(monkeypatch, block, x, half=half, by=passes)
    calls = []
    for function in ("projected", "written", "fed"):
        ours = getattr(sublayers, function)
        monkeypatch.setattr(sublayers, function, lambda *a, f=ours, n=function: calls.append(n) or f(*a))
    tried = step(block, x, half=half)
    assert calls == ["projected", "written", "fed"]
    assert all(tensor.dtype == torch.float32 for tensor in tried)
    assert_as_accurate(tried, known, exact, largest=1.5 if half else 2, mean=1.1 if half else 2)


def test_the_judge_sees_a_rough_gradient(monkeypatch):
    block, x = make_block(**SETTINGS["modern"]), drawn(3, 45, 32)
    exact = step(copy.deepcopy(block).double(), x.double(), half=False)
    known = by_modules(monkeypatch, block, x, half=True, by=passes)
    for index, tensor in enumerate(known):
        if tensor.numel() <= 500:
            continue
        tried = [1.01 * tensor if i == index else tensor for i, tensor in enumerate(known)]
        with pytest.raises(AssertionError):
            assert_as_accurate(tried, known, exact, largest=1.5, mean=1.1)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_dropout_drops_what_the_modules_would(half, monkeypatch):
    block, x = make_block(dropout=0.3, **SETTINGS["modern"]), drawn(3, 45, 32)
    rtol, atol = (0.05, 0.05) if half else (1e-4, 2e-5)
    pairs = zip(step(block, x, half=half), by_modules(monkeypatch, block, x, half=half), strict=True)
    for tried, known in pairs:
        torch.testing.assert_close(tried, known, rtol=rtol, atol=atol)


def test_a_mask_is_the_modules_too(monkeypatch):
    block, x, mask = make_block(), drawn(3, 45, 32), Padding(torch.tensor([45, 3, 20]))
    sides = step(block, x, half=False, mask=mask), by_modules(monkeypatch, block, x, half=False, mask=mask)
    for tried, known in zip(*sides, strict=True):
        torch.testing.assert_close(tried, known, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["", "attention", "attention.query", "attention.output", "feed_forward.down"])
def test_frozen_weights_stay_without_a_gradient(name):
    block, x = make_block(**SETTINGS["gpt2"]), drawn(2, 9, 32)
    whole = step(block, x, half=False)
    frozen = set(block.get_submodule(name).parameters())
    kept = [grad for grad, each in zip(whole[2:], block.parameters(), strict=True) if each not in frozen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for tried, known in zip(step(block, x, half=False), [*whole[:2], *kept], strict=True):
        torch.testing.assert_close(tried, known)


@pytest.mark.parametrize("name", [name for name, _ in make_block(**SETTINGS["modern"]).named_modules() if name])
def test_a_hook_is_called(name):
    seen, block = [], make_block(**SETTINGS["modern"])
    block.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    step(block, drawn(1, 5, 32), half=True)
    assert set(seen) == {name}


def test_another_module_in_the_place_of_ours_is_called():
    class Louder(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    block, louder, x = make_block(), make_block(), drawn(1, 5, 32)
    louder.feed_forward.down = Louder(72, 32, bias=False)
    with torch.no_grad():
        louder.feed_forward.down.weight.copy_(block.feed_forward.down.weight / 2)
    torch.testing.assert_close(step(louder, x, half=False)[0], step(block, x, half=False)[0])


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_a_step_computed_again_drops_the_same(norm_first, half):
    def run(call):
        block, x = make_block(dropout=0.3, **SETTINGS["modern"]), drawn(3, 45, 32).requires_grad_()
        block.norm_first = norm_first
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            output = call(block, x)
        output.square().sum().backward()
        return output, *[tensor.grad for tensor in (x, *block.parameters())]

    known = run(lambda block, x: block(x))
    for reentrant in (True, False):
        tried = run(lambda block, x, again=reentrant: checkpoint(block, x, use_reentrant=again))
        assert all(torch.equal(one, other) for one, other in zip(tried, known, strict=True))


def test_the_output_may_be_changed_in_place():
    block, x = make_block(), drawn(2, 5, 32)
    known = step(block, x, half=False)
    block.register_forward_hook(lambda *outputs: outputs[-1].add_(1))
    tried = step(block, x, half=False)
    torch.testing.assert_close(tried[0], known[0] + 1)
    assert all(torch.equal(one, other) for one, other in zip(tried[1:], known[1:], strict=True))


@pytest.mark.parametrize("name", ["attention", "attention.query_norm", "feed_forward", "feed_forward.down"])
def test_a_replaced_call_is_called(name, monkeypatch):
    block, x, seen = make_block(**SETTINGS["modern"]), drawn(1, 5, 32), []
    module = block.get_submodule(name)
    kind, own = type(module), type(module).forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, *a, **k: seen.append(self) or own(self, *a, **k))
        block(x)
    assert module in seen
    module.forward = lambda *a, **k: seen.append(name) or own(module, *a, **k)
    block(x)
    assert seen.count(name) == 1


def test_who_listens_to_all_modules_hears_all():
    block, x, seen = make_block(**SETTINGS["modern"]), drawn(1, 5, 32), set()
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module)):
        block(x)
    assert seen == set(block.modules())


def test_what_a_step_computes_is_counted():
    block, x = make_block(), drawn(1, 64, 32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        block(x).sum().backward()
    maps = sum(linear.weight.numel() for linear in block.modules() if isinstance(linear, nn.Linear))
    assert counter.get_total_flops() >= 3 * 2 * 64 * maps


def test_a_gate_of_another_width_is_refused_as_ever():
    block = make_block()
    block.feed_forward.gate, block.feed_forward.up = nn.Linear(32, 80), nn.Linear(32, 64)  # as wide as two of 72
    for call in (block, block.feed_forward):
        with pytest.raises(RuntimeError, match="must match"):
            call(drawn(1, 5, 32))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_gradients_in_a_batch_are_those_one_by_one(norm_first):
    def slopes(vectorize):
        block = make_block(dropout=0.3, **SETTINGS["modern"])
        block.norm_first = norm_first
        return torch.autograd.functional.jacobian(block, drawn(1, 3, 32), vectorize=vectorize)

    torch.testing.assert_close(slopes(True), slopes(False))


@pytest.mark.parametrize("training", [True, False])
def test_what_is_no_norm_may_stand_in_a_norms_place(training):
    plain, block = make_block(), make_block(attention={"query_key_norm": True})
    block.load_state_dict(plain.state_dict(), strict=False)
    block.attention.query_norm = block.attention.key_norm = nn.Identity()
    x = drawn(2, 9, 32)
    torch.testing.assert_close(block.train(training)(x), plain.train(training)(x))


def other(block: Block, name: str, *, dtype: torch.dtype = torch.bfloat16) -> Block:
    """The block with one parameter of another dtype."""
    module, _, last = name.rpartition(".")
    parameter = block.get_parameter(name).detach().to(dtype)
    setattr(block.get_submodule(module), last, nn.Parameter(parameter))
    return block


@pytest.mark.parametrize("name", ["attention.output.bias", "feed_forward.up.bias", "attention.query_norm.weight"])
def test_a_weight_of_another_dtype_is_the_modules(name, monkeypatch):
    settings = {**SETTINGS["gpt2"], "attention": {"query_key_norm": True}}
    block, x = other(make_block(**settings), name), drawn(2, 9, 32)
    for tried, known in zip(
        step(block, x, half=True), by_modules(monkeypatch, block, x, half=True, by=passes), strict=True
    ):
        torch.testing.assert_close(tried, known, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("change", ["epsilon", "weight"])
def test_a_norm_of_queries_that_the_kernel_does_not_know_is_called(change, monkeypatch):
    block, x = make_block(attention={"query_key_norm": True}), drawn(2, 9, 32)
    block.attention.query_norm = RMSNorm(8, eps=0.1) if change == "epsilon" else RMSNorm(8, elementwise_affine=False)
    sides = step(block, x, half=False), by_modules(monkeypatch, block, x, half=False, by=passes)
    for tried, known in zip(*sides, strict=True):
        torch.testing.assert_close(tried, known, rtol=1e-4, atol=2e-5)


def test_the_operators_refuse_what_does_not_belong_together():
    operators, x, norm, seed = torch.ops.sightline, drawn(4, 32), torch.ones(32), torch.tensor(3)
    rows, weight = drawn(4, 64), drawn(32, 64)
    wide = torch.ones(1, 1).expand(100_000, 32)
    many, double = drawn(100_000, 64), torch.ones(4, 32, dtype=torch.float64)

    def feed(first, second, curve, dropout=0.0):
        return operators.feed(
            x, norm, None, 1e-6, False, first, None, second, None, weight, None, curve, dropout, seed, False
        )

    def feed_backward(grad, half=False):
        normed, up, hidden, down = (t.bfloat16() if half else t for t in (drawn(len(grad), 32), weight.T, many, weight))
        hidden = hidden[: len(grad)]
        return operators.feed_backward(
            grad, normed.float(), norm, None, 1e-6, False, normed, up.contiguous(), hidden, hidden, down, 1, 0.0, None,
            True, True, True, True,
        )  # fmt: skip

    def heads_backward(grad):
        x, columns = drawn(len(grad), 32), grad.shape[1]
        return operators.heads_backward(
            grad, x, norm, None, 1e-6, False, x, drawn(columns, 32).to(grad.dtype), x, True, True
        )

    for call in (
        lambda: feed(drawn(64, 32), drawn(48, 32), 0),
        lambda: feed(drawn(64, 32), drawn(64, 32), 1),
        lambda: feed(drawn(64, 32), None, 1, -1.0),
        lambda: feed(drawn(64, 32), None, 1, 1.0),
        lambda: feed(drawn(64, 32), None, 1, float("nan")),
        lambda: operators.write(x, rows, weight, None, 0.5, None, False),
        lambda: operators.write(x, rows, weight, None, -1.0, seed, False),
        lambda: operators.write(x, rows, weight, None, float("nan"), seed, False),
        lambda: operators.write(x, rows.double(), weight, None, 0.0, None, False),
        lambda: operators.write(drawn(4, 31), rows, weight, None, 0.0, None, False),
        lambda: operators.write_backward(wide, many, weight, 0.0, None, True, True),
        lambda: operators.write_backward(wide, many.bfloat16(), weight.bfloat16(), 0.0, None, True, True),
        lambda: operators.write_backward(double, rows.double(), weight.double(), 0.0, None, True, True),
        lambda: heads_backward(wide),
        lambda: heads_backward(double),
        lambda: feed_backward(wide),
        lambda: feed_backward(wide, half=True),
        lambda: feed_backward(double),
    ):
        with pytest.raises(RuntimeError, match="sightline:"):
            call()
