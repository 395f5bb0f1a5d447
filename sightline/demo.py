"""The first five minutes: train on the embedded text, compare with counting, write, and look.

Everything it writes goes into one folder. Nothing is downloaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sightline.batches import tokenize
from sightline.checkpoints import load
from sightline.corpora import open_corpus
from sightline.evaluation import Evaluation, bigram, unigram
from sightline.generation import SampleConfig, generate
from sightline.inspection import capture
from sightline.training import Listener, TrainConfig, TrainResult, train

PROMPT = "The value of the expression"
VOCABULARY = 512
# Without dropout a text this short is known by heart after six readings, and a fast machine ends up worse than a slow
# one. With it, and three times the usual weight decay, the sixteenth still helps: there the steps end on any machine.
SHAPE = {"context": 384, "d_model": 128, "num_layers": 4, "num_heads": 4, "dropout": 0.1}
TRAINING = TrainConfig(steps=2000, minutes=2.5, batch=4, weight_decay=0.3, cooldown=0.6, evaluate_every=200)
LOOK_TOKENS = 160
SENTENCE = "A class definition is an executable statement. It defines the name of the class."


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What training came to, beside two baselines that only count, on the same held-out text."""

    result: TrainResult
    unigram: Evaluation
    bigram: Evaluation


def learn(folder: Path, listener: Listener | None = None) -> Lesson:
    """Train a small `modern` Decoder on the embedded text, and count for the baselines."""
    corpus = open_corpus("embedded")
    result = train(
        "embedded", folder, model=SHAPE, tokenizer="bpe", vocabulary=VOCABULARY, config=TRAINING, listener=listener
    )
    model = load(folder)
    assert model.tokenizer is not None
    data = tokenize(corpus, model.tokenizer, folder / "tokens")
    assert data.train is not None and data.valid is not None
    return Lesson(
        result=result,
        unigram=unigram(data.train, data.valid, VOCABULARY),
        bigram=bigram(data.train, data.valid, VOCABULARY),
    )


def write(folder: Path, seed: int = 0) -> Iterator[str]:
    """100 words at temperature 0.8, one after the other."""
    return generate(load(folder), PROMPT, SampleConfig(words=100, temperature=0.8, seed=seed))


def look(folder: Path) -> list[Path]:
    """attention.html and three pictures of what the trained model looks at in its held-out text."""
    from sightline.positions import sinusoidal
    from sightline.viewer.page import page
    from sightline.viewer.plots import plot_heads, plot_positions, plot_weights

    model = load(folder)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(next(open_corpus("embedded").texts("valid")))
    seen = capture(model, ids[:LOOK_TOKENS])
    files = [folder / name for name in ("attention.html", "heads.png", "head.png", "positions.png")]
    page(seen, files[0])
    plot_heads(seen).savefig(files[1], dpi=160)
    near = capture(model, SENTENCE)
    layer, head = divmod(int(near.previous_token.argmax()), near.num_heads)
    plot_weights(near, layer=layer, head=head).savefig(files[2], dpi=160)
    plot_positions(sinusoidal(64, 32)).savefig(files[3], dpi=160)
    return files
