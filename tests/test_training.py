import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sightline import loop, runs, schedule, trainer
from sightline.batches import TokenFile, TokenizedCorpus
from sightline.checkpoints import load, write_manifest
from sightline.corpora import open_corpus
from sightline.evaluation import evaluate, unigram
from sightline.events import Ended, Evaluated, Saved, Started, Stepped, Warned
from sightline.models import Decoder, DecoderConfig
from sightline.tokenizers import Tokenizer
from sightline.training import Diverged, Interrupted, TrainConfig, choose_tokenizer, fit, train

VOCABULARY = 7
CONFIG = TrainConfig(steps=20, batch=4, evaluate_every=5, evaluate_batches=2, learning_rate=0.01)
SMALL = {"context": 8, "d_model": 16, "num_layers": 1, "num_heads": 2}


def token_file(length, seed):
    """Text with an order to learn: each token is the last one plus 0, 1 or 2."""
    steps = np.random.default_rng(seed).integers(0, 3, length)
    ids = (np.cumsum(steps) % VOCABULARY).astype(np.uint16)
    return TokenFile(ids=ids, num_bytes=2 * length, num_words=length, num_unknown=0)


DATA = TokenizedCorpus(train=token_file(2000, 0), valid=token_file(300, 1))


def decoder(seed=0, **changes):
    shape = {**SMALL, "dropout": 0.1, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(DecoderConfig(vocabulary=VOCABULARY, **shape))


def losses(out):
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return [(event["step"], event["loss_nats"]) for event in events if event["event"] == "stepped"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Stopper:
    """A listener that raises Ctrl-C at a step."""

    def __init__(self, step):
        self.step = step

    def __call__(self, event):
        if isinstance(event, Stepped) and event.step == self.step:
            raise KeyboardInterrupt


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


# --- A time limit --------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when training or evaluating."""

    def __init__(self, monkeypatch, step_seconds, evaluation_seconds):
        self.now = 100.0
        for module in (loop, trainer):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        self._slow(monkeypatch, "_gradients", step_seconds)
        self._slow(monkeypatch, "evaluate", evaluation_seconds)

    def _slow(self, monkeypatch, name, seconds):
        original = getattr(trainer.Trainer, name)

        def slow(trainer):
            self.now += seconds
            return original(trainer)

        monkeypatch.setattr(trainer.Trainer, name, slow)


@pytest.mark.parametrize("evaluation_seconds", [0.1, 8.0])
def test_a_run_ends_inside_its_time_and_cools_down(tmp_path, monkeypatch, evaluation_seconds):
    Clock(monkeypatch, 0.5, evaluation_seconds)
    events = []
    config = replace(CONFIG, steps=None, minutes=1.0, evaluate_every=30)
    result = fit(decoder(), DATA, tmp_path, config, listener=events.append)
    assert result.stopped == "minutes"
    assert 50 < result.seconds <= 60
    rates = [event.learning_rate for event in events if isinstance(event, Stepped)]
    assert rates[-1] < 0.1 * config.learning_rate
    assert max(rates) == config.learning_rate


def test_a_limit_of_steps_can_come_first(tmp_path, monkeypatch):
    Clock(monkeypatch, 0.5, 1.0)
    result = fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=10, minutes=1.0))
    assert (result.stopped, result.steps) == ("steps", 10)


def test_no_time_to_train(tmp_path, monkeypatch):
    Clock(monkeypatch, 0.5, 70.0)
    with pytest.raises(ValueError, match=r"time to train in --minutes 1.0, but an evaluation takes 70.0 s"):
        fit(decoder(), DATA, tmp_path, replace(CONFIG, minutes=1.0))


def test_time_counts_over_sessions(tmp_path, monkeypatch):
    Clock(monkeypatch, 0.5, 1.0)
    config = replace(CONFIG, steps=None, minutes=0.5, evaluate_every=50)
    with pytest.raises(Interrupted):
        fit(decoder(), DATA, tmp_path, config, listener=Stopper(20))
    result = fit(decoder(), DATA, tmp_path, config, resume=True)
    assert 25 < result.seconds <= 30


