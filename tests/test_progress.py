import io

import pytest
from rich.console import Console

from sightline import progress
from sightline.progress import TrainProgress
from sightline.runs import Ended, Evaluated, Saved, Started, Stepped, Warned

STARTED = Started(
    step=0, resumed=False, steps=2000, minutes=3.0, parameters=5_000_000, train_tokens=120_000, valid_tokens=14_000,
    batch=16, context=64, learning_rate=0.01, device="cpu", precision="float32",
)  # fmt: skip
STEPPED = Stepped(
    step=1234, done=0.25, loss_nats=3.21, gradient_norm=1.0, learning_rate=0.01, tokens_per_second=8765.4, seconds=30.0
)
EVALUATED = Evaluated(
    step=1234, best=True, loss_nats=3.1, perplexity=22.2, bits_per_byte=1.345, tokens=100, seconds=30.0
)
ENDED = Ended(step=2000, stopped="minutes", seconds=3661.0, tokens_per_second=8765.4)
EVENTS = [STARTED, EVALUATED, STEPPED, Saved(step=1234, folder="out", seconds=31.0), ENDED]


def shown(width, terminal, events=EVENTS):
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=terminal, highlight=False, color_system=None)
    with TrainProgress(console) as listener:
        for event in events:
            listener(event)
            listener._bar.refresh()
    return text.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    lines = shown(80, terminal=False).splitlines()
    assert lines == [
        "training 5,000,000 parameters on 120,000 tokens for 2,000 steps or 3 minutes "
        "(16 x 64 tokens a step, cpu, float32)",
        "step 1,234: validation loss 3.1000 nats, perplexity 22.20, 1.3450 bits/byte (best)",
        "step 1,234  loss 3.210  1.345 bits/byte  8,765 tokens/s  1:30 left",
        "ended at step 2,000 by its minutes: 1:01:01, 8,765 tokens/s",
    ]


def test_steps_are_mostly_silent_where_there_is_no_terminal():
    assert "left" not in shown(80, terminal=False, events=[STARTED, *[STEPPED] * 50])


def test_a_bar_in_a_terminal():
    text = shown(120, terminal=True)
    assert "step 1,234  loss 3.210  1.345 bits/byte  8,765 tokens/s  1:30 left" in text
    assert "━" in text


@pytest.mark.parametrize("width", [30, 50, 69])
def test_a_narrow_terminal_is_never_overrun(width):
    text = shown(width, terminal=True)
    assert "step 1,234" in text and "loss 3.210" in text and "━" not in text
    lines = [line.split("\r")[-1].split("\x1b[2K")[-1] for line in text.split("\n")]
    assert max(len(line) for line in lines) <= width + len("\x1b[?25l")


def test_a_resumed_run_says_so():
    resumed = Started(**{**STARTED.__dict__, "step": 500, "resumed": True, "minutes": None})
    text = shown(200, terminal=False, events=[resumed])
    assert text.startswith("after step 500, going on with 5,000,000 parameters on 120,000 tokens for 2,000 steps (")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_warning_is_shown(terminal):
    text = shown(200, terminal, events=[STARTED, Warned(step=9, message="the loss rises: do this", seconds=1.0), ENDED])
    assert "warning: the loss rises: do this\n" in text
