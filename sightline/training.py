"""Training: `train` goes the whole way from text, `fit` trains a model on token files.

How long and how fast says `TrainConfig`, what is written where `runs`. Everything random follows from the
seed and the step, so a run that was stopped goes on as if it had not been. Knows no terminal: a listener
hears what happens.
"""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from sightline.batches import TokenizedCorpus, tokenize
from sightline.causality import check_causal
from sightline.checkpoints import Model, read_config
from sightline.corpora import Corpus, Errors, open_corpus
from sightline.distributed import Team
from sightline.encoder_decoder import EncoderDecoderConfig
from sightline.loop import Interrupted, Listener, Run, TrainResult
from sightline.models import Decoder, DecoderConfig
from sightline.recipes import RecipeName, check_changes, settle
from sightline.runs import Event, Follower, RunFolder
from sightline.schedule import TrainConfig, choose_device
from sightline.tokenizers import UNKNOWN, Kind, Tokenizer
from sightline.trainer import Diverged, Trainer

__all__ = [
    "Diverged",
    "Interrupted",
    "Listener",
    "Preset",
    "TrainConfig",
    "TrainResult",
    "choose_tokenizer",
    "fit",
    "train",
]

Preset = Literal["modern", "classic"]
Shape = TypeVar("Shape", DecoderConfig, EncoderDecoderConfig)

_VOCABULARY_BYTES = 1 << 28


def train(
    source: str | Path,
    out: str | Path,
    *,
    preset: Preset = "modern",
    recipe: RecipeName | None = None,
    model: Mapping[str, Any] | None = None,
    tokenizer: Kind | None = None,
    vocabulary: int | None = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    errors: Errors = "strict",
    resume: bool = False,
    listener: Listener | None = None,
) -> TrainResult:
    """Trains a Transformer on text: vocabulary, token files, model, and `fit`.

    `source` is what `open_corpus` takes. `recipe` (None: "auto", see `choose_recipe`) fills in what is not said:
    `model` holds the fields of `DecoderConfig` that differ from it and from the preset, `config` those of
    `TrainConfig`. A whole `TrainConfig` is taken as it is, without a recipe. Without `tokenizer` and `vocabulary`,
    `choose_tokenizer` decides. Token files are kept in `cache` (None: the folder `tokens` inside `out`). `resume`
    goes on with the vocabulary of the run; all else must be as it was, but for how long to train.

    Raises: as `fit`, and ValueError for text that cannot be read.

    >>> import tempfile
    >>> from sightline.checkpoints import load
    >>> small = {"context": 16, "d_model": 16, "num_layers": 1, "num_heads": 2}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = train("embedded", folder, model=small, tokenizer="characters",
    ...                 config=TrainConfig(steps=30, evaluate_batches=4))
    ...     run.best.bits_per_byte < run.start.bits_per_byte, load(folder).tokenizer.kind
    (True, 'characters')
    """
    out = Path(out)
    changes = dict(model or {})
    preset_config(DecoderConfig, preset, 1, changes)  # a bad setting is known before any work is done
    choose_device(check_changes(recipe, config))
    team = Team.here()
    with team.together():
        if team.leads:
            RunFolder(out, resume=resume).close()  # what is refused is refused before a long text is read
        if team.size > 1 and source == "-":
            raise ValueError("expected a file or a folder that every process can read, got standard input")
        corpus = open_corpus(source, errors=errors)
    if corpus.left_out and team.leads:
        warnings.warn(corpus.left_out, stacklevel=2)
    with _folder(out, resume, team) as folder:
        chosen = None
        with team.together():
            if team.leads and resume:
                chosen = same_tokenizer(folder.step, tokenizer, vocabulary)
            elif team.leads:
                chosen = new_tokenizer(corpus, tokenizer, vocabulary)
        told = team.tell(chosen and chosen.to_json())
        text = Tokenizer.of_json(told) if chosen is None else chosen
        with team.together():
            data = tokenize(corpus, text, out / "tokens" if cache is None else cache)
        tokens = 0 if data.train is None else len(data.train.ids)
        settled, changes, said = settle(recipe, config, changes, preset, tokens=tokens, vocabulary=len(text))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settled.seed)
            decoder = Decoder(preset_config(DecoderConfig, preset, len(text), changes))
        decoder.tokenizer = text
        return fit_in(decoder, data, folder, settled, listener, team, said)


def fit(
    model: Decoder,
    data: TokenizedCorpus,
    out: str | Path,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    *,
    resume: bool = False,
    listener: Listener | None = None,
) -> TrainResult:
    """Trains a model on token files, and keeps its best and its latest step in the folder `out`.

    Linear warm-up and cool-down; a checkpoint at every evaluation and at the end. The model
    ends with the weights of its last step; `load(out)` has the best. With `resume` it starts from the
    folder's newest whole step, and on one machine the losses are, bit for bit, those of a run never stopped.
    The first Ctrl-C saves and stops. Advice goes to the listener, without one to `warnings`.

    Raises:
        ValueError: the folder, the text or the config does not fit (the line says which and how).
        Diverged: the loss turned NaN or infinite; the last checkpoint stands.
        Interrupted: Ctrl-C, after saving.
        RuntimeError: the model sees its future.

    >>> import tempfile
    >>> corpus = open_corpus("embedded")
    >>> tokenizer = Tokenizer.train("characters", corpus.texts("train"))
    >>> shape = DecoderConfig(vocabulary=len(tokenizer), context=16, d_model=16, num_layers=1, num_heads=2)
    >>> model = Decoder(shape)
    >>> model.tokenizer = tokenizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     data = tokenize(corpus, tokenizer, folder + "/tokens")
    ...     result = fit(model, data, folder + "/run", TrainConfig(steps=30, evaluate_batches=4))
    >>> result.final.loss < result.start.loss
    True
    """
    team = Team.here()
    with _folder(out, resume, team) as folder:
        return fit_in(model, data, folder, config, listener, team)


