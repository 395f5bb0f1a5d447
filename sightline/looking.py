"""The work of `sightline look`: from a model and a text to captures, with what is to be told about them.

Knows nothing of browsers and terminals.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sightline.beams import DecodeConfig, find_targets
from sightline.captures import Capture
from sightline.corpora import Corpus
from sightline.encoder_decoder import EncoderDecoder
from sightline.generation import SampleConfig, sample_tokens
from sightline.inspection import capture, read, watched
from sightline.memory import peak_bytes
from sightline.models import Decoder
from sightline.pairs import line_end, pad, source_ids
from sightline.tokenizers import Tokenizer

PACE = 0.5
"""Seconds between two looks at what a model is writing."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one model saw of the beginning of a text."""

    capture: Capture
    seconds: float
    """How long it took, from tokens to capture."""
    peak_bytes: int
    """The most memory that this process has held so far."""
    unknown: str
    """How many tokens are <unk>, and why; empty where none is."""

    goal: int | None = None
    """How many tokens there will be when the model has written them all; None: it is not writing."""

    def notes(self, text: str) -> list[str]:
        """What is to be told of it, a line each; `text` is the name of what was read."""
        count, prompt = len(self.capture.tokens), self.capture.prompt
        given = count if prompt is None else prompt
        wrote = f" and {count - given:,} that the model wrote" if count > given else ""
        captured = f"captured the first {given:,} tokens of {text}{wrote} in {self.seconds:.1f} s"
        memory = f", with {self.peak_bytes / 1e9:.1f} GB of memory at most"
        return [captured + memory, *([self.unknown] if self.unknown else [])]


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
    first, most = _tokenizer(models[0]), _room(models, tokens, write)
    given = _beginning(corpus, first, most)
    ids = given + list(sample_tokens(models[0], given, SampleConfig(tokens=write, seed=0))) if write else given
    looks = []
    for model in models:
        tokenizer = _tokenizer(model)
        same = tokenizer.tokens_sha256 == first.tokens_sha256
        if write and not same:
            raise ValueError("--write and --compare need two models with the same tokens; leave one of them out")
        own = ids if same else _beginning(corpus, tokenizer, most)
        start = time.perf_counter()
        seen = capture(model, own, layers=layers, prompt=len(given) if write else None, folder=folder)
        looks.append(_look(seen, tokenizer, start))
    return looks


def writing(
    model: Decoder,
    corpus: Corpus,
    *,
    tokens: int | None = None,
    layers: Sequence[int] | None = None,
    write: int,
) -> Iterator[Look]:
    """What a model sees of the beginning of a text and of the `write` tokens that it writes after it, as it writes.

    First when the text has been read, then about twice a second, last with all of them: what `look` would give, in
    one pass.

    Raises: as `look`.
    """
    tokenizer = _tokenizer(model)
    given = _beginning(corpus, tokenizer, _room([model], tokens, write))
    ids, whole, start, due = list(given), len(given) + write, time.perf_counter(), 0.0
    # One token more than is wanted: to draw it the model reads the last one.
    more = sample_tokens(model, given, SampleConfig(tokens=write + 1, seed=0))
    with closing(more), watched(model, layers, room=whole) as recorder:
        for token in more:
            if time.perf_counter() >= due or len(ids) == whole:
                shown = time.perf_counter()
                seen = read(recorder, model, ids, prompt=len(given))
                yield _look(seen, tokenizer, start, goal=whole if len(ids) < whole else None)
                # Showing takes the machine from writing: half of the time at most.
                due = time.perf_counter() + max(PACE, time.perf_counter() - shown)
            ids.append(token)


def stages(
    models: Mapping[str, Decoder],
    corpus: Corpus,
    *,
    live: bool,
    tell: Callable[[str], None],
    write: int = 0,
    folder: Path | None = None,
    **options: Any,
) -> Iterator[tuple[dict[str, Capture], int | None]]:
    """What is to be shown, one after the other: captures by name, and how many tokens there will be, or None.

    One stage, unless one model alone writes, `live` and into no folder: then as it writes. `tell` hears the notes.

    Raises: as `look`, when the first is asked for.
    """
    if live and write and len(models) == 1 and folder is None:
        (model,) = models.values()
        looks = (([one], one.goal) for one in writing(model, corpus, write=write, **options))
    else:
        looks = [(look(list(models.values()), corpus, write=write, folder=folder, **options), None)]
    for seen, goal in looks:
        for note in chain.from_iterable(one.notes(corpus.name) for one in seen if goal is None):
            tell(note)
        if folder is not None:
            tell(f"saved: sightline look --capture {folder} shows it again")
        yield {name: one.capture for name, one in zip(models, seen, strict=True)}, goal