# --- Going on --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run never stopped, and its model."""
    out, model = tmp_path_factory.mktemp("straight") / "run", decoder()
    result = fit(model, DATA, out, CONFIG)
    return out, model, result


@pytest.mark.parametrize("stop", [1, 5, 13])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, straight, stop):
    out, model, result = straight
    with pytest.raises(Interrupted, match=rf"stopped at step {stop}, saved in .*step-{stop}: the same with --resume"):
        fit(decoder(), DATA, tmp_path, CONFIG, listener=Stopper(stop))
    again = decoder(seed=9)
    torch.randn(stop)  # the state of the generator around must not matter
    resumed = fit(again, DATA, tmp_path, CONFIG, resume=True)
    assert losses(tmp_path) == losses(out)
    assert same_weights(again, model)
    assert (resumed.start, resumed.best, resumed.best_step) == (result.start, result.best, result.best_step)
    assert resumed.final == result.final
    assert same_weights(load(tmp_path), load(out))


def test_a_finished_run_can_be_made_longer(tmp_path):
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=10))
    with pytest.raises(ValueError, match=r"ended at step 10 because of its steps: give a larger --steps to go on"):
        fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=10), resume=True)
    result = fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=15), resume=True)
    assert result.steps == 15
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 16))


def test_ctrl_c_waits_for_the_end_of_a_step(tmp_path, monkeypatch, straight):
    gradients = trainer.Trainer._gradients

    def pressed(self):
        if self.step == 11:
            signal.raise_signal(signal.SIGINT)
        return gradients(self)

    monkeypatch.setattr(trainer.Trainer, "_gradients", pressed)
    with pytest.raises(Interrupted, match="stopped at step 12"):
        fit(decoder(), DATA, tmp_path, CONFIG)
    monkeypatch.undo()
    fit(decoder(), DATA, tmp_path, CONFIG, resume=True)
    assert [loss for _, loss in losses(tmp_path)][12:] == [loss for _, loss in losses(straight[0])][12:]


def test_ctrl_c_before_the_first_step(tmp_path):
    def stop(event):
        raise KeyboardInterrupt

    model = decoder()
    with pytest.raises(Interrupted, match="stopped before the first step: nothing to save"):
        fit(model, DATA, tmp_path, CONFIG, listener=lambda event: stop(event) if isinstance(event, Evaluated) else 0)
    fit(model, DATA, tmp_path, replace(CONFIG, steps=2))  # the folder is as good as new


def test_a_second_ctrl_c_while_saving_keeps_what_there_was(tmp_path, monkeypatch):
    def again(*_):
        raise KeyboardInterrupt

    def stop(event):
        if isinstance(event, Stepped) and event.step == 8:
            monkeypatch.setattr(runs, "save_file", again)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(decoder(), DATA, tmp_path, CONFIG, listener=stop)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint.json", "log.jsonl", "step-5"]
    assert fit(decoder(), DATA, tmp_path, CONFIG, resume=True).steps == 20


OTHERS = [
    ({"model": {"d_model": 32}}, {}, r"expected the model of the run .* whose d_model is 16 in .*, got d_model 32"),
    ({"model": {"tied": False}}, {}, r"whose tied is True in .*, got tied False"),
    ({"data": token_file(2001, 0)}, {}, r"expected the text of the run .* whose train is '.*' in .*, got train '"),
    ({}, {"seed": 1}, r"expected the config of the run .* whose seed is 0 in .*, got seed 1: give the same, or"),
    ({}, {"learning_rate": 0.02}, r"whose learning_rate is 0.01 in .*, got learning_rate 0.02"),
    ({}, {"betas": (0.8, 0.9)}, r"whose betas is \[0.9, 0.99\] in .*, got betas \[0.8, 0.9\]"),
]