@contextmanager
def _folder(out: str | Path, resume: bool, team: Team) -> Iterator[RunFolder | Follower]:
    """The run's folder, in which the first process alone writes."""
    with ExitStack() as opened:
        folder = None
        with team.together():
            if team.leads:
                folder = opened.enter_context(RunFolder(out, resume=resume))
        latest = team.tell(folder and folder.latest)
        yield Follower(out, latest) if folder is None else folder


def fit_in(
    model: Model,
    data: Any,
    folder: RunFolder | Follower,
    config: TrainConfig,
    listener: Listener | None,
    team: Team,
    recipe: str | None = None,
    make: Callable[..., Trainer] = Trainer,
) -> TrainResult:
    """`fit` in a folder that is open, by the trainer that `make` makes of model, data and config."""
    began = time.perf_counter()
    resume = folder.latest is not None
    was_training = model.training
    with team.together():
        device = choose_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if config.smoothing and isinstance(model, Decoder):
            raise ValueError(f"smoothing is for translation and has no effect here, got {config.smoothing}: drop it")
        trainer = make(model, data, config, team, device=device)
        if isinstance(model, Decoder):
            check_causal(model)
        run = Run(trainer, folder, config, listener if team.leads else _unheard, began, recipe)
        if resume:
            run.restore()
        try:
            model.train()
            return run.complete(resume)
        finally:
            model.train(was_training)


def _unheard(event: Event) -> None:
    """The listener of the processes that say nothing."""


def choose_tokenizer(corpus: Corpus) -> tuple[Kind, int | None]:
    """The kind of tokenizer for a text, and the size of its vocabulary (None: all there is).

    Words, if `<unk>` stands in the first megabyte, as in WikiText, where every word is already cut out;
    else byte-level BPE with a token for every 256 bytes of training text, from 512 to 16,384. The merges of a
    text beyond 256 MB are those of pieces taken evenly from all of it.

    >>> choose_tokenizer(open_corpus("embedded"))[0]
    'bpe'
    """
    if UNKNOWN in next(corpus.texts("train")).split():
        return "words", None
    return "bpe", _bpe_vocabulary(corpus)


def _bpe_vocabulary(corpus: Corpus) -> int:
    return min(max(corpus.size("train") // 256, 512), 16_384)


def new_tokenizer(
    corpus: Corpus, kind: Kind | None, vocabulary: int | None, *, most_bytes: int = _VOCABULARY_BYTES
) -> Tokenizer:
    """The tokenizer of a text; the merges of BPE are those of so many bytes at most, evenly taken."""
    chosen, size = choose_tokenizer(corpus)
    if kind is not None and kind != chosen:
        chosen, size = kind, _bpe_vocabulary(corpus) if kind == "bpe" else None
    texts = corpus.texts("train")
    if chosen == "bpe":  # its merges are a matter of frequency: of a large text a sample tells them
        texts = itertools.islice(texts, 0, None, -(-corpus.size("train") // most_bytes))
    return Tokenizer.train(chosen, texts, size if vocabulary is None else vocabulary)


def preset_config(made_of: type[Shape], preset: Preset, vocabulary: int, changes: Mapping[str, Any]) -> Shape:
    """The preset of a config with changes.

    Raises:
        ValueError: an unknown preset, an unknown or a bad setting.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"expected preset to be {' or '.join(get_args(Preset))}, got {preset!r}")
    if "vocabulary" in changes:
        raise ValueError("expected no vocabulary among the model's settings, it is the tokenizer's: use --vocabulary")
    made_of.from_dict({"vocabulary": vocabulary, **changes})  # names the nearest of an unknown key
    make = made_of.classic if preset == "classic" else made_of.modern
    return make(vocabulary=vocabulary, **changes)


def same_tokenizer(step: Path, kind: Kind | None, vocabulary: int | None) -> Tokenizer:
    """The tokenizer of a run that goes on from a step.

    Raises:
        ValueError: there is none, or another was asked for.
    """
    _, stored = read_config(step)
    if stored is None:
        raise ValueError(f"expected a run with a tokenizer to go on with, but {step} has none: use fit")
    if kind is not None and kind != stored.kind:
        raise ValueError(f"expected the tokenizer of the run in {step}, {stored.kind}, got {kind}")
    # A text with fewer tokens than were asked for has a smaller vocabulary: the same command must go on.
    if vocabulary is not None and vocabulary < len(stored):
        raise ValueError(
            f"expected at least the {len(stored)} tokens of the run in {step}, got vocabulary {vocabulary}"
        )
    return stored
