"""The native operators as torch sees them: graphs, tracing, memory, threads, and calls that must not reach them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from oracle import draw
from torch.utils.flop_counter import FlopCounterMode

from sightline.attention import attention, observe
from sightline.kernels import cpu
from sightline.masks import ALiBi, Allowed, Bias, Causal, Padding, Segments, Window
from sightline.shapes import ShapeError

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING or "built")

# What torch's tracer does.
tracing = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def leaves(**sizes: Any) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in draw(dtype=torch.float32, **sizes)]


def test_used_twice_in_one_graph():
    case = leaves(queries=20, keys=20)
    first = attention(*case, Causal(), implementation="cpu").sum()
    second = attention(*case, Window(before=3, after=3), implementation="cpu").square().sum()
    together = torch.autograd.grad(first + second, case, retain_graph=True)
    apart = zip(torch.autograd.grad(first, case), torch.autograd.grad(second, case), strict=True)
    for whole, (one, other) in zip(together, apart, strict=True):
        torch.testing.assert_close(whole, one + other)


def test_its_output_may_be_its_next_input():
    def twice(x: torch.Tensor, implementation: Any) -> torch.Tensor:
        once = attention(x, x, x, Causal(), implementation=implementation)
        return attention(once, x, once, implementation=implementation)

    x = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad(twice(x, "cpu").square().sum(), x)
    (exact,) = torch.autograd.grad(twice(wide, "reference").square().sum(), wide)
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_second_derivative_is_an_error():
    case = leaves()
    output = attention(*case, implementation="cpu")
    (first,) = torch.autograd.grad(output.square().sum(), case[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_is_saved_for_the_gradient_grows_with_the_length_alone():
    def saved(length: int) -> int:
        numbers: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            numbers[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attention(*leaves(queries=length, keys=length), Causal(), implementation="cpu")
        return sum(numbers.values())

    assert saved(640) == 10 * saved(64)


def test_inference_keeps_nothing():
    with torch.inference_mode():
        output = attention(*draw(dtype=torch.float32), implementation="cpu")
    assert output.is_inference()
    with torch.no_grad():
        assert attention(*leaves(), implementation="cpu").grad_fn is None


@tracing
def test_compiles_once_for_all_lengths():
    mask = Window(before=9, after=0)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, mask, implementation="cpu")

    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for length in (12, 30, 300):
        case = leaves(queries=length, keys=length)
        gradients = [torch.autograd.grad(f(*case).sum(), case) for f in (compiled, call)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
        counts.add(counter.frame_count)
    assert len(counts) == 1


@tracing
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_masks_are_made_in_compiled_code(implementation):
    def call(x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        mask = Causal() & Window(before=5, after=None) & Padding([9, 7]) & ALiBi(3) & Allowed(allowed)
        mask &= Segments(torch.arange(9).expand(2, 9) // 4) & Bias(allowed.float())
        return attention(x, x, x, mask, implementation=implementation)

    x, allowed = torch.randn(2, 3, 9, 8), torch.rand(9, 9) > 0.3
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, allowed), call(x, allowed))


@tracing
def test_exports_with_its_masks():
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return attention(x, x, x, Causal() & Allowed(allowed) & Bias(bias), implementation="cpu")

    inputs = torch.randn(2, 3, 9, 8), torch.rand(9, 9) > 0.3, torch.randn(9, 9)
    exported = torch.export.export(Module(), inputs)
    assert "sightline.forward" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*inputs), Module()(*inputs))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list a process's threads")
def test_it_starts_no_thread_beside_those_of_torch():
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        x = torch.randn(512, 512)
        (x @ x).exp().sum()
        started = threads()
        case = leaves(queries=300, keys=700, width=64, value_width=64)
        observe(*case, implementation="cpu").output.sum().backward()
        assert threads() == started
    finally:
        torch.set_num_threads(before)


def wrong(**changes: Any) -> list[torch.Tensor]:
    case = draw(dtype=torch.float32)._asdict()
    return list({name: changes.get(name, lambda t: t)(t) for name, t in case.items()}.values())


BAD_CALLS = {
    "dtype": (wrong(query=torch.Tensor.double, key=torch.Tensor.double, value=torch.Tensor.double), {}, "float64"),
    "dtypes": (wrong(key=torch.Tensor.bfloat16), {}, "one dtype"),
    "integers": (wrong(query=torch.Tensor.int, key=torch.Tensor.int, value=torch.Tensor.int), {}, "float tensors"),
    "device": (wrong(key=lambda t: t.to("meta")), {}, "key on meta"),
    "rank": (wrong(query=lambda t: t[0, 0]), {}, "axes"),
    "ranks": (wrong(key=lambda t: t[:, 0]), {}, "axes"),
    "width": (wrong(query=lambda t: t[..., :-1]), {}, "width is"),
    "no width": (wrong(query=lambda t: t[..., :0], key=lambda t: t[..., :0]), {}, "width is 0"),
    "keys": (wrong(value=lambda t: t[:, :, 1:]), {}, "keys is"),
    "groups": (wrong(key=lambda t: t[:, [0, 0, 0]], value=lambda t: t[:, [0, 0, 0]]), {}, "multiple"),
    "allowed": (wrong(), {"mask": Allowed(torch.ones(7, 12, dtype=torch.bool))}, "allowed"),
    "bias": (wrong(), {"mask": Bias(torch.zeros(3, 1, 7, 11))}, "bias"),
    "lengths": (wrong(), {"mask": Padding([1, 2, 3])}, "lengths"),
    "sinks": (wrong(), {"sinks": torch.zeros(3)}, "heads is"),
    "softcap": (wrong(), {"softcap": -1.0}, "softcap"),
    "float mask": (wrong(), {"mask": torch.zeros(7, 11)}, "bool"),
}


@pytest.mark.parametrize("call", [attention, observe])
@pytest.mark.parametrize(("case", "options", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_ends_before_native_code(call, case, options, message, monkeypatch):
    for name in ("attention", "observe"):
        monkeypatch.setattr(cpu, name, lambda *_, **__: pytest.fail("native code was called"))
    with pytest.raises((ValueError, ShapeError), match=message):
        call(*case, **options, implementation="cpu")


def test_what_it_computes_is_counted():
    """As torch counts the products of the definition, whatever the mask; five more in the backward."""
    query, key, value = (torch.randn(2, heads, 30, 8, requires_grad=True) for heads in (4, 2, 2))
    with FlopCounterMode(display=False) as products:
        (query @ key.repeat_interleave(2, 1).mT) @ value.repeat_interleave(2, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        observe(query, key, value, Causal(), implementation="cpu")
    assert counter.get_total_flops() == products.get_total_flops() > 0
    with FlopCounterMode(display=False) as counter:
        attention(query, key, value, implementation="cpu").sum().backward()
    assert counter.get_total_flops() == products.get_total_flops() * 7 // 2


def test_it_refuses_other_devices():
    query = torch.empty(1, 1, 2, 8, device="meta")
    assert "it runs on the CPU, and query is on meta" in cpu.refusal(query, query)


@pytest.mark.parametrize("option", ["top", "map_block", "sink_keys"])
def test_a_negative_option_ends_before_native_code(option, monkeypatch):
    monkeypatch.setattr(cpu, "observe", lambda *_, **__: pytest.fail("native code was called"))
    with pytest.raises(ValueError, match=f"{option} must be 0 or more, got -1"):
        observe(*draw(dtype=torch.float32), implementation="cpu", **{option: -1})


def test_out_of_memory_says_so():
    query, key = torch.zeros(1, 1, 1, 8).expand(1, 1, 2**45, 8), torch.zeros(1, 1, 1, 8)
    with pytest.raises(RuntimeError, match=f"sightline: no memory for a tensor of {2**50} bytes; fewer or shorter"):
        torch.ops.sightline.forward(query, key, key, *[None] * 6, -1, -1, 1.0, 0.0)


def test_what_is_dropped_is_drawn_on_the_cpu():
    case = draw(dtype=torch.float32)
    torch.manual_seed(1)
    known = attention(*case, dropout=0.5, implementation="cpu")
    torch.manual_seed(1)
    with torch.device("meta"):
        assert torch.equal(attention(*case, dropout=0.5, implementation="cpu"), known)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, torch.Tensor.double, "4 axes and one dtype"),
        (0, lambda t: t[0], "4 axes and one dtype"),
        (1, lambda t: t[:, :, :, :-1], "do not belong together"),
        (2, lambda t: t.mT.contiguous().mT, "stride 1"),
        (3, torch.Tensor.int, "lengths must be int64"),
        (4, torch.Tensor.int, "segments must be int64"),
        (4, lambda t: t[:, 1:], "segments must be int64"),
        (5, torch.Tensor.float, "allowed must be bool"),
        (5, lambda t: t[..., :-1], "does not broadcast"),
        (6, torch.Tensor.double, "bias must be float32"),
        (8, lambda t: t[1:], "slopes and sinks"),
    ],
)
def test_the_operators_check_what_they_are_given(place, change, message):
    case = draw(queries=7, keys=11, dtype=torch.float32)
    allowed, bias = torch.ones(1, 1, 7, 11, dtype=torch.bool), torch.zeros(1, 1, 7, 11)
    segments = torch.zeros(2, 18, dtype=torch.int64)
    arguments = [*case, torch.tensor([11, 4]), segments, allowed, bias, torch.ones(4), torch.zeros(4)]
    arguments[place] = change(arguments[place])
    for operator, rest in ((torch.ops.sightline.forward, ()), (torch.ops.sightline.observe, (3, True, 8, 2))):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments, -1, 0, 0.3, 0.0, *rest)
