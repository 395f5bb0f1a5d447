"""The portable kernel compiled for another CPU, run by an emulator: each call against the definition in float64."""

import shutil
import subprocess
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from oracle import Case, assert_as_accurate, draw

from sightline.attention import attention, observe
from sightline.kernels import build
from sightline.masks import ALiBi, Allowed, Bias, Mask, Padding, Window

DRIVER = Path(__file__).parent / "native" / "driver.cpp"
COMPILERS = {"here": ("g++", []), "aarch64": ("aarch64-linux-gnu-g++", ["qemu-aarch64"])}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "blocks": {"queries": 70, "keys": 300, "width": 37, "value_width": 21},
    "decoding": {"queries": 2, "keys": 515, "width": 64, "value_width": 64},
    "tails": {"queries": 3, "keys": 5, "width": 1, "value_width": 3},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=COMPILERS)
def driver(request, tmp_path_factory) -> list[str]:
    """The command that runs a call."""
    compiler, emulator = COMPILERS[request.param]
    for tool in (compiler, *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here; Debian has it in g++-aarch64-linux-gnu and qemu-user")
    program = tmp_path_factory.mktemp("driver") / request.param
    flags = [*build.COMMON, "-Werror", "-I", build.NATIVE, "-static"]
    kernel = [*build.KERNEL, "-DSIGHTLINE_ISA=baseline", build.NATIVE / "kernels.cpp"]
    made = program.with_suffix(".o")
    subprocess.run([compiler, *flags[:-1], *kernel, "-c", "-o", made], check=True)
    subprocess.run([compiler, *flags, "-DKERNELS=kernels_baseline", DRIVER, made, "-o", program], check=True)
    return [*emulator, str(program)]


def run(driver: list[str], case: Case, grad: torch.Tensor, mask: Mask, softcap: float, sinks: torch.Tensor) -> dict:
    """What the driver makes of a call: `top` 3, squares of 20, 4 sink keys."""
    (batch, heads, queries, width), (groups, keys) = case.query.shape, case.key.shape[1:3]
    value_width, dtype = case.value.shape[-1], case.query.dtype
    sizes = [DTYPES.index(dtype), batch, heads, groups, queries, keys, width, value_width, mask.before, mask.after]
    allowed = mask.allowed.expand(batch, heads, queries, keys)
    bias = mask.bias.expand(batch, heads, queries, keys)
    inputs = [torch.tensor([*sizes, 3, 20, 4]), torch.tensor([width**-0.5, softcap]), *case, grad]
    inputs += [mask.lengths, allowed, bias, mask.slopes, sinks]
    sent = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in inputs)
    got = subprocess.run(driver, input=sent, check=True, capture_output=True).stdout
    rows, squares = (batch, heads, queries), (batch, heads, -(-queries // 20), -(-keys // 20))
    outputs = {
        "plain": (grad.shape, dtype), "output": (grad.shape, dtype),
        **dict.fromkeys(("logsumexp", "entropy", "distance", "sink"), (rows, torch.float32)),
        "top_weights": ((*rows, 3), torch.float32), "top_keys": ((*rows, 3), torch.int64),
        "received": ((batch, heads, keys), torch.float32),
        "map_sum": (squares, torch.float32), "map_max": (squares, torch.float32),
        **{f"grad_{name}": (t.shape, dtype) for name, t in case._asdict().items()},
    }  # fmt: skip
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in outputs.values()]
    assert len(got) == sum(sizes)
    parts = zip(outputs.items(), sizes, accumulate(sizes), strict=True)
    return {
        name: torch.frombuffer(bytearray(got[end - size : end]), dtype=dtype).view(shape)
        for (name, (shape, dtype)), size, end in parts
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_call_there_agrees_with_the_definition(driver, shape, dtype):
    random = torch.Generator().manual_seed(0)
    queries, keys = shape["queries"], shape["keys"]
    case, grad = draw(**shape, dtype=dtype), draw(1, **shape | {"keys": queries}, groups=4, dtype=dtype).value
    mask = Window(before=200, after=3) & Padding([keys, keys - 2]) & ALiBi(4)
    mask &= Allowed(torch.rand(2, 1, queries, keys, generator=random) > 0.2)
    mask &= Bias(torch.randn(1, 4, 1, keys, generator=random))
    sinks = torch.randn(4, generator=random)
    seen = run(driver, case, grad, mask, 20.0, sinks)

    wide = {"softcap": 20.0, "sinks": sinks.double()}
    exact = observe(*case.to(torch.float64), mask, top=3, map_block=20, implementation="reference", **wide)
    assert torch.equal(seen["plain"], seen["output"])
    plain = attention(*case, mask, softcap=20.0, sinks=sinks, implementation="reference")
    assert_as_accurate(seen["output"], exact.output, plain)
    for name in ("logsumexp", "entropy", "distance", "sink", "top_weights", "received"):
        torch.testing.assert_close(seen[name].double(), getattr(exact, name), atol=1e-5, rtol=1e-5)
    assert torch.equal(seen["top_keys"], exact.top_keys)
    torch.testing.assert_close(seen["map_sum"].double(), exact.map.sum, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen["map_max"].double(), exact.map.max, atol=1e-5, rtol=1e-5)
    for dtype_of_math in (torch.float64, dtype):
        leaves = [t.to(dtype_of_math).requires_grad_() for t in case]
        output = attention(*leaves, mask, softcap=20.0, sinks=sinks.to(dtype_of_math), implementation="reference")
        gradients = torch.autograd.grad(output, leaves, grad.to(dtype_of_math))
        if dtype_of_math == torch.float64:
            right = gradients
    for name, gradient, theirs in zip(Case._fields, right, gradients, strict=True):
        assert_as_accurate(seen[f"grad_{name}"], gradient, theirs)
