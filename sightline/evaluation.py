"""How well held-out text is predicted: loss, perplexity, bits per byte, and two baselines that count.

The model and the baselines score the same tokens: every token of the file but its first. Knows nothing
about training.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sightline.batches import TokenFile, windows
from sightline.distributed import ALONE, Team
from sightline.models import Decoder, evaluating

# Token ids counted at a time: bounds the memory of sorting, not of what is kept.
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What held-out text costs to predict.

    Losses are comparable only between models of one tokenizer; `bits_per_byte` between all of them.
    """

    loss: float
    """Mean negative log-likelihood in nats per token."""
    tokens: int
    """Number of tokens predicted."""
    bytes: int
    """Bytes of text that these tokens stand for."""
    unknown: float
    """Share of the text's tokens that are `<unk>`: such words are scored as one easy token."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token: for a word tokenizer per word, with `<eos>` counted as a word."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """loss * tokens / (ln 2 * bytes)."""
        return self.loss * self.tokens / (math.log(2) * self.bytes)

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} nats a token, perplexity {self.perplexity:,.2f}, "
            f"{self.bits_per_byte:.4f} bits per byte ({self.tokens:,} tokens, {self.bytes:,} bytes)"
        )


def evaluate(
    model: Decoder,
    tokens: TokenFile,
    *,
    context: int | None = None,
    batch: int = 16,
    batches: int | None = None,
    stride: int | None = None,
    dynamic: float | None = None,
    team: Team = ALONE,
) -> Evaluation:
    """Scores held-out tokens in disjoint windows: each token is predicted once.

    A window starts without a past, so a longer `context` (None: the model's) gives a lower loss.
    `batches` stops after that many batches of windows (None: the whole file); a `team` shares them out. Dropout is
    off while it runs; the model's mode is put back afterwards.

    Two other questions, whose answers compare with one another's and not with the plain number:

    - `stride`: how well is a token predicted that has a past? Windows overlap: each begins `stride` tokens after
      the one before, and only its last `stride` tokens count (of the first window all). context / stride times
      the work.
    - `dynamic`: how well by a model that goes on learning from what it has read? One window at a time is scored
      and then learned from: W <- W - dynamic * gradient. The weights are put back afterwards.

    Source: Krause et al. 2018, Dynamic evaluation of neural sequence models, with plain gradient steps.

    Raises:
        ValueError: there is nothing to predict, the context is longer than the model's, the stride longer than
            the context, or the loss of dynamic evaluation is no longer a number.

    >>> import numpy as np, torch
    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(vocabulary=10, context=8, d_model=16, num_layers=1, num_heads=2))
    >>> ids = np.arange(100, dtype=np.uint16) % 10
    >>> evaluate(model, TokenFile(ids=ids, num_bytes=100, num_words=20, num_unknown=0)).tokens
    99
    """
    if not isinstance(tokens, TokenFile):
        raise ValueError(
            f"expected a TokenFile, got {type(tokens).__name__}: sightline.batches.tokenize makes those of a text, "
            "and `sightline evaluate` scores a file"
        )
    context = model.config.context if context is None else context
    if not 1 <= context <= model.config.context:
        raise ValueError(f"expected a context from 1 to the model's {model.config.context}, got {context}")
    for name, value in (("batch", batch), ("batches", batches)):
        if value is not None and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    if stride is not None and dynamic is not None:
        raise ValueError("expected a stride or a dynamic rate, got both: each is a number of its own")
    if stride is not None and not 1 <= stride <= context:
        raise ValueError(f"expected a stride from 1 to the context's {context}, got {stride}")
    if dynamic is not None and not 0 < dynamic < math.inf:
        raise ValueError(f"expected a dynamic rate above 0, got {dynamic}")
    if dynamic is not None and team.size > 1:
        raise ValueError("expected one process for dynamic evaluation: each window learns from the one before")
    _expect_something(tokens)
    context = min(context, len(tokens.ids) - 1)  # a shorter text is one window
    scored: Iterator[tuple[Tensor, Tensor, int]]
    if stride is not None:
        scored = _sliding(tokens.ids, context=context, stride=min(stride, context), batch=batch)
    else:
        pairs = windows(tokens, context=context, batch=1 if dynamic else batch)
        scored = ((inputs, targets, targets.shape[1]) for inputs, targets in pairs)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model), _learning(model, dynamic) as learn:
        for (inputs, targets, last), counts in team.turns(islice(scored, batches)):
            _expect_ids(targets, model.config.vocabulary)
            loss = model.loss(inputs.to(device), targets.to(device), last=last)
            number = targets.shape[0] * last * counts
            total += loss.item() * number
            count += number
            learn(loss)
    total, count = team.total((total, count))
    return _evaluation(total, int(count), tokens)


def _sliding(ids: NDArray, *, context: int, stride: int, batch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Overlapping windows: inputs, targets, and how many of the last targets no window before has scored."""
    ends = np.arange(context, len(ids), stride)  # of windows' inputs; their targets end one later
    places = np.arange(-context, 1)
    yield (*_pair(ids, ends[:1, None] + places), context)
    for first in range(1, len(ends), batch):
        yield (*_pair(ids, ends[first : first + batch, None] + places), stride)
    left = len(ids) - 1 - int(ends[-1])
    if left:
        yield (*_pair(ids, len(ids) - 1 + places[None]), left)


def _pair(ids: NDArray, places: NDArray) -> tuple[Tensor, Tensor]:
    both = torch.from_numpy(np.asarray(ids[places]).astype(np.int64))
    return both[:, :-1], both[:, 1:]


