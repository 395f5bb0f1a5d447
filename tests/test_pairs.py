"""Parallel text is read whole or refused by line; batches are padded, within their size, and a function of the step."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sightline.pairs import (
    Pair,
    TokenPairs,
    batch,
    batches,
    encode_pairs,
    line_end,
    open_pairs,
    pad,
    read_lines,
)
from sightline.tokenizers import Tokenizer

LINES = [f"source {n}\ttarget {n}" for n in range(200)]


@pytest.fixture
def tsv(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return file


def test_a_file_is_split_by_its_sources(tsv):
    found = open_pairs(tsv)
    assert len(found.train) + len(found.valid) == 200 and 2 <= len(found.valid) <= 25
    assert found.train[0] == Pair("source 0", "target 0", 1)
    tsv.write_text("\n".join([*reversed(LINES), LINES[3]]), encoding="utf-8")
    again = open_pairs(tsv)
    assert {pair.source for pair in again.valid} == {pair.source for pair in found.valid}
    assert not {pair.source for pair in again.train} & {pair.source for pair in again.valid}
    assert len(found.split("all")) == 200
    with pytest.raises(ValueError, match="has no test split; choose train, valid or all"):
        found.split("test")


def test_two_files_are_one(tsv, tmp_path):
    for side, name in enumerate(("a", "b")):
        text = "\r\n".join(line.split("\t")[side] for line in LINES)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    aligned = open_pairs(tmp_path / "a", tmp_path / "b")
    assert (aligned.train, aligned.valid) == (open_pairs(tsv).train, open_pairs(tsv).valid)


def test_a_folder_has_its_own_splits(tmp_path):
    for name, lines in (("train", LINES[:9]), ("valid", LINES[9:11]), ("test", LINES[11:12])):
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
    found = open_pairs(tmp_path)
    assert [len(found.split(name)) for name in ("train", "valid", "test", "all")] == [9, 2, 1, 12]
    (tmp_path / "valid.tsv").write_text(LINES[4])
    with pytest.raises(ValueError, match=r"line 1 of valid\.tsv is line 5 of train\.tsv"):
        open_pairs(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one column", r"line 2 of .* to be source<TAB>target, got 1 column: 'one column'"),
        ("a\tb\tc", r"line 2 of .* got 3 columns"),
        ("", r"line 2 of .* got 1 column"),
        ("a\t ", r"expected a target in line 2 of .*, but it is empty"),
        ("\tb", r"expected a source in line 2 of .*, but it is empty"),
    ],
)
def test_a_bad_line_is_named(tsv, line, message):
    tsv.write_text("\n".join([LINES[0], line, *LINES[1:]]))
    with pytest.raises(ValueError, match=message):
        open_pairs(tsv)


def test_bad_files_are_named(tmp_path, tsv):
    short, empty, latin = tmp_path / "short", tmp_path / "empty", tmp_path / "latin"
    short.write_text("one\ntwo")
    empty.write_text("")
    latin.write_bytes(b"one\ncaf\xe9\tx\n")
    with pytest.raises(ValueError, match=r"200 in .*pairs.tsv and 2 in .*short: line 3 of .*pairs.tsv has no partner"):
        open_pairs(tsv, short)
    with pytest.raises(ValueError, match="is empty"):
        open_pairs(empty)
    with pytest.raises(ValueError, match=r"line 2 of .*latin is not UTF-8 \(byte 0xe9\)"):
        open_pairs(latin)
    with pytest.raises(ValueError, match="does not exist"):
        read_lines(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"one source in 20 out for validation, got 2"):
        short.write_text("a\tb\nc\td")
        open_pairs(short)


# --- Tokens ------------------------------------------------------------------------------------------

TOKENIZER = Tokenizer.train("words", ["a b c d\n", "x y z\n"])


def test_pairs_become_ids_between_line_ends():
    pairs = [Pair("a b", "x", 1), Pair("c", "y z y", 2), Pair("d", "new", 3)]
    found = encode_pairs(pairs, TOKENIZER, context=4, name="text")
    source, lengths, target, target_lengths = found.padded(np.array([1, 0]))
    end = line_end(TOKENIZER)
    assert TOKENIZER.decode(source[1].tolist()) == "a b\n" and lengths.tolist() == [2, 3]
    assert target[1].tolist() == [end, *TOKENIZER.encode("x"), end, 0, 0] and target_lengths.tolist() == [5, 3]
    assert (found.num_unknown, found.num_predicted, found.num_bytes) == (1, 2 + 4 + 2, 2 + 6 + 4)
    with pytest.raises(ValueError, match=r"the target in line 2 of text has 4 tokens, more than the context of 3"):
        encode_pairs(pairs, TOKENIZER, context=3, name="text")
    with pytest.raises(ValueError, match=r"the source in line 9 of text has 5 tokens"):
        encode_pairs([Pair("a b c d", "x", 9)], TOKENIZER, context=3, name="text")
    with pytest.raises(ValueError, match="one token for the end of a line"):
        line_end(Tokenizer.train("characters", ["abc"]))


def made(lengths: list[tuple[int, int]]) -> TokenPairs:
    """Pairs whose every id is their own number."""
    flat = [n for number, pair in enumerate(lengths) for n in [number] * sum(pair)]
    ends = np.cumsum([n for pair in lengths for n in pair])
    return TokenPairs(ids=np.array(flat), ends=ends, num_bytes=1, num_unknown=0)


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(2, 9)), min_size=1, max_size=40)


@given(SIZES, st.integers(18, 200), st.integers(0, 3))
def test_a_batch_is_padded_pairs_within_its_size(lengths, tokens, step):
    pairs = made(lengths)
    source, source_lengths, target, target_lengths = batch(pairs, step=step, seed=1, tokens=tokens)
    assert source.numel() + target.numel() <= tokens
    chosen = target[:, 0].tolist()
    assert len(set(chosen)) == len(chosen)
    for row, number in enumerate(chosen):
        assert (int(source_lengths[row]), int(target_lengths[row])) == lengths[number]
        for side, length in ((source, source_lengths), (target, target_lengths)):
            assert (side[row, : length[row]] == number).all() and not side[row, length[row] :].any()
    again = batch(pairs, step=step, seed=1, tokens=tokens)
    assert all(map(torch.equal, again, (source, source_lengths, target, target_lengths)))


@given(SIZES, st.integers(1, 200))
def test_batches_hold_every_pair_once(lengths, tokens):
    found = []
    for source, _, target, _ in batches(made(lengths), tokens=tokens):
        assert source.numel() + target.numel() <= tokens or len(source) == 1
        found += target[:, 0].tolist()
    assert sorted(found) == list(range(len(lengths)))


def test_long_pairs_are_drawn_about_as_often_as_short_ones():
    pairs = made([(1 + n // 40, 2 + n // 40) for n in range(400)])
    drawn: Counter[int] = Counter()
    for step in range(1_500):
        drawn.update(batch(pairs, step=step, seed=0, tokens=120).target[:, 0].tolist())
    counts = np.array([drawn[n] for n in range(400)], dtype=float).reshape(4, 100).mean(1)
    assert counts.max() / counts.min() < 2  # four times, if places were drawn by pairs


def test_padding_is_after_what_is_shorter():
    padded, lengths = pad([[1, 2, 3], [4]])
    assert padded.tolist() == [[1, 2, 3], [4, 0, 0]] and lengths.tolist() == [3, 1]
