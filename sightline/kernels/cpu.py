"""The native CPU kernel: attention, and attention that says what it saw, in one pass and O(N) memory.

The library is built by `python -m sightline.kernels.build` and loaded here if it is there; it is these torch operators:
`sightline::forward` and `sightline::backward`, joined by an autograd function, `sightline::observe`, `sightline::pool`.
Its others are called by `sightline.kernels.products` (`multiply`, and for few rows `project`, `norm`, `feed_forward`,
`attend`), by `sightline.passes` (what a training step takes between its products: `bend`, `drop`, `row_norm`, `place`)
and by `sightline.sublayers` (with the products: `heads`, `write`, `feed`).
(Registering the gradient with the operator costs every call ten times what the function costs a differentiated one.)
Masks come as plain numbers and tensors. float32, bfloat16 and float16, computed in float32.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

LIBRARY = Path(__file__).parent / "libsightline.so"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = (
    "forward", "backward", "observe", "pool", "project", "norm", "feed_forward", "attend", "place", "drop", "row_norm",
    "heads", "write", "feed", "multiply",
)  # fmt: skip
NEWEST_ARGUMENT = "segments"
"""Of the operators, the one that came last: tells a library of older sources."""
HOW_TO_GET_IT = "build it with `python -m sightline.kernels.build` (needs a C++ compiler)"


class Masks(NamedTuple):
    """A mask as the kernel takes it: None where it has nothing to say."""

    before: int | None = None
    after: int | None = None
    lengths: Tensor | None = None
    """(batch)"""
    segments: Tensor | None = None
    """(batch, queries and keys): the number of each query, then of each key; those of one number see one another."""
    allowed: Tensor | None = None
    """bool, broadcastable to (batch heads queries keys)"""
    bias: Tensor | None = None
    """float, broadcastable likewise"""
    slopes: Tensor | None = None
    """(heads)"""


def _load() -> tuple[Any, str]:
    if not LIBRARY.exists():
        return None, f"the native kernel is not built; {HOW_TO_GET_IT}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return None, f"the native kernel does not load ({error}); {HOW_TO_GET_IT}"
    found = [hasattr(torch.ops.sightline, name) for name in OPERATORS]
    known = [argument.name for argument in torch.ops.sightline.forward.default._schema.arguments] if all(found) else []
    if NEWEST_ARGUMENT not in known:
        return None, f"the native kernel was built from older sources; {HOW_TO_GET_IT}"
    library = ctypes.CDLL(str(LIBRARY))
    library.sightline_instructions.restype = ctypes.c_char_p
    library.sightline_available.restype = ctypes.c_char_p
    library.sightline_available.argtypes = [ctypes.c_int64]
    library.sightline_use_instructions.argtypes = [ctypes.c_char_p]
    library.sightline_probe.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    library.sightline_probe.restype = ctypes.c_int64
    return library, ""


_library, MISSING = _load()
"""MISSING says why there is no kernel; empty where there is one."""


def available() -> list[str]:
    """The instruction sets that this CPU and the library have in common, best first; empty without a library."""
    names: list[str] = []
    while _library is not None and (name := _library.sightline_available(len(names))):
        names.append(name.decode())
    return names


def instructions() -> str:
    """The instruction set in use."""
    return _library.sightline_instructions().decode()


def use_instructions(name: str) -> None:
    """Use another instruction set from now on, in every thread.

    Raises:
        ValueError: this CPU cannot run it.
    """
    if name not in available():
        raise ValueError(f"instructions must be one of {', '.join(available()) or 'none'} here, got {name!r}")
    _library.sightline_use_instructions(name.encode())


def multipliers() -> list[str]:
    """Who can multiply matrices in float32 here: "torch" and, where torch has it and there is a library, "onednn"."""
    return ["torch", "onednn"] if _library is not None and _library.sightline_has_onednn() else ["torch"]


def multiplier() -> str:
    """Who does: "torch", by whichever library it takes itself, or "onednn".

    At first "onednn" on AMD's CPUs since family 26 (Zen 5): torch takes MKL, which keeps to AVX2 on AMD's.
    """
    return "onednn" if _library is not None and _library.sightline_by_onednn() else "torch"


def use_multiplier(name: str) -> None:
    """Have another one multiply from now on, in every thread; `torch.backends.mkldnn.enabled` does not reach it.

    Raises:
        ValueError: it is not there.
    """
    if name not in multipliers():
        raise ValueError(f"multiplier must be one of {', '.join(multipliers())} here, got {name!r}")
    if _library is not None:
        _library.sightline_use_onednn(name == "onednn")


def probe(rounds: int, threads: int, *, dot: bool = False) -> int:
    """Do nothing but multiply-adds on each thread, `rounds` rounds of 12 vectors; how many numbers were multiplied.

    `dot`: by the bf16 dot product; 0, at once, where the instructions in use have none.
    """
    return _library.sightline_probe(rounds, threads, dot)


def refusal(query: Tensor, value: Tensor) -> str:
    """Why the kernel cannot compute a call, and what would help; empty where it can."""
    if query.device.type != "cpu":
        return f"it runs on the CPU, and query is on {query.device}"
    if query.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    if MISSING:
        return MISSING
    if not query.shape[-1] or not value.shape[-1]:
        return "it needs a width of at least 1"
    return ""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """query (batch heads queries width), key and value (batch groups keys width or value_width).

    In memory the output is (batch queries heads value_width): joining heads after it copies nothing. What `dropout`
    drops is a hash of a number drawn from torch's generator and of each weight's place; no mask is kept.
    """
    arguments = *_arguments(query, key, value, masks, scale, softcap, sinks), dropout, seed(dropout)
    if _differentiates(query, key, value, sinks, masks.bias, masks.slopes):
        return cast(Tensor, _Attention.apply(None, *arguments))
    return torch.ops.sightline.forward.default(*arguments)[0]


def seed(dropout: float) -> Tensor | None:
    """A number from torch's generator, of which what is dropped is a hash; None where nothing is."""
    return torch.randint(2**63 - 1, (), device="cpu") if dropout else None


