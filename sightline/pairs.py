"""Parallel text: pairs of a source and a target, their tokens, and padded batches of them by index.

Knows nothing about models.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sightline import numerals
from sightline.tokenizers import Tokenizer

EMBEDDED = "numerals"
"""The name of the embedded job."""
HELD_OUT = 20
"""Of a text without splits, the pairs of one source in so many are for validation."""
_EMBEDDED_TRAIN, _EMBEDDED_VALID = 100_000, 2_000
_NEIGHBOURS = 0.25


class Pair(NamedTuple):
    """A source, its target, and the line they stand in."""

    source: str
    target: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Pairs to train on and pairs to be scored on; no source is in both."""

    name: str
    train: Sequence[Pair]
    valid: Sequence[Pair]
    test: Sequence[Pair] = ()

    def split(self, name: str) -> Sequence[Pair]:
        """The pairs of one split; of "all", those of all.

        Raises: ValueError for a split without pairs.
        """
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        found = [*self.train, *self.valid, *self.test] if name == "all" else splits.get(name, ())
        if not found:
            raise ValueError(f"{self.name} has no {name} split; choose train, valid or all")
        return found


class Batch(NamedTuple):
    """Padded at the ends with 0; a target begins and ends with the token of a line's end."""

    source: Tensor
    """(batch source_tokens)"""
    source_lengths: Tensor
    """(batch)"""
    target: Tensor
    """(batch target_tokens)"""
    target_lengths: Tensor
    """(batch)"""


# --- Text --------------------------------------------------------------------------------------------


def open_pairs(source: str | Path, target: str | Path | None = None) -> Parallel:
    """Read parallel text, UTF-8.

    Without `target`, `source` is a file of lines `source<TAB>target`, a folder with train.tsv, valid.tsv and, if there
    is one, test.tsv, or 'numerals', the embedded job. With it, the two are aligned line by line. Where there are no
    splits, the hash of a source decides: one in 20 is for validation, whatever its place in the file, so that no source
    is in both.

    Raises: ValueError for a file that is missing, empty or not UTF-8, a line without exactly one tab, an empty source
    or target, files of different length, or a text too small to be split; with the line's number.
    """
    if str(source) == EMBEDDED and target is None:
        return _embedded()
    source = Path(source)
    if target is not None:
        pairs = _aligned(source, Path(target))
        return _split(f"{source} and {target}", pairs)
    if not source.is_dir():
        return _split(str(source), _tab_separated(source))
    train, valid = (_tab_separated(source / f"{name}.tsv") for name in ("train", "valid"))
    test = _tab_separated(source / "test.tsv") if (source / "test.tsv").exists() else ()
    _check_disjoint(source, train, valid)
    return Parallel(name=str(source), train=train, valid=valid, test=test)


