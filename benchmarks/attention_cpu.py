"""The native CPU kernel beside PyTorch's SDPA and eager attention, each as a share of what the CPU can do.

python benchmarks/attention_cpu.py [--rounds 9] [--save] [--quick] [--only backward 2048 float32]

The ceiling is multiply-adds on registers and nothing else, on as many threads; for bfloat16 by the bf16 dot product
where the CPU has one. It is the best of many runs of a millisecond at the start and beside every row: what the CPU can
do is the same for all rows, and a neighbour only takes from it. A share above 1 means that the clock has since risen.
With --save the report and the two charts of the README are written; --only takes the rows that have all of these words,
and writes nothing.
"""

import functools
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from measure import Report, arguments, processor

import sightline as sl
from sightline.bench import interleaved
from sightline.kernels import cpu

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
PROBE_ROUNDS = 500_000
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

Wanted = Callable[..., bool]
"""Whether the row with these words is to be measured."""


def draw(batch: int, heads: int, length: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, length, width, dtype=dtype) for _ in range(3)]


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool) -> torch.Tensor:
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    weights = scores.softmax(-1)
    return weights @ value


@functools.cache
def multiplies(*, dot: bool) -> int:
    """Numbers multiplied by one run of the probe; 0 where the CPU has no bf16 dot product."""
    return cpu.probe(PROBE_ROUNDS, torch.get_num_threads(), dot=dot)


