"""Where text comes from: a file, a folder, standard input, or a corpus by name, cut into named splits.

A Corpus is read as often as needed, in pieces of about 64 kB, and never held whole; every byte is checked when
it is opened, so that a bad one is known before any work is done. Knows nothing about tokens.
"""

import atexit
import codecs
import difflib
import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sightline.downloads import DOWNLOADS, cache_folder

Errors = Literal["strict", "replace"]

PIECE = 1 << 16
SPLITS = ("train", "valid", "test")
_OTHER_NAMES = {"val": "valid", "validation": "valid", "dev": "valid"}
_SUFFIXES = (".txt", ".md", ".tokens", ".raw", "")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes `start` to `end` of a file, or of bytes in memory; `name` is what an error calls them."""

    name: str
    source: Path | bytes
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Named splits of text, made by `open_corpus`.

    `skipped` has one line for each file of a folder that was left out, and says why.

    >>> corpus = open_corpus("embedded")
    >>> corpus.splits
    ('train', 'valid')
    >>> corpus.size("train") > 8 * corpus.size("valid")
    True
    >>> next(corpus.texts("train"))[:22]
    'The "assert" statement'
    """

    name: str
    spans: Mapping[str, tuple[Span, ...]]
    errors: Errors = "strict"
    skipped: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits there are, among "train", "valid", "test"."""
        return tuple(self.spans)

    @property
    def left_out(self) -> str:
        """One line about `skipped`: how many, and the first of them; empty if nothing was."""
        if not self.skipped:
            return ""
        more = f"; and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
        return " ".join(f"{self.name}: {len(self.skipped)} left out: {'; '.join(self.skipped[:3])}{more}".split())

    def texts(self, split: str) -> Iterator[str]:
        """The text of a split in pieces of about 64 kB, line ends and all as they are in the files.

        A piece begins with the white space after a word, so that its tokens are those of the whole text;
        where there is no white space for 64 kB it may begin with any character.

        Raises ValueError for a split that is not there, bytes that are not text, a file that has shrunk.
        """
        return _pieces(_decode(self._spans(split), self.errors))

    def hash(self, split: str) -> str:
        """The sha256 of the bytes of a split, read anew at every call."""
        digest = hashlib.sha256()
        for span in self._spans(split):
            for chunk in _chunks(span):
                digest.update(chunk)
        return digest.hexdigest()

    def size(self, split: str) -> int:
        """The bytes of a split."""
        return _size(self._spans(split))

    def _spans(self, split: str) -> tuple[Span, ...]:
        if split not in self.spans:
            raise ValueError(f"{self.name} has the splits {', '.join(self.splits)}, not {split!r}")
        return self.spans[split]


def open_corpus(source: str | Path, *, errors: Errors = "strict", cache: str | Path | None = None) -> Corpus:
    """Open text for reading, and check every byte of it.

    source          splits
    a file          its first 90 % of bytes train, the rest validates (cut between two characters)
    a folder        with train, valid, test: as they are (files .txt, .md, .tokens, .raw or without suffix,
                    or folders; WikiText's wiki.train.tokens too); without valid, train is cut as one text
    another folder  its text files, by name, then those of its sub-folders, cut as one text
    "-"             standard input, cut as one text
    "embedded"      the language documentation inside every CPython (`pydoc_data.topics`), cut as one text
    "wikitext-2"    what `download` has put into `cache` (by default `cache_folder()`); nothing is fetched

    A name means the corpus; "./embedded" or `Path("embedded")` means the file. What is hidden, empty or not
    text in a folder is left out, and listed in `Corpus.skipped`. A UTF-8 byte order mark is no part of the
    text. With `errors="replace"` bytes that are not UTF-8 become U+FFFD.

    Raises ValueError, in one line, for a source that is missing, empty, binary, not UTF-8 or too short to cut.
    """
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors must be 'strict' or 'replace', got {errors!r}")
    if source == "-":
        return _standard_input(errors)
    if source == "embedded":
        return _one_text("embedded", [_embedded()], errors)
    if isinstance(source, str) and source in DOWNLOADS:
        return _downloaded(source, errors, cache_folder() if cache is None else Path(cache))
    if source == "":
        raise ValueError("the source is empty, expected the name of a file, a folder or a corpus: . is this folder")
    path = Path(source)
    if path.is_dir():
        return _folder(path, path.resolve().name, errors)
    if path.is_file():
        return _one_text(path.stem, [_checked(path, str(path), errors)], errors)
    if path.exists():
        raise ValueError(f"{path} is neither a file nor a folder: to read from a pipe, redirect it and give -")
    raise ValueError(_missing(path))


def _chunks(span: Span) -> Iterator[bytes]:
    left = span.end - span.start
    with io.BytesIO(span.source) if isinstance(span.source, bytes) else span.source.open("rb") as stream:
        stream.seek(span.start)
        while left:
            chunk = stream.read(min(left, PIECE))
            if not chunk:
                raise ValueError(f"{span.name} has lost its last {left} bytes since it was opened: start again")
            left -= len(chunk)
            yield chunk


def _decode(spans: Iterable[Span], errors: Errors) -> Iterator[str]:
    for span in spans:
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        at = span.start
        for chunk in _chunks(span):
            zero = chunk.find(0)
            if zero >= 0:
                raise ValueError(f"{span.name} is binary, not text: NUL byte at offset {at + zero}{_utf_16(span)}")
            pending = len(decoder.getstate()[0])
            last = at + len(chunk) == span.end
            try:
                yield decoder.decode(chunk, last)
            except UnicodeDecodeError as error:
                raise ValueError(_not_utf_8(span, at - pending + error.start)) from None
            at += len(chunk)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        rest += text
        end = _word_end(rest)
        if end:
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _word_end(text: str) -> int:
    """The last place where white space follows a word, or the end of the text."""
    for i in range(len(text) - 1, 0, -1):
        if text[i] in " \t\r\n" and not text[i - 1].isspace():
            return i
    return len(text)


def _not_utf_8(span: Span, offset: int) -> str:
    line = 1 + sum(chunk.count(b"\n") for chunk in _chunks(replace(span, start=0, end=offset)))
    byte = next(_chunks(replace(span, start=offset, end=offset + 1)))[0]
    return (
        f"{span.name} is not UTF-8: byte 0x{byte:02x} at offset {offset} (line {line}): "
        'convert it, or read such bytes as U+FFFD with --errors replace (errors="replace")'
    )


def _utf_16(span: Span) -> str:
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return " (it looks like UTF-16: convert it to UTF-8)" if next(_chunks(span))[:2] in marks else ""


def _size(spans: Iterable[Span]) -> int:
    return sum(span.end - span.start for span in spans)


def _one_text(name: str, spans: Sequence[Span], errors: Errors, skipped: Sequence[str] = ()) -> Corpus:
    train, valid = _cut(name, spans)
    return Corpus(name=name, spans={"train": train, "valid": valid}, errors=errors, skipped=tuple(skipped))


def _cut(name: str, spans: Sequence[Span]) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """The first 90 % of the bytes, and the rest."""
    total = _size(spans)
    left = total * 9 // 10
    first: list[Span] = []
    rest: list[Span] = []
    for span in spans:
        middle = min(span.start + left, span.end)
        left -= middle - span.start
        if span.start < middle < span.end:
            middle = _character_start(span, middle)
        if span.start < middle:
            first.append(replace(span, end=middle))
        if middle < span.end:
            rest.append(replace(span, start=middle))
    if not first or not rest:
        raise ValueError(f"{name} has {total} bytes, too few to cut into train and valid: give more text")
    return tuple(first), tuple(rest)


def _character_start(span: Span, at: int) -> int:
    """The start of the character that byte `at` belongs to: at most three bytes before it."""
    start = max(span.start, at - 3)
    around = next(_chunks(replace(span, start=start, end=at + 1)))
    back = 0
    while back < len(around) - 1 and around[-1 - back] & 0b1100_0000 == 0b1000_0000:
        back += 1
    return at - back


def _checked(file: Path, name: str, errors: Errors) -> Span:
    """All of a file, once read from end to end."""
    with file.open("rb") as stream:
        start = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        end = stream.seek(0, io.SEEK_END)
    if start == end:
        raise ValueError(f"{name} is empty, expected text: give a file that has some")
    span = Span(name=name, source=file, start=start, end=end)
    for _ in _decode([span], errors):
        pass
    return span


def _embedded() -> Span:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(f"this Python lacks the embedded corpus, pydoc_data.topics ({error}): name a file") from None
    text = "\n".join(topics[topic] for topic in sorted(topics)).encode("utf-8")
    return Span(name="embedded", source=text, start=0, end=len(text))


def _standard_input(errors: Errors) -> Corpus:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("standard input is a terminal, expected text: redirect some into it, or name a file")
    # A pipe can be read once, a corpus must be readable often: keep a copy for as long as the process lives.
    folder = Path(tempfile.mkdtemp(prefix="sightline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "text"
    with file.open("wb") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy, PIECE)
    return _one_text("standard input", [_checked(file, "standard input", errors)], errors)


def _downloaded(name: str, errors: Errors, cache: Path) -> Corpus:
    if not (cache / name).is_dir():
        wanted = DOWNLOADS[name]
        raise ValueError(
            f"{name} is not in {cache}: --download (download({name!r}, folder)) would fetch {wanted.url} "
            f"({wanted.size / 1e6:.1f} MB, licence {wanted.licence})"
        )
    return _folder(cache / name, name, errors)


def _folder(folder: Path, name: str, errors: Errors) -> Corpus:
    entries, skipped = _split_entries(folder)
    if "train" not in entries:
        spans, skipped = _text_files(folder, errors)
        return _one_text(name, spans, errors, skipped)
    splits: dict[str, tuple[Span, ...]] = {}
    for split, entry in entries.items():
        if entry.is_dir():
            spans, more = _text_files(entry, errors)
            skipped += [f"{entry.name}/{line}" for line in more]
        else:
            spans = [_checked(entry, str(entry), errors)]
        splits[split] = tuple(spans)
    if "valid" not in splits:
        splits["train"], splits["valid"] = _cut(name, splits["train"])
    return Corpus(
        name=name,
        spans={split: splits[split] for split in SPLITS if split in splits},
        errors=errors,
        skipped=tuple(skipped),
    )


def _split_entries(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Which file or folder is which split, and a line for each that is none."""
    entries: dict[str, Path] = {}
    skipped: list[str] = []
    for entry in sorted(folder.iterdir()):
        stem, suffix = (entry.name, "") if entry.is_dir() else (entry.stem, entry.suffix)
        stem = stem.lower().removeprefix("wiki.")
        split = _OTHER_NAMES.get(stem, stem)
        if split not in SPLITS or suffix.lower() not in _SUFFIXES:
            skipped.append(f"{entry.name} is not train, valid or test")
        elif split in entries:
            raise ValueError(f"{folder} has two texts for {split}, {entries[split].name} and {entry.name}: keep one")
        else:
            entries[split] = entry
    return entries, skipped


def _text_files(folder: Path, errors: Errors) -> tuple[list[Span], list[str]]:
    """The text files under a folder, a newline after each that lacks its last one, and what was left out."""
    spans: list[Span] = []
    skipped: list[str] = []
    for file in _walk(folder, skipped):
        try:
            span = _checked(file, file.relative_to(folder).as_posix(), errors)
        except ValueError as error:
            skipped.append(str(error))
            continue
        if spans and next(_chunks(replace(spans[-1], start=spans[-1].end - 1))) != b"\n":
            spans.append(Span(name="newline", source=b"\n", start=0, end=1))
        spans.append(span)
    if not spans:
        why = f": {len(skipped)} left out, {'; '.join(skipped[:3])}" if skipped else ", it is empty"
        raise ValueError(f"folder {folder} has no text{why}: give one that has text files")
    return spans, skipped


def _walk(folder: Path, skipped: list[str]) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, onerror=_raise):
        here = Path(parent)
        hidden = {name for name in [*folders, *files] if name.startswith(".")}
        links = {name for name in folders if (here / name).is_symlink()} - hidden
        odd = {name for name in files if not (here / name).is_file()} - hidden
        for names, what in ((hidden, "hidden"), (links, "a link to a folder"), (odd, "not a regular file")):
            skipped.extend(f"{(here / name).relative_to(folder).as_posix()} is {what}" for name in sorted(names))
        folders[:] = sorted(set(folders) - hidden - links)
        yield from (here / name for name in sorted(set(files) - hidden - odd))


def _raise(error: OSError) -> None:
    # os.walk would pass over a folder that it may not read.
    raise error


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no file or folder {path}: there is no folder {path.parent} either"
    there = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, [*there, "embedded", *DOWNLOADS], n=1)
    if not near:
        return f"no file or folder {path}: give a file, a folder, - for standard input, or embedded"
    return f"no file or folder {path}: did you mean {path.parent / near[0] if near[0] in there else near[0]}?"
