"""Time per token while writing, early and late, with the cache and without it.

Prints a markdown table. Run: python benchmarks/generation.py
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from sightline.generation import SampleConfig, sample_tokens
from sightline.models import Decoder, DecoderConfig

PLACES = (10, 100, 300, 1000)
"""The tokens whose time is taken, each as the median of a window around it."""
WINDOW = 16
WAYS = {"with the cache": True, "without": False}
CONFIG = DecoderConfig.modern(vocabulary=4096, context=1100, d_model=256, num_layers=6, num_heads=8, num_groups=2)


def measure(model: Decoder, seed: int, use_cache: bool) -> list[float]:
    """The seconds a token takes at each place.

    One generator stands at the beginning of each window, and they take their steps in turn, so that whatever
    else the machine does slows all places alike.
    """
    text = torch.randint(CONFIG.vocabulary, (max(PLACES),), generator=torch.Generator().manual_seed(seed)).tolist()
    config = SampleConfig(seed=seed)
    # The first token after such a prompt also pays for reading it, and is not counted.
    starts = [text[: place - WINDOW // 2 - 1] for place in PLACES]
    generators = [sample_tokens(model, start, config, use_cache=use_cache) for start in starts]
    for tokens in generators:
        next(tokens)
    seconds = [[] for _ in PLACES]
    for _ in range(WINDOW):
        for window, tokens in zip(seconds, generators, strict=True):
            start = time.perf_counter()
            next(tokens)
            window.append(time.perf_counter() - start)
    return [statistics.median(window) for window in seconds]


def processor() -> str:
    """The processor's name, which `platform` leaves out on Linux."""
    about = Path("/proc/cpuinfo")
    if about.exists():
        for line in about.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time per token while writing, as a markdown table.")
    parser.add_argument("--repetitions", type=int, default=7, help="default: 7")
    repetitions = parser.parse_args().repetitions
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    runs: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for repetition in range(-1, repetitions):
        for name, use_cache in WAYS.items():
            result = measure(model, max(repetition, 0), use_cache)
            if repetition >= 0:  # the one before warms up
                runs[name].append(result)

    print(f"{processor()}, {torch.get_num_threads()} threads, {platform.system()}; ", end="")
    print(f"Python {platform.python_version()}, torch {torch.__version__}.\n")
    print(f"Decoder of {model.num_parameters:,} parameters: {CONFIG.num_layers} layers, d_model {CONFIG.d_model},")
    print(f"{CONFIG.num_heads} heads, {CONFIG.num_groups} groups, vocabulary {CONFIG.vocabulary}, float32, batch 1.\n")
    print(f"Milliseconds a token, drawing included: median of {repetitions} repetitions, in each the median of the")
    print(f"{WINDOW} tokens around the place; the places take their steps in turn. Ratio: token {PLACES[-1]} to token")
    print(f"{PLACES[0]} within a repetition; median, least and greatest.")
    print()
    print("| | " + " | ".join(f"token {place}" for place in PLACES) + " | ratio |")
    print("|---|" + "---|" * (len(PLACES) + 1))
    for name, results in runs.items():
        cells = [f"{statistics.median(column) * 1e3:.2f}" for column in zip(*results, strict=True)]
        ratios = [result[-1] / result[0] for result in results]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | " + " | ".join(cells) + f" | {ratio} |")
    print()
    print("Not measured: a GPU, batches, bfloat16, reading a long prompt.")


if __name__ == "__main__":
    main()
