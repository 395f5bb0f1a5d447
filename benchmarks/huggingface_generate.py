"""Writing with one set of weights: our generation beside transformers' `generate`, which needs transformers.

python benchmarks/huggingface_generate.py [--rounds 9] [--save]
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import Report, arguments

import sightline as sl
from sightline.generation import sample_tokens
from sightline.rows import scores

PROMPT, NEW = 1024, 256
CONFIG = sl.DecoderConfig.modern(
    vocabulary=1000,
    context=2048,
    d_model=512,
    num_layers=4,
    num_heads=8,
    num_groups=2,
    query_key_norm=False,
    tied=False,
)


def timed(write: Callable[[], list[int]]) -> tuple[float, list[int]]:
    start = time.perf_counter()
    tokens = write()
    return time.perf_counter() - start, tokens


def reading(model: sl.Decoder) -> tuple[float, int]:
    """Seconds that a token's weights take to be read, once and for nothing else, and their bytes."""
    read = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embedding" not in name]
    rows = {weight.shape[1]: torch.ones(1, weight.shape[1]) for weight in read}
    taken = []
    with torch.no_grad():
        for _ in range(50):
            start = time.perf_counter()
            for weight in read:
                scores(rows[weight.shape[1]], weight)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken), sum(weight.nbytes for weight in read)


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = arguments(__doc__ or "").parse_args()
    torch.manual_seed(0)
    ours = sl.Decoder(CONFIG).eval()
    with tempfile.TemporaryDirectory() as folder:
        there = sl.save(f"{folder}/model", ours, format="huggingface")
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(there).eval()
    prompt = torch.randint(CONFIG.vocabulary, (1, PROMPT))

    def by_us(new: int) -> list[int]:
        return list(sample_tokens(ours, prompt[0].tolist(), sl.SampleConfig(tokens=new, top_k=1)))

    def by_them(new: int) -> list[int]:
        given = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        return theirs.generate(prompt, max_new_tokens=new, **given)[0, PROMPT:].tolist()

    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "transformers": []}
    for turn in range(options.rounds + 1):
        texts = []
        for name, write in (("ours", by_us), ("transformers", by_them)):
            first, _ = timed(lambda write=write: write(1))
            whole, text = timed(lambda write=write: write(NEW))
            texts.append(text)
            if turn:  # the first round warms up
                seconds[name].append((whole, (whole - first) / (NEW - 1)))
        assert texts[0] == texts[1], "greedy text differs"
    report = Report("Writing 256 tokens after a prompt of 1,024, one stream, against transformers' generate (goal: 3x)")
    report.say(
        f"The same weights, {ours.num_parameters:,} of them: {CONFIG.num_layers} layers, d_model {CONFIG.d_model}, "
        f"{CONFIG.num_heads} heads over {CONFIG.num_groups} groups, d_ff {CONFIG.d_ff}, vocabulary "
        f"{CONFIG.vocabulary}, float32, greedy, and the same text; transformers {transformers.__version__} with SDPA. "
        f"A token's time leaves out the prompt. Medians of {options.rounds} rounds in turn; ratios within a round: "
        "median, least and greatest. Not measured: sampling, batches, bfloat16, compiled generation."
    )
    report.table("", "transformers", "ours", "times as fast")
    for i, (row, unit, factor) in enumerate((("the whole, prompt included", "s", 1), ("a token", "ms", 1e3))):
        columns = {name: [round[i] for round in rounds] for name, rounds in seconds.items()}
        cells = [f"{statistics.median(columns[name]) * factor:.2f} {unit}" for name in ("transformers", "ours")]
        ratios = [theirs / ours for theirs, ours in zip(columns["transformers"], columns["ours"], strict=True)]
        report.row(row, *cells, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    floor, held = reading(ours)
    report.say(
        f"\nReading {held / 1e6:.0f} MB of weights once, as our linear maps of one row do: {floor * 1e3:.2f} ms, "
        f"{held / floor / 1e9:.0f} GB/s, {len(ours.blocks) * 7 + 1} calls."
    )
    if options.save:
        report.write("huggingface-generate")


if __name__ == "__main__":
    main()
