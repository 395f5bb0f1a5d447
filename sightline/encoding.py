"""Text to the bytes of its token ids: fast on one core, and on all of them.

Words repeat, so the ids of what stands between two spaces are remembered: in byte-level BPE that is several times as
fast as asking the library for every piece anew. What is remembered has a bound. Knows nothing about files.
"""

import contextlib
import os
import re
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from sightline.tokenizers import END_OF_LINE, Tokenizer

REMEMBERED = 1 << 19
"""Stretches of text whose ids are remembered at a time: about 100 MB."""

_LONGEST = 64
# Ends before white space that follows something else: there no token of byte-level BPE runs on, and nothing that
# comes later changes what came before. Only these four are white space to everybody.
_STRETCHES = re.compile(r"\s*\S+(?:(?![ \t\r\n])\s\s*(?:\S+|\Z))*|\s+")
_TEXT, _IDS = struct.Struct("<Q"), struct.Struct("<QQQ")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The ids of a text as little-endian bytes, its words between white space, and how many ids are `<unk>`."""

    ids: bytes
    words: int
    unknown: int


def width(tokenizer: Tokenizer) -> str:
    """The dtype that holds every id of a vocabulary: two bytes or four."""
    return "<u2" if len(tokenizer) <= 1 << 16 else "<u4"


class Encoder:
    r"""Encodes as `Tokenizer.encode` does, into bytes.

    >>> encoder = Encoder(Tokenizer.train("words", ["the cat sat\n"]))
    >>> encoder.encode("the dog sat\n")
    Encoded(ids=b'\x04\x00\x00\x00\x03\x00\x01\x00', words=3, unknown=1)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._dtype = width(tokenizer)
        self._unknown = tokenizer.unknown
        makers = {"words": _of_words, "characters": _of_characters, "bpe": _of_bpe, "other": _of_other}
        self._ids = makers[tokenizer.kind](tokenizer, self._dtype)

    def encode(self, text: str) -> Encoded:
        """The ids of a text; one text after another, as `Corpus.texts` cuts them, gives those of the whole."""
        ids = self._ids(text)
        unknown = 0 if self._unknown is None else np.count_nonzero(np.frombuffer(ids, self._dtype) == self._unknown)
        return Encoded(ids=ids, words=len(text.split()), unknown=int(unknown))


def _of_words(tokenizer: Tokenizer, dtype: str) -> Callable[[str], bytes]:
    ids = {token: np.asarray(i, dtype).tobytes() for token, i in tokenizer.vocabulary.items()}
    assert tokenizer.unknown is not None
    get, unknown = ids.get, np.asarray(tokenizer.unknown, dtype).tobytes()
    return lambda text: b"".join([get(word, unknown) for word in text.replace("\n", f" {END_OF_LINE} ").split()])


def _of_characters(tokenizer: Tokenizer, dtype: str) -> Callable[[str], bytes]:
    ids = np.full(sys.maxunicode + 1, tokenizer.unknown, dtype)
    for token, i in tokenizer.vocabulary.items():
        if len(token) == 1:
            ids[ord(token)] = i
    return lambda text: ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")].tobytes()


def _of_bpe(tokenizer: Tokenizer, dtype: str) -> Callable[[str], bytes]:
    remembered = _Remembered(tokenizer, dtype)
    return lambda text: b"".join(map(remembered.__getitem__, _STRETCHES.findall(text)))


def _of_other(tokenizer: Tokenizer, dtype: str) -> Callable[[str], bytes]:
    # Nothing is known of where its rules may cut, so nothing is remembered.
    return lambda text: np.asarray(tokenizer.encode(text), dtype).tobytes()


class _Remembered(dict[str, bytes]):
    """The ids of each stretch of text, computed when first asked for."""

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        super().__init__()
        self._tokenizer, self._dtype = tokenizer, dtype

    def __missing__(self, stretch: str) -> bytes:
        ids = np.asarray(self._tokenizer.encode(stretch), self._dtype).tobytes()
        if len(stretch) <= _LONGEST:
            if len(self) >= REMEMBERED:
                self.clear()
            self[stretch] = ids
        return ids


