"""From models and a text to captures: which tokens are read, what is written, what is refused."""

import pytest
import torch

from sightline import corpora, looking
from sightline.captures import AXES
from sightline.corpora import open_corpus
from sightline.generation import SampleConfig, sample_tokens
from sightline.looking import beginning, look, writing
from sightline.models import Decoder, DecoderConfig
from sightline.tokenizers import Tokenizer

TEXT = "the cat sat on the mat and the dog ran after the cat\n" * 20


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    file = tmp_path / "cats.txt"
    file.write_text(TEXT, encoding="utf-8", newline="\n")
    monkeypatch.setattr(corpora, "PIECE", 64)  # so that the text comes in many pieces
    return open_corpus(file)


def reader(kind="characters", **changes) -> Decoder:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(kind, [TEXT], vocabulary=300 if kind == "bpe" else None)
    shape = {"d_model": 16, "num_layers": 1, "num_heads": 2, "context": 40}
    model = Decoder(DecoderConfig(vocabulary=len(tokenizer), **(shape | changes)))
    model.tokenizer = tokenizer
    return model


@pytest.mark.parametrize("kind", ["words", "characters", "bpe"])
@pytest.mark.parametrize("most", [1, 7, 150, 10_000])
def test_the_beginning_is_that_of_the_whole_text(corpus, kind, most):
    tokenizer = reader(kind).tokenizer
    assert beginning(corpus, tokenizer.encode, most) == tokenizer.encode(TEXT)[:most]


def test_as_much_as_the_context_holds(corpus):
    (one,) = look([reader()], corpus)
    assert "".join(one.capture.tokens) == TEXT[:40]
    assert one.capture.prompt is None and one.unknown == "" and one.seconds > 0 and one.peak_bytes > 1e8
    (short, long) = look([reader(context=30), reader(context=60)], corpus)
    assert short.capture.tokens == long.capture.tokens == tuple(TEXT[:30])


def test_what_the_first_model_writes_is_read_by_both(corpus):
    models = [reader(), reader(num_layers=2)]
    first, second = look(models, corpus, tokens=9, write=8)
    ids = models[0].tokenizer.encode(TEXT)[:9]
    expected = (*ids, *sample_tokens(models[0], ids, SampleConfig(tokens=8, seed=0)))
    assert first.capture.ids == second.capture.ids == expected
    assert first.capture.prompt == second.capture.prompt == 9 and second.capture.layers == (0, 1)


@pytest.mark.parametrize("write", [1, 12])
def test_what_is_seen_while_a_model_writes_ends_as_what_is_seen_at_once(corpus, monkeypatch, write):
    monkeypatch.setattr(looking, "PACE", 0.0)
    model = reader(num_layers=2, num_groups=1)
    (whole,) = look([model], corpus, tokens=9, write=write)
    looks = [one.capture for one in writing(model, corpus, tokens=9, write=write)]
    assert [len(seen.tokens) for seen in looks][:2] == [9, 10] and len(looks) <= write + 1
    last, expected = looks[-1], whole.capture
    names = ("ids", "tokens", "prompt", "separator", "layers", "model", "map_block", "scales")
    assert all(getattr(last, name) == getattr(expected, name) for name in names)
    assert [vars(mask) for mask in last.masks] == [vars(mask) for mask in expected.masks]
    for name in (*AXES, "previous_token", "induction"):
        if name != "top_keys":
            torch.testing.assert_close(getattr(last, name), getattr(expected, name), atol=2e-5, rtol=1e-4, msg=name)
    for seen in looks:
        assert seen.tokens == expected.tokens[: len(seen.tokens)] and seen.prompt == 9
        torch.testing.assert_close(seen.entropy, expected.entropy[..., : len(seen.tokens)], atol=2e-5, rtol=1e-4)
    assert model.training and all(getattr(module, "observer", None) is None for module in model.modules())


def test_models_of_other_tokens_read_the_same_text(corpus):
    first, second = look([reader(), reader("words")], corpus, tokens=5)
    assert first.capture.tokens == tuple("the c") and second.capture.tokens == ("the", "cat", "sat", "on", "the")


def test_what_cannot_be_is_said(corpus):
    silent = reader()
    silent.tokenizer = None
    for call, message in [
        (lambda: look([silent], corpus), "no tokenizer to read text with"),
        (lambda: look([reader()], corpus, tokens=41), "--tokens must be from 1 to 40, .* got 41"),
        (
            lambda: look([reader()], corpus, write=40),
            "--write must be from 0 to 39, for a context of 40 tokens; got 40",
        ),
        (lambda: look([reader()], corpus, write=-1), "--write must be from 0 to 39, .* got -1"),
        (lambda: look([reader(), reader("words")], corpus, write=1), "two models with the same tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