def _embedded() -> Parallel:
    splits = {
        name: [
            Pair(*pair, line) for line, pair in enumerate(numerals.examples(count, held_out=name == "valid"), start=1)
        ]
        for name, count in (("train", _EMBEDDED_TRAIN), ("valid", _EMBEDDED_VALID))
    }
    return Parallel(name="the embedded numerals", **splits)


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 file, without their ends.

    Raises: ValueError for a file that is missing or a line that is not UTF-8.
    """
    if not file.is_file():
        raise ValueError(f"expected a file of text, but {file} does not exist")
    lines = []
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {number} of {file} is not UTF-8 (byte {line[error.start]:#04x}): convert the file first"
            ) from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise ValueError(f"expected lines of text, but {file} is empty")
    return lines


def _tab_separated(file: Path) -> list[Pair]:
    pairs = []
    for number, line in enumerate(read_lines(file), start=1):
        columns = line.split("\t")
        if len(columns) != 2:
            raise ValueError(
                f"expected line {number} of {file} to be source<TAB>target, got {len(columns)} column"
                f"{'s' * (len(columns) != 1)}: {line[:60]!r}"
            )
        pairs.append(Pair(*_checked(columns, number, (file, file)), number))
    return pairs


def _aligned(source: Path, target: Path) -> list[Pair]:
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        longer, shorter = (source, target) if len(sources) > len(targets) else (target, source)
        least = min(len(sources), len(targets))
        raise ValueError(
            f"expected two files of equally many lines, got {len(sources):,} in {source} and {len(targets):,} in "
            f"{target}: line {least + 1:,} of {longer} has no partner in {shorter}"
        )
    pairs = zip(sources, targets, strict=True)
    return [Pair(*_checked(pair, number, (source, target)), number) for number, pair in enumerate(pairs, start=1)]


def _checked(pair: Sequence[str], number: int, files: tuple[Path, Path]) -> tuple[str, str]:
    for side, text, file in zip(("source", "target"), pair, files, strict=True):
        if not text.strip():
            raise ValueError(f"expected a {side} in line {number} of {file}, but it is empty: fill it or drop the pair")
    return pair[0], pair[1]


def _split(name: str, pairs: list[Pair]) -> Parallel:
    train, valid = [], []
    for pair in pairs:
        hashed = int.from_bytes(sha256(pair.source.encode("utf-8")).digest()[:8], "big")
        (train if hashed % HELD_OUT else valid).append(pair)
    if not train or not valid:
        raise ValueError(
            f"expected enough pairs to hold one source in {HELD_OUT} out for validation, got {len(pairs)} in {name}: "
            "give more, or a folder with train.tsv and valid.tsv"
        )
    return Parallel(name=name, train=train, valid=valid)


def _check_disjoint(folder: Path, train: list[Pair], valid: list[Pair]) -> None:
    known = {pair.source: pair.line for pair in train}
    for pair in valid:
        if pair.source in known:
            raise ValueError(
                f"expected no source in both splits of {folder}, but line {pair.line} of valid.tsv is line "
                f"{known[pair.source]} of train.tsv: drop one"
            )


# --- Tokens ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenPairs:
    """The ids of pairs, in memory: each source with its end of line, and its target between two ends of line.

    >>> pairs = TokenPairs(ids=np.array([5, 6, 0, 7, 0]), ends=np.array([2, 5]), num_bytes=2, num_unknown=0)
    >>> pairs.padded(np.array([0])).target
    tensor([[0, 7, 0]])
    """

    ids: np.ndarray
    """All ids, pair by pair."""
    ends: np.ndarray
    """Where each source and each target ends in `ids`, in turn."""
    num_bytes: int
    """UTF-8 bytes of the targets, with their line ends."""
    num_unknown: int
    """Ids of targets that are `<unk>`."""

    def __len__(self) -> int:
        return len(self.ends) // 2

    @cached_property
    def lengths(self) -> np.ndarray:
        """(pairs, 2): tokens of source and of target."""
        return np.diff(self.ends, prepend=0).reshape(-1, 2)

    @cached_property
    def num_predicted(self) -> int:
        """What a decoder predicts: each target but its first token."""
        return int(self.lengths[:, 1].sum()) - len(self)

    @cached_property
    def order(self) -> np.ndarray:
        """The pairs by length."""
        return np.argsort(self.lengths.sum(1), kind="stable")

    @cached_property
    def reach(self) -> np.ndarray:
        """Tokens of all pairs up to and with each one in `order`."""
        return self.lengths.sum(1)[self.order].cumsum()

    def padded(self, chosen: np.ndarray) -> Batch:
        """Some pairs as one batch."""
        sides = [
            [
                self.ids[stop - n : stop]
                for stop, n in zip(self.ends[2 * chosen + side], self.lengths[chosen, side], strict=True)
            ]
            for side in (0, 1)
        ]
        return Batch(*pad(sides[0]), *pad(sides[1]))


def pad(sequences: Sequence[np.ndarray] | Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Sequences of ids as int64 (batch tokens), with zeros after the shorter ones, and their lengths (batch).

    >>> pad([[5, 6], [7]])
    (tensor([[5, 6],
            [7, 0]]), tensor([2, 1]))
    """
    lengths = torch.tensor([len(ids) for ids in sequences])
    padded = np.zeros((len(sequences), int(lengths.max())), dtype=np.int64)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(padded), lengths


def line_end(tokenizer: Tokenizer) -> int:
    """The token of a line's end, with which a target begins and ends.

    Raises: ValueError for a vocabulary without one.
    """
    ids = [] if tokenizer.unknown_words("\n") else tokenizer.encode("\n")
    if len(ids) != 1:
        raise ValueError("expected a vocabulary with one token for the end of a line: train it on lines of text")
    return ids[0]