def has_dot(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and multiplies(dot=True) > 0


class Ceiling:
    """The most multiply-adds that were seen in a second; probed again, it can only rise."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dot = has_dot(dtype)
        self.seconds = math.inf

    def probe(self, runs: int = 9) -> float:
        """GFLOP/s of the best run of all so far: a multiply-add is two."""
        for _ in range(runs):
            start = time.perf_counter()
            cpu.probe(PROBE_ROUNDS, torch.get_num_threads(), dot=self.dot)
            self.seconds = min(self.seconds, time.perf_counter() - start)
        return 2 * multiplies(dot=self.dot) / self.seconds / 1e9


@functools.cache
def ceiling(dtype: torch.dtype) -> Ceiling:
    """The one of this process."""
    return Ceiling(dtype)


def forward(report: Report, rounds: int, wanted: Wanted, *, quick: bool) -> None:
    report.say("\n## Forward: plain, and saying what it saw")
    report.say("Batch 1, 8 heads. Row facts: logsumexp, entropy, top 8, distance, sink; all: received and the map too.")
    report.table(
        "length", "width", "dtype", "causal", "ours ms", "of the ceiling", "SDPA ms", "SDPA of the ceiling",
        "SDPA / ours", "row facts / ours", "all / ours", "SDPA / all",
    )  # fmt: skip
    for length in (512, 2048, 8192):
        for width in (64, 128):
            for dtype in (torch.float32, torch.bfloat16):
                for causal in (False, True):
                    few = rounds if length < 4096 else max(2, rounds // 4)
                    if wanted("forward", length, width, dtype, "causal" if causal else "all"):
                        forward_row(report, few, length, width, dtype, causal=causal)
    if not quick and wanted("forward", 32768, 64, torch.float32, "causal"):
        forward_row(report, 1, 32768, 64, torch.float32, causal=True)


def forward_row(report: Report, rounds: int, length: int, width: int, dtype: torch.dtype, *, causal: bool) -> None:
    q, k, v = draw(1, 8, length, width, dtype)
    mask = sl.Causal() if causal else None
    facts: dict[str, Any] = {"implementation": "cpu"}
    times = interleaved(
        {
            "ours": lambda: sl.attention(q, k, v, mask, implementation="cpu"),
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
            "rows": lambda: sl.observe(q, k, v, mask, received=False, map_block=0, **facts),
            "all": lambda: sl.observe(q, k, v, mask, **facts),
        },
        rounds=rounds,
    )
    scores = length * (length + 1) / 2 if causal else length**2
    most = ceiling(dtype).probe()

    def share(side: str) -> str:
        return f"{4 * 8 * scores * width / times[side] / 1e9 / most:.2f}"

    def ratio(one: str, other: str) -> str:
        return f"{times[one] / times[other]:.2f}"

    report.row(
        length, width, str(dtype).removeprefix("torch."), causal, f"{times['ours'] * 1e3:.2f}", share("ours"),
        f"{times['sdpa'] * 1e3:.2f}", share("sdpa"), ratio("sdpa", "ours"), ratio("rows", "ours"), ratio("all", "ours"),
        ratio("sdpa", "all"),
    )  # fmt: skip


def backward(report: Report, rounds: int, wanted: Wanted, *, quick: bool) -> None:
    report.say("\n## Backward alone (grad of query, key and value)")
    report.table(
        "batch heads length width", "dtype", "causal", "ours ms", "of the ceiling", "SDPA ms", "SDPA of the ceiling",
        "SDPA / ours",
    )  # fmt: skip
    shapes = [(1, 8, 512, 64), (1, 8, 512, 128), (1, 8, 2048, 64), (1, 1, 2048, 64), (1, 8, 2048, 128)]
    for shape in shapes if quick else [*shapes, (1, 8, 8192, 64), (1, 8, 8192, 128)]:
        # SDPA's backward of 8,192 in bfloat16 takes a minute a call on a CPU without bf16 instructions.
        both = shape[2] < 4096 or has_dot(torch.bfloat16)
        for dtype in (torch.float32, torch.bfloat16) if both else (torch.float32,):
            for causal in (False, True):
                if wanted("backward", f"heads{shape[1]}", *shape[2:], dtype, "causal" if causal else "all"):
                    few = rounds if shape[2] < 2048 else max(2, rounds // 3)
                    backward_row(report, few, shape, dtype, causal=causal)


def backward_row(
    report: Report, rounds: int, shape: tuple[int, int, int, int], dtype: torch.dtype, *, causal: bool
) -> None:
    leaves = [t.requires_grad_() for t in draw(*shape, dtype)]
    weight = torch.randn(shape, dtype=dtype)
    ours = sl.attention(*leaves, sl.Causal() if causal else None, implementation="cpu")
    torchs = F.scaled_dot_product_attention(*leaves, is_causal=causal)

    def gradients(output: torch.Tensor) -> object:
        return torch.autograd.grad(output, leaves, weight, retain_graph=True)

    sides = {"ours": lambda: gradients(ours), "sdpa": lambda: gradients(torchs)}
    times = interleaved(sides, rounds=rounds)
    work = 10 * shape[1] * shape[2] ** 2 * shape[3] / (2 if causal else 1)
    most = work / 1e9 / ceiling(dtype).probe()
    report.row(
        " x ".join(map(str, shape)), str(dtype).removeprefix("torch."), causal, f"{times['ours'] * 1e3:.2f}",
        f"{most / times['ours']:.2f}", f"{times['sdpa'] * 1e3:.2f}", f"{most / times['sdpa']:.2f}",
        f"{times['sdpa'] / times['ours']:.2f}",
    )  # fmt: skip


def decode(report: Report, rounds: int) -> None:
    report.say("\n## Decoding: 1 query, 32 heads over 8 groups, 8,192 keys, width 128")
    report.say("Reading is torch's sum of all keys and values: what memory gives to a plain pass over them.")
    report.table("dtype", "ours ms", "SDPA ms", "SDPA / ours", "reading ms", "reading / ours")
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(1, 32, 1, 128, dtype=dtype)
        k, v = (torch.randn(1, 8, 8192, 128, dtype=dtype) for _ in range(2))
        times = interleaved(
            {
                "ours": lambda q=q, k=k, v=v: sl.attention(q, k, v, implementation="cpu"),
                "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                "reading": lambda k=k, v=v: (k.view(torch.float32).sum(), v.view(torch.float32).sum()),
            },
            rounds=2 * rounds,
        )
        ours, sdpa, reading = times["ours"], times["sdpa"], times["reading"]
        report.row(
            str(dtype).removeprefix("torch."), f"{ours * 1e3:.2f}", f"{sdpa * 1e3:.2f}", f"{sdpa / ours:.2f}",
            f"{reading * 1e3:.2f}", f"{reading / ours:.2f}",
        )  # fmt: skip


def short(report: Report, rounds: int) -> None:
    report.say("\n## Short work: batch 12, 4 heads, length 64, width 32, causal, float32")
    report.table("what", "ours ms", "SDPA ms", "SDPA / ours")
    leaves = draw(12, 4, 64, 32, torch.float32)
    weight = torch.randn(12, 4, 64, 32)

    def ours() -> torch.Tensor:
        return sl.attention(*leaves, sl.Causal(), implementation="cpu")

    def torchs() -> torch.Tensor:
        return F.scaled_dot_product_attention(*leaves, is_causal=True)

    def differentiated(side: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(side(), leaves, weight)

    times = interleaved({"ours": ours, "sdpa": torchs}, rounds=30 * rounds)
    rows = {"forward": times}
    for leaf in leaves:
        leaf.requires_grad_()
    sides = {"ours": lambda: differentiated(ours), "sdpa": lambda: differentiated(torchs)}
    rows["forward and backward"] = interleaved(sides, rounds=30 * rounds)
    for what, times in rows.items():
        ours_ms, sdpa_ms = times["ours"] * 1e3, times["sdpa"] * 1e3
        report.row(what, f"{ours_ms:.3f}", f"{sdpa_ms:.3f}", f"{sdpa_ms / ours_ms:.2f}")


SIDES: dict[str, Callable[..., object]] = {
    "ours, plain": lambda q, k, v: sl.attention(q, k, v, sl.Causal(), implementation="cpu"),
    "ours, seeing": lambda q, k, v: sl.observe(q, k, v, sl.Causal(), implementation="cpu"),
    "PyTorch SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "eager, with weights": lambda q, k, v: eager(q, k, v, causal=True),
}


def memory(side: str, length: int) -> float:
    """Megabytes that one call takes above its inputs, in a process of its own."""
    code = (
        "import sys, torch, attention_cpu as b; from measure import peak_bytes\n"
        "side, length = sys.argv[1], int(sys.argv[2])\n"
        "b.SIDES[side](*b.draw(1, 8, 64, 64, torch.float32))\n"
        "inputs = b.draw(1, 8, length, 64, torch.float32)\n"
        "for t in inputs: t.add_(0)\n"
        "before = peak_bytes(); b.SIDES[side](*inputs); print(peak_bytes() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, side, str(length)], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout) / 1e6


def growth(report: Report, *, quick: bool) -> dict[str, dict[int, tuple[float, float]]]:
    """Milliseconds and megabytes of each side by length."""
    report.say("\n## Time and memory against length")
    report.say("Batch 1, 8 heads, width 64, causal, float32; seeing keeps every fact. Memory is above the inputs.")
    report.table("length", *(f"{side}, {unit}" for side in SIDES for unit in ("ms", "MB")))
    found: dict[str, dict[int, tuple[float, float]]] = {side: {} for side in SIDES}
    for length in LENGTHS[:-1] if quick else LENGTHS:
        inputs = draw(1, 8, length, 64, torch.float32)
        # Eager holds three matrices at a time.
        sides = [side for side in SIDES if side != "eager, with weights" or 8 * length**2 * 4 * 3 < 8e9]
        calls = {side: functools.partial(SIDES[side], *inputs) for side in sides}
        times = interleaved(calls, rounds=5 if length < 4096 else 2 if length < 16384 else 1)
        cells: list[object] = [f"{length:,}"]
        for side in SIDES:
            if side in sides:
                found[side][length] = times[side] * 1e3, memory(side, length)
                cells += [f"{number:.1f}" for number in found[side][length]]
            else:
                cells += ["", ""]
        report.row(*cells)
    return found


def charts(found: dict[str, dict[int, tuple[float, float]]], machine: str) -> None:
    """Two log-log charts: what each side takes as the text grows."""
    colours = {
        "ours, plain": "#1b6f7a",
        "ours, seeing": "#d9822b",
        "PyTorch SDPA": "#8a8f98",
        "eager, with weights": "#b04a5a",
    }
    for column, (name, unit) in enumerate((("time", "milliseconds"), ("memory", "megabytes above the inputs"))):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150, layout="constrained")
        assert isinstance(axes, Axes)
        for side, points in found.items():
            numbers = [values[column] for values in points.values()]
            axes.loglog(list(points), numbers, "o-", color=colours[side], markersize=4, label=side)
        lengths = sorted({length for points in found.values() for length in points})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=9)
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_title(f"{machine}: 8 heads, width 64, causal, float32", fontsize=9, loc="left")
        figure.savefig(PICTURES / f"attention-{name}.png")
        plt.close(figure)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="leave out lengths above 8,192")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows with all of these words")
    options = parser.parse_args()
    if options.only and options.save:
        parser.error("--save writes a report of all rows; leave out --only")
    if cpu.MISSING:
        parser.exit(1, f"attention_cpu: {cpu.MISSING}\n")
    torch.manual_seed(0)
    report = Report("The native CPU kernel")
    for dtype in (torch.float32, torch.bfloat16):
        most = ceiling(dtype).probe(100)
        if dtype == torch.float32 or has_dot(dtype):
            what = "the bf16 dot product" if has_dot(dtype) else "fused multiply-adds"
            report.say(
                f"Kernel: {cpu.instructions()}. Ceiling of {what}: {most:.0f} GFLOP/s, the best of all probes so far."
            )
        else:
            report.say(
                "No bf16 dot product here: bfloat16 is computed in float32, and float32's ceiling is its ceiling."
            )

    def wanted(*words: object) -> bool:
        return set(options.only) <= {str(word).removeprefix("torch.") for word in words}

    forward(report, options.rounds, wanted, quick=options.quick)
    backward(report, options.rounds, wanted, quick=options.quick)
    if wanted("decode"):
        decode(report, options.rounds)
    if wanted("short"):
        short(report, options.rounds)
    found = growth(report, quick=options.quick) if wanted("growth") else {}
    if options.save:
        machine = f"{processor()}, {torch.get_num_threads()} threads, {cpu.instructions()}"
        charts(found, machine)
        report.write(
            "attention-cpu-" + re.sub(r"[^a-z0-9]+", "-", f"{processor()} {cpu.instructions()}".lower()).strip("-")
        )


if __name__ == "__main__":
    main()