def translation(
    model: EncoderDecoder,
    text: str,
    *,
    target: str | None = None,
    layers: Sequence[int] | None = None,
    write: int = 0,
    tell: Callable[[str], None],
) -> Iterator[tuple[dict[str, Capture], None]]:
    """The one thing to be shown of a source and its target: what the target saw of the source, and each of itself.

    Without a target the model writes one, found by beam search, of at most `write` tokens (0: as many as it takes).
    `tell` hears the notes.

    Raises: ValueError for a model without tokenizer, a source as `source_ids` refuses it or that names a file, a target
    that is no line, `write` beside a target, or as `capture`.
    """
    if target is not None and write:
        raise ValueError("--target is what --write would let the model write: drop one of the two")
    if target is not None and (not target.strip() or "\n" in target):
        raise ValueError(f"expected one line of text as --target, got {target!r}")
    if os.path.isfile(text):  # noqa: PTH113 (that of a Path raises for a line too long to be a name)
        raise ValueError(f"--text is the line itself where --model translates, and {text} is a file: give its line")
    tokenizer, start = _tokenizer(model), time.perf_counter()
    source, end = source_ids(text, 1, tokenizer, context=model.config.context), line_end(tokenizer)
    if target is None:
        device = model.head_weight.device
        read, lengths = (part.to(device) for part in pad([source]))
        (found,) = find_targets(model, read, lengths, end, DecodeConfig(tokens=write or None))
        seen = capture(model, source, [end, *found], layers=layers, prompt=1)
        said = f"the model wrote {tokenizer.decode(found)!r}"
    else:
        seen = capture(model, source, target, layers=layers)
        said = "the target was given"
    counts = " and ".join(f"{len(seen[part].tokens):,}" for part in ("encoder", "decoder"))
    tell(f"captured {counts} tokens of source and target in {time.perf_counter() - start:.1f} s; {said}")
    yield seen, None


def _room(models: Sequence[Decoder], tokens: int | None, write: int) -> int:
    """How many tokens of the text are read."""
    return room(min(model.config.context for model in models), tokens, write)


def room(context: int, tokens: int | None, write: int) -> int:
    """How many tokens of a text are read into a context; raises ValueError for more than it holds."""
    most = context - write
    if not 0 <= write < context:
        raise ValueError(f"--write must be from 0 to {context - 1}, for a context of {context} tokens; got {write}")
    if tokens is not None and not 1 <= tokens <= most:
        raise ValueError(f"--tokens must be from 1 to {most}, what the model's context holds; got {tokens}")
    return most if tokens is None else tokens


def _look(seen: Capture, tokenizer: Tokenizer, start: float, goal: int | None = None) -> Look:
    return looked(seen, start, unknown=tokenizer.unknown, kind=tokenizer.kind, goal=goal)


def looked(seen: Capture, start: float, *, unknown: int | None, kind: str, goal: int | None = None) -> Look:
    """A capture that was begun at `start`; `unknown` is the id of the tokens of a `kind` that the model lacks."""
    count = sum(token == unknown for token in seen.ids)
    said = f"{count:,} of them are <unk>: {kind} that the model's vocabulary lacks" if count else ""
    seconds = time.perf_counter() - start
    return Look(capture=seen, seconds=seconds, peak_bytes=peak_bytes(), unknown=said, goal=goal)


def beginning(corpus: Corpus, encode: Callable[[str], list[int]], most: int) -> list[int]:
    """The first tokens of a corpus, from as much of its text as they need."""
    text, ids, wanted = "", [], 0
    for piece in chain.from_iterable(corpus.texts(split) for split in corpus.splits):
        text += piece
        # Encoding everything again after every piece would take the square of the text's length.
        if len(text) >= wanted:
            ids = encode(text)
            wanted = 2 * len(text)
        if len(ids) > most:
            break
    else:
        ids = encode(text)
    return ids[:most]


def _beginning(corpus: Corpus, tokenizer: Tokenizer, most: int) -> list[int]:
    return beginning(corpus, lambda text: [*tokenizer.start, *tokenizer.encode(text)], most)


def _tokenizer(model: Decoder | EncoderDecoder) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("look: this model has no tokenizer to read text with; set model.tokenizer")
    return model.tokenizer
