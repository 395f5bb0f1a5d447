import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline import encoding
from sightline.encoding import Encoder, encode_all
from sightline.tokenizers import Tokenizer

KINDS = ("words", "characters", "bpe")
SAMPLE = "the cat's  cat \n\n  sat\r\n\t on the mat, \u00fcber\u3000the\x1cmat\x1f \u4e2d\u6587 12\u00b2 \n"
TOKENIZERS = {kind: Tokenizer.train(kind, [SAMPLE * 9]) for kind in KINDS}
# Every character that is white space to somebody, and what the pre-tokenizer tells apart.
PARTS = [
    *" \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000",
    "the",
    "cat",
    "'s",
    "12",
    "\u00b2",
    ",",
    "\u00fc\u4e2d",
    "  ",
]
texts = st.lists(st.one_of(st.sampled_from(PARTS), st.characters(blacklist_categories=["Cs"])), max_size=30)


def ids_of(encoded):
    return np.frombuffer(encoded.ids, "<u2").tolist()


@pytest.mark.parametrize("kind", KINDS)
@given(parts=texts)
def test_an_encoder_gives_the_ids_of_the_tokenizer(kind, parts):
    text, tokenizer = "".join(parts), TOKENIZERS[kind]
    encoded = Encoder(tokenizer).encode(text)
    ids = tokenizer.encode(text)
    assert ids_of(encoded) == ids
    assert (encoded.words, encoded.unknown) == (len(text.split()), sum(i == tokenizer.unknown for i in ids))


@pytest.mark.parametrize("kind", KINDS)
def test_wide_vocabularies_have_wide_ids(kind, monkeypatch):
    monkeypatch.setattr(encoding, "width", lambda tokenizer: "<u4")
    encoded = Encoder(TOKENIZERS[kind]).encode(SAMPLE)
    assert np.frombuffer(encoded.ids, "<u4").tolist() == TOKENIZERS[kind].encode(SAMPLE)


def test_what_is_remembered_has_a_bound(monkeypatch):
    monkeypatch.setattr(encoding, "REMEMBERED", 10)
    remembered = encoding._Remembered(TOKENIZERS["bpe"], "<u2")
    for i in range(100):
        assert remembered[f" {i}"] == np.asarray(TOKENIZERS["bpe"].encode(f" {i}"), "<u2").tobytes()
        assert len(remembered) <= 10
    assert remembered["x" * 65] and "x" * 65 not in remembered


@pytest.mark.parametrize("kind", KINDS)
def test_processes_encode_in_order(kind):
    pieces = [f"the cat {i} sat\n" * (i % 7 + 1) for i in range(20)]
    alone = list(encode_all(pieces, TOKENIZERS[kind], processes=1))
    assert list(encode_all(iter(pieces), TOKENIZERS[kind], processes=3)) == alone
    assert [text for text, _ in alone] == pieces


def test_fewer_texts_than_processes():
    assert [text for text, _ in encode_all(["a"], TOKENIZERS["bpe"], processes=3)] == ["a"]
    assert list(encode_all([], TOKENIZERS["bpe"], processes=2)) == []


def test_processes_end_with_the_work(monkeypatch):
    started = []

    def start(*arguments, original=subprocess.Popen, **options):
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(encoding.subprocess, "Popen", start)
    answers = encode_all(iter(["a", "b", "c", "d"]), TOKENIZERS["bpe"], processes=2)
    next(answers)
    answers.close()
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_a_process_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(encoding, "_PROGRAM", "import sys; sys.exit(3)")
    with pytest.raises(OSError, match="a process that tokenizes ended with code 3"):
        list(encode_all(["a", "b"], TOKENIZERS["bpe"], processes=2))
