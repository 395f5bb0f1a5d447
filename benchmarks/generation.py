"""Time per token while writing, early and late, with the cache and without it.

python benchmarks/generation.py [--rounds 9] [--save]
"""

import statistics
import time

import torch
from measure import Report, arguments

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


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    runs: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for turn in range(options.rounds + 1):
        for name, use_cache in WAYS.items():
            result = measure(model, turn, use_cache)
            if turn:  # the first round warms up
                runs[name].append(result)
    report = Report("Time per token while writing (token 1,000 at most 1.3 times token 10, with the cache)")
    report.say(
        f"Decoder of {model.num_parameters:,} parameters: {CONFIG.num_layers} layers, d_model {CONFIG.d_model}, "
        f"{CONFIG.num_heads} heads, {CONFIG.num_groups} groups, vocabulary {CONFIG.vocabulary}, float32, batch 1. "
        f"Milliseconds a token, drawing included; a place is the median of {WINDOW} tokens around it, and the places "
        f"take their steps in turn. Ratio within a round: median, least and greatest of {options.rounds}. "
        "Not measured: a GPU, batches, bfloat16, reading a long prompt."
    )
    report.table("", *(f"token {place:,}" for place in PLACES), "ratio")
    for name, results in runs.items():
        cells = [f"{statistics.median(column) * 1e3:.2f}" for column in zip(*results, strict=True)]
        ratios = [result[-1] / result[0] for result in results]
        report.row(name, *cells, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if options.save:
        report.write("generation")


if __name__ == "__main__":
    main()
