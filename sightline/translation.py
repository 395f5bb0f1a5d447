"""Translation: `train_pairs` learns it from parallel text, `translate` does it, `score_pairs` tells how well.

Knows no terminal.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.beams import DecodeConfig, find_targets
from sightline.distributed import ALONE, Team
from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from sightline.evaluation import Evaluation
from sightline.loop import Listener, TrainResult
from sightline.models import evaluating
from sightline.pairs import (
    Batch,
    Pair,
    Parallel,
    TokenPairs,
    batch,
    batches,
    encode_pairs,
    line_end,
    open_pairs,
    pad,
    source_ids,
)
from sightline.runs import RunFolder
from sightline.schedule import TrainConfig, autocast, choose_device
from sightline.tokenizers import Kind, Tokenizer
from sightline.trainer import Trainer
from sightline.training import Preset, fit_in, preset_config, same_tokenizer

_LEAST_CONTEXT = 64
_VOCABULARY_PAIRS = 1 << 20
_TOGETHER = 4096
"""Tokens that are translated side by side."""


def train_pairs(
    source: str | Path,
    out: str | Path,
    *,
    target: str | Path | None = None,
    preset: Preset = "modern",
    model: Mapping[str, Any] | None = None,
    tokenizer: Kind | None = None,
    vocabulary: int | None = None,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    resume: bool = False,
    listener: Listener | None = None,
) -> TrainResult:
    """Trains an `EncoderDecoder` on parallel text, as `train` does a `Decoder` on text.

    `source` and `target` are what `open_pairs` takes. `model` holds the fields of `EncoderDecoderConfig` that differ
    from the preset; without a context there it is twice what the longest pair needs, 64 at least. Source and target
    share one vocabulary, of bytes (bpe) unless `tokenizer` says otherwise, in which each digit is a token. A step is
    as many pairs of similar length as fill `config.batch` windows of the context, padding included.

    Raises: as `fit`, and ValueError for pairs that cannot be read, with the line's number.

    >>> import tempfile
    >>> from sightline.checkpoints import load
    >>> small = {"d_model": 16, "num_layers": 1, "num_heads": 2}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = train_pairs("numerals", folder, model=small, tokenizer="characters", config=TrainConfig(
    ...         steps=4, batch=2, evaluate_batches=2))
    ...     len(translate(load(folder), ["forty-two"]))
    1
    """
    out, changes = Path(out), dict(model or {})
    preset_config(EncoderDecoderConfig, preset, 1, changes)  # a bad setting is known before any work is done
    choose_device(config.device)
    if Team.here().size > 1 or config.accumulate > 1:
        raise ValueError("translation trains in one process, a batch at once: drop torchrun and --accumulate")
    RunFolder(out, resume=resume).close()
    parallel = open_pairs(source, target)
    with RunFolder(out, resume=resume) as folder:
        if resume:
            text = same_tokenizer(folder.step, tokenizer, vocabulary)
        else:
            text = _new_tokenizer(parallel, "bpe" if tokenizer is None else tokenizer, vocabulary)
        data = tokenize_pairs(parallel, text, changes.get("context"))
        changes.setdefault("context", _context(data))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            translator = EncoderDecoder(preset_config(EncoderDecoderConfig, preset, len(text), changes))
        translator.tokenizer = text
        return fit_in(translator, data, folder, config, listener, ALONE, make=PairTrainer)


@dataclass(frozen=True, kw_only=True)
class TokenizedPairs:
    """The token pairs of each split."""

    train: TokenPairs
    valid: TokenPairs


def tokenize_pairs(parallel: Parallel, tokenizer: Tokenizer, context: int | None) -> TokenizedPairs:
    """The tokens of both splits; `context` None lets them have any length.

    Raises: ValueError for a source or target longer than the context, with its line.
    """
    train, valid = (
        encode_pairs(pairs, tokenizer, context=context, name=parallel.name)
        for pairs in (parallel.train, parallel.valid)
    )
    return TokenizedPairs(train=train, valid=valid)


class PairTrainer(Trainer):
    """A `Trainer` whose batches are pairs."""

    model: EncoderDecoder  # pyright: ignore[reportIncompatibleVariableOverride] (what it needs of a model, both have)
    train_tokens: TokenPairs  # pyright: ignore[reportIncompatibleVariableOverride]
    valid_tokens: TokenPairs  # pyright: ignore[reportIncompatibleVariableOverride]

    def _gradients(self) -> tuple[Tensor, Tensor]:
        self._seed()
        drawn = batch(self.train_tokens, step=self.step, seed=self.config.seed, tokens=self._tokens)
        with autocast(self.device, self.precision):
            loss = self.model.loss(*(part.to(self.device) for part in drawn), smoothing=self.config.smoothing)
        self.optimizers.zero_grad()
        loss.backward()
        return loss.detach(), self._clipped()

    def _evaluation(self) -> Evaluation:
        given = islice(batches(self.valid_tokens, tokens=self._tokens), self.config.evaluate_batches)
        return _evaluate(self.model, given, self.valid_tokens)[0]

    @property
    def _tokens(self) -> int:
        return self.config.batch * self.context


# --- Scoring -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """How well held-out pairs are translated."""

    evaluation: Evaluation
    """What the targets cost to predict, given all before each token."""
    accuracy: float
    """Share of tokens, line ends included, that are the likeliest given all before them."""
    exact: float
    """Share of translations that are the target, letter by letter."""
    bleu: float | None
    """sacrebleu's BLEU, 0 to 100; None without sacrebleu."""
    chrf: float | None
    """sacrebleu's chrF, 0 to 100; None without sacrebleu."""
    pairs: int

    def __str__(self) -> str:
        marks = [f"{self.exact:.2%} exact", f"token accuracy {self.accuracy:.2%}"]
        if self.bleu is not None and self.chrf is not None:
            marks += [f"BLEU {self.bleu:.2f}", f"chrF {self.chrf:.2f}"]
        else:
            marks.append("no BLEU and chrF without sacrebleu (pip install 'sightline[translation]')")
        return f"{', '.join(marks)}, loss {self.evaluation.loss:.4f} nats a token ({self.pairs:,} pairs)"