def source_ids(text: str, line: int, tokenizer: Tokenizer, *, context: int) -> list[int]:
    """The ids of one text to be translated, with the end of its line; `line` is the number that errors call it by.

    Raises: ValueError for a text that is empty, has a line break or words that the vocabulary lacks, or is longer than
    the context.
    """
    if not text.strip() or "\n" in text:
        what = "it has a line break" if text.strip() else "it is empty"
        raise ValueError(f"expected one line of text to translate, but of line {line} {what}")
    lacking = tokenizer.unknown_words(text)
    if lacking:
        named = ", ".join(map(repr, lacking[:5])) + (f", ... ({len(lacking)} in all)" if len(lacking) > 5 else "")
        raise ValueError(f"line {line} has {tokenizer.kind} that the model's vocabulary lacks: {named}")
    ids = [*tokenizer.encode(text), line_end(tokenizer)]
    if len(ids) > context:
        raise ValueError(f"line {line} has {len(ids)} tokens, more than the model's context of {context}: shorten it")
    return ids


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, *, context: int | None, name: str) -> TokenPairs:
    """The tokens of pairs; `context` None lets them have any length.

    Raises: ValueError for a source or target that is longer than the context, with the line's number.
    """
    end, unknown = line_end(tokenizer), 0
    ids, ends = array("i"), array("q")
    for pair in pairs:
        source = [*tokenizer.encode(pair.source), end]
        target = [end, *tokenizer.encode(pair.target), end]
        for side, count in (("source", len(source)), ("target", len(target) - 1)):
            if context is not None and count > context:
                raise ValueError(
                    f"the {side} in line {pair.line} of {name} has {count} tokens, more than the context of {context}: "
                    "give a larger --context or shorten it"
                )
        unknown += target.count(tokenizer.unknown) if tokenizer.unknown is not None else 0
        for part in (source, target):
            ids.extend(part)
            ends.append(len(ids))
    size = sum(len(pair.target.encode("utf-8")) + 1 for pair in pairs)
    return TokenPairs(ids=np.array(ids), ends=np.array(ends), num_bytes=size, num_unknown=unknown)


def batch(pairs: TokenPairs, *, step: int, seed: int, tokens: int) -> Batch:
    """Random pairs of similar length, at most `tokens` in all with their padding (but at least one pair).

    A pure function of its arguments, so that training goes on from a step number alone. Long and short pairs are drawn
    about equally often: fewer long ones fit, and batches of them come more often.

    >>> ends = np.cumsum([n % 7 + 2 for n in range(200)])
    >>> pairs = TokenPairs(ids=np.ones(ends[-1]), ends=ends, num_bytes=0, num_unknown=0)
    >>> source, lengths, target, _ = batch(pairs, step=3, seed=0, tokens=64)
    >>> source.numel() + target.numel() <= 64, bool((lengths <= source.shape[1]).all())
    (True, True)
    """
    draw = np.random.default_rng([seed, step])
    middle = int(np.searchsorted(pairs.reach, draw.integers(pairs.reach[-1]), side="right"))
    most = max(1, min(len(pairs), tokens // 2))
    near = max(most, int(_NEIGHBOURS * len(pairs)))
    offsets = draw.choice(min(near, len(pairs)), size=most, replace=False) - near // 2
    chosen = pairs.order[(middle + offsets) % len(pairs)]
    return pairs.padded(chosen[: _fitting(pairs.lengths[chosen], tokens)])


def batches(pairs: TokenPairs, *, tokens: int) -> Iterator[Batch]:
    """Every pair once, in batches of similar length of at most `tokens`; a part of them is like the whole."""
    cuts, first = [], 0
    while first < len(pairs):
        count = _fitting(pairs.lengths[pairs.order[first : first + max(1, tokens // 2)]], tokens)
        cuts.append((first, first + count))
        first += count
    for number in np.random.default_rng(0).permutation(len(cuts)):
        first, stop = cuts[number]
        yield pairs.padded(pairs.order[first:stop])


def _fitting(lengths: np.ndarray, tokens: int) -> int:
    """How many of the pairs, from the first, make a batch."""
    padded = np.maximum.accumulate(lengths, axis=0).sum(1) * np.arange(1, len(lengths) + 1)
    return max(1, int((padded <= tokens).sum()))