def observe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    top: int,
    received: bool,
    map_block: int,
    sink_keys: int,
) -> dict[str, Tensor]:
    """The output and the facts of the reference; the output alone carries a gradient."""
    arguments = _arguments(query, key, value, masks, scale, softcap, sinks)
    with torch.no_grad():
        output, logsumexp, entropy, distance, sink, *switched = torch.ops.sightline.observe.default(
            *arguments, top, received, map_block, sink_keys
        )
    if _differentiates(query, key, value, sinks, masks.bias, masks.slopes):
        output = cast(Tensor, _Attention.apply((output, logsumexp), *arguments, 0.0, None))
    facts = {"output": output, "logsumexp": logsumexp, "entropy": entropy, "distance": distance, "sink": sink}
    names = ("top_weights", "top_keys", "received", "map_sum", "map_max")
    wanted = (top, top, received, map_block, map_block)
    return facts | {name: fact for name, fact, want in zip(names, switched, wanted, strict=True) if want}


def pool(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    masks: Masks,
    *,
    scale: float,
    softcap: float | None,
    position: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Weights of a window summed, and the largest, over squares of `block`: (batch heads query_blocks key_blocks) each.

    The logsumexp of the whole rows is known: (batch heads queries). `position`: how far the window's first query
    stands behind its first key; the masks are those of the window.
    """
    query, key, _, *tensors, _, _, _, scale, softcap = _arguments(query, key, key, masks, scale, softcap, None)
    before, after = (-1 if limit is None else min(limit, 2**40) for limit in masks[:2])
    return torch.ops.sightline.pool.default(
        query, key, logsumexp.contiguous(), *tensors, before, after, scale, softcap, position, block
    )


class _Attention(torch.autograd.Function):
    """Keeps output and logsumexp: the weights are recomputed. `seen`: both, where they are known already."""

    @staticmethod
    def forward(ctx: Any, seen: tuple[Tensor, Tensor] | None, *arguments: Any) -> Tensor:
        output, logsumexp = seen or torch.ops.sightline.forward.default(*arguments)
        *tensors, before, after, scale, softcap, ctx.dropout, seed = arguments
        ctx.save_for_backward(output, logsumexp, seed, *tensors)
        ctx.numbers = before, after, scale, softcap
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        output, logsumexp, seed, *tensors = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        to_bias, to_slopes, to_sinks = ctx.needs_input_grad[7:10]
        *by_input, row_sums, by_bias, by_slope = torch.ops.sightline.backward.default(
            grad, output, logsumexp, *tensors, *ctx.numbers, to_bias, to_slopes, ctx.dropout, seed
        )
        sinks, by_sink = tensors[8], None
        if to_sinks:
            # A sink has no value: its gradient is its weight times (0 - grad_output . output), over all rows.
            weights = (sinks[:, None] - logsumexp).exp().masked_fill(logsumexp == -torch.inf, 0)
            by_sink = -(weights * row_sums).sum(dim=(0, 2))
        by_mask = (by_bias if to_bias else None, by_slope if to_slopes else None)
        return None, *by_input, None, None, None, *by_mask, by_sink, None, None, None, None, None, None


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments that all operators share, as they take them."""
    longest = query.shape[-2] + key.shape[-2]
    before, after = (-1 if limit is None else min(limit, longest) for limit in masks[:2])
    lengths, segments, slopes = masks.lengths, masks.segments, masks.slopes
    return (
        *(t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)),
        None if lengths is None else lengths.to(torch.int64).contiguous(),
        None if segments is None else segments.to(torch.int64).contiguous(),
        _four_axes(masks.allowed),
        None if masks.bias is None else _four_axes(masks.bias.to(torch.float32)),
        None if slopes is None else slopes.to(torch.float32).contiguous(),
        None if sinks is None else sinks.to(torch.float32).contiguous(),
        before,
        after,
        scale,
        softcap or 0.0,
    )


