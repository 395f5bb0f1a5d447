"""Seconds of training to a quality, beside nanoGPT and PyTorch's word_language_model.

    python benchmarks/recipes.py --row shakespeare --peer PATH/TO/nanoGPT --text PATH/TO/input.txt [--save]
    python benchmarks/recipes.py --row words --peer PATH/TO/word_language_model --text PATH/TO/wikitext-2 [--save]
    python benchmarks/recipes.py --row minutes --text PATH/TO/input.txt --minutes 30 [--save]

Evaluations are not timed on any side; our counting of the text is, and what counts alone reach has a row. A peer takes
turns with ours for the time of its steps, which is then multiplied by the number of its command's steps; --whole trains
it to its end and scores it too. Ours is trained whole in every round, from another seed. The peers are not part of this
repository.
"""

import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from measure import Report, arguments
from training import peer as nanogpt

from sightline.batches import TokenFile, TokenizedCorpus, tokenize
from sightline.corpora import Corpus, open_corpus
from sightline.counts import Counts
from sightline.evaluation import evaluate
from sightline.models import Decoder, DecoderConfig
from sightline.recipes import RecipeName, choose_recipe, cook
from sightline.tokenizers import Tokenizer
from sightline.trainer import Trainer
from sightline.training import train

NANOGPT_STEPS, NANOGPT_LOSS = 2000, 1.886
EPOCHS, BPTT, ROWS = 6, 35, 20  # word_language_model's, at --epochs 6
QUICK_STEPS = (16, 50, 100)
WORDS_STEPS = (100, 430)


def ours(
    data: TokenizedCorpus, split: TokenFile, vocabulary: int, name: RecipeName, **settings: Any
) -> tuple[float, float]:
    """Seconds of training steps, and the loss of the text in `split` afterwards."""
    assert data.train is not None
    recipe = choose_recipe(name, tokens=len(data.train.ids), vocabulary=vocabulary)
    config = cook(recipe, settings)
    assert config.steps is not None
    torch.manual_seed(config.seed)
    model = Decoder(DecoderConfig.modern(vocabulary=vocabulary, **recipe.model))
    began = time.perf_counter()
    trainer = Trainer(model, data, config)
    model.train()
    for step in range(config.steps):
        trainer.take_step(config.rate((step + 0.5) / config.steps))
    seconds = time.perf_counter() - began
    return seconds, evaluate(model, split).loss


def counts_alone(data: TokenizedCorpus, split: TokenFile, vocabulary: int, name: RecipeName) -> tuple[float, float]:
    """Seconds of counting as the recipe counts, and the loss of the text in `split` by that alone, all of it a past."""
    assert data.train is not None
    counts = Counts(
        vocabulary, longest=choose_recipe(name, tokens=len(data.train.ids), vocabulary=vocabulary).model["counts"]
    )
    began = time.perf_counter()
    counts.count(data.train.ids)
    seconds = time.perf_counter() - began
    ids = torch.from_numpy(split.ids.astype("int64"))[None]
    return seconds, -float(counts.probability(ids[:, :-1], ids[:, 1:]).double().log().mean())


def shakespeare(report: Report, options: Any, folder: Path) -> None:
    """tinyshakespeare by characters, to the loss of nanoGPT's CPU command."""
    corpus = open_corpus(options.text)
    tokenizer = Tokenizer.train("characters", corpus.texts("train"))
    data = tokenize(corpus, tokenizer, folder)
    assert data.valid is not None
    turn, _ = nanogpt(options.peer, data)
    turn()
    per_turn, runs = [], {steps: [] for steps in QUICK_STEPS}
    for seed in range(options.rounds):
        began = time.perf_counter()
        turn()
        per_turn.append(time.perf_counter() - began)
        for steps, seen in runs.items():
            seen.append(ours(data, data.valid, len(tokenizer), "quick", steps=steps, seed=seed))
    theirs = statistics.median(per_turn) / 50 * NANOGPT_STEPS
    report.say(f"\n## tinyshakespeare, characters (at most {NANOGPT_LOSS}, in a tenth of the time)")
    report.table("", "steps", "seconds of steps", "validation loss, median", "worst", "of nanoGPT's time")
    report.row("nanoGPT, its CPU command", f"{NANOGPT_STEPS:,}", f"{theirs:.1f}", f"{NANOGPT_LOSS}", "", "1.00")
    runs = {0: [counts_alone(data, data.valid, len(tokenizer), "quick")], **runs}
    _rows(report, "recipe quick", runs, theirs, lambda loss: f"{loss:.4f}")


