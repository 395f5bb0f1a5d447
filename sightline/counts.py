"""How often which token followed which in the training text, as a probability. Knows nothing of networks.

Most of what a text of a few hundred thousand words has to teach is which words stand side by side. A network needs many
passes to learn it, and learns it by heart; counting takes one.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MOST_TOKENS = 20_000_000
"""A longer text is not counted: its runs would fill gigabytes, and a network learns them from so much text."""
# Counts of this many parts but one meet the part that is left: few enough that they are nearly those of all.
_FOLDS = 8


@dataclass(frozen=True)
class _Table:
    """All runs of one length, sorted by number: those that begin alike stand together, so that sums are differences."""

    runs: Tensor
    times: Tensor
    times_before: Tensor  # of all runs in front of this one; one entry more than runs
    held_before: Tensor
    discounts: Tensor  # of a run seen 0, 1, 2, 3 or more times


class Counts(nn.Module):
    """The next token's probability by counts of runs of up to `longest` tokens: interpolated Kneser-Ney.

        p_n(w | h) = (c(h w) - D(c(h w)) + held(h) p_n-1(w | h')) / sum over w of c(h w),    p_0 = 1 / vocabulary

    h is the last n - 1 tokens, h' all of them but the first. D is a discount for runs seen once, twice and more often,
    from how many there are of each; held(h) is the sum of D over all w, so that probabilities sum to 1. c counts how
    often a run of the longest kind occurs, and of a shorter one how many different tokens stand before it. After
    tokens that nothing followed the shorter ones decide. Nothing is trained; the counts are buffers, and saved.

    Source: Kneser and Ney 1995; Chen and Goodman 1999, sections 2.7 and 3 (modified).

    Raises: ValueError where a run's number would not fit 64 bits.

    >>> counts = Counts(vocabulary=3, longest=2)
    >>> counts.count(np.array([0, 1, 0, 1, 0, 2]))
    >>> counts.shares(torch.tensor([[0]]))
    tensor([[[0.0444, 0.6444, 0.3111]]])
    """

    def __init__(self, vocabulary: int, *, longest: int) -> None:
        super().__init__()
        if vocabulary**longest >= 2**62:
            most = next(n for n in range(longest, 0, -1) if vocabulary**n < 2**62)
            raise ValueError(
                f"Counts: runs of {longest} of {vocabulary:,} tokens have no numbers of 64 bits: "
                f"count runs of at most {most}"
            )
        self.vocabulary, self.longest = vocabulary, longest
        for n in self._lengths:
            self.register_buffer(f"runs_{n}", torch.empty(0, dtype=torch.int64))
            self.register_buffer(f"times_{n}", torch.empty(0, dtype=torch.int32))
        self._tables: dict[int, tuple[_Table, tuple[tuple[int, int], ...]]] = {}
        self._apart: tuple[Tensor, Tensor] | None = None

    @property
    def _lengths(self) -> range:
        return range(1, self.longest + 1)

    def count(self, ids: NDArray[Any]) -> None:
        """Counts a text, and what its tokens are given by the rest of it (`apart`); forgets what was counted before.

        Raises: ValueError for a text shorter than a run, longer than `MOST_TOKENS`, or of another vocabulary.
        """
        if not self.longest <= len(ids) <= MOST_TOKENS:
            raise ValueError(
                f"Counts: expected a text of {self.longest} to {MOST_TOKENS:,} tokens to count, got {len(ids):,}: "
                "train without counts"
            )
        if ids.max() >= self.vocabulary:
            raise ValueError(f"Counts: expected ids under the vocabulary's {self.vocabulary}, got {ids.max()}")
        numbers = np.zeros(len(ids) - self.longest + 1, dtype=np.int64)
        for place in range(self.longest):
            numbers *= self.vocabulary
            numbers += ids[place : len(ids) - self.longest + 1 + place]
        runs, at, times = np.unique(numbers, return_inverse=True, return_counts=True)
        tables = [_Runs.of(runs, at, times, self.vocabulary)]
        for n in range(self.longest - 1, 0, -1):  # the last n tokens of each different run of n + 1
            ends = tables[0].runs % self.vocabulary**n
            tables.insert(0, _Runs.of(*np.unique(ends, return_inverse=True, return_counts=True), self.vocabulary))
        device = self.get_buffer("runs_1").device
        for n, table in zip(self._lengths, tables, strict=True):
            setattr(self, f"runs_{n}", torch.from_numpy(table.runs).to(device))
            setattr(self, f"times_{n}", torch.from_numpy(table.times.astype(np.int32)).to(device))
        share, support = _cross_counted(tables, len(numbers), self.vocabulary)
        unknown = self.longest - 1  # in front of the first whole run
        self._apart = (
            torch.from_numpy(np.pad(share, (unknown, 0), constant_values=1 / self.vocabulary)),
            torch.from_numpy(np.pad(support, ((unknown, 0), (0, 0)))),
        )

    def apart(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """What the counted text's tokens at these places are given by counts of the rest of it, and the `support`.

        The text is cut into `_FOLDS` parts, and each is read with the counts of the others: whoever learns how far to
        trust counts must see them meet a new text. Leaving out a token alone is not enough: its text repeats it.
        """
        assert self._apart is not None, "count() first"
        share, support = (values[places.cpu()].to(places.device) for values in self._apart)
        return share, support

    def probability(self, tokens: Tensor, targets: Tensor, past: Tensor | None = None) -> Tensor:
        """What each of `targets` (batch tokens) is given after its token and those before it; `past` came earlier."""
        share = torch.full(tokens.shape, 1 / self.vocabulary, dtype=torch.float64, device=tokens.device)
        for table, context in self._contexts(tokens, past):
            runs = context * self.vocabulary + targets
            place = torch.searchsorted(table.runs, runs).clamp(max=len(table.runs) - 1)
            times = torch.where((context >= 0) & (table.runs[place] == runs), table.times[place], 0)
            total, held = self._sums(table, context)
            new = (times - table.discounts[times.clamp(max=3)] + held * share) / total.clamp(min=1)
            share = torch.where(total > 0, new, share)
        return share.float()

    def shares(self, tokens: Tensor, past: Tensor | None = None) -> Tensor:
        """What every token of the vocabulary is given after each of `tokens`: (batch tokens vocabulary)."""
        share = torch.full((tokens.numel(), self.vocabulary), 1 / self.vocabulary, dtype=torch.float64)
        share = share.to(tokens.device)
        for table, context in self._contexts(tokens, past):
            total, held = (sums.flatten()[:, None] for sums in self._sums(table, context))
            share = torch.where(total > 0, held / total.clamp(min=1) * share, share)
            first, stop = (edge.flatten() for edge in self._span(table, context))
            lengths = stop - first
            rows = torch.arange(len(first), device=tokens.device).repeat_interleave(lengths)
            places = torch.arange(len(rows), device=tokens.device) + (first - lengths.cumsum(0) + lengths)[rows]
            times = table.times[places]
            more = (times - table.discounts[times.clamp(max=3)]) / total[rows, 0]
            share.index_put_((rows, table.runs[places] % self.vocabulary), more, accumulate=True)
        return share.float().view(*tokens.shape, self.vocabulary)

    def support(self, tokens: Tensor, past: Tensor | None = None) -> Tensor:
        """How much the counts have to go by: log(1 + how often it occurred) for each context but the empty one.

        (batch tokens longest - 1)
        """
        contexts = self._contexts(tokens, past)[1:]
        seen = [self._sums(table, context)[0].float().log1p() for table, context in contexts]
        return torch.stack(seen, dim=-1) if seen else torch.zeros(*tokens.shape, 0, device=tokens.device)

    def _contexts(self, tokens: Tensor, past: Tensor | None) -> list[tuple[_Table, Tensor]]:
        """For each length the table, and the number of the n - 1 tokens before the next; -1 where there are fewer."""
        context = max(self.longest - 2, 0)
        known = tokens if past is None or not context else torch.cat((past[:, -context:], tokens), dim=1)
        length = known.shape[1]
        number, found = torch.zeros_like(tokens), []
        for n in self._lengths:
            if n > 1:
                back = n - 2
                token = torch.full_like(tokens, -1)
                there = min(length - back, tokens.shape[1])
                if there > 0:
                    token[:, tokens.shape[1] - there :] = known[:, length - back - there : length - back]
                # Once -1, a context stays so: what is before the first token is before all that came earlier.
                number = torch.where(token < 0, -1, token * self.vocabulary**back + number)
            found.append((self._table(n), number))
        return found

    def _sums(self, table: _Table, context: Tensor) -> tuple[Tensor, Tensor]:
        """How often the runs that begin with a context occurred, and how much of that is held back."""
        first, stop = self._span(table, context)
        return (
            table.times_before[stop] - table.times_before[first],
            table.held_before[stop] - table.held_before[first],
        )

    def _span(self, table: _Table, context: Tensor) -> tuple[Tensor, Tensor]:
        """The first of the runs that begin with a context, and the first behind them."""
        return tuple(torch.searchsorted(table.runs, (context + more) * self.vocabulary) for more in (0, 1))  # pyright: ignore[reportReturnType]

    def _table(self, n: int) -> _Table:
        runs, times = self.get_buffer(f"runs_{n}"), self.get_buffer(f"times_{n}")
        if not len(runs):
            raise ValueError("Counts: nothing was counted yet; train the model on a text, or load one that was")
        if runs.device.type == "mps":
            raise ValueError("Counts: expected a device with numbers of 64 bits, got mps: take the cpu, or no counts")
        if len(runs) != len(times):
            raise ValueError(
                f"Counts: {len(runs)} runs of {n} tokens have {len(times)} counts: the checkpoint is damaged"
            )
        table, state = self._tables.get(n, (None, None))
        now = tuple((tensor.data_ptr(), tensor._version) for tensor in (runs, times))
        if table is None or state != now:
            times = times.long()
            discounts = torch.from_numpy(_discounts(times.cpu().numpy())).to(times.device)
            sums = (values.cumsum(0) for values in (times, discounts[times.clamp(max=3)]))
            seen, held = (torch.cat((values.new_zeros(1), values)) for values in sums)
            table = _Table(runs.detach(), times, seen, held, discounts)
            self._tables[n] = table, now
        return table


def _discounts(times: NDArray[Any]) -> NDArray[np.float64]:
    """Of a run seen 0, 1, 2, 3 or more times: those that make the text likely when one occurrence is left out.

    Where a text is too short for there to be runs of a kind, one discount for all.
    """
    there = [int((times == number).sum()) for number in range(1, 5)]
    share = there[0] / (there[0] + 2 * there[1]) if there[0] else 0.0
    found = [0.0]
    for number, (these, above) in enumerate(pairwise(there), start=1):
        discount = number - (number + 1) * share * above / these if these and above else share
        found.append(min(max(discount, 0.0), float(number)))
    return np.array(found)


@dataclass(frozen=True)
class _Runs:
    """All different runs of one length, and where in the list each of a longer list, or of the text, ends."""

    runs: NDArray[np.int64]
    ends: NDArray[np.int64]
    times: NDArray[np.int64]
    first: NDArray[np.int64]  # of the runs with the same context, and the first behind them
    stop: NDArray[np.int64]

    @classmethod
    def of(cls, runs: NDArray[np.int64], ends: NDArray[np.int64], times: NDArray[np.int64], vocabulary: int) -> "_Runs":
        new = np.flatnonzero(np.diff(runs // vocabulary, prepend=-1))
        lengths = np.diff(np.append(new, len(runs)))
        return cls(runs, ends, times, np.repeat(new, lengths), np.repeat(new + lengths, lengths))


def _cross_counted(
    tables: list[_Runs], length: int, vocabulary: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For each whole run of the text what its last token is given by the other parts, and their support."""
    share = np.empty(length, dtype=np.float32)
    support = np.empty((length, len(tables) - 1), dtype=np.float32)
    discounts = [_discounts(table.times) for table in tables]
    edges = np.linspace(0, length, _FOLDS + 1).astype(np.int64)
    for first, stop in pairwise(edges):
        mine = tables[-1].ends[first:stop]
        times = [tables[-1].times - np.bincount(mine, minlength=len(tables[-1].runs))]
        places = [mine]
        for longer, table in pairwise(tables[::-1]):
            times.insert(0, np.bincount(table.ends[times[0] > 0], minlength=len(table.runs)))
            places.insert(0, table.ends[places[0]])
            assert len(table.ends) == len(longer.runs)
        found = np.full(len(mine), 1 / vocabulary)
        for n, (table, seen, place, discount) in enumerate(zip(tables, times, places, discounts, strict=True)):
            off = discount[np.minimum(seen, 3)]
            sums = (np.append(0, values.cumsum()) for values in (seen, off))
            total, held = (before[table.stop[place]] - before[table.first[place]] for before in sums)
            new = (seen[place] - off[place] + held * found) / np.maximum(total, 1)
            found = np.where(total > 0, new, found)
            if n:
                support[first:stop, n - 1] = np.log1p(total)
        share[first:stop] = found
    return share, support
