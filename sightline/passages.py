"""Where things stand in a text of tokens: its headings, its lines, and what is searched for.

Knows nothing of attention.
"""

import codecs
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

MOST_TITLES = 2_000
MOST_LINES = 20_000
MOST_HITS = 1_000
LONGEST_TITLE = 60

_BYTES = re.compile(r"\\x([89a-f][0-9a-f])")
_HEADINGS = (
    re.compile(r"^ *(?P<marks>=(?: ?=)*) (?P<title>[^\s=].*?) (?P=marks) *$", re.MULTILINE),  # wikitext
    re.compile(r"^ *#{1,6} +(?P<title>\S.*)$", re.MULTILINE),  # markdown
    re.compile(r"^ *(?P<title>(?:chapter|book|part|act|scene)[ .]+(?:\d+|[ivxlc]+)\b.{0,60})$", re.MULTILINE | re.I),
)
_PARAGRAPH = re.compile(r"(?:\A|\n[ \t]*\n)\s*(?P<title>\S.*)")


class Hits(NamedTuple):
    """Where a search found something."""

    at: list[int]
    """The first token of each hit."""
    length: list[int]
    """How many tokens it touches."""
    more: bool
    """There are more than are listed."""


class Passages:
    """The text of tokens, with the way back from a place in it to its token.

    >>> passages = Passages(["= ", "A", " =", "\\n", "b c"], separator="")
    >>> passages.titles
    [(1, 'A')]
    >>> passages.search("B").at
    [4]
    """

    def __init__(self, tokens: Sequence[str], separator: str) -> None:
        self._tokens, self._separator = tokens, separator

    @cached_property
    def _decoded(self) -> tuple[str, list[float]]:
        """The text, and where each token begins in it.

        Tokens that are parts of a character, shown as their bytes, are put together to what they are; all but the first
        of them begin half a place on.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts: list[str] = []
        starts: list[float] = []
        length = 0
        for token in self._tokens:
            starts.append(length + 0.5 if decoder.getstate()[0] else length)
            part = token if "\\x" not in token else decoder.decode(_bytes(token))
            if part is token and decoder.getstate()[0]:
                part = decoder.decode(b"", final=True) + token
                decoder.reset()
            parts.append(part + self._separator)
            length += len(parts[-1])
        return "".join(parts), starts

    @property
    def text(self) -> str:
        return self._decoded[0]

    def token_at(self, place: int) -> int:
        """The token that the character at a place in the text begins in."""
        return bisect_right(self._decoded[1], place) - 1

    @cached_property
    def titles(self) -> list[tuple[int, str]]:
        """(token, heading) of headings; where there are none, of the first words of paragraphs; 2,000 at most."""
        matches = (match for heading in _HEADINGS for match in heading.finditer(self.text))
        found = sorted((match.start("title"), match["title"]) for match in matches)
        if not found:
            found = [(match.start("title"), match["title"]) for match in _PARAGRAPH.finditer(self.text)]
        return [(self.token_at(place), _shortened(title)) for place, title in _thinned(found, MOST_TITLES)]

    @cached_property
    def lines(self) -> list[int]:
        """The tokens that lines begin with, 20,000 at most."""
        text = self.text
        starts = [0, *(match.end() for match in re.finditer("\n", text) if match.end() < len(text))]
        return sorted({self.token_at(place) for place in _thinned(starts, MOST_LINES)})

    def search(self, wanted: str, after: int = 0) -> Hits:
        """Where a text stands, whatever its case, also across tokens; from token `after` on, 1,000 hits at most.

        Raises: ValueError for nothing to search for.
        """
        if not wanted:
            raise ValueError("there is nothing to search for: give some text")
        text, starts = self._decoded
        at: list[int] = []
        length: list[int] = []
        begin = math.ceil(starts[after]) if after < len(starts) else len(text)
        for match in re.compile(re.escape(wanted), re.IGNORECASE).finditer(text, begin):
            if len(at) == MOST_HITS:
                return Hits(at, length, True)
            first = self.token_at(match.start())
            at.append(first)
            length.append(bisect_left(starts, match.end()) - first)
        return Hits(at, length, False)


def _bytes(token: str) -> bytes:
    parts = _BYTES.split(token)
    return b"".join(
        bytes.fromhex(part) if odd % 2 else part.encode("utf-8", "replace") for odd, part in enumerate(parts)
    )


def _shortened(title: str) -> str:
    title = " ".join(title.split())
    return title if len(title) <= LONGEST_TITLE else title[: LONGEST_TITLE - 1].rsplit(" ", 1)[0] + "\u2026"


def _thinned(items: list, most: int) -> list:
    """At most so many, evenly."""
    return items if len(items) <= most else [items[index * len(items) // most] for index in range(most)]
