"""Counted probabilities against the definition, run by run, in Python's own numbers."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline import counts as module
from sightline.counts import Counts


def kneser_ney(text: list[int], vocabulary: int, longest: int):
    """The definition: p(token, context) by dictionaries; contexts are tuples."""
    times = {longest: Counter(tuple(text[i : i + longest]) for i in range(len(text) - longest + 1))}
    for n in range(longest - 1, 0, -1):
        times[n] = Counter(run[1:] for run in times[n + 1])
    off = {n: discounts(times[n].values()) for n in times}

    def p(token: int, context: tuple[int, ...]) -> float:
        below = p(token, context[1:]) if context else 1 / vocabulary
        known = {run[-1]: c for run, c in times[len(context) + 1].items() if run[:-1] == context}
        if not known:
            return below
        held = sum(off[len(context) + 1][min(c, 3)] for c in known.values())
        c = known.get(token, 0)
        return (c - off[len(context) + 1][min(c, 3)] + held * below) / sum(known.values())

    return p


def discounts(times) -> list[float]:
    kinds = Counter(times)
    y = kinds[1] / (kinds[1] + 2 * kinds[2]) if kinds[1] else 0.0
    found = [0.0]
    for c in (1, 2, 3):
        plain = y if not (kinds[c] and kinds[c + 1]) else c - (c + 1) * y * kinds[c + 1] / kinds[c]
        found.append(min(max(plain, 0.0), c))
    return found


def drawn(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(7, size=length, p=np.array([8, 5, 3, 2, 1, 1, 1]) / 21)


def counted(text: np.ndarray, longest: int = 3, vocabulary: int = 8) -> Counts:
    counts = Counts(vocabulary, longest=longest)
    counts.count(text)
    return counts


@settings(deadline=None)
@given(length=st.integers(4, 60), longest=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_definition(length, longest, seed):
    text = drawn(length, seed)
    counts, p = counted(text, longest), kneser_ney(text.tolist(), 8, longest)
    tokens = torch.from_numpy(np.random.default_rng(seed + 1).integers(0, 8, (2, 5)))
    shares = counts.shares(tokens)
    for row in range(2):
        for i in range(5):
            context = tuple(tokens[row, : i + 1].tolist())[max(0, i + 2 - longest) :] if longest > 1 else ()
            expected = torch.tensor([p(token, context) for token in range(8)])
            torch.testing.assert_close(shares[row, i], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 5))


@settings(deadline=None)
@given(longest=st.integers(1, 4), cut=st.integers(0, 9), seed=st.integers(0, 99))
def test_one_token_or_all_with_a_past_or_in_one_pass(longest, cut, seed):
    counts = counted(drawn(80, seed), longest)
    tokens = torch.from_numpy(drawn(20, seed + 1)).view(2, 10)
    shares = counts.shares(tokens)
    targets = torch.from_numpy(drawn(20, seed + 2)).view(2, 10)
    exact = shares.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(counts.probability(tokens, targets), exact)
    past, new = tokens[:, :cut], tokens[:, cut:]
    torch.testing.assert_close(counts.shares(new, past), shares[:, cut:])
    torch.testing.assert_close(counts.support(new, past), counts.support(tokens)[:, cut:])


def test_support_is_how_often_a_context_was_seen():
    counts = counted(np.array([0, 1, 0, 1, 2, 0, 1, 0]))
    # 0, 1 before a third token: three times; 1 alone by what stands before it and after it: 010 and 012 are two kinds.
    torch.testing.assert_close(counts.support(torch.tensor([[0, 1]]))[0, 1].exp() - 1, torch.tensor([2.0, 3.0]))


def test_apart_is_by_the_counts_of_the_other_parts():
    text, longest = drawn(60), 3
    counts = counted(text, longest)
    runs = [tuple(text[i : i + longest].tolist()) for i in range(len(text) - longest + 1)]
    edges = np.linspace(0, len(runs), module._FOLDS + 1).astype(int)
    off = {n: discounts(getattr(counts, f"times_{n}").tolist()) for n in (1, 2, 3)}
    for first, stop in pairwise(edges):
        times = {longest: Counter(runs[:first] + runs[stop:])}
        for n in (2, 1):
            times[n] = Counter(run[1:] for run in times[n + 1])
        for i in range(first, stop):
            p, seen = 1 / 8, []
            for n in (1, 2, 3):
                run = runs[i][longest - n :]
                known = [c for other, c in times[n].items() if other[:-1] == run[:-1]]
                seen.append(sum(known))
                if known:
                    c, held = times[n][run], sum(off[n][min(c, 3)] for c in known)
                    p = (c - off[n][min(c, 3)] + held * p) / sum(known)
            share, support = counts.apart(torch.tensor([i + longest - 1]))
            assert share.item() == pytest.approx(p, rel=1e-5)
            np.testing.assert_allclose(support[0].exp() - 1, seen[1:], rtol=1e-5)


def test_what_cannot_be_counted():
    with pytest.raises(ValueError, match="count runs of at most 4"):
        Counts(18_000, longest=5)
    with pytest.raises(ValueError, match=r"a text of 3 to 20,000,000 tokens to count, got 2"):
        counted(np.array([0, 1]))
    with pytest.raises(ValueError, match="vocabulary's 8, got 9"):
        counted(np.array([0, 1, 9, 1]))
    with pytest.raises(ValueError, match="nothing was counted yet"):
        Counts(8, longest=2).shares(torch.tensor([[0]]))


def test_counts_that_were_replaced_are_looked_at_anew():
    counts, other = counted(drawn(80)), counted(drawn(80, seed=1))
    tokens = torch.tensor([[0, 1]])
    before = counts.shares(tokens)
    for name, buffer in counts.named_buffers():
        buffer.data = other.get_buffer(name)
    assert not torch.equal(counts.shares(tokens), before)
    assert torch.equal(counts.shares(tokens), other.shares(tokens))
