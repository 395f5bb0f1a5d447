"""Memory-mapped token files, and batches from them by index.

A split of a corpus becomes one file of ids in a cache folder that is named by what went into it: the bytes of
the text, the tokenizer, the format. Knows nothing about models.
"""

import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from sightline.corpora import Corpus
from sightline.encoding import Encoded, cores, encode_all, width
from sightline.files import sha256
from sightline.locks import Lock
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
    file whose size or checksum is not the manifest's is written anew. Memory stays constant, and a long text
    is shared out to all cores. What a killed call has written the next one goes on with; two calls for the
    same text take turns. `progress(bytes_done, bytes_total)` is called while tokenizing, and not at all when
    nothing is to do.

    Raises ValueError for a split without a token, a text that changes meanwhile, a cache that cannot be written.
    """
    cache = Path(cache)
    hashes = {split: corpus.hash(split) for split in corpus.splits}
    made_of = {"format": FORMAT, "tokenizer": tokenizer.hash, "texts": hashes}
    folder = cache / hashlib.sha256(json.dumps(made_of).encode("utf-8")).hexdigest()
    found = _open(folder, made_of)
    if found is not None:
        return found
    with _work_folder(cache, folder.name) as work:
        found = _open(folder, made_of)  # another process may have been faster
        if found is not None:
            return found
        _Writer(corpus, tokenizer, work, progress).write(made_of)
        if {split: corpus.hash(split) for split in corpus.splits} != hashes:
            raise ValueError(f"{corpus.name} changed while it was tokenized: start again")
        with _into(cache):
            if folder.exists():
                shutil.rmtree(folder)
            work.rename(folder)
    written = _open(folder, made_of)
    assert written is not None, folder
    return written


def batch(
    tokens: TokenFile, *, step: int, seed: int, batch: int, context: int, part: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Random windows of a token file: inputs and, one token later, targets, int64 (batch context).

    A pure function of its arguments, so that training goes on from a step number alone. `part` (i, n) is the i-th of
    n parts of the batch, as even as can be: together they are the batch, whatever n is.

    Raises ValueError for a text of fewer than context + 1 tokens and for numbers out of range.

    >>> tokens = TokenFile(ids=np.arange(100, dtype="<u2"), num_bytes=0, num_words=0, num_unknown=0)
    >>> inputs, targets = batch(tokens, step=7, seed=0, batch=2, context=5)
    >>> inputs.shape, bool((targets == inputs + 1).all())
    (torch.Size([2, 5]), True)
    """
    starts = window_starts(tokens, step=step, seed=seed, batch=batch, context=context, part=part)
    return _pair(tokens.ids[starts[:, None] + np.arange(context + 1)])


