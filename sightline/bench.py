"""Timing two ways of doing the same thing on a noisy machine, and the table of `sightline bench`."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.attention import attention, observe
from sightline.masks import Causal

if TYPE_CHECKING:
    from rich.table import Table


def interleaved(sides: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each side, run in turn so that a noisy neighbour hits all alike; one warm-up round.

    Each round has an order of its own: what a side leaves in the caches is not always found by the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(sides), len(sides)):
            start = time.perf_counter()
            sides[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median seconds at one length: batch 1, 8 heads, width 64, causal, float32."""

    length: int
    sdpa: float
    """PyTorch's scaled_dot_product_attention, which says nothing."""
    attention: float
    observe: float
    """attention() with every fact of `observe()`."""
    eager: float | None
    """The same facts from weights held whole; None where these would take more than 2 GB."""


def timings(lengths: tuple[int, ...] = (512, 1024, 2048, 4096), *, rounds: int = 5) -> Iterator[Timing]:
    """One `Timing` a length, as they are measured."""
    with torch.no_grad():
        for length in lengths:
            q, k, v = torch.randn(3, 1, 8, length, 64)
            sides: dict[str, Callable[[], object]] = {
                "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                "attention": lambda q=q, k=k, v=v: attention(q, k, v, Causal()),
                "observe": lambda q=q, k=k, v=v: observe(q, k, v, Causal()),
            }
            if 8 * length**2 * 4 * 4 <= 2**31:  # eager holds about four matrices at a time
                sides["eager"] = lambda q=q, k=k, v=v: eager(q, k, v)
            times = interleaved(sides, rounds=rounds)
            yield Timing(length=length, eager=times.pop("eager", None), **times)


def table() -> "Table":
    """What `sightline bench` shows, in milliseconds."""
    from rich.table import Table

    shown = Table("tokens", "PyTorch SDPA", "attention", "observe", "eager with the same facts", box=None)
    for timing in timings():
        cells = (timing.sdpa, timing.attention, timing.observe, timing.eager)
        shown.add_row(f"{timing.length:,}", *("too large" if s is None else f"{s * 1e3:.1f}" for s in cells))
    return shown


def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Causal attention with its weights held whole, and from them everything that observe() returns."""
    queries, keys = query.shape[-2], key.shape[-2]
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries), -torch.inf)
    weights = scores.softmax(-1)
    distance = (torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)).abs()
    blocks = weights.unflatten(-1, (-1, 64)).unflatten(-3, (-1, 64))
    return (
        weights @ value,
        scores.logsumexp(-1),
        torch.special.entr(weights).sum(-1),
        *weights.topk(8, -1),
        (weights * distance).sum(-1),
        weights[..., :4].sum(-1),
        weights.sum(-2),
        blocks.sum((-3, -1)),
        blocks.amax((-3, -1)),
    )
