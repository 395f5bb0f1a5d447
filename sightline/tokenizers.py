"""Text to token ids and back: words, characters, byte-level BPE, or whatever a tokenizer.json from elsewhere says.

Whatever its kind, a Tokenizer is one `tokenizers.Tokenizer`, so that `tokenizer.json` is the file which
`transformers` reads as `PreTrainedTokenizerFast(tokenizer_file=...)`. Knows nothing about files of text.
"""

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from operator import index
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, final, get_args

if TYPE_CHECKING:
    import tokenizers

Kind = Literal["words", "characters", "bpe"]

OTHER = "other"
"""The kind of a tokenizer with rules of its own: read from a file, never trained here."""
UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
BPE_VOCABULARY = 4096
COUNTED = 1 << 22
"""Different words that are counted at a time, so that memory has a bound: about 500 MB."""

_RESERVED: dict[Kind, tuple[str, ...]] = {"words": (UNKNOWN, END_OF_LINE), "characters": (UNKNOWN,), "bpe": ()}


@final
class Tokenizer:
    r"""A vocabulary and the rule that cuts text into its tokens.

    kind         a token is                                      decode(encode(text)) is
    words        what stands between white space (`str.split`);  the words of each line, joined by a space
                 "\n" is `<eos>`, an unseen word `<unk>`
    characters   one character, an unseen one `<unk>`            the text, but for the unseen
    bpe          one or more bytes, merged as in GPT-2           the text, always
    other        what the rules in its file say                  what they say

    `decode(ids[:n])` begins `decode(ids[:n + 1])`, except that a character whose bytes are not complete in
    bpe reads U+FFFD.

    Source: WikiText's word format, Merity et al. 2016, section 4; byte-level BPE, Radford et al. 2019, 2.2.

    >>> tokenizer = Tokenizer.train("words", ["the cat sat\nthe end\n"])
    >>> tokenizer.encode("the dog sat\n"), tokenizer.unknown_words("the dog sat\n")
    ([2, 0, 5, 1], ['dog'])
    >>> tokenizer.decode([2, 0, 5, 1])
    'the <unk> sat\n'
    """

    def __init__(self, backend: "tokenizers.Tokenizer", *, size: int | None = None, ends: Iterable[int] = ()) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        `size`, how many ids a model has, lets the rules be any (kind "other"); ids without a token then read as
        nothing. `ends` are the tokens that end a text.

        Raises ValueError for ids beyond `size`; without one, for rules that are not those of one of our kinds.
        """
        self.kind: Kind | Literal["other"] = (
            OTHER if size is not None and _is_other(backend, size) else _kind_of(backend)
        )
        self.ends: frozenset[int] = frozenset(ends)
        self.start: tuple[int, ...] = ()
        """Tokens that stand before every text."""
        self.unknown: int | None = None
        self._backend = backend
        self._ids: dict[str, int] = backend.get_vocab()
        if self.kind == OTHER:
            assert size is not None
            self._take_any(size)
            return
        self._tokens: list[str] = sorted(self._ids, key=self._ids.__getitem__)
        missing = [token for token in _RESERVED[self.kind] if token not in self._ids]
        if missing:
            raise ValueError(
                f"a {self.kind} vocabulary needs {' and '.join(missing)}, this one of {len(self._ids)} tokens has not"
            )
        if [self._ids[token] for token in self._tokens] != list(range(len(self._tokens))):
            raise ValueError("the ids of a vocabulary must count up from 0 without a gap, these do not")
        if self.kind != "bpe":
            self.unknown = self._ids[UNKNOWN]

    def _take_any(self, size: int) -> None:
        most = max(self._ids.values(), default=-1)
        if most >= size:
            raise ValueError(f"the model has {size} tokens, but the tokenizer has one with the id {most}")
        named = {i: token for token, i in self._ids.items()}
        self._tokens = [named.get(i, "") for i in range(size)]
        self._backend.no_truncation()
        self._backend.no_padding()
        plain, full = (self._backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.start = next((tuple(full[:i]) for i in range(len(full)) if full[i : i + len(plain)] == plain), ())

    @classmethod
    def train(cls, kind: Kind, texts: Iterable[str], vocabulary: int | None = None) -> "Tokenizer":
        """Make the vocabulary of `texts`: the most frequent tokens, or the most frequent merges.

        `vocabulary` bounds its size, `<unk>` and `<eos>` included; None keeps every word or character, and
        means `BPE_VOCABULARY` for bpe. Ties go to the token that sorts first. A text too small for its
        bpe vocabulary ends with a smaller one. `texts` is read once and never held; where it has more than
        `COUNTED` different words, those seen least so far are forgotten.

        Raises ValueError for an unknown kind, a vocabulary too small for the kind, texts without a token.

        >>> len(Tokenizer.train("characters", ["abba", "cab"]))
        4
        """
        if kind not in get_args(Kind):
            near = difflib.get_close_matches(str(kind), get_args(Kind), n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}{hint}")
        if isinstance(texts, str):
            raise ValueError(f"texts must be texts, got one string of {len(texts)} characters: give [text]")
        least = 256 if kind == "bpe" else len(_RESERVED[kind]) + 1
        if vocabulary is not None and vocabulary < least:
            what = "one for each byte" if kind == "bpe" else f"{', '.join(_RESERVED[kind])} and one more"
            raise ValueError(f"a {kind} vocabulary has at least {least} tokens ({what}), got {vocabulary}")
        if kind == "bpe":
            return cls(_train_bpe(texts, BPE_VOCABULARY if vocabulary is None else vocabulary))
        return cls(_train_lookup(kind, texts, vocabulary))

    @classmethod
    def load(cls, file: str | Path, *, size: int | None = None, ends: Iterable[int] = ()) -> "Tokenizer":
        """Read a `tokenizer.json`; its kind follows from the rules in it, or is "other" where a `size` is given.

        Raises ValueError when the file is missing, damaged, or, without `size`, of no kind of ours.
        """
        import tokenizers

        file = Path(file)
        if not file.is_file():
            raise ValueError(f"no tokenizer file {file}")
        try:
            text = file.read_text(encoding="utf-8")
            json.loads(text)
        except ValueError as error:
            raise ValueError(f"{file} is damaged, it should be JSON: {error}") from None
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"{file} is not a tokenizer.json that `tokenizers` can read: {error}") from None
        try:
            return cls(backend, size=size, ends=ends)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def save(self, file: str | Path) -> None:
        """Write `tokenizer.json`."""
        Path(file).write_bytes(self._backend.to_str(pretty=True).encode("utf-8"))

    def to_json(self) -> str:
        """Rules and vocabulary, as in `tokenizer.json`."""
        return self._backend.to_str()

    @classmethod
    def of_json(cls, text: str) -> "Tokenizer":
        """The tokenizer that `to_json` gave."""
        import tokenizers

        return cls(tokenizers.Tokenizer.from_str(text))

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The id of each token; in bpe its bytes are disguised as letters, as in GPT-2."""
        return MappingProxyType(self._ids)

    @property
    def hash(self) -> str:
        """The sha256 of rules and vocabulary: equal for tokenizers that encode alike."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    @property
    def tokens_sha256(self) -> str:
        """The sha256 of the tokens in the order of their ids, whatever wrote the file."""
        return hashlib.sha256(json.dumps(self._tokens).encode("utf-8")).hexdigest()

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocabulary={len(self)})"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without what may stand at its `start`.

        Raises ValueError (UnicodeEncodeError) in bpe for half a surrogate pair, which has no bytes.
        """
        if self.kind in ("bpe", OTHER):
            text.encode("utf-8")
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        # The backend's own encode gives the same ids and takes 10 to 30 times as long.
        unknown, get = self._ids[UNKNOWN], self._ids.get
        return [get(token, unknown) for token in _split(self.kind, text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids.

        Raises ValueError for an id outside the vocabulary.
        """
        return self._backend.decode(self._checked(ids), skip_special_tokens=False)

    def text_of(self, token: int) -> str:
        """What a token adds to a text; U+FFFD for bytes that are only part of a character.

        Raises ValueError for an id outside the vocabulary.
        """
        if self.kind != OTHER:
            return self.decode([token])
        # Some rules leave out the space before a text's first token: so after another one.
        return self.decode([token, token])[len(self.decode([token])) :]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        r"""What each token looks like to a person: leading spaces kept, the unprintable escaped.

        Bytes that are only part of a character are written as `\xe2`.

        >>> Tokenizer.train("characters", ["a b\n"]).pieces([1, 2, 0])
        ['\\n', ' ', '<unk>']
        """
        tokens = [self._tokens[i] for i in self._checked(ids)]
        if self.kind == "bpe" or (self.kind == OTHER and "ByteLevel" in json.dumps(_rules(self._backend)[3])):
            tokens = list(map(text_of_bytes, tokens))
        return ["".join(c if c.isprintable() else _escape(c) for c in token) for token in tokens]

    def unknown_words(self, text: str) -> list[str]:
        """The words (or characters) of a text that the vocabulary lacks, in order, each once."""
        if self.kind in ("bpe", OTHER):
            return []
        return list(dict.fromkeys(token for token in _split(self.kind, text) if token not in self._ids))

    def _checked(self, ids: Iterable[int]) -> list[int]:
        """The ids as plain integers; the backend would leave out the ones it does not know."""
        checked = [index(i) for i in ids]
        for i in checked:
            if not 0 <= i < len(self):
                raise ValueError(f"token id {i} is outside the vocabulary of {len(self)} tokens (0 to {len(self) - 1})")
        return checked


def _split(kind: str, text: str) -> Sequence[str]:
    """What `_backend_of` says about cutting, in Python."""
    return text if kind == "characters" else text.replace("\n", f" {END_OF_LINE} ").split()


def _train_lookup(kind: Kind, texts: Iterable[str], vocabulary: int | None) -> "tokenizers.Tokenizer":
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_split(kind, text))
        least = 1
        while len(counts) > COUNTED:
            least += 1
            counts = Counter({token: count for token, count in counts.items() if count >= least})
    reserved = _RESERVED[kind]
    for token in reserved:
        counts.pop(token, None)
    if not counts:
        raise ValueError(f"the text has no {kind} to make a vocabulary of: give more text")
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    kept = frequent if vocabulary is None else frequent[: vocabulary - len(reserved)]
    return _backend_of(kind, {token: i for i, token in enumerate([*reserved, *kept])})


def _train_bpe(texts: Iterable[str], vocabulary: int) -> "tokenizers.Tokenizer":
    from tokenizers import pre_tokenizers, trainers

    backend = _backend_of("bpe", {})
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(_lines(texts), trainer)
    return backend


def _lines(texts: Iterable[str]) -> Iterator[str]:
    # The trainer gathers 256 strings before it works, so they must be short to keep memory constant.
    # A cut between a word and the white space after it never parts what the pre-tokenizer keeps together.
    for text in texts:
        yield from re.split(r"(?<=\S)(?=\n)", text)


def _backend_of(kind: Kind, vocabulary: dict[str, int]) -> "tokenizers.Tokenizer":
    """The rules of a kind: this is what tokenizer.json says, and `_kind_of` recognises."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        return backend
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    if kind == "characters":
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        return backend
    backend.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
    # str.split() also cuts at the four information separators, which Unicode does not call white space.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\x1c-\x1f]+"), "removed")
    # "a b <eos> c": a space before every token, then lines, then without the first space.
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"\A"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(rf" {END_OF_LINE}(?= |\z)"), "\n"),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def _kind_of(backend: "tokenizers.Tokenizer") -> Kind:
    rules = _rules(backend)
    for kind in get_args(Kind):
        if _rules(_backend_of(kind, {UNKNOWN: 0})) == rules:
            return kind
    model, pre_tokenizer = rules[0], (rules[2] or {}).get("type")
    raise ValueError(
        f"expected the rules of a tokenizer of {', '.join(get_args(Kind))}, got a {model} model "
        f"after the pre-tokenizer {pre_tokenizer}: train one with Tokenizer.train"
    )


def _is_other(backend: "tokenizers.Tokenizer", size: int) -> bool:
    saved = json.loads(backend.to_str())
    if backend.get_vocab_size() != size or saved["added_tokens"] or saved["post_processor"]:
        return True
    return all(_rules(_backend_of(kind, {UNKNOWN: 0})) != _rules(backend) for kind in get_args(Kind))


def _rules(backend: "tokenizers.Tokenizer") -> tuple:
    saved = json.loads(backend.to_str())
    return (saved["model"]["type"], saved["normalizer"], saved["pre_tokenizer"], saved["decoder"])


def text_of_bytes(token: str) -> str:
    r"""The text of a token whose letters are bytes in GPT-2's disguise; what is only part of a character as `\xe2`.

    >>> text_of_bytes("Ã©"), text_of_bytes("Ã"), text_of_bytes("▁a")
    ('é', '\\xc3', '▁a')
    """
    bytes_of = _byte_of_character()
    if not bytes_of.keys() >= {*token}:
        return token
    return bytes(bytes_of[letter] for letter in token).decode("utf-8", "backslashreplace")


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's disguise of bytes as letters: printable Latin-1 stands for itself, the others count from U+0100."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
