"""The time that a run will still take, against runs of a clock that only work moves."""

import time
from dataclasses import replace

import numpy as np
import pytest

from sightline.batches import TokenFile, TokenizedCorpus
from sightline.events import Evaluated, Saved, Started, Stepped
from sightline.loop import Interrupted
from sightline.models import Decoder, DecoderConfig
from sightline.pace import Pace
from sightline.runs import RunFolder
from sightline.schedule import TrainConfig
from sightline.trainer import Trainer
from sightline.training import fit

DATA = TokenizedCorpus(**{
    split: TokenFile(ids=np.arange(size, dtype=np.uint16) % 5, num_bytes=size, num_words=size, num_unknown=0)
    for split, size in (("train", 200), ("valid", 40))
})  # fmt: skip
CONFIG = TrainConfig(steps=250, batch=1, evaluate_every=40, evaluate_batches=1)

COMMON = {"gradient_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 1.0, "peak_bytes": 0, "loss_nats": 1.0}
STARTED = Started(
    step=0, resumed=False, steps=5, minutes=None, evaluate_every=2, look_seconds=0.0, parameters=1, train_tokens=1,
    valid_tokens=1, batch=1, context=1, learning_rate=0.1, device="cpu", precision="float32", seconds=0.0,
)  # fmt: skip


def stepped(step):
    return Stepped(step=step, done=step / 5, seconds=float(step), **COMMON)


def evaluated(step):
    return Evaluated(
        step=step, best=True, loss_nats=1.0, perplexity=1.0, bits_per_byte=1.0, tokens=1, seconds=float(step)
    )


EVENTS = [STARTED, evaluated(0), stepped(1), stepped(2), evaluated(2), stepped(3), stepped(5)]


class Clock:
    """Time that passes only while a run steps, evaluates and saves: steps vary by a third, the same work by a tenth."""

    def __init__(self, monkeypatch, *, step, evaluation, checkpoint, seed=0):
        self.now, self.generator = 50.0, np.random.default_rng(seed)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for owner, name, seconds, noise in (
            (Trainer, "take_step", step, 0.33),
            (Trainer, "evaluate", evaluation, 0.1),
            (RunFolder, "save", checkpoint, 0.33),
        ):
            monkeypatch.setattr(owner, name, self.slow(getattr(owner, name), seconds, noise))

    def slow(self, work, seconds, noise):
        def slow(*arguments, **named):
            self.now += seconds * self.generator.uniform(1 - noise, 1 + noise)
            return work(*arguments, **named)

        return slow


def decoder():
    return Decoder(DecoderConfig(vocabulary=5, context=4, d_model=8, num_layers=1, num_heads=1))


def foreseen(out, config, *, resume=False, stop_at=None):
    """After each event: seconds since the session began, what was foreseen, and the moment itself."""
    pace, rows = Pace(), []

    def listener(event):
        pace.hear(event)
        rows.append((event.seconds, pace.left))
        if stop_at is not None and isinstance(event, Stepped) and event.step == stop_at:
            raise KeyboardInterrupt

    try:
        fit(decoder(), DATA, out, config, resume=resume, listener=listener)
    except Interrupted:
        assert stop_at is not None
    return rows


def check(rows, *, look):
    """After a minute, what is foreseen is within a tenth of what it came to, and the chance of two steps and a look."""
    began, end = rows[0][0], rows[-1][0]
    late = [(now, left) for now, left in rows if now - began >= 60]
    assert len(late) > 20
    for now, left in late:
        assert abs(left - (end - now)) <= 0.1 * (end - now) + 4 + 0.35 * look, (now - began, end - now, left)


@pytest.mark.parametrize("evaluation", [0.5, 30.0])
@pytest.mark.parametrize("seed", range(2))
def test_steps_evaluations_and_checkpoints_are_foreseen(tmp_path, monkeypatch, evaluation, seed):
    Clock(monkeypatch, step=2.0, evaluation=evaluation, checkpoint=0.2 * evaluation, seed=seed)
    check(foreseen(tmp_path, CONFIG), look=1.2 * evaluation)


def test_a_limit_of_time_is_foreseen(tmp_path, monkeypatch):
    Clock(monkeypatch, step=2.0, evaluation=15.0, checkpoint=2.0)
    check(foreseen(tmp_path, replace(CONFIG, steps=None, minutes=8.0)), look=17.0)


def test_the_last_evaluation_takes_as_long_as_the_others_and_not_as_the_slowest():
    pace = Pace()
    saved = Saved(step=2, folder="step-2", seconds=12.0)
    started = replace(STARTED, steps=None, minutes=2.0, look_seconds=20.0)
    for event in (started, stepped(1), stepped(2), replace(evaluated(2), seconds=11.0), saved):
        pace.hear(event)
    # Training ends at 120 - 1.25 * 20 s, and the last evaluation takes the 10 s of the one before.
    assert pace.left == pytest.approx(120 - 25 + 10 - 12)


@pytest.mark.parametrize(("steps", "minutes"), [(90, 60.0), (5000, 8.0)])
def test_what_comes_first_counts(tmp_path, monkeypatch, steps, minutes):
    Clock(monkeypatch, step=2.0, evaluation=5.0, checkpoint=1.0)
    check(foreseen(tmp_path, replace(CONFIG, steps=steps, minutes=minutes)), look=6.0)


def test_a_resumed_run_knows_its_evaluations_before_the_first(tmp_path, monkeypatch):
    Clock(monkeypatch, step=1.0, evaluation=100.0, checkpoint=10.0)
    config = replace(CONFIG, evaluate_every=50)
    foreseen(tmp_path, config, stop_at=60)
    rows = foreseen(tmp_path, config, resume=True)
    assert rows[0][0] > 200  # the seconds of both sessions
    check(rows, look=110.0)


def test_the_check_can_fail():
    rows = [(float(now), 100.0 - now) for now in range(101)]
    check(rows, look=1.0)
    with pytest.raises(AssertionError):
        check([(now, left * 1.5) for now, left in rows], look=1.0)


def test_nothing_is_said_while_nothing_is_known(tmp_path):
    pace, known = Pace(), []
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=3), listener=lambda event: known.append(heard(pace, event)))
    assert known[:2] == [None, None]  # started, evaluated: no step yet
    assert all(left is not None for left in known[2:])


def heard(pace, event):
    pace.hear(event)
    return pace.left


def test_an_evaluation_that_is_due():
    pace = Pace()
    assert not pace.looks
    due = []
    for event in EVENTS:
        pace.hear(event)
        due.append(pace.looks)
    assert due == [True, False, False, True, False, False, True]
