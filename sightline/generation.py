"""Writing: one token after another, drawn from what a `Decoder` expects next.

`SampleConfig` says how to draw and when to end, `probabilities` is the distribution that is drawn from,
`sample_tokens` yields tokens and knows nothing of text, `generate` yields words.
Knows nothing about training, files or terminals.
"""

import math
import re
import warnings
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sightline.models import Decoder, evaluating
from sightline.tokenizers import Tokenizer

# Text without a space, or a model that has learned only line ends, would otherwise never end a word.
_LONGEST_WORD = 64

# An unfinished UTF-8 character is at most three bytes, so at most three tokens; one more stands before them.
_TAIL = 4

_PIECE = re.compile(r"\s*\S+|\s+")
_WORD_END = re.compile(r"\S(?=\s)")
_WORD_END_OR_END = re.compile(r"\S(?=\s|\Z)")


class ContextWarning(UserWarning):
    """The text has outgrown the context that the model was trained on; once per call."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How the next token is drawn, and when to stop."""

    words: int = 100
    """Stop after so many words: runs of anything but white space."""

    tokens: int | None = None
    """Stop after so many tokens instead of counting words."""

    temperature: float = 1.0
    """Divides the logits: below 1 safer, above 1 bolder; must be above 0 (the likeliest token: top_k=1)."""

    top_k: int | None = None
    """Draw only among so many of the likeliest tokens."""

    top_p: float = 1.0
    """Draw only among the likeliest tokens that together reach this probability, in (0, 1]."""

    min_p: float = 0.0
    """Draw only among tokens at least this share as probable as the likeliest, in [0, 1)."""

    seed: int | None = None
    """The same seed writes the same text; without one every call differs."""

    stop: str | None = None
    """End before this text appears; it is not written."""

    def __post_init__(self) -> None:
        for name in ("words", "tokens", "top_k"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, but it is {number}")
        if self.tokens is not None and self.words != SampleConfig.words:
            raise ValueError(
                f"words and tokens are two ways to say when to stop, but words={self.words} and "
                f"tokens={self.tokens} were given: give one of them"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature must be a number above 0, but it is {self.temperature}: "
                "for the likeliest token at every step use top_k=1"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, but it is {self.top_p}: 1 keeps every token")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be at least 0 and below 1, but it is {self.min_p}: 0 keeps every token")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, but it is {self.seed}")
        if self.stop == "":
            raise ValueError("stop must hold at least one character, but it is empty: None stops at no text")

    def generator(self) -> torch.Generator:
        """Where random numbers come from: a generator at `seed`, or without one at a place that nobody knows."""
        generator = torch.Generator()
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        return generator


def probabilities(logits: Tensor, config: SampleConfig) -> Tensor:
    """Turn the logits of one position into the distribution that the next token is drawn from.

    In this order: softmax(logits / temperature); `top_k` keeps the k likeliest tokens; `top_p` keeps the
    shortest list of likeliest tokens whose probability, renormalised after top_k, reaches top_p; `min_p`
    drops what is less probable than min_p times the likeliest. What is left is renormalised. Of equally
    likely tokens those with the lowest ids stay. At least one token always stays.

    The result is float64 on the CPU, (vocabulary), whatever the logits are.

    Raises:
        ValueError: the logits hold NaN or inf, or nothing but -inf.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1 (top-p); Nguyen et
    al. 2024, "Turning Up the Heat", section 3 (min-p).

    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> [round(share, 3) for share in probabilities(logits, SampleConfig(top_k=2)).tolist()]
    [0.625, 0.375, 0.0]
    """
    logits = logits.cpu().double()
    likeliest = _checked(logits.max(), len(logits))
    # Subtracting first keeps 0 / temperature at 0, however small the temperature.
    scores = (logits - likeliest) / config.temperature
    if config.top_k is not None and config.top_k < len(scores):
        scores = _keep_top_k(scores, config.top_k)
    shares = scores.softmax(-1)
    if config.top_p < 1:
        shares = _keep_top_p(shares, config.top_p)
    if config.min_p > 0:
        shares = shares.where(shares >= config.min_p * shares.max(), 0.0)
    return shares / shares.sum()


def _checked(likeliest: Tensor, count: int) -> Tensor:
    if not math.isfinite(likeliest):
        raise ValueError(
            f"the logits of the next token must be numbers, but the largest of {count} is "
            f"{likeliest.item()}: the weights are damaged or training diverged; use an earlier checkpoint"
        )
    return likeliest


def _keep_top_k(scores: Tensor, k: int) -> Tensor:
    least = scores.topk(k).values[-1]
    # topk() promises nothing about ties; a stable sort of the few that are left does.
    ids = (scores >= least).nonzero()[:, 0]
    kept = ids[scores[ids].sort(descending=True, stable=True).indices[:k]]
    return torch.full_like(scores, -math.inf).index_copy(0, kept, scores[kept])


def _keep_top_p(shares: Tensor, mass: float) -> Tensor:
    # Tokens below (1 - mass) / vocabulary together have less than 1 - mass: none is needed, and sorting them is
    # slow. Half of that leaves room for rounding.
    ids = (shares >= (1 - mass) / (2 * len(shares))).nonzero()[:, 0]
    ordered, order = shares[ids].sort(descending=True, stable=True)
    # A token stays while those before it have not reached the mass: the first always stays.
    ordered[1:].masked_fill_(ordered.cumsum(-1)[:-1] >= mass, 0.0)
    return torch.zeros_like(shares).index_copy(0, ids[order], ordered)


def draw(logits: Tensor, config: SampleConfig, generator: torch.Generator) -> int:
    """Draw a token by inverting the cumulative distribution: one random number a token, whatever the vocabulary."""
    if config.top_k == 1:
        likeliest, token = logits.max(-1)  # of equally likely ones the first
        _checked(likeliest, len(logits))
        return int(token)
    cumulative = probabilities(logits, config).cumsum(-1)
    point = torch.rand(1, dtype=torch.float64, generator=generator) * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True))