# --- On all cores -------------------------------------------------------------------------------------


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    texts: Iterable[str], tokenizer: Tokenizer, processes: int
) -> Generator[tuple[str, Encoded], None, None]:
    """Encodes one text after another, in order, each with what came of it.

    With more than one process the texts go round them: each waits while the others work, so texts of equal length
    keep them all busy. They are programs of their own, not forks (which a process with threads must not make) and not
    `multiprocessing`'s (which would run the user's script again).

    >>> tokenizer = Tokenizer.train("characters", ["abc"])
    >>> [encoded.ids for _, encoded in encode_all(["ab", "c"], tokenizer, processes=2)]
    [b'\\x01\\x00\\x02\\x00', b'\\x03\\x00']
    """
    if processes == 1:
        encode = Encoder(tokenizer).encode
        yield from ((text, encode(text)) for text in texts)
        return
    with _workers(tokenizer, processes) as idle:
        busy: deque[tuple[str, _Worker]] = deque()
        for text in texts:
            if not idle:
                done, worker = busy.popleft()
                encoded = worker.answer()
                idle.append(worker)
                _ask(idle, busy, text)
                yield done, encoded
            else:
                _ask(idle, busy, text)
        for text, worker in busy:
            yield text, worker.answer()


def _ask(idle: "deque[_Worker]", busy: "deque[tuple[str, _Worker]]", text: str) -> None:
    worker = idle.popleft()
    worker.ask(text)
    busy.append((text, worker))


@contextlib.contextmanager
def _workers(tokenizer: Tokenizer, processes: int) -> Iterator["deque[_Worker]"]:
    workers: deque[_Worker] = deque()
    try:
        for _ in range(processes):
            workers.append(_Worker(tokenizer))
        yield workers.copy()
    finally:
        for worker in workers:
            worker.close()


# The package's own front door imports torch, which a worker has no use for.
_PROGRAM = """
import sys
sys.path[:] = sys.argv[2:]
import os, types
package = types.ModuleType("sightline")
package.__path__ = [sys.argv[1]]
sys.modules["sightline"] = package
from sightline.encoding import work
try:
    work(sys.stdin.buffer, sys.stdout.buffer)
except BrokenPipeError:
    os._exit(1)  # nobody listens any more, which the interpreter would complain about
"""


class _Worker:
    """A process that encodes: text goes in, ids come out, one answer for each question."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, Path(__file__).parent, *filter(None, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            # Ctrl-C in a terminal reaches the whole group: it is for the parent to say what becomes of the work.
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._in: IO[bytes] = self._process.stdin
        self._out: IO[bytes] = self._process.stdout
        self.ask(tokenizer.to_json())

    def ask(self, text: str) -> None:
        content = text.encode("utf-8")
        try:
            self._in.write(_TEXT.pack(len(content)))
            self._in.write(content)
            self._in.flush()
        except BrokenPipeError:
            self._fail()

    def answer(self) -> Encoded:
        head = self._out.read(_IDS.size)
        if len(head) < _IDS.size:
            self._fail()
        size, words, unknown = _IDS.unpack(head)
        ids = self._out.read(size)
        if len(ids) < size:
            self._fail()
        return Encoded(ids=ids, words=words, unknown=unknown)

    def _fail(self) -> None:
        raise OSError(f"a process that tokenizes ended with code {self._process.wait()}: is there enough memory?")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._in, self._out):
            with contextlib.suppress(BrokenPipeError):  # what it was sent and never read
                pipe.close()


def work(questions: IO[bytes], answers: IO[bytes]) -> None:
    r"""What a worker does until nobody asks any more: first comes a tokenizer.json, then texts.

    >>> from io import BytesIO
    >>> parts = [Tokenizer.train("characters", ["a"]).to_json().encode(), b"aaa"]
    >>> answers = BytesIO()
    >>> work(BytesIO(b"".join(_TEXT.pack(len(part)) + part for part in parts)), answers)
    >>> answers.getvalue()[_IDS.size :]
    b'\x01\x00\x01\x00\x01\x00'
    """
    encoder: Encoder | None = None
    while head := questions.read(_TEXT.size):
        (size,) = _TEXT.unpack(head)
        content = questions.read(size)
        if len(content) < size:
            return  # who asked has died
        text = content.decode("utf-8")
        if encoder is None:
            encoder = Encoder(Tokenizer.of_json(text))
            continue
        encoded = encoder.encode(text)
        answers.write(_IDS.pack(len(encoded.ids), encoded.words, encoded.unknown))
        answers.write(encoded.ids)
        answers.flush()