@pytest.mark.parametrize(("given", "settings", "message"), OTHERS)
def test_another_run_cannot_be_resumed(tmp_path, given, settings, message):
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=2))
    before = (tmp_path / "log.jsonl").read_bytes()
    data = replace(DATA, train=given["data"]) if "data" in given else DATA
    config = replace(CONFIG, steps=4, **settings)
    with pytest.raises(ValueError, match=message):
        fit(decoder(**given.get("model", {})), data, tmp_path, config, resume=True)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_another_tokenizer_cannot_be_resumed(tmp_path):
    model = decoder()
    model.tokenizer = Tokenizer.train("characters", ["abcdef"])
    fit(model, DATA, tmp_path, replace(CONFIG, steps=2))
    model.tokenizer = Tokenizer.train("characters", ["fedcbx"])
    with pytest.raises(ValueError, match="expected the tokenizer of the run to resume"):
        fit(model, DATA, tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize("name", ["training.json", "training.safetensors", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_state_is_named(tmp_path, name, damage):
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=2))
    file = tmp_path / "step-2" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=name):
        fit(decoder(), DATA, tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", "abc", r"'step' in .*training.json to be int, got 'abc'"),
        ("seconds", None, r"'seconds' in .*training.json to be int \| float, got None"),
        ("data", "x", r"'data' in .*training.json to be dict, got 'x'"),
        ("config", [], r"'config' in .*training.json to be dict, got \[\]"),
        ("best_step", "2", r"'best_step' in .*training.json to be int \| None, got '2'"),
        ("advice", {"a": 1}, r"training.json: expected advice of steps, mean, .*, got {'a': 1}"),
        ("start", {"a": 1}, r"'start' in .*training.json to hold bytes, loss, tokens, unknown, got {'a': 1}"),
    ],
)
def test_a_foreign_state_is_named(tmp_path, key, value, message):
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=2))
    file = tmp_path / "step-2" / "training.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    write_manifest(file.parent)
    with pytest.raises(ValueError, match=message):
        fit(decoder(), DATA, tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize("name", ["embedding.weight.step", "blocks.0.attention.query.weight.momentum_buffer"])
@pytest.mark.parametrize("tensor", [None, torch.zeros(3), torch.zeros(3, dtype=torch.uint8)])
def test_a_foreign_tensor_of_the_state_is_named(tmp_path, name, tensor):
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=2))
    file = tmp_path / "step-2" / "training.safetensors"
    tensors = {**load_file(file), name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)
    write_manifest(file.parent)
    with pytest.raises(ValueError, match=f"expected the training state {name} of shape"):
        fit(decoder(), DATA, tmp_path, CONFIG, resume=True)


# --- What goes wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, number):
    model = decoder()

    def poison(event):
        if isinstance(event, Stepped) and event.step == 7:
            with torch.no_grad():
                model.embedding.weight[:] = number

    message = (
        r"the loss became nan at step 8: .*step-5 is the last good checkpoint; .* lower --learning-rate \(now 0.01\)"
    )
    with pytest.raises(Diverged, match=message):
        fit(model, DATA, tmp_path, CONFIG, listener=poison)
    assert names(tmp_path) == ["checkpoint.json", "log.jsonl", "step-5"]
    assert all(parameter.isfinite().all() for parameter in load(tmp_path).parameters())


def test_a_validation_loss_that_is_no_number_is_not_saved(tmp_path):
    model = decoder()

    def poison(event):
        if isinstance(event, Stepped) and event.step == 5:
            with torch.no_grad():
                model.embedding.weight[:] = float("nan")

    with pytest.raises(Diverged, match="the validation loss became nan at step 5: nothing was saved yet"):
        fit(model, DATA, tmp_path, CONFIG, listener=poison)
    assert names(tmp_path) == ["log.jsonl"]


def test_losses_looked_at_late_are_the_same(tmp_path, monkeypatch, straight):
    monkeypatch.setattr(trainer.Trainer, "_look_every", 3)
    fit(decoder(), DATA, tmp_path, CONFIG)
    assert losses(tmp_path) == losses(straight[0])


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (replace(DATA, train=token_file(8, 0)), CONFIG, "training text of at least 9 tokens, got 8"),
        (replace(DATA, valid=token_file(1, 0)), CONFIG, "validation text of at least 2 tokens, got 1"),
        (replace(DATA, valid=None), CONFIG, "a validation split, but it has none"),
    ],
)
def test_data_that_does_not_fit(tmp_path, data, config, message):
    with pytest.raises(ValueError, match=message):
        fit(decoder(), data, tmp_path, config)


