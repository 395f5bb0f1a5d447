"""Runs of tokens and their rows: each its own where they fit, the same with a past as in one pass."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.checkpoints import save
from sightline.models import Decoder, DecoderConfig
from sightline.ngrams import Ngrams


def drawn(**shape) -> Ngrams:
    torch.manual_seed(0)
    ngrams = Ngrams(d_model=4, **shape)
    for parameter in ngrams.parameters():
        torch.nn.init.normal_(parameter)
    return ngrams


def test_where_rows_suffice_each_run_has_its_own():
    ngrams = Ngrams(vocabulary=3, d_model=4, longest=3, rows=64)
    runs = torch.tensor(list(itertools.product(range(3), repeat=3)))
    pairs, triples = (rows[:, -1] for rows in ngrams.rows(runs))
    assert len(triples.unique()) == 27 and triples.max() < 64
    assert len(pairs.unique()) == 9 and pairs.max() < 16
    # Two runs with the same last two tokens are one pair.
    assert [len(pairs[(runs[:, 1:] == pair).all(1)].unique()) for pair in runs[:9, 1:]] == [1] * 9


def test_the_beginning_of_a_text_is_no_token():
    ngrams = Ngrams(vocabulary=3, d_model=4, longest=2, rows=64)
    (first,) = ngrams.rows(torch.tensor([[0], [1], [2]]))
    (later,) = ngrams.rows(torch.tensor(list(itertools.product(range(3), repeat=2))))
    assert not set(first[:, 0].tolist()) & set(later[:, 1].tolist())


def test_hashed_rows_are_spread():
    """65 characters in runs of four over 1,024 rows: the fullest row has not many times the mean."""
    ngrams = Ngrams(vocabulary=65, d_model=4, longest=4, rows=1024)
    tokens = torch.randint(65, (1, 100_000), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(ngrams.rows(tokens)[-1][0], minlength=1024)
    assert counts.min() > 40 and counts.max() < 180  # 98 on average, and 10 is one standard deviation


def test_a_large_vocabulary_does_not_overflow():
    ngrams = Ngrams(vocabulary=200_000, d_model=4, longest=6, rows=1000)
    rows = ngrams.rows(torch.full((1, 8), 199_999))
    assert all(int(row.min()) >= 0 and int(row.max()) < 1000 for row in rows)


@settings(max_examples=25, deadline=None)
@given(tokens=st.lists(st.integers(0, 6), min_size=2, max_size=12), cut=st.integers(1, 11), longest=st.integers(2, 5))
def test_a_past_is_as_good_as_one_pass(tokens, cut, longest):
    ngrams = drawn(vocabulary=7, longest=longest, rows=40)
    whole = torch.tensor([tokens])
    cut = min(cut, len(tokens) - 1)
    expected = ngrams(whole)
    torch.testing.assert_close(ngrams(whole[:, cut:], whole[:, :cut]), expected[:, cut:])
    torch.testing.assert_close(ngrams(whole[:, :cut]), expected[:, :cut])  # the future changes nothing


def test_rows_without_ngrams_are_an_error():
    with pytest.raises(ValueError, match="ngram_rows has no effect with ngrams 1; drop it"):
        DecoderConfig(vocabulary=5, ngram_rows=100)


def test_no_model_of_transformers_has_them(tmp_path):
    model = Decoder(DecoderConfig(vocabulary=5, context=4, d_model=8, num_layers=1, num_heads=1, ngrams=2))
    with pytest.raises(ValueError, match="no model of transformers computes this one: ngrams is 2"):
        save(tmp_path / "model", model, format="huggingface")
