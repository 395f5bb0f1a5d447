"""A training run as a person follows it: a bar and its numbers in a terminal, a line now and then elsewhere.

Hears the events of `runs`; knows nothing about how training works.
"""

import textwrap
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sightline.events import Ended, Evaluated, Event, Saved, Started, Stepped, Warned
from sightline.memory import shown
from sightline.pace import Pace, clock

# Where there is no terminal, lines of steps are at least so far apart in seconds, and in shares of the run.
_QUIET_SECONDS, _QUIET_SHARE = 10.0, 0.02


class TrainProgress:
    """A listener for `fit` and `train` that draws what it hears, and a context that tidies up after it.

    In a terminal the newest lines are drawn anew four times a second, in as many columns as there are just then.

    with TrainProgress() as progress:
        train("my.txt", "out", listener=progress)

    >>> import sys
    >>> with TrainProgress(Console(file=sys.stdout)) as progress:
    ...     progress(Ended(step=2000, stopped="steps", seconds=75.0, tokens_per_second=20480.0, peak_bytes=512_000_000))
    ended at step 2,000 by its steps: 1:15, 20,480 tokens/s, 512 MB of memory at most
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.pace = Pace()
        self.bits_per_byte: float | None = None
        self.loss: float | None = None
        self._last: Stepped | None = None
        self._heard = 0.0
        self._spoke = time.perf_counter()
        self._live = Live(get_renderable=lambda: self, console=self.console, transient=True)

    def __enter__(self) -> "TrainProgress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Draws one event."""
        self.pace.hear(event)
        self._heard = time.perf_counter()
        if isinstance(event, Stepped):
            self._stepped(event)
        elif isinstance(event, Evaluated):
            self.bits_per_byte = event.bits_per_byte
            self._say(_evaluated(event))
        elif isinstance(event, Started):
            if event.recipe is not None and not event.resumed:
                self._say(event.recipe)
            self._say(_started(event))
        elif isinstance(event, Warned):
            self._say(f"warning: {event.message}")
        elif isinstance(event, Ended):
            self.pace, self._last = Pace(), None
            self._say(_ended(event))
        else:
            assert isinstance(event, Saved)  # said by the evaluation just before it

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        started = self.pace.started
        if started is None:
            return
        done = 0.0 if self._last is None else self._last.done
        row = Table.grid(expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(ProgressBar(total=1.0, completed=done), Text("  ".join([f"{done:.0%}", *self._left()])))
        yield row
        yield Text("\n".join(_lines(self._numbers(), options.max_width)), no_wrap=True, overflow="ellipsis")

    def _stepped(self, event: Stepped) -> None:
        # One batch is noisy: what is shown leans on the last twenty or so.
        self.loss = event.loss_nats if self.loss is None else 0.95 * self.loss + 0.05 * event.loss_nats
        self._last = event
        if self.console.is_terminal:
            return
        left = self.pace.left or 0.0
        if self._heard - self._spoke >= max(_QUIET_SECONDS, _QUIET_SHARE * (event.seconds + left)):
            self._say("  ".join([*self._numbers(), *self._left()]))

    def _numbers(self) -> list[str]:
        started, last = self.pace.started, self._last
        parts = []
        if last is not None:
            goal = f" of {started.steps:,}" if started and started.steps else ""
            parts = [f"step {last.step:,}{goal}", f"loss {self.loss:.3f}"]
        if self.bits_per_byte is not None:
            parts.append(f"{self.bits_per_byte:.3f} bits/byte")
        if last is not None:
            parts.append(f"{last.tokens_per_second:,.0f} tokens/s")
            parts += [shown(last.peak_bytes)] if last.peak_bytes else []
        return [*parts, "evaluating"] if self.pace.looks else parts

    def _left(self) -> list[str]:
        left = self.pace.left
        if left is None:
            return []
        return [f"{clock(max(0.0, left - (time.perf_counter() - self._heard)))} left"]

    def _say(self, line: str) -> None:
        self._spoke = time.perf_counter()
        if self.console.is_terminal:
            width = max(self.console.width, 20)
            fold = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
            line = "\n".join(textwrap.wrap(line, width, **fold))
        self.console.print(line, markup=False, soft_wrap=True)


def _lines(parts: list[str], width: int) -> Iterator[str]:
    """The parts in as few lines as hold them; a part is never broken."""
    line = ""
    for part in parts:
        if line and len(line) + 2 + len(part) > width:
            yield line
            line = ""
        line = f"{line}  {part}" if line else part
    if line:
        yield line


def _started(event: Started) -> str:
    goal = " or ".join(
        ([f"{event.steps:,} step{'s' * (event.steps != 1)}"] if event.steps else [])
        + ([f"{event.minutes:g} minute{'s' * (event.minutes != 1)}"] if event.minutes else [])
    )
    start = f"after step {event.step:,}, going on with" if event.resumed else "training"
    on = event.device
    if event.processes > 1:
        on = f"{event.processes} processes on {on}, {'each a part' if event.sharded else 'each a copy'} of the model"
    return (
        f"{start} {event.parameters:,} parameters on {event.train_tokens:,} tokens for {goal} "
        f"({event.batch} x {event.context} tokens a step, {on}, {event.precision})"
    )


def _evaluated(event: Evaluated) -> str:
    return (
        f"step {event.step:,}: validation loss {event.loss_nats:.4f} nats, perplexity {event.perplexity:,.2f}, "
        f"{event.bits_per_byte:.4f} bits/byte{' (best)' if event.best else ''}"
    )


def _ended(event: Ended) -> str:
    memory = f", {shown(event.peak_bytes)} of memory at most" if event.peak_bytes else ""
    share = f", {event.of_peak:.0%} of the GPUs' peak" if event.of_peak else ""
    return (
        f"ended at step {event.step:,} by its {event.stopped}: {clock(event.seconds)}, "
        f"{event.tokens_per_second:,.0f} tokens/s{share}{memory}"
    )