def words(report: Report, options: Any, folder: Path) -> None:
    """A text of WikiText's kind by words, with the peer's vocabulary: that of all three files."""
    corpus = open_corpus(options.text)
    tokenizer = Tokenizer.train("words", _all_texts(corpus))
    data = tokenize(corpus, tokenizer, folder)
    assert data.train is not None and data.valid is not None and data.test is not None
    learn, score = word_language_model(options.peer, options.text)
    learn(4)
    per_turn, runs = [], {steps: [] for steps in options.steps or WORDS_STEPS}
    for seed in range(options.rounds):
        began = time.perf_counter()
        learn(20)
        per_turn.append((time.perf_counter() - began) / 20)
        for steps, seen in runs.items():
            seen.append(ours(data, data.test, len(tokenizer), "counted", steps=steps, seed=seed))
    batches = -(-(len(data.train.ids) // ROWS - 1) // BPTT)
    theirs = statistics.median(per_turn) * batches * EPOCHS
    report.say(f"\n## {corpus.name}, words, {len(tokenizer):,} of them (perplexity 399 in half of the time)")
    report.table("", "steps", "seconds of steps", "test perplexity, median", "worst", "of the peer's time")
    perplexity, note = "399.0", ""
    if options.whole:
        theirs, perplexity = score()
    else:
        note = (
            "The peer's seconds are those of 20 of its steps, taken on to all; its perplexity is that of a whole run."
        )
    report.row("word_language_model", f"{batches * EPOCHS:,}", f"{theirs:.0f}", perplexity, "", "1.00")
    runs = {0: [counts_alone(data, data.test, len(tokenizer), "counted")], **runs}
    _rows(report, "recipe counted", runs, theirs, lambda loss: f"{math.exp(loss):.1f}")
    report.say(f"\n{note}")


def minutes(report: Report, options: Any, folder: Path) -> None:
    """The best loss within a time, evaluations counted."""
    result = train(
        options.text, folder / "run", tokenizer="characters", recipe="counted", config={"minutes": options.minutes}
    )
    report.say("\n## tinyshakespeare, characters, best loss within a time (at most 1.4697, nanoGPT's on an A100)")
    report.table("recipe", "minutes", "steps", "best validation loss", "at step", "tokens a second")
    cells = (f"{result.steps:,}", f"{result.best.loss:.4f}", f"{result.best_step:,}")
    report.row("counted", f"{options.minutes:g}", *cells, f"{result.tokens_per_second:,.0f}")


def _rows(report: Report, name: str, runs: dict, theirs: float, say: Callable[[float], str]) -> None:
    for steps, seen in runs.items():
        seconds = statistics.median(seconds for seconds, _ in seen)
        losses = [loss for _, loss in seen]
        cells = (f"{seconds:.1f}", say(statistics.median(losses)), say(max(losses)), f"{seconds / theirs:.3f}")
        report.row(name if steps else "counts alone", f"{steps:,}", *cells)


def _all_texts(corpus: Corpus):
    for split in ("train", "valid", "test"):
        yield from corpus.texts(split)


def _module(folder: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"peer_{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"peer_{name}"] = module
    spec.loader.exec_module(module)
    return module


def word_language_model(folder: Path, text: Path):
    """A function for some of the steps of the peer's model, and one that trains it whole and scores it.

    Its sizes, batches, losses and annealing, as `main.py --model Transformer --lr 5 --epochs 6` has them.
    """
    corpus = _module(folder, "data").Corpus(str(text))
    tokens = len(corpus.dictionary)
    torch.manual_seed(1111)
    model = _module(folder, "model").TransformerModel(tokens, 200, 2, 200, 2, 0.2)
    criterion = torch.nn.NLLLoss()

    def columns(ids: torch.Tensor, rows: int) -> torch.Tensor:
        return ids[: len(ids) // rows * rows].view(rows, -1).t().contiguous()

    train_ids = columns(corpus.train, ROWS)

    def losses(source: torch.Tensor):
        for i in range(0, len(source) - 1, BPTT):
            length = min(BPTT, len(source) - 1 - i)
            yield (
                criterion(model(source[i : i + length]).view(-1, tokens), source[i + 1 : i + 1 + length].view(-1)),
                length,
            )

    def learn(count: int | None, rate: float = 5.0) -> None:
        model.train()
        for step, (loss, _) in enumerate(losses(train_ids), start=1):
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-rate)
            loss.item()
            if step == count:
                return

    @torch.no_grad()
    def mean_loss(ids: torch.Tensor) -> float:
        model.eval()
        source = columns(ids, 10)
        return sum(length * loss.item() for loss, length in losses(source)) / (len(source) - 1)

    def score() -> tuple[float, str]:
        for parameter in model.parameters():  # its own start again
            parameter.data.copy_(start[parameter])
        seconds, rate, best, kept = 0.0, 5.0, math.inf, {}
        for _ in range(EPOCHS):
            began = time.perf_counter()
            learn(None, rate)
            seconds += time.perf_counter() - began
            found = mean_loss(corpus.valid)
            if found < best:
                best, kept = found, {name: tensor.clone() for name, tensor in model.state_dict().items()}
            else:
                rate /= 4
        model.load_state_dict(kept)
        return seconds, f"{math.exp(mean_loss(corpus.test)):.1f}"

    start = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    return learn, score


def main() -> None:
    parser = arguments(__doc__ or "")
    rows = {"shakespeare": shakespeare, "words": words, "minutes": minutes}
    parser.add_argument("--row", choices=rows, required=True)
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, or the folder word_language_model")
    parser.add_argument(
        "--text", type=Path, required=True, help="tinyshakespeare's input.txt, or a folder of three files"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="for the row minutes")
    parser.add_argument("--steps", type=int, nargs="*", help="for the row words: lengths of our runs")
    parser.add_argument("--whole", action="store_true", help="train word_language_model to its end")
    options = parser.parse_args()
    if options.row != "minutes" and options.peer is None:
        parser.error(f"the row {options.row} needs --peer")
    report = Report(f"Speed to quality: {options.row}")
    with tempfile.TemporaryDirectory() as folder:
        rows[options.row](report, options, Path(folder))
    if options.save:
        report.write(f"recipes-{options.row}")


if __name__ == "__main__":
    main()