def _four_axes(tensor: Tensor | None) -> Tensor | None:
    return tensor[None, None] if tensor is not None and tensor.ndim == 2 else tensor


if _library is not None:
    # Counted as torch counts its own on a GPU: every pair, whatever the mask.

    @register_flop_formula([torch.ops.sightline.forward, torch.ops.sightline.observe])
    def _(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
        batch, heads, queries, width = query
        return 2 * batch * heads * queries * key[2] * (width + value[3])

    @register_flop_formula(torch.ops.sightline.backward)
    def _(grad: Any, output: Any, logsumexp: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int],
          *_: Any, **__: Any) -> int:  # fmt: skip
        batch, heads, queries, width = query
        return 2 * batch * heads * queries * key[2] * (3 * width + 2 * value[3])

    @torch.library.register_fake("sightline::forward")
    def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _empty_output(query, value), query.new_empty(query.shape[:-1], dtype=torch.float32)

    @torch.library.register_fake("sightline::backward")
    def _(
        grad_output: Tensor, output: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        bias, slopes = rest[3:5]
        to_bias, to_slopes = rest[10:12]
        none = logsumexp.new_empty(0)
        by_input = (_empty_output(t, t) for t in (query, key, value))
        by_mask = (bias.clone() if to_bias else none, slopes.clone() if to_slopes else none)
        return (*by_input, logsumexp.clone(), *by_mask)

    @torch.library.register_fake("sightline::pool")
    def _(query: Tensor, key: Tensor, logsumexp: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        block, (batch, heads, queries, _) = rest[-1], query.shape
        maps = [logsumexp.new_empty(batch, heads, -(-queries // block), -(-key.shape[-2] // block)) for _ in range(2)]
        return maps[0], maps[1]

    @torch.library.register_fake("sightline::observe")
    def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        top, received, map_block, _ = rest[-4:]
        batch, heads, queries, _ = query.shape
        keys = key.shape[-2]

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return query.new_empty(shape, dtype=dtype)

        rows = [empty(batch, heads, queries) for _ in range(4)]
        tops = [empty(batch, heads, queries, top), empty(batch, heads, queries, top, dtype=torch.int64)]
        blocks = (-(-queries // map_block), -(-keys // map_block)) if map_block else (0, 0)
        to_keys = empty(batch, heads, keys) if received else empty(0)
        maps = [empty(batch, heads, *blocks) for _ in range(2)]
        return (_empty_output(query, value), *rows, *tops, to_keys, *maps)


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
