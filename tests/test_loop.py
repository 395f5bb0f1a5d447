"""The course of a run: limits of time, Ctrl-C and going on, losses that are no number, advice, kills."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import CONFIG, DATA, Stopper, decoder, losses, names, same_weights, token_file

from sightline import loop, runs, trainer
from sightline.batches import TokenizedCorpus
from sightline.checkpoints import load
from sightline.events import Evaluated, Stepped, Warned
from sightline.training import Diverged, Interrupted, fit

# --- A time limit --------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when training or evaluating."""

    def __init__(self, monkeypatch, step_seconds, evaluation_seconds, *, stalled=0.0):
        """The third step takes `stalled` seconds more."""
        self.now = 100.0
        for module in (loop, trainer):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        step = itertools.chain([step_seconds] * 2, [step_seconds + stalled], itertools.repeat(step_seconds))
        self._slow(monkeypatch, "_gradients", step)
        self._slow(monkeypatch, "evaluate", itertools.repeat(evaluation_seconds))

    def _slow(self, monkeypatch, name, seconds):
        original = getattr(trainer.Trainer, name)

        def slow(trainer):
            self.now += next(seconds)
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


def test_a_step_that_stood_still_takes_no_more_than_its_time(tmp_path, monkeypatch):
    Clock(monkeypatch, 0.5, 0.1, stalled=15.0)
    result = fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=None, minutes=1.0, evaluate_every=30))
    assert result.stopped == "minutes"
    assert 55 < result.seconds <= 60


def test_a_limit_of_steps_can_come_first(tmp_path, monkeypatch):
    Clock(monkeypatch, 0.5, 1.0)
    result = fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=10, minutes=1.0))
    assert (result.stopped, result.steps) == ("steps", 10)


def test_no_time_to_train(tmp_path, monkeypatch):
    Clock(monkeypatch, 0.5, 70.0)
    with pytest.raises(ValueError, match=r"--minutes 1, but none was left .* an evaluation takes 70.0 s"):
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
from small_runs import CONFIG, DATA, decoder
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