def sample_tokens(
    model: Decoder,
    tokens: Sequence[int],
    config: SampleConfig = SampleConfig(),
    *,
    use_cache: bool = True,
) -> Generator[int, None, None]:
    """Yield the tokens that follow `tokens`: `config.tokens` of them, or without end.

    With the cache each step reads one token; without it each step reads everything again and comes to the
    same tokens. When the model's context is full, the older half is let go and the newer half is read anew
    from position 0; a prompt longer than the context begins that way. The model is in evaluation mode until
    the generator ends or is closed. `config.words` and `config.stop` are about text: see `generate`.

    Warns:
        ContextWarning: once per call, when the context is outgrown.

    Raises:
        ValueError: a model of another kind, no tokens to start from, a token outside the vocabulary, or logits that
            are not numbers.

    >>> from sightline.models import DecoderConfig
    >>> model = Decoder(DecoderConfig(vocabulary=5, context=8, d_model=8, num_layers=1, num_heads=2))
    >>> len(list(sample_tokens(model, [3], SampleConfig(tokens=4, seed=1))))
    4
    """
    _expect_decoder("sample_tokens", model)
    window = [int(token) for token in tokens]
    if not window:
        raise ValueError("sample_tokens() needs at least one token to start from, but got none")
    vocabulary = model.config.vocabulary
    for token in window:
        if not 0 <= token < vocabulary:
            raise ValueError(f"tokens must be from 0 to {vocabulary - 1} (the vocabulary), but one is {token}")
    return _sample(model, window, config, use_cache)


def _expect_decoder(name: str, model: object) -> None:
    if not isinstance(getattr(model, "_orig_mod", model), Decoder):  # torch.compile keeps the model there
        raise ValueError(
            f"{name}: expected a Decoder, got {type(model).__name__}: sl.translate writes with an EncoderDecoder, and "
            "a model of transformers has a generate() of its own, which sl.huggingface.watch sees"
        )


