"""The work of `sightline look`: from a model and a text to captures, with what is to be told about them.

Knows nothing of browsers and terminals.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from sightline.captures import Capture
from sightline.corpora import Corpus
from sightline.generation import SampleConfig, sample_tokens
from sightline.inspection import capture
from sightline.memory import peak_bytes
from sightline.models import Decoder
from sightline.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one model saw of the beginning of a text."""

    capture: Capture
    seconds: float
    """How long it took, from tokens to capture."""
    peak_bytes: int
    """The most memory that this process has held so far."""
    unknown: int
    """How many tokens are <unk>."""


def look(
    models: Sequence[Decoder],
    corpus: Corpus,
    *,
    tokens: int | None = None,
    layers: Sequence[int] | None = None,
    write: int = 0,
    folder: Path | None = None,
) -> list[Look]:
    """Capture the first `tokens` of a text with each model; None: as many as the models' contexts hold.

    The first model then writes `write` tokens more. Models with the tokens of the first read the same ids; others
    read the same text in their own. With `folder` the capture of one model is written there.

    Raises:
        ValueError: a model without tokenizer, more tokens than a context holds, or `write` with models of different
            tokens.
    """
    context = min(model.config.context for model in models)
    most = context - write
    if not 0 <= write < context:
        raise ValueError(f"--write must be from 0 to {context - 1}, for a context of {context} tokens; got {write}")
    if tokens is not None and not 1 <= tokens <= most:
        raise ValueError(f"--tokens must be from 1 to {most}, what the model's context holds; got {tokens}")
    first = _tokenizer(models[0])
    given = beginning(corpus, first, most if tokens is None else tokens)
    ids = given + list(sample_tokens(models[0], given, SampleConfig(tokens=write, seed=0))) if write else given
    looks = []
    for model in models:
        tokenizer = _tokenizer(model)
        same = tokenizer.tokens_sha256 == first.tokens_sha256
        if write and not same:
            raise ValueError("--write and --compare need two models with the same tokens; leave one of them out")
        own = ids if same else beginning(corpus, tokenizer, most if tokens is None else tokens)
        start = time.perf_counter()
        seen = capture(model, own, layers=layers, prompt=len(given) if write else None, folder=folder)
        seconds = time.perf_counter() - start
        unknown = sum(token == tokenizer.unknown for token in own)
        looks.append(Look(capture=seen, seconds=seconds, peak_bytes=peak_bytes(), unknown=unknown))
    return looks


def beginning(corpus: Corpus, tokenizer: Tokenizer, most: int) -> list[int]:
    """The first tokens of a corpus, from as much of its text as they need."""
    text, ids, wanted = "", [], 0
    for piece in chain.from_iterable(corpus.texts(split) for split in corpus.splits):
        text += piece
        # Encoding everything again after every piece would take the square of the text's length.
        if len(text) >= wanted:
            ids = tokenizer.encode(text)
            wanted = 2 * len(text)
        if len(ids) > most:
            break
    else:
        ids = tokenizer.encode(text)
    return [*tokenizer.start, *ids][:most]


def _tokenizer(model: Decoder) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("look: this model has no tokenizer to read text with; set model.tokenizer")
    return model.tokenizer
