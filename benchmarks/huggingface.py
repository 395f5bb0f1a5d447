"""A model of transformers on our attention, watched and not, beside its own; needs transformers.

python benchmarks/huggingface.py [--rounds 9] [--save] [--quick]
"""

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from measure import Report, arguments, peak_bytes

import sightline as sl
from sightline.huggingface import interface
from sightline.kernels import cpu
from sightline.memory import held_bytes, shown

LENGTH, EAGER_LENGTH, LONG_LENGTH = 8192, 4096, 32768
QUICK = (1024, 1024, 4096)
SHAPE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": LONG_LENGTH,
    "pad_token_id": None,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(dtype: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface
    from transformers.utils import logging

    from sightline.huggingface.recipes import recipe_mask

    logging.set_verbosity_error()
    sl.huggingface.enable()
    AttentionInterface.register("nothing", nothing)
    AttentionMaskInterface.register("nothing", recipe_mask)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return model.to(DTYPES[dtype])


def forward(model: Any, side: str, length: int) -> Callable[[], object]:
    """What is measured: one forward pass, and what it tells kept until it is over."""
    ids = torch.randint(SHAPE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation("sightline" if side in ("watched", "row facts") else side)
    told = {"output_attentions": True} if side in ("eager", "row facts") else {}

    def run() -> object:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1, **told)

    def watched() -> object:
        with sl.huggingface.watch(model) as seen:
            run()
        return seen

    def row_facts() -> object:
        with mock.patch.object(interface, "observe", functools.partial(interface.observe, received=False)):
            return run()

    return {"watched": watched, "row facts": row_facts}.get(side, run)


def nothing(module: Any, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    """In the place of attention, for what the rest of the model takes."""
    return query.transpose(1, 2).contiguous(), None


def ceiling(report: Report, dtype: str, length: int, rounds: int) -> None:
    """What a kernel that runs at the CPU's full speed would give."""
    plain, rest = (statistics.median(side) for side in seconds(dtype, ("sdpa", "nothing"), length, rounds))
    threads, best = torch.get_num_threads(), 0.0
    for dot in (False, True) if dtype == "bfloat16" else (False,):
        start = time.perf_counter()
        done = cpu.probe(20_000_000, threads, dot=dot)
        best = max(best, 2 * done / (time.perf_counter() - start))
    heads, layers, width = (SHAPE[name] for name in ("num_attention_heads", "num_hidden_layers", "head_dim"))
    operations = 2 * 2 * width * layers * heads * length * (length + 1) / 2
    report.say(
        f"{dtype}, {length:,} tokens: {rest:.2f} s without any attention, sdpa {plain:.2f} s. Attention is "
        f"{operations / 1e9:.0f} GFLOP, and {threads} threads reach {best / 1e9:.0f} GFLOP/s in registers: "
        f"{operations / best:.2f} s. So {plain / (rest + operations / best):.2f}x is the most that any kernel could "
        f"give here, and {plain / rest:.2f}x if attention cost nothing."
    )


def timed(model: Any, side: str, length: int) -> float:
    run = forward(model, side, length)
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def seconds(dtype: str, sides: tuple[str, str], length: int, rounds: int) -> tuple[list[float], list[float]]:
    """Of both sides in turn; the first round warms up."""
    model = build(dtype)
    taken = [[timed(model, side, length) for side in sides] for _ in range(rounds + 1)][1:]
    first, second = zip(*taken, strict=True)
    return list(first), list(second)


def memory(dtype: str, side: str, length: int) -> dict[str, float]:
    """Of the middle one of three processes: the most it held, how much came with the pass, and seconds of the pass."""
    call = [sys.executable, __file__, "--child", dtype, side, str(length)]
    ends = [subprocess.run(call, capture_output=True, text=True, check=True) for _ in range(3)]
    return sorted((json.loads(end.stdout.splitlines()[-1]) for end in ends), key=lambda facts: facts["peak"])[1]


def child(dtype: str, side: str, length: str) -> None:
    model = build(dtype)
    forward(model, side, 64)()
    before = held_bytes()
    start = time.perf_counter()
    kept: Any = forward(model, side, int(length))()
    taken, peak = time.perf_counter() - start, peak_bytes()
    facts = {"peak": peak, "added": peak - before, "seconds": taken}
    if side == "watched":
        start = time.perf_counter()
        kept.capture()
        facts |= {"capture": time.perf_counter() - start, "peak_capture": peak_bytes()}
    print(json.dumps(facts))


def compare(report: Report, dtype: str, sides: tuple[str, str], length: int, rounds: int, goal: str) -> None:
    """One row: the second side against the first."""
    first, second = seconds(dtype, sides, length, rounds)
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    held = [memory(dtype, side, length) for side in sides]
    unwatched = [memory(dtype, side, length)["peak"] for side in ("sdpa", "sightline")] if sides[0] == "eager" else []
    report.row(
        f"{sides[1]} against {sides[0]}, {dtype}, {length:,} tokens",
        *(f"{statistics.median(side):.2f} s" for side in (first, second)),
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        *(f"{shown(one['peak'])}, {shown(one['added'])}" for one in held),
        f"{held[0]['peak'] / held[1]['peak']:.2f}, {held[0]['added'] / held[1]['added']:.2f}",
        goal,
    )
    if unwatched:
        eager, watched = (one["peak"] - base for one, base in zip(held, unwatched, strict=True))
        report.row("the same, memory beyond that of sdpa and of sightline unwatched", "", "", "", shown(eager),
                   shown(watched), f"{eager / watched:.1f}", "20x less memory")  # fmt: skip


def main() -> None:
    import transformers

    parser = arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens, three rounds")
    options = parser.parse_args()
    length, eager_length, long_length = QUICK if options.quick else (LENGTH, EAGER_LENGTH, LONG_LENGTH)
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    report = Report("A model of transformers on our attention, watched and not, beside its own")
    report.say(
        f"A random llama: {SHAPE['num_hidden_layers']} layers, d_model {SHAPE['hidden_size']}, "
        f"{SHAPE['num_attention_heads']} heads over {SHAPE['num_key_value_heads']} groups, width {SHAPE['head_dim']}, "
        f"vocabulary {SHAPE['vocab_size']}; transformers {transformers.__version__}. One forward pass, no padding. "
        "sightline: attn_implementation='sightline'; watched: the same inside `sl.huggingface.watch`, every layer and "
        "head, everything that can be seen; row facts: what each query saw, by output_attentions=True, which keeps "
        "queries, keys and values too; eager: with "
        f"output_attentions=True. Medians of {rounds} rounds in turn; ratios are first / second, "
        "within a round: median, least and greatest. Memory is of a process of its own, the middle one of three: the "
        "most it held, and what of that the pass added to the libraries and weights."
    )
    report.table("", "first", "second", "times as fast", "memory of first", "of second", "first / second", "goal")
    for dtype, goal in (("float32", "1.3x as fast"), ("bfloat16", "2x as fast")):
        compare(report, dtype, ("sdpa", "sightline"), length, rounds, goal)
    for dtype in DTYPES:
        compare(report, dtype, ("sightline", "row facts"), length, rounds, "at least 0.80x")
        compare(report, dtype, ("sightline", "watched"), length, rounds, "at least 0.80x, memory at least 0.83x")
    compare(report, "float32", ("eager", "watched"), eager_length, rounds, "4x as fast, 20x less memory")
    report.say("")
    for dtype in DTYPES:
        ceiling(report, dtype, length, min(rounds, 3))
    for dtype in DTYPES:
        alone = memory(dtype, "watched", long_length)
        report.say(
            f"{long_length:,} tokens, all watched, {dtype}: {alone['seconds']:.1f} s and {shown(alone['peak'])} in all "
            f"(goal: under 4 GB); its `capture()` {alone['capture']:.1f} s more, {shown(alone['peak_capture'])} in all."
        )
    if options.save:
        report.write("huggingface")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