def window_starts(
    tokens: TokenFile, *, step: int, seed: int, batch: int, context: int, part: tuple[int, int] = (0, 1)
) -> np.ndarray:
    """Where the windows of a `batch` of the same arguments begin."""
    _check(tokens, batch=batch, context=context)
    if step < 0 or seed < 0:
        raise ValueError(f"step and seed must be 0 or more, got step={step}, seed={seed}")
    index, parts = part
    if not 0 <= index < parts <= batch:
        raise ValueError(f"expected part {index} of {parts} parts of a batch of {batch}: each has a window at least")
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - context, size=batch)
    return starts[batch * index // parts : batch * (index + 1) // parts]


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


# --- Writing -----------------------------------------------------------------------------------------

_WORK = ".tokens-"
_JOURNAL = "journal.json"
BLOCK = 1 << 20
"""Characters, at least, that are encoded at a time."""
NOTED_EVERY = 64
"""Blocks after which a killed call need not be done again."""
SHARED_FROM = 16 * BLOCK
"""Bytes of text below which processes would take longer to start than to work."""


@contextmanager
def _into(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write token files into {cache}: {error.strerror}: choose another folder") from None


@contextmanager
def _work_folder(cache: Path, name: str) -> Iterator[Path]:
    """The folder to work in, held by this process alone, with what a killed one has left there.

    Ctrl-C leaves it for the next call; an error leaves nothing.
    """
    work = cache / (_WORK + name)
    lock = _lock_of(work)
    with _into(cache):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_orphans(cache, work)
        if not lock.take():
            warnings.warn(f"process {lock.holder()} tokenizes the same text: waiting for it", stacklevel=4)
            lock.take(wait=True)
    try:
        with _into(cache):
            work.mkdir(exist_ok=True)
        yield work
    except Exception:  # whatever failed, half a work folder is not gone on with; a kill, which is, comes past here
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        if work.exists() and not (work / _JOURNAL).exists():
            shutil.rmtree(work, ignore_errors=True)
        lock.give_back()


def _lock_of(work: Path) -> Lock:
    return Lock(work.with_name(f"{work.name}.lock"))


def _remove_orphans(cache: Path, own: Path) -> None:
    """Removes what calls for other texts left that were killed."""
    for path in list(cache.glob(_WORK + "*")):
        work = path.with_suffix("")
        if work == own or not (lock := _lock_of(work)).take():
            continue
        shutil.rmtree(work, ignore_errors=True)
        lock.give_back()


@dataclass(kw_only=True)
class _Counts:
    """How far a split is: blocks of text read, and what has been written of them."""

    blocks: int = 0
    ids: int = 0
    bytes: int = 0
    words: int = 0
    unknown: int = 0
    in_word: bool = False

    def add(self, text: str, encoded: Encoded, itemsize: int) -> None:
        self.blocks += 1
        self.ids += len(encoded.ids) // itemsize
        self.bytes += len(text.encode("utf-8"))
        # A word that runs over from the block before has been counted there.
        self.words += encoded.words - (self.in_word and not text[0].isspace())
        self.in_word = not text[-1].isspace()
        self.unknown += encoded.unknown


class _Writer:
    """Writes one file of ids a split, and last the manifest that says how each must look."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: Progress | None) -> None:
        self.corpus, self.tokenizer, self.folder, self.progress = corpus, tokenizer, folder, progress
        self.dtype = np.dtype(width(tokenizer))
        self.total = sum(corpus.size(split) for split in corpus.splits)
        self.counts = {split: _Counts() for split in corpus.splits}
        shared = self.total >= SHARED_FROM and tokenizer.kind in ("words", "bpe")  # characters take a table, not time
        self.processes = cores() if shared else 1

    def write(self, made_of: dict[str, Any]) -> None:
        self._find_journal()
        splits = {split: self._write(split) for split in self.corpus.splits}
        with _into(self.folder.parent):
            (self.folder / _JOURNAL).unlink(missing_ok=True)
            with (self.folder / "manifest.json").open("w", encoding="utf-8", newline="\n") as file:
                json.dump({**made_of, "dtype": self.dtype.str, **splits}, file, indent=2)
                _sync(file)

    def _write(self, split: str) -> dict[str, int | str]:
        counts = self.counts[split]
        with _into(self.folder.parent):
            file = (self.folder / split).open("ab")
        with file:
            digest = self._kept(split)
            blocks = itertools.islice(_blocks(self.corpus.texts(split)), counts.blocks, None)
            with closing(encode_all(blocks, self.tokenizer, self.processes)) as answers:
                for text, encoded in answers:
                    with _into(self.folder.parent):
                        file.write(encoded.ids)
                    digest.update(encoded.ids)
                    counts.add(text, encoded, self.dtype.itemsize)
                    if counts.blocks % NOTED_EVERY == 0:
                        self._note(file)
                    if self.progress is not None:
                        self.progress(min(sum(c.bytes for c in self.counts.values()), self.total), self.total)
            with _into(self.folder.parent):
                _sync(file)
        if counts.ids == 0:
            raise ValueError(f"{self.corpus.name} has no {self.tokenizer.kind} in its {split} split: give more text")
        return {
            "sha256": digest.hexdigest(),
            "num_ids": counts.ids,
            "num_bytes": counts.bytes,
            "num_words": counts.words,
            "num_unknown": counts.unknown,
        }

    def _note(self, file: IO[bytes]) -> None:
        """Notes how far the work is, once that much of it is on the disk."""
        with _into(self.folder.parent):
            _sync(file)
            new = self.folder / f"{_JOURNAL}.new"
            new.write_text(json.dumps({split: asdict(counts) for split, counts in self.counts.items()}))
            new.replace(self.folder / _JOURNAL)

    def _find_journal(self) -> None:
        """Goes back to what is noted, and to the beginning where nothing is or it cannot be."""
        with _into(self.folder.parent):
            try:
                noted = json.loads((self.folder / _JOURNAL).read_text())
                self.counts = {split: _Counts(**noted[split]) for split in self.corpus.splits}
                for split, counts in self.counts.items():
                    self._cut(self.folder / split, counts.ids * self.dtype.itemsize)
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                self.counts = {split: _Counts() for split in self.corpus.splits}
                for path in self.folder.iterdir():
                    path.unlink()

    def _cut(self, file: Path, size: int) -> None:
        if size and file.stat().st_size < size:
            raise ValueError(f"{file} is shorter than noted")
        if file.exists():
            os.truncate(file, size)

    def _kept(self, split: str) -> "hashlib._Hash":
        digest = hashlib.sha256()
        with (self.folder / split).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest


def _blocks(texts: Iterator[str]) -> Iterator[str]:
    """Pieces of text joined into fewer: as few as possible of at least `BLOCK` characters, but for the last."""
    parts: list[str] = []
    length = 0
    for text in texts:
        parts.append(text)
        length += len(text)
        if length >= BLOCK:
            yield "".join(parts)
            parts, length = [], 0
    if parts:
        yield "".join(parts)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


# --- Reading -----------------------------------------------------------------------------------------


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
    if file.stat().st_size != facts["num_ids"] * np.dtype(dtype).itemsize or sha256(file) != facts["sha256"]:
        raise ValueError(f"{file} is damaged: {facts['num_ids']} ids expected")
    counts = {name: facts[name] for name in ("num_bytes", "num_words", "num_unknown")}
    return TokenFile(ids=np.memmap(file, dtype=dtype, mode="r"), **counts)
