import io
import re

import pytest
from rich.console import Console

from sightline import progress
from sightline.events import Ended, Evaluated, Saved, Started, Stepped, Warned
from sightline.progress import TrainProgress

STARTED = Started(
    step=0, resumed=False, steps=2000, minutes=3.0, evaluate_every=500, look_seconds=0.0, parameters=5_000_000,
    train_tokens=120_000, valid_tokens=14_000, batch=16, context=64, learning_rate=0.01, device="cpu",
    precision="float32", seconds=0.0,
)  # fmt: skip
STEPPED = Stepped(
    step=1234, done=0.25, loss_nats=3.21, gradient_norm=1.0, learning_rate=0.01, tokens_per_second=8765.4,
    peak_bytes=1_230_000_000, seconds=30.0,
)  # fmt: skip
EVALUATED = Evaluated(
    step=1234, best=True, loss_nats=3.1, perplexity=22.2, bits_per_byte=1.345, tokens=100, seconds=30.0
)
ENDED = Ended(step=2000, stopped="minutes", seconds=3661.0, tokens_per_second=8765.4, peak_bytes=1_230_000_000)
EVENTS = [STARTED, EVALUATED, STEPPED, Saved(step=1234, folder="out", seconds=31.0), ENDED]
NUMBERS = ["step 1,234 of 2,000", "loss 3.210", "1.345 bits/byte", "8,765 tokens/s", "1.2 GB"]
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def plain(text):
    """What a terminal was told to show, each line of each picture a line."""
    return CONTROLS.sub("", re.sub(r"\x1b\[2K|\r", "\n", text))


def shown(width, terminal, events=EVENTS):
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=terminal, highlight=False, color_system=None)
    with TrainProgress(console) as listener:
        for event in events:
            listener(event)
            listener._live.refresh()
    return text.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_QUIET_SHARE", 0.0)
    text = shown(80, terminal=False)
    assert text.splitlines() == [
        "training 5,000,000 parameters on 120,000 tokens for 2,000 steps or 3 minutes "
        "(16 x 64 tokens a step, cpu, float32)",
        "step 1,234: validation loss 3.1000 nats, perplexity 22.20, 1.3450 bits/byte (best)",
        "  ".join([*NUMBERS, "1:00 left"]),
        "ended at step 2,000 by its minutes: 1:01:01, 8,765 tokens/s, 1.2 GB of memory at most",
    ]
    assert not CONTROLS.search(text)


def test_steps_are_mostly_silent_where_there_is_no_terminal(monkeypatch):
    assert "left" not in shown(80, terminal=False, events=[STARTED, *[STEPPED] * 50])
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)  # three minutes: the next line comes after 3.6 seconds
    assert "left" not in shown(80, terminal=False, events=[STARTED, *[STEPPED] * 50])


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 120])
def test_every_number_stays_whole_in_any_terminal(width):
    text = plain(shown(width, terminal=True))
    assert max(len(line) for line in text.splitlines()) <= width
    for part in NUMBERS:
        assert part in text
    assert "━" in text and "25%  " in text and "left" in text
    words = " ".join(text.split())
    assert "validation loss 3.1000 nats, perplexity 22.20, 1.3450 bits/byte (best)" in words
    assert words.endswith("ended at step 2,000 by its minutes: 1:01:01, 8,765 tokens/s, 1.2 GB of memory at most")


def test_lines_that_a_narrow_terminal_folds_are_indented():
    lines = plain(shown(30, terminal=True, events=[Warned(step=1, message="a b " * 20, seconds=1.0)]))
    first, *rest = filter(None, lines.splitlines())
    assert rest and first.startswith("warning: ") and all(line.startswith("  ") for line in rest)


def test_an_evaluation_that_is_due_is_told():
    text = shown(120, terminal=True, events=[STARTED])
    assert "evaluating" in text
    assert "evaluating" not in shown(120, terminal=True, events=[STARTED, EVALUATED, STEPPED]).split("loss 3.210")[1]
    due = Stepped(**{**STEPPED.__dict__, "step": 1500})
    assert "evaluating" in shown(120, terminal=True, events=[STARTED, EVALUATED, due]).split("loss 3.210")[1]


def test_the_time_left_goes_down_between_two_events(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True, color_system=None)
    listener = TrainProgress(console)
    for event in (STARTED, Stepped(**{**STEPPED.__dict__, "step": 1})):
        listener(event)
    for seconds, left in ((0, "2:30 left"), (20, "2:10 left"), (1000, "0:00 left")):
        now[0] = 100.0 + seconds
        text.truncate(0)
        console.print(listener)
        assert left in text.getvalue()


def test_a_resumed_run_says_so():
    resumed = Started(**{**STARTED.__dict__, "step": 500, "resumed": True, "minutes": None})
    text = shown(200, terminal=False, events=[resumed])
    assert text.startswith("after step 500, going on with 5,000,000 parameters on 120,000 tokens for 2,000 steps (")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_warning_is_shown(terminal):
    text = shown(200, terminal, events=[STARTED, Warned(step=9, message="the loss rises: do this", seconds=1.0), ENDED])
    assert "warning: the loss rises: do this\n" in text
