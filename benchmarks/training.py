"""Training the model of nanoGPT's CPU command, beside nanoGPT itself, on tinyshakespeare.

    python benchmarks/training.py --peer PATH/TO/nanoGPT --text PATH/TO/input.txt [--save]

4 layers, width 128, 4 heads, context 64, batch 12, AdamW: the sides take turns of 50 steps, then ours goes on to 2,000
steps and is scored on the whole validation split. nanoGPT's CPU command computes in float32; ours does so too, and in
bfloat16 where the CPU multiplies it in hardware, as `train` would by itself. --compile measures nanoGPT compiled as
well. The floors take turns too: the model's matrix products alone, forward and backward, into tensors that are there
already; nobody who computes them by this library, in that precision, takes less time. The peer is not part of this
repository.
"""

import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import Report, arguments

from sightline.batches import TokenizedCorpus, tokenize
from sightline.bench import interleaved
from sightline.corpora import open_corpus
from sightline.models import Decoder, DecoderConfig
from sightline.schedule import Precision, has_bfloat16
from sightline.tokenizers import Tokenizer
from sightline.trainer import Trainer
from sightline.training import TrainConfig, fit

TURN = 50
SHAPE = {"context": 64, "d_model": 128, "num_layers": 4, "num_heads": 4}
# nanoGPT's block in our words; the preset `modern` is measured beside it.
GPT2 = {"norm": "layer", "positions": "learned", "activation": "gelu", "query_key_norm": False}
CONFIG = TrainConfig(steps=2000, batch=12, optimizer="adamw", learning_rate=1e-3, precision="float32")


def ours(data: TokenizedCorpus, shape: dict, precision: Precision):
    """A turn of our training steps."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocabulary=data_vocabulary(data), **SHAPE, **shape))
    trainer = Trainer(model, data, dataclasses.replace(CONFIG, precision=precision))
    model.train()

    def turn():
        for _ in range(TURN):
            trainer.take_step(CONFIG.learning_rate)

    return turn, model.num_parameters


def data_vocabulary(data: TokenizedCorpus) -> int:
    return int(max(data.train.ids.max(), data.valid.ids.max())) + 1


def peer(folder: Path, data: TokenizedCorpus, *, compiled: bool = False):
    """A turn of nanoGPT's training steps: its model, its optimiser, its loop's order of calls."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    config = module.GPTConfig(
        block_size=64, vocab_size=data_vocabulary(data), n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False
    )
    model = module.GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    count = sum(p.numel() for p in model.parameters())
    if compiled:
        model.compile()
    ids = np.asarray(data.train.ids)

    def get_batch():
        starts = torch.randint(len(ids) - 64, (12,))
        x = torch.stack([torch.from_numpy(ids[i : i + 64].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(ids[i + 1 : i + 65].astype(np.int64)) for i in starts])
        return x, y

    def turn():
        model.train()
        for _ in range(TURN):
            x, y = get_batch()
            _, loss = model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # nanoGPT logs it now and then; ours checks every loss for NaN

    return turn, count


def products(vocabulary: int, dtype: torch.dtype) -> Callable[[], None]:
    """A turn of a step's matrix products: nanoGPT's linear maps, head and attention, and their gradients."""
    width, tokens, heads, context = 128, 12 * 64, 12 * 4, 64
    maps = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * 4 + [(width, vocabulary)]
    both = []
    for wide, out in maps:
        x, y, weight = (torch.randn(size).to(dtype) for size in ((tokens, wide), (tokens, out), (out, wide)))
        both += [(x, weight.T), (y, weight), (y.T, x)]
    query, weights = (torch.randn(heads, context, size).to(dtype) for size in (32, context))
    # Scores and values, then the gradients of values, weights, queries and keys.
    attention = [(query, query.mT), (weights, query), (weights.mT, query), (query, query.mT), (weights, query)]
    both += [*attention, (weights.mT, query)] * 4
    pairs = [(left, right, left @ right) for left, right in both]

    def turn() -> None:
        with torch.no_grad():
            for _ in range(TURN):
                for left, right, out in pairs:
                    torch.matmul(left, right, out=out)

    return turn


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--compile", action="store_true", help="measure nanoGPT compiled too")
    parser.add_argument("--speed", action="store_true", help="leave the quality out")
    options = parser.parse_args()
    report = Report("Training beside nanoGPT")
    corpus = open_corpus(options.text)
    tokenizer = Tokenizer.train("characters", corpus.texts("train"))
    with tempfile.TemporaryDirectory() as folder:
        data = tokenize(corpus, tokenizer, Path(folder) / "tokens")
        measure_speed(report, options.peer, data, options.rounds, compiled=options.compile)
        if not options.speed:
            measure_quality(report, data, len(tokenizer), Path(folder))
    if options.save:
        report.write("training")


def measure_speed(report: Report, folder: Path, data: TokenizedCorpus, rounds: int, *, compiled: bool) -> None:
    halves = has_bfloat16(torch.device("cpu"))
    precisions: tuple[Precision, ...] = ("float32", "bfloat16") if halves else ("float32",)
    sides = {"nanoGPT, eager": peer(folder, data)}
    if compiled:
        sides["nanoGPT, compiled"] = peer(folder, data, compiled=True)
    peers = list(sides)
    turns: dict[str, Callable[[], object]] = {}
    for precision in precisions:
        for name, shape in (("its shape", GPT2), ("modern", {})):
            sides[f"ours, {name}, {precision}"] = ours(data, shape, precision)
        dtype = getattr(torch, precision)
        turns[f"the matrix products alone, {precision}"] = products(data_vocabulary(data), dtype)
    times = interleaved({**{name: turn for name, (turn, _) in sides.items()}, **turns}, rounds=rounds)
    base = min(times[name] for name in peers)
    report.say("\n## Speed: 4 layers, width 128, 4 heads, batch 12 x 64 (2x nanoGPT's best, in float32, is asked)")
    report.say(f"nanoGPT {'eager and compiled' if compiled else 'eager alone, not compiled'}.")
    if not halves:
        report.say("This CPU has no bfloat16 in hardware: ours in float32 alone.")
    report.table("", "parameters", "ms a step", "tokens a second", "against nanoGPT's best")
    for name, seconds in times.items():
        speed = f"{TURN * 12 * 64 / seconds:,.0f}"
        size = f"{sides[name][1]:,}" if name in sides else ""
        report.row(name, size, f"{seconds * 1e3 / TURN:.1f}", speed, f"{base / seconds:.2f}x")


def measure_quality(report: Report, data: TokenizedCorpus, vocabulary: int, folder: Path) -> None:
    report.say("\n## Quality after 2,000 steps, whole validation split (at most 1.886, nanoGPT's)")
    report.table("", "validation loss", "best", "tokens a second", "seconds with evaluations")
    for name, shape in (("its shape", GPT2), ("modern", {})):
        torch.manual_seed(CONFIG.seed)
        model = Decoder(DecoderConfig(vocabulary=vocabulary, **SHAPE, **shape))
        result = fit(model, data, folder / name.replace(" ", "-"), CONFIG)
        cells = (f"{result.final.loss:.4f}", f"{result.best.loss:.4f}", f"{result.tokens_per_second:,.0f}")
        report.row(f"ours, {name}", *cells, f"{result.seconds:.0f}")


if __name__ == "__main__":
    main()
