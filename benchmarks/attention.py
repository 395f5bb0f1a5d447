"""attention() beside PyTorch's SDPA; observe() beside the eager path that takes the same statistics; its memory.

python benchmarks/attention.py [--rounds 9] [--save] [--quick]
"""

import subprocess
import sys

import torch
import torch.nn.functional as F
from measure import Report, arguments, peak_bytes

import sightline as sl
from sightline.bench import eager, interleaved

LONG = 32768


def draw(batch: int, heads: int, length: int, width: int, dtype: torch.dtype = torch.float32):
    return [torch.randn(batch, heads, length, width, dtype=dtype) for _ in range(3)]


def compare_with_sdpa(report: Report, rounds: int, *, quick: bool) -> None:
    report.say("\n## attention() wherever SDPA applies (at most 1.05 of its time)")
    report.table("batch heads length width", "dtype", "causal", "attention ms", "SDPA ms", "ratio")
    shapes = [(12, 4, 64, 32), (1, 8, 512, 64), (4, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 8192, 64)]
    for shape in shapes[:-1] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for causal in (False, True):
                q, k, v = draw(*shape, dtype)
                mask = sl.Causal() if causal else None
                calls = max(1, 2**21 // (shape[0] * shape[1] * shape[2] ** 2))

                def ours(q=q, k=k, v=v, mask=mask, calls=calls):
                    for _ in range(calls):
                        sl.attention(q, k, v, mask)

                def torchs(q=q, k=k, v=v, causal=causal, calls=calls):
                    for _ in range(calls):
                        F.scaled_dot_product_attention(q, k, v, is_causal=causal)

                times = interleaved({"ours": ours, "torch": torchs}, rounds=max(rounds, 3 * rounds * (calls > 1)))
                ours_ms, torch_ms = (times[side] * 1e3 / calls for side in ("ours", "torch"))
                cells = (f"{number:.3f}" for number in (ours_ms, torch_ms, ours_ms / torch_ms))
                report.row(" x ".join(map(str, shape)), str(dtype).removeprefix("torch."), causal, *cells)


def compare_with_eager(report: Report, rounds: int) -> None:
    report.say("\n## observe() beside eager attention with the same statistics (at most 1.0 of its time)")
    report.say("Batch 1, 8 heads, width 64, causal, float32, all facts.")
    report.table("length", "observe ms", "eager ms", "ratio", "SDPA alone ms")
    for length in (512, 1024, 2048):
        q, k, v = draw(1, 8, length, 64)
        times = interleaved(
            {
                "ours": lambda q=q, k=k, v=v: sl.observe(q, k, v, sl.Causal()),
                "eager": lambda q=q, k=k, v=v: eager(q, k, v),
                "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            },
            rounds=rounds,
        )
        ours, slow, plain = (times[side] * 1e3 for side in ("ours", "eager", "sdpa"))
        report.row(length, f"{ours:.1f}", f"{slow:.1f}", f"{ours / slow:.2f}", f"{plain:.1f}")


def memory_of_observe() -> None:
    """Run in a process of its own: peak memory above the inputs, in bytes."""
    import time

    q, k, v = draw(1, 8, LONG, 64)
    sl.observe(q[:, :, :64], k[:, :, :64], v[:, :, :64], sl.Causal())
    before, start = peak_bytes(), time.perf_counter()
    sl.observe(q, k, v, sl.Causal())
    print(peak_bytes() - before, time.perf_counter() - start)


def report_memory(report: Report) -> None:
    report.say(f"\n## observe() at {LONG:,} tokens (less than 1.5 GB above the inputs)")
    report.say("Batch 1, 8 heads, width 64, causal, float32, all facts; eager would hold 34.4 GB of weights.")
    command = [sys.executable, __file__, "--memory"]
    used, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    report.table("above the inputs, GB", "seconds")
    report.row(f"{int(used) / 1e9:.2f}", f"{float(seconds):.1f}")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="leave out lengths above 2,048")
    parser.add_argument("--memory", action="store_true", help="only print the peak memory of observe(), in bytes")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if options.memory:
        memory_of_observe()
        return
    report = Report("Attention, and attention that says what it saw")
    compare_with_eager(report, options.rounds)
    if not options.quick:
        report_memory(report)
    compare_with_sdpa(report, options.rounds, quick=options.quick)
    if options.save:
        report.write("attention")


if __name__ == "__main__":
    main()