@contextmanager
def _learning(model: Decoder, rate: float | None) -> Iterator[Callable[[Tensor], None]]:
    """How to learn from a loss: by a gradient step, undone at the end; without a rate not at all."""
    if rate is None:
        with torch.no_grad():
            yield lambda loss: None
        return
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]

    def learn(loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss became {loss.item()}: give a dynamic rate below {rate}")
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.sub_(gradient, alpha=rate)

    try:
        with torch.enable_grad():
            yield learn
    finally:
        with torch.no_grad():
            for parameter, kept in zip(parameters, before, strict=True):
                parameter.copy_(kept)


def unigram(train: TokenFile, held_out: TokenFile, vocabulary: int) -> Evaluation:
    """Scores held-out tokens by how often each occurs in the training tokens, whatever stands before it.

    p(token) = (count(token) + 1) / (tokens + vocabulary).

    >>> import numpy as np
    >>> ids = np.array([0, 1] * 50, dtype=np.uint16)
    >>> text = TokenFile(ids=ids, num_bytes=100, num_words=50, num_unknown=0)
    >>> round(unigram(text, text, vocabulary=2).perplexity, 3)
    2.0
    """
    _expect_something(held_out)
    log_p = np.log(unigram_probabilities(train, vocabulary))
    targets, total = held_out.ids[1:], 0.0
    for start in _starts(targets):
        piece = targets[start : start + _CHUNK]
        _expect_ids(piece, vocabulary)
        total -= float(log_p[piece].sum())
    return _evaluation(total, len(targets), held_out)


def bigram(train: TokenFile, held_out: TokenFile, vocabulary: int) -> Evaluation:
    """Scores held-out tokens by how often each follows the one before it in the training tokens.

    Witten-Bell smoothing: p(token | last) = (count(last, token) + kinds(last) * unigram(token)) /
    (count(last) + kinds(last)), where kinds(last) is how many different tokens follow `last`; after a
    token that nothing follows, the unigram. Memory grows with the number of different pairs.

    Source: Witten and Bell (1991), The zero-frequency problem, method C.

    >>> import numpy as np
    >>> ids = np.array([0, 1] * 50, dtype=np.uint16)
    >>> text = TokenFile(ids=ids, num_bytes=100, num_words=50, num_unknown=0)
    >>> round(bigram(text, text, vocabulary=2).perplexity, 3)
    1.01
    """
    _expect_something(held_out)
    model = Bigram(train, vocabulary)
    total = 0.0
    for start in _starts(held_out.ids):
        piece = np.asarray(held_out.ids[start : start + _CHUNK + 1], dtype=np.int64)
        _expect_ids(piece, vocabulary)
        total -= float(np.log(model.probabilities(piece[:-1], piece[1:])).sum())
    return _evaluation(total, len(held_out.ids) - 1, held_out)


def unigram_probabilities(train: TokenFile, vocabulary: int) -> NDArray[np.float64]:
    """The unigram's probability of every token of the vocabulary."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for start in _starts(train.ids):
        piece = train.ids[start : start + _CHUNK]
        _expect_ids(piece, vocabulary)
        counts += np.bincount(piece, minlength=vocabulary)
    return (counts + 1) / (counts.sum() + vocabulary)


class Bigram:
    """Counts of adjacent tokens, smoothed as `bigram` says."""

    def __init__(self, train: TokenFile, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.unigram = unigram_probabilities(train, vocabulary)
        self.pairs, self.counts = _count_pairs(train.ids, vocabulary)
        last = self.pairs // vocabulary
        self.followers = np.bincount(last, weights=self.counts, minlength=vocabulary)
        self.kinds = np.bincount(last, minlength=vocabulary)

    def probabilities(self, last: NDArray[np.int64], token: NDArray[np.int64]) -> NDArray[np.float64]:
        """p(token | last), element by element."""
        pair = last * self.vocabulary + token
        place = np.minimum(np.searchsorted(self.pairs, pair), max(len(self.pairs) - 1, 0))
        count = np.where(self.pairs[place] == pair, self.counts[place], 0)
        kinds, followers = self.kinds[last], self.followers[last]
        smoothed = (count + kinds * self.unigram[token]) / np.maximum(followers + kinds, 1)
        return np.where(kinds > 0, smoothed, self.unigram[token])


def _count_pairs(ids: NDArray, vocabulary: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different adjacent pairs as sorted numbers (first * vocabulary + second), and their counts."""
    if len(ids) < 2:
        raise ValueError(f"expected at least 2 training tokens to count pairs, got {len(ids)}")
    pairs, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for start in _starts(ids):
        piece = np.asarray(ids[start : start + _CHUNK + 1], dtype=np.int64)
        new, new_counts = np.unique(piece[:-1] * vocabulary + piece[1:], return_counts=True)
        merged, place = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        both = np.zeros(len(merged), dtype=np.int64)
        both[place[: len(pairs)]] = counts
        both[place[len(pairs) :]] += new_counts
        pairs, counts = merged, both
    return pairs, counts


def _starts(ids: NDArray) -> range:
    return range(0, len(ids), _CHUNK)


def _expect_ids(ids: NDArray | Tensor, vocabulary: int) -> None:
    if ids.max() >= vocabulary:
        raise ValueError(
            f"expected token ids under the vocabulary's {vocabulary}, got {int(ids.max())}: "
            "the text was tokenized by another tokenizer"
        )


def _expect_something(tokens: TokenFile) -> None:
    if len(tokens.ids) < 2:
        raise ValueError(f"expected held-out text of at least 2 tokens, got {len(tokens.ids)}")


def _evaluation(total: float, count: int, tokens: TokenFile) -> Evaluation:
    return Evaluation(
        loss=total / count,
        tokens=count,
        bytes=max(1, round(tokens.num_bytes * count / len(tokens.ids))),
        unknown=tokens.num_unknown / len(tokens.ids),
    )
