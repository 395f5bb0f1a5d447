"""Memory-mapped token files, and batches from them by index.

A split of a corpus becomes one file of ids in a cache folder that is named by what went into it: the bytes of
the text, the tokenizer, the format. Knows nothing about models.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from sightline.corpora import Corpus
from sightline.tokenizers import Tokenizer

FORMAT = 1
"""To be raised whenever the same text and tokenizer give other files."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenFile:
    """The ids of a split, memory-mapped, and what they stand for.

    `num_bytes` counts the text's UTF-8 bytes, `num_words` its words between white space, `num_unknown` the ids
    that are `<unk>`.
    """

    ids: np.ndarray
    num_bytes: int
    num_words: int
    num_unknown: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedCorpus:
    """The token file of each split; None for a split that the corpus has not."""

    train: TokenFile | None = None
    valid: TokenFile | None = None
    test: TokenFile | None = None


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, cache: str | Path, progress: Progress | None = None
) -> TokenizedCorpus:
    """Turn every split of a corpus into a token file, or take the files from an earlier call.

    The text is read and hashed at every call, so that a file which has changed is tokenized anew; a cached
    file whose size or checksum is not the manifest's is written anew. Memory stays constant.
    `progress(bytes_done, bytes_total)` is called while tokenizing, and not at all when nothing is to do.

    Raises ValueError for a split without a token, a text that changes meanwhile, a cache that cannot be written.
    """
    hashes = {split: corpus.hash(split) for split in corpus.splits}
    made_of = {"format": FORMAT, "tokenizer": tokenizer.hash, "texts": hashes}
    folder = Path(cache) / hashlib.sha256(json.dumps(made_of).encode("utf-8")).hexdigest()
    found = _open(folder, made_of)
    if found is not None:
        return found
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".tokens-", dir=cache))
    except OSError as error:
        raise ValueError(f"cannot write token files into {cache}: {error.strerror}: choose another folder") from None
    try:
        _write(corpus, tokenizer, work, made_of, progress)
        if {split: corpus.hash(split) for split in corpus.splits} != hashes:
            raise ValueError(f"{corpus.name} changed while it was tokenized: start again")
        found = _open(folder, made_of)
        if found is not None:
            return found
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    written = _open(folder, made_of)
    assert written is not None, folder
    return written


def batch(tokens: TokenFile, *, step: int, seed: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """Random windows of a token file: inputs and, one token later, targets, int64 (batch context).

    A pure function of its arguments, so that training goes on from a step number alone.

    Raises ValueError for a text of fewer than context + 1 tokens and for numbers out of range.

    >>> tokens = TokenFile(ids=np.arange(100, dtype="<u2"), num_bytes=0, num_words=0, num_unknown=0)
    >>> inputs, targets = batch(tokens, step=7, seed=0, batch=2, context=5)
    >>> inputs.shape, bool((targets == inputs + 1).all())
    (torch.Size([2, 5]), True)
    """
    _check(tokens, batch=batch, context=context)
    if step < 0 or seed < 0:
        raise ValueError(f"step and seed must be 0 or more, got step={step}, seed={seed}")
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - context, size=batch)
    return _pair(tokens.ids[starts[:, None] + np.arange(context + 1)])


def windows(tokens: TokenFile, *, context: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All of a token file in order: disjoint windows that predict every token but the first exactly once.

    Inputs and targets are int64 (batch context); the windows that are left at the end come in a smaller
    batch, the last targets in one shorter window.

    Raises ValueError for a text of fewer than context + 1 tokens and for numbers out of range.

    >>> tokens = TokenFile(ids=np.arange(9, dtype="<u2"), num_bytes=0, num_words=0, num_unknown=0)
    >>> [targets.tolist() for _, targets in windows(tokens, context=3, batch=2)]
    [[[1, 2, 3], [4, 5, 6]], [[7, 8]]]
    """
    _check(tokens, batch=batch, context=context)
    return _windows(tokens, context, batch)


def _windows(tokens: TokenFile, context: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    targets = len(tokens) - 1
    whole = targets // context
    for first in range(0, whole, batch):
        starts = np.arange(first, min(first + batch, whole)) * context
        yield _pair(tokens.ids[starts[:, None] + np.arange(context + 1)])
    if whole * context < targets:
        yield _pair(tokens.ids[None, whole * context :])


def _pair(ids: np.ndarray) -> tuple[Tensor, Tensor]:
    both = torch.from_numpy(np.asarray(ids).astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _check(tokens: TokenFile, *, batch: int, context: int) -> None:
    if batch < 1 or context < 1:
        raise ValueError(f"batch and context must be at least 1, got batch={batch}, context={context}")
    if len(tokens) < context + 1:
        raise ValueError(
            f"text has {len(tokens)} tokens, needs at least context+1 = {context + 1}: "
            "lower --context or give more text"
        )


@dataclass(kw_only=True)
class _Counts:
    ids: int = 0
    bytes: int = 0
    words: int = 0
    unknown: int = 0
    in_word: bool = False

    def add(self, text: str, ids: np.ndarray, unknown: int | None) -> None:
        self.ids += len(ids)
        self.bytes += len(text.encode("utf-8"))
        # A word that runs over from the piece before has been counted there.
        self.words += len(text.split()) - (self.in_word and not text[0].isspace())
        self.in_word = not text[-1].isspace()
        self.unknown += 0 if unknown is None else int(np.count_nonzero(ids == unknown))


def _write(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, made_of: dict[str, Any], progress: Progress | None
) -> None:
    """One file of ids a split, and last the manifest that says how each must look."""
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    total = sum(corpus.size(split) for split in corpus.splits)
    before = 0
    splits: dict[str, dict[str, int | str]] = {}
    for split in corpus.splits:
        counts, digest = _Counts(), hashlib.sha256()
        with (folder / split).open("wb") as file:
            for text in corpus.texts(split):
                ids = np.asarray(tokenizer.encode(text), dtype=dtype)
                file.write(ids.tobytes())
                digest.update(ids.tobytes())
                counts.add(text, ids, tokenizer.unknown)
                if progress is not None:
                    progress(min(before + counts.bytes, total), total)
            _sync(file)
        before += corpus.size(split)
        if counts.ids == 0:
            raise ValueError(f"{corpus.name} has no {tokenizer.kind} in its {split} split: give more text")
        splits[split] = {
            "sha256": digest.hexdigest(),
            "num_ids": counts.ids,
            "num_bytes": counts.bytes,
            "num_words": counts.words,
            "num_unknown": counts.unknown,
        }
    with (folder / "manifest.json").open("w", encoding="utf-8", newline="\n") as file:
        json.dump({**made_of, "dtype": dtype, **splits}, file, indent=2)
        _sync(file)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _open(folder: Path, made_of: dict[str, Any]) -> TokenizedCorpus | None:
    """The token files of a folder, or None where one is missing or not what its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if {key: manifest[key] for key in made_of} != made_of:
            return None
        files = {split: _token_file(folder / split, manifest["dtype"], manifest[split]) for split in made_of["texts"]}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return TokenizedCorpus(**files)


def _token_file(file: Path, dtype: str, facts: dict[str, Any]) -> TokenFile:
    if file.stat().st_size != facts["num_ids"] * np.dtype(dtype).itemsize or _digest(file) != facts["sha256"]:
        raise ValueError(f"{file} is damaged: {facts['num_ids']} ids expected")
    counts = {name: facts[name] for name in ("num_bytes", "num_words", "num_unknown")}
    return TokenFile(ids=np.memmap(file, dtype=dtype, mode="r"), **counts)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