def score_pairs(
    model: EncoderDecoder,
    pairs: Sequence[Pair],
    config: DecodeConfig = DecodeConfig(),  # noqa: B008 (frozen)
    *,
    name: str = "the pairs",
) -> PairScore:
    """Translates pairs and compares: exactness, token accuracy, loss, and, where sacrebleu is there, BLEU and chrF.

    Raises: ValueError for no pairs, or as `translate`.
    """
    if not pairs:
        raise ValueError(f"expected pairs to score, but {name} has none")
    tokenizer = _tokenizer(model)
    tokens = encode_pairs(pairs, tokenizer, context=model.config.context, name=name)
    evaluation, accuracy = _evaluate(model, batches(tokens, tokens=_TOGETHER), tokens)
    found = translate(model, [pair.source for pair in pairs], config, lines=[pair.line for pair in pairs])
    wanted = [pair.target for pair in pairs]
    try:
        import sacrebleu
    except ImportError:
        bleu = chrf = None
    else:
        bleu, chrf = sacrebleu.corpus_bleu(found, [wanted]).score, sacrebleu.corpus_chrf(found, [wanted]).score
    exact = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(pairs)
    return PairScore(evaluation=evaluation, accuracy=accuracy, exact=exact, bleu=bleu, chrf=chrf, pairs=len(pairs))


def _evaluate(model: EncoderDecoder, given: Iterable[Batch], pairs: TokenPairs) -> tuple[Evaluation, float]:
    device = next(model.parameters()).device
    total, count, right = 0.0, 0, 0
    with evaluating(model), torch.no_grad():
        for one in given:
            features, wanted = model.predicted(*(part.to(device) for part in one))
            logits = model.logits(features).float()
            total += float(F.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(-1) == wanted).sum())
            count += wanted.numel()
    evaluation = Evaluation(
        loss=total / count,
        tokens=count,
        bytes=max(1, round(pairs.num_bytes * count / pairs.num_predicted)),
        unknown=pairs.num_unknown / pairs.num_predicted,
    )
    return evaluation, right / count


# --- Translating -------------------------------------------------------------------------------------


def translate(
    model: EncoderDecoder,
    texts: Sequence[str],
    config: DecodeConfig = DecodeConfig(),  # noqa: B008 (frozen)
    *,
    lines: Sequence[int] | None = None,
) -> list[str]:
    """The translation of each text, in their order; texts of similar length go side by side.

    `lines` are the numbers that errors call the texts by; None: from 1.

    Raises: ValueError for a model without tokenizer, and for a text that is empty, has a line break or words that the
    vocabulary lacks, or is longer than the context.

    Example: see `train_pairs`.
    """
    tokenizer = _tokenizer(model)
    end, context = line_end(tokenizer), model.config.context
    numbers = range(1, len(texts) + 1) if lines is None else lines
    sources = [source_ids(*one, tokenizer, context=context) for one in zip(texts, numbers, strict=True)]
    device = next(model.parameters()).device
    found = [""] * len(texts)
    for chosen in _side_by_side([len(ids) for ids in sources], config.beam):
        source, lengths = (part.to(device) for part in pad([sources[i] for i in chosen]))
        targets = find_targets(model, source, lengths, end, config)
        for i, ids in zip(chosen, targets, strict=True):
            found[i] = tokenizer.decode(ids)
    return found


def _side_by_side(lengths: Sequence[int], beams: int) -> list[list[int]]:
    """Which texts go together: sorted by length, as many as `_TOGETHER` tokens allow with their beams."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or (len(groups[-1]) + 1) * lengths[i] * beams > _TOGETHER:
            groups.append([])
        groups[-1].append(i)
    return groups


def _tokenizer(model: EncoderDecoder) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer to read text with: load a checkpoint, or set model.tokenizer")
    return model.tokenizer


# --- Making ------------------------------------------------------------------------------------------


def _new_tokenizer(parallel: Parallel, kind: Kind, vocabulary: int | None) -> Tokenizer:
    step = -(-len(parallel.train) // _VOCABULARY_PAIRS)
    texts = [f"{text}\n" for pair in parallel.train[::step] for text in (pair.source, pair.target)]
    if kind == "bpe":
        # Digits stand alone where merges are counted, so none is made of two: numbers are read digit by digit.
        texts = [re.sub(r"\d", "\\g<0>\n", text) for text in texts]
        size = sum(len(text.encode("utf-8")) for text in texts)
        vocabulary = min(max(size // 256, 512), 16_384) if vocabulary is None else vocabulary
    return Tokenizer.train(kind, texts, vocabulary)


def _context(data: TokenizedPairs) -> int:
    longest = int(max(data.train.lengths.max(), data.valid.lengths.max()))
    return max(_LEAST_CONTEXT, 1 << (2 * longest - 1).bit_length())