def _sample(model: Decoder, window: list[int], config: SampleConfig, use_cache: bool) -> Generator[int, None, None]:
    context = model.config.context
    device = model.embedding.weight.device
    generator = config.generator()
    with evaluating(model):
        cache = model.new_cache() if use_cache else None
        unread, outgrown, count = window, False, 0
        while config.tokens is None or count < config.tokens:
            if len(window) > context:
                if not outgrown:
                    warn_outgrown(context)
                    outgrown = True
                unread = window = window[-((context + 1) // 2) :]
                if cache is not None:
                    cache.clear()
            # Left before the yield: it must not reach into the caller's code. Not inference_mode(): the tables of
            # positions that a model makes on the way must serve its training too.
            with torch.no_grad():
                logits = model(torch.tensor([unread], device=device), cache=cache, last=1)
                token = draw(logits[0, -1], config, generator)
            window.append(token)
            unread = window if cache is None else [token]
            count += 1
            yield token


def warn_outgrown(context: int) -> None:
    """Say that the older half is forgotten from here on."""
    warnings.warn(
        f"the text has outgrown the model's context of {context} tokens: from here on, whenever it is full, "
        "the model forgets the older half",
        ContextWarning,
        stacklevel=3,
    )


def generate(
    model: Decoder,
    prompt: str | None = None,
    config: SampleConfig = SampleConfig(),
    *,
    use_cache: bool = True,
) -> Generator[str, None, None]:
    """Yield new text word by word as it grows: " cat", " is", " on" after the prompt "The".

    The prompt itself is not yielded; the pieces joined are the new text. No piece splits a word or a
    character: a word comes when what follows ends it (at once from a model of words), with the white space
    before it. The first piece may complete the prompt's last word and then counts as a word. Where no word
    ends for 64 tokens, what they wrote counts as one. With `config.tokens` the last piece may be
    part of a word. A token that ends a text (`Tokenizer.ends`) ends it here too. Without a prompt the model starts
    as after a line end, or, where its vocabulary has none, after its first token. `config.stop` is looked for in
    the new text alone.

    Use `contextlib.closing`, or let go of the generator, to end early: the model then gets back its mode.

    Warns:
        ContextWarning: once per call, when the model's context is outgrown (see `sample_tokens`).

    Raises:
        ValueError: a model of another kind or without a tokenizer, words in the prompt that the vocabulary lacks, or
            logits that are not numbers.

    Source: Vaswani et al. 2017, section 3: each token is generated from those before it.

    >>> from sightline.models import DecoderConfig
    >>> tokenizer = Tokenizer.train("words", ["the cat is on the mat"])
    >>> model = Decoder(DecoderConfig(vocabulary=len(tokenizer), d_model=8, num_layers=1, num_heads=2))
    >>> model.tokenizer = tokenizer
    >>> len(list(generate(model, "the cat", SampleConfig(words=3))))
    3
    """
    _expect_decoder("generate", model)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "generate() needs a model with a tokenizer, but model.tokenizer is None: "
            "load a checkpoint, set model.tokenizer, or use sample_tokens()"
        )
    start = _start(tokenizer, prompt or "")
    tokens = sample_tokens(model, start, config, use_cache=use_cache)
    return words(tokenizer, start, tokens, config)


class Reader(Protocol):
    """What tokens are turned into text by: a `Tokenizer`, or another library's."""

    @property
    def kind(self) -> str: ...

    @property
    def ends(self) -> Collection[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


def words(
    tokenizer: Reader, start: Sequence[int], tokens: Generator[int, None, None], config: SampleConfig
) -> Generator[str, None, None]:
    """The text of tokens that follow `start`, word by word, as `generate` yields it; `tokens` is closed at the end."""
    limit = config.words if config.tokens is None else None
    return _words(_Pending(tokenizer, start), tokens, limit, config.stop)


def _start(tokenizer: Tokenizer, prompt: str) -> list[int]:
    lacking = tokenizer.unknown_words(prompt)
    if lacking:
        kind = tokenizer.kind
        named = ", ".join(map(repr, lacking[:5])) + (f", ... ({len(lacking)} in all)" if len(lacking) > 5 else "")
        other = "choose other characters" if kind == "characters" else "choose others or write <unk> in their place"
        raise ValueError(f"the prompt may only use {kind} of the model's vocabulary, which lacks {named}: {other}")
    ids = [*tokenizer.start, *tokenizer.encode(prompt)]
    line_end = [] if tokenizer.unknown_words("\n") else tokenizer.encode("\n")
    return ids or line_end or [0]


class _Pending:
    """The new text that has not been given out yet, decoded from as few tokens as can be."""

    def __init__(self, tokenizer: Reader, before: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before[-_TAIL:])
        self.given = len(tokenizer.decode(self.ids))
        self.text = ""
        self.tokens = 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        self.text = self.tokenizer.decode(self.ids)[self.given :]
        self.tokens += 1

    def settled(self, stop: str | None) -> int:
        """Return the length of the text that whatever follows leaves as it is: whole words."""
        safe = len(self.text) - _held_for(stop, self.text)
        if self.tokens >= _LONGEST_WORD:
            # What is left of an unfinished character decodes to one replacement character.
            return len(self.text[:safe].removesuffix("\N{REPLACEMENT CHARACTER}"))
        ends = _WORD_END_OR_END if self.tokenizer.kind == "words" else _WORD_END
        return max((match.end() for match in ends.finditer(self.text) if match.end() <= safe), default=0)

    def give(self, length: int) -> None:
        self.given += length
        self.text = self.text[length:]
        self.tokens = 0
        tail = self.ids[-_TAIL:]
        decoded = self.tokenizer.decode(tail)
        if decoded.endswith(self.text):
            self.ids, self.given = tail, len(decoded) - len(self.text)


def _held_for(stop: str | None, text: str) -> int:
    """Return how many of the last characters may be the beginning of the stop text."""
    if stop is None:
        return 0
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def _words(
    pending: _Pending, tokens: Generator[int, None, None], limit: int | None, stop: str | None
) -> Generator[str, None, None]:
    count = 0
    with closing(tokens):
        for token in tokens:
            if token in pending.tokenizer.ends:
                break
            pending.add(token)
            found = -1 if stop is None else pending.text.find(stop)
            length = found if found >= 0 else pending.settled(stop)
            for piece in _PIECE.findall(pending.text[:length]):
                yield piece
                count += 1
                if count == limit:
                    return
            if found >= 0:
                return
            if length > 0:
                pending.give(length)
    yield from _PIECE.findall(pending.text)
