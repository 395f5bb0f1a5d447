"""A training run as a person follows it: a progress bar in a terminal, a line now and then elsewhere.

Hears the events of `runs`; knows nothing about how training works.
"""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sightline.runs import Ended, Evaluated, Event, Saved, Started, Stepped, Warned

# Between two lines of steps where there is no terminal.
_QUIET_SECONDS = 10.0
# Under this many columns the bar and the speed give way to the numbers.
_NARROW = 70


class TrainProgress:
    """A listener for `fit` and `train` that draws what it hears, and a context that tidies up after it.

    with TrainProgress() as progress:
        train("my.txt", "out", listener=progress)

    >>> import sys
    >>> with TrainProgress(Console(file=sys.stdout)) as progress:
    ...     progress(Ended(step=2000, stopped="steps", seconds=75.0, tokens_per_second=20480.0))
    ended at step 2,000 by its steps: 1:15, 20,480 tokens/s
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.bits_per_byte: float | None = None
        self.loss: float | None = None
        self._spoke = 0.0
        narrow = self.console.width < _NARROW
        numbers = TextColumn("{task.fields[numbers]}")
        self._bar = Progress(
            *([] if narrow else [BarColumn(bar_width=None)]),
            numbers,
            console=self.console,
            expand=not narrow,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._narrow = narrow
        self._task = self._bar.add_task("training", total=1.0, numbers="")

    def __enter__(self) -> "TrainProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Draws one event."""
        if isinstance(event, Stepped):
            self._stepped(event)
        elif isinstance(event, Evaluated):
            self.bits_per_byte = event.bits_per_byte
            self._say(_evaluated(event))
        elif isinstance(event, Started):
            self._say(_started(event))
        elif isinstance(event, Warned):
            self._say(f"warning: {event.message}")
        elif isinstance(event, Ended):
            self._bar.update(self._task, completed=1.0)
            self._say(
                f"ended at step {event.step:,} by its {event.stopped}: {_clock(event.seconds)}, "
                f"{event.tokens_per_second:,.0f} tokens/s"
            )
        else:
            assert isinstance(event, Saved)  # said by the evaluation just before it

    def _stepped(self, event: Stepped) -> None:
        # One batch is noisy: what is shown leans on the last twenty or so.
        self.loss = event.loss_nats if self.loss is None else 0.95 * self.loss + 0.05 * event.loss_nats
        left = event.seconds * (1 - event.done) / max(event.done, 1e-9)
        parts = [f"step {event.step:,}", f"loss {self.loss:.3f}"]
        if self.bits_per_byte is not None:
            parts.append(f"{self.bits_per_byte:.3f} bits/byte")
        if not self._narrow:
            parts.append(f"{event.tokens_per_second:,.0f} tokens/s")
        parts.append(f"{_clock(left)} left")
        line = "  ".join(parts)
        self._bar.update(self._task, completed=event.done, numbers=line)
        if not self.console.is_terminal and time.perf_counter() - self._spoke >= _QUIET_SECONDS:
            self._say(line)

    def _say(self, line: str) -> None:
        self._spoke = time.perf_counter()
        self.console.print(line, markup=False, soft_wrap=not self.console.is_terminal)


def _started(event: Started) -> str:
    goal = " or ".join(
        ([f"{event.steps:,} steps"] if event.steps else []) + ([f"{event.minutes:g} minutes"] if event.minutes else [])
    )
    start = f"after step {event.step:,}, going on with" if event.resumed else "training"
    return (
        f"{start} {event.parameters:,} parameters on {event.train_tokens:,} tokens for {goal} "
        f"({event.batch} x {event.context} tokens a step, {event.device}, {event.precision})"
    )


def _evaluated(event: Evaluated) -> str:
    return (
        f"step {event.step:,}: validation loss {event.loss_nats:.4f} nats, perplexity {event.perplexity:,.2f}, "
        f"{event.bits_per_byte:.4f} bits/byte{' (best)' if event.best else ''}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