def test_ids_beyond_the_vocabulary(tmp_path):
    data = replace(DATA, train=replace(DATA.train, ids=DATA.train.ids + 5))
    with pytest.raises(ValueError, match="training ids under the model's vocabulary of 7, got 11"):
        fit(decoder(), data, tmp_path, CONFIG)


# --- Advice ----------------------------------------------------------------------------------------------

# Sixty tokens, and another text to validate: nothing but learning by heart is possible.
SCARCE = TokenizedCorpus(train=token_file(60, 0), valid=token_file(300, 5))
BY_HEART = replace(CONFIG, steps=200, evaluate_every=20, learning_rate=0.02)


def warned(out):
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "warned"]


def test_a_text_learned_by_heart_is_told_once(tmp_path):
    events = []
    fit(decoder(dropout=0.0), SCARCE, tmp_path, BY_HEART, listener=events.append)
    size, turn = [event for event in events if isinstance(event, Warned)]
    assert size.step == 0 and re.match("[0-9,]+ parameters are many for 60 tokens of text: ", size.message)
    assert turn.message.startswith("the validation loss turns up, from ") and "--patience 3" in turn.message
    assert [event["message"] for event in warned(tmp_path)] == [size.message, turn.message]
    longer = replace(BY_HEART, steps=260)
    fit(decoder(dropout=0.0), SCARCE, tmp_path, longer, resume=True, listener=events.append)
    assert len([event for event in events if isinstance(event, Warned)]) == 2


def test_advice_without_a_listener_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="parameters are many for 60 tokens of text"):
        fit(decoder(), SCARCE, tmp_path, replace(BY_HEART, steps=40))


def test_a_learning_rate_that_is_too_high_is_told(tmp_path):
    events = []
    config = replace(CONFIG, steps=300, evaluate_every=100, learning_rate=3.0, warmup=0.8, cooldown=0.0)
    fit(decoder(dropout=0.0), DATA, tmp_path, config, listener=events.append)
    (event,) = [event for event in events if isinstance(event, Warned)]
    assert event.message.startswith("the training loss rises, from ")
    assert event.message.endswith("stop with Ctrl-C and start again with a lower --learning-rate (now 3)")


def test_a_loss_that_is_no_number_is_in_the_log(tmp_path, monkeypatch):
    def gradients(self, original=trainer.Trainer._gradients):
        loss, norm = original(self)
        return loss * (float("nan") if self.step == 3 else 1), norm

    monkeypatch.setattr(trainer.Trainer, "_gradients", gradients)
    with pytest.raises(Diverged) as stopped:
        fit(decoder(), DATA, tmp_path, CONFIG)
    assert [event["message"] for event in warned(tmp_path)] == [str(stopped.value)]


# --- Killed ------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
from test_training import CONFIG, DATA, decoder
from dataclasses import replace
from sightline.training import fit
fit(decoder(), DATA, sys.argv[1], replace(CONFIG, steps=100_000, evaluate_every=1))
"""


def kill_after(out, steps, wait=0.0):
    """Starts a run that saves at every step, and kills it some time after it has saved `steps` of them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, out, Path(__file__).parent], env=environment)
    log = out / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b'"saved"') < steps:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(wait)
    process.kill()
    process.wait()


def check_after_kill(out, steps):
    assert load(out).config.d_model == 16
    reached = json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))["latest"]
    reached = int(reached.removeprefix("step-"))
    assert reached >= steps
    more = reached + 3
    result = fit(decoder(), DATA, out, replace(CONFIG, steps=more, evaluate_every=1), resume=True)
    assert result.steps == more
    assert [step for step, _ in losses(out)] == list(range(1, more + 1))
    kept = {"checkpoint.json", "log.jsonl", f"step-{more}", f"step-{more - 1}", f"step-{result.best_step}"}
    assert set(names(out)) == kept


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_run_goes_on(tmp_path):
    kill_after(tmp_path, steps=3)
    check_after_kill(tmp_path, steps=3)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("milliseconds", range(0, 60, 4))
def test_a_run_killed_at_any_moment_goes_on(tmp_path, milliseconds):
    kill_after(tmp_path, steps=2, wait=milliseconds / 1000)
    check_after_kill(tmp_path, steps=2)


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
