"""From token files or from text to a checkpoint: what a run is, and what of it follows from the seed."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from small_runs import CONFIG, DATA, SMALL, VOCABULARY, Stopper, decoder, losses, names, same_weights

from sightline import schedule
from sightline.checkpoints import load
from sightline.corpora import open_corpus
from sightline.evaluation import evaluate, unigram
from sightline.events import Ended, Evaluated, Saved, Started, Stepped
from sightline.training import Interrupted, choose_tokenizer, fit, train

# --- A run --------------------------------------------------------------------------------------------


def test_a_run_learns_and_is_kept(tmp_path):
    model = decoder(dropout=0.0)
    result = fit(model, DATA, tmp_path / "run", replace(CONFIG, steps=150, evaluate_every=50, evaluate_batches=None))
    assert result.final.loss < 1.3 < unigram(DATA.train, DATA.valid, VOCABULARY).loss < result.start.loss + 0.2
    assert (result.steps, result.stopped) == (150, "steps")
    assert result.best.loss <= result.final.loss
    best = load(result.out)
    assert evaluate(best, DATA.valid, batch=CONFIG.batch).loss == pytest.approx(result.best.loss, rel=1e-6)
    assert same_weights(load(result.out / "step-150"), model)
    steps = {f"step-{result.best_step}", "step-100", "step-150"}
    assert set(names(result.out)) == {"checkpoint.json", "log.jsonl", *steps}
    files = ["config.json", "manifest.json", "model.safetensors", "training.json", "training.safetensors"]
    assert names(result.out / "step-150") == files


def test_the_events_of_a_run(tmp_path):
    events = []
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=7), listener=events.append)
    kinds = [Started, Evaluated, *[Stepped] * 5, Evaluated, Saved, *[Stepped] * 2, Evaluated, Saved, Ended]
    assert [type(event) for event in events] == kinds
    steps = [event for event in events if isinstance(event, Stepped)]
    assert [event.step for event in steps] == list(range(1, 8))
    config = replace(CONFIG, steps=7)
    assert [event.learning_rate for event in steps] == [config.rate((step + 0.5) / 7) for step in range(7)]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in logged] == [kind.__name__.lower() for kind in kinds]


def test_seeds(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(decoder(), DATA, tmp_path / name, replace(CONFIG, steps=5, seed=seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize("training", [True, False])
def test_what_is_around_a_run_stays_as_it_was(tmp_path, training):
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    model = decoder().train(training)
    fit(model, DATA, tmp_path, replace(CONFIG, steps=3))
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGINT) is handler
    assert model.training is training


def test_patience_ends_a_run(tmp_path):
    config = replace(CONFIG, steps=1000, learning_rate=1e-30, matrix_rate=1e-30, patience=3)
    result = fit(decoder(), DATA, tmp_path, config)
    assert (result.stopped, result.steps, result.best_step) == ("patience", 20, 5)


def test_a_model_that_sees_its_future_is_not_trained(tmp_path):
    model = decoder()
    forward = model.forward
    model.forward = lambda tokens, cache=None: forward(tokens, cache=cache).flip(1)
    with pytest.raises(RuntimeError, match="sees its future"):
        fit(model, DATA, tmp_path, CONFIG)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # rms_norm of PyTorch
def test_bfloat16_trains_where_it_is_emulated(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "has_bfloat16", lambda device: False)
    model = decoder()
    with pytest.warns(UserWarning, match="slower than float32"):
        result = fit(model, DATA, tmp_path, replace(CONFIG, steps=5, precision="bfloat16"))
    assert result.final.loss < result.start.loss
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --- From text ---------------------------------------------------------------------------------------------

TEXT = "the cat sat on the mat and the dog sat on the cat\n" * 60


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8", newline="\n")
    return file


FROM_TEXT = {"model": {**SMALL, "dropout": 0.1}, "tokenizer": "characters"}


def test_from_text_to_a_checkpoint(tmp_path, text):
    result = train(text, tmp_path / "run", **FROM_TEXT, config=replace(CONFIG, steps=40))
    assert result.best.bits_per_byte < 0.8 * result.start.bits_per_byte
    model = load(tmp_path / "run")
    assert model.tokenizer.decode(model.tokenizer.encode("the cat")) == "the cat"
    assert "tokens" in names(tmp_path / "run")


def test_from_text_and_on(tmp_path, text):
    for name, stop in (("straight", 0), ("stopped", 8)):
        try:
            train(text, tmp_path / name, **FROM_TEXT, config=CONFIG, listener=Stopper(stop))
        except Interrupted:
            train(text, tmp_path / name, **FROM_TEXT, config=CONFIG, resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_the_same_seed_gives_the_same_first_weights(tmp_path, text):
    results = [
        train(text, tmp_path / str(i), **FROM_TEXT, config=replace(CONFIG, steps=1, seed=seed))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert results[0].start == results[1].start != results[2].start


def test_presets_and_cache(tmp_path, text):
    config = replace(CONFIG, steps=1)
    train(text, tmp_path / "run", preset="classic", **FROM_TEXT, config=config, cache=tmp_path / "cache")
    assert load(tmp_path / "run").config.norm == "layer"
    assert "tokens" not in names(tmp_path / "run")
    assert names(tmp_path / "cache")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": {"d_modle": 16}}, "unknown key 'd_modle'; did you mean 'd_model'"),
        ({"model": {"vocabulary": 16}}, "no vocabulary among the model's settings"),
        ({"model": {"d_model": 16, "num_heads": 3}}, "d_model 16 is not divisible by num_heads 3"),
        ({"preset": "moderm"}, "preset to be modern or classic, got 'moderm'"),
        ({"tokenizer": "word"}, "kind must be one of words, characters, bpe"),
        ({"resume": True}, "expected a run to go on with"),
    ],
)
def test_bad_arguments_are_known_before_any_work(tmp_path, text, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(text, tmp_path / "run", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "bpe"}, r"the tokenizer of the run in .*, characters, got bpe"),
        ({"vocabulary": 4}, r"at least the 14 tokens of the run in .*, got vocabulary 4"),
    ],
)
def test_a_run_keeps_its_vocabulary(tmp_path, text, arguments, message):
    train(text, tmp_path / "run", **FROM_TEXT, config=replace(CONFIG, steps=1))
    with pytest.raises(ValueError, match=message):
        train(text, tmp_path / "run", **{**FROM_TEXT, **arguments}, config=CONFIG, resume=True)


def test_the_same_command_goes_on_where_the_text_has_fewer_tokens_than_asked_for(tmp_path, text):
    arguments = {**FROM_TEXT, "vocabulary": 99}
    train(text, tmp_path / "run", **arguments, config=replace(CONFIG, steps=1))
    assert train(text, tmp_path / "run", **arguments, config=replace(CONFIG, steps=2), resume=True).steps == 2


def test_text_that_changed_cannot_be_resumed(tmp_path, text):
    train(text, tmp_path / "run", **FROM_TEXT, config=replace(CONFIG, steps=1))
    text.write_text(TEXT[:-100] + TEXT[:90], encoding="utf-8", newline="\n")
    with pytest.raises(ValueError, match="expected the text of the run to resume"):
        train(text, tmp_path / "run", **FROM_TEXT, config=CONFIG, resume=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (TEXT, ("bpe", 512)),
        (TEXT * 200, ("bpe", 2109)),
        (TEXT.replace("dog", "<unk>"), ("words", None)),
    ],
)
def test_the_tokenizer_chosen_for_a_text(tmp_path, content, expected):
    file = tmp_path / "text.txt"
    file.write_text(content, encoding="utf-8", newline="\n")
    assert choose_tokenizer(open_corpus(file)) == expected
