"""The native CPU kernel beside PyTorch's SDPA and eager attention, each as a share of what the CPU can do.

python benchmarks/attention_cpu.py [--rounds 9] [--save] [--quick]

The ceiling is measured in the same turns as the sides: fused multiply-adds on registers and nothing else, on as many
threads. A share above 1 means that the machine's clock or a neighbour changed between turns.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import Report, arguments

import sightline as sl
from sightline.bench import interleaved
from sightline.kernels import cpu

PROBE_ROUNDS = 200_000


def draw(batch: int, heads: int, length: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, length, width, dtype=dtype) for _ in range(3)]


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool) -> torch.Tensor:
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return scores.softmax(-1) @ value


@functools.cache
def operations() -> int:
    """Of one run of the probe: a multiply-add is two."""
    return 2 * cpu.probe(PROBE_ROUNDS, torch.get_num_threads())


def ceiling(seconds: float) -> float:
    """GFLOP/s of a probe that took so long."""
    return operations() / seconds / 1e9


def forward(report: Report, rounds: int, *, quick: bool) -> None:
    report.say("\n## Forward: plain, and saying what it saw")
    report.say("Batch 1, 8 heads. Row facts: logsumexp, entropy, top 8, distance, sink; all: received and the map too.")
    report.table(
        "length", "width", "dtype", "causal", "ours ms", "share of ceiling", "SDPA ms", "SDPA / ours",
        "row facts / ours", "all / ours", "eager ms",
    )  # fmt: skip
    for length in (512, 2048) if quick else (512, 2048, 4096, 8192):
        for width in (64, 128):
            for dtype in (torch.float32, torch.bfloat16):
                for causal in (False, True):
                    q, k, v = draw(1, 8, length, width, dtype)
                    forward_row(report, rounds if length < 4096 else max(3, rounds // 2), q, k, v, causal=causal)


def forward_row(
    report: Report, rounds: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> None:
    mask = sl.Causal() if causal else None
    length, width = q.shape[-2:]
    facts: dict[str, Any] = {"implementation": "cpu"}
    sides = {
        "ceiling": lambda: cpu.probe(PROBE_ROUNDS, torch.get_num_threads()),
        "ours": lambda: sl.attention(q, k, v, mask, implementation="cpu"),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        "rows": lambda: sl.observe(q, k, v, mask, received=False, map_block=0, **facts),
        "all": lambda: sl.observe(q, k, v, mask, **facts),
    }
    if length <= 2048:
        sides["eager"] = lambda: eager(q, k, v, causal=causal)
    times = interleaved(sides, rounds=rounds)
    scores = length * (length + 1) / 2 if causal else length**2
    reached = 4 * q.shape[1] * scores * width / times["ours"] / 1e9
    report.row(
        length, width, str(q.dtype).removeprefix("torch."), causal, f"{times['ours'] * 1e3:.2f}",
        f"{reached / ceiling(times['ceiling']):.2f}", f"{times['sdpa'] * 1e3:.2f}",
        f"{times['sdpa'] / times['ours']:.2f}", f"{times['rows'] / times['ours']:.2f}",
        f"{times['all'] / times['ours']:.2f}", f"{times['eager'] * 1e3:.1f}" if "eager" in times else "",
    )  # fmt: skip


def backward(report: Report, rounds: int, *, quick: bool) -> None:
    report.say("\n## Backward alone (grad of query, key and value)")
    report.table("batch heads length width", "dtype", "causal", "ours ms", "share of ceiling", "SDPA ms", "SDPA / ours")
    shapes = [(1, 8, 512, 64), (1, 8, 2048, 64), (1, 1, 2048, 64), (1, 8, 2048, 128), (1, 8, 8192, 64)]
    for shape in shapes[:-1] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for causal in (False, True):
                leaves = [t.requires_grad_() for t in draw(*shape, dtype)]
                weight = torch.randn(shape, dtype=dtype)
                ours = sl.attention(*leaves, sl.Causal() if causal else None, implementation="cpu")
                torchs = F.scaled_dot_product_attention(*leaves, is_causal=causal)

                def gradients(output: torch.Tensor, leaves=leaves, weight=weight) -> object:
                    return torch.autograd.grad(output, leaves, weight, retain_graph=True)

                times = interleaved(
                    {
                        "ceiling": lambda: cpu.probe(PROBE_ROUNDS, torch.get_num_threads()),
                        "ours": lambda ours=ours, gradients=gradients: gradients(ours),
                        "sdpa": lambda torchs=torchs, gradients=gradients: gradients(torchs),
                    },
                    rounds=rounds if shape[2] < 4096 else max(3, rounds // 2),
                )
                work = 10 * shape[1] * shape[2] ** 2 * shape[3] / (2 if causal else 1)
                share = work / times["ours"] / 1e9 / ceiling(times["ceiling"])
                report.row(
                    " x ".join(map(str, shape)), str(dtype).removeprefix("torch."), causal,
                    f"{times['ours'] * 1e3:.2f}", f"{share:.2f}", f"{times['sdpa'] * 1e3:.2f}",
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


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="leave out lengths above 2,048")
    options = parser.parse_args()
    if cpu.MISSING:
        parser.exit(1, f"attention_cpu: {cpu.MISSING}\n")
    torch.manual_seed(0)
    report = Report("The native CPU kernel")
    threads = torch.get_num_threads()
    probe = interleaved({"ceiling": lambda: cpu.probe(PROBE_ROUNDS, threads)}, rounds=5 * options.rounds)["ceiling"]
    report.say(f"Kernel: {cpu.instructions()}. Ceiling of fused multiply-adds: {ceiling(probe):.0f} GFLOP/s.")
    if not torch.cpu._is_avx512_bf16_supported():
        report.say("This CPU has no bf16 dot product: bfloat16 is computed in float32, and its ceiling is float32's.")
    forward(report, options.rounds, quick=options.quick)
    backward(report, options.rounds, quick=options.quick)
    decode(report, options.rounds)
    short(report, options.rounds)
    if options.save:
        report.write("attention-cpu")


if __name__ == "__main__":
    main()
