"""How long a run will still take, from its events alone. Knows nothing about how training works."""

import math

from sightline.events import Evaluated, Event, Saved, Started, Stepped

# Steps are averaged over about a minute or a hundred of them, whichever is longer: a machine's load changes.
_SECONDS, _STEPS = 60.0, 100
# What the loop keeps free for the last evaluation, in times of the slowest; it takes as long as the others.
_KEPT_FREE = 1.25


class Pace:
    """Hears the events of a run, live or read from its log, and says how many seconds are left.

    Counted are the steps that are left, the evaluations among them with their checkpoints, and the limit of time.
    `patience` may end a run earlier: that is not foreseen.

    >>> pace = Pace()
    >>> common = {"loss_nats": 1.0, "gradient_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 1.0}
    >>> pace.hear(Started(step=0, resumed=False, steps=100, minutes=None, evaluate_every=1000, look_seconds=2.0,
    ...     parameters=1, train_tokens=9, valid_tokens=9, batch=1, context=1, learning_rate=0.1, device="cpu",
    ...     precision="float32", seconds=0.0))
    >>> for step in range(1, 11):
    ...     pace.hear(Stepped(step=step, done=step / 100, seconds=0.5 * step, peak_bytes=0, **common))
    >>> round(pace.left, 3)  # 90 steps of half a second, and the last evaluation
    47.0
    """

    def __init__(self) -> None:
        self.started: Started | None = None
        self._now, self._step = 0.0, 0
        self._looked: int | None = None
        self._looking_since = 0.0
        self._first: float | None = None
        self._time = self._count = 0.0
        self._look, self._looks = 0.0, 0
        self._slowest_look = 0.0

    def hear(self, event: Event) -> None:
        """One event, in the order in which they come."""
        if isinstance(event, Started):
            self.__init__()
            self.started, self._looking_since = event, event.seconds
            self._look = self._slowest_look = event.look_seconds
        elif isinstance(event, Stepped):
            self._stepped(event)
        elif isinstance(event, Evaluated):
            self._looked = event.step
            if not self._looks:  # without the checkpoint: until one is written, the best that is known
                self._look = max(self._look, event.seconds - self._looking_since)
            self._slowest_look = max(self._slowest_look, self._look)
        elif isinstance(event, Saved) and self._looked == event.step:
            self._saved(event.seconds - self._looking_since)
        self._now, self._step = event.seconds, event.step

    def _stepped(self, event: Stepped) -> None:
        self._looking_since = event.seconds
        if self._first is None:  # the first step of a session also sets up what the others use
            self._first = event.seconds - self._now
            return
        forget = 1 - 1 / max(_STEPS, _SECONDS * self._count / self._time if self._time else 0.0)
        self._time = forget * self._time + event.seconds - self._now
        self._count = forget * self._count + 1

    def _saved(self, seconds: float) -> None:
        self._looks += 1
        self._look = seconds if self._looks == 1 else self._look + (seconds - self._look) / min(self._looks, 4)
        self._slowest_look = max(self._slowest_look, seconds)

    @property
    def looks(self) -> bool:
        """Whether an evaluation is due after the event that came last."""
        if self.started is None:
            return False
        if self._step == 0:
            return self._looked is None
        due = self._step % self.started.evaluate_every == 0 or self._step == self.started.steps
        return due and self._looked != self._step

    @property
    def left(self) -> float | None:
        """Seconds from the event that came last to the end of the run; None while too little is known."""
        if self.started is None:
            return None
        ends = [self._by_steps(self.started.steps)] if self.started.steps is not None else []
        if self.started.minutes is not None:
            ends.append(60 * self.started.minutes - _KEPT_FREE * self._slowest_look + self._look - self._now)
        known = [end for end in ends if end is not None]
        return max(0.0, min(known)) if known else None

    def _by_steps(self, steps: int) -> float | None:
        assert self.started is not None
        every = self.started.evaluate_every
        step_seconds = self._time / self._count if self._count else self._first
        if step_seconds is None:
            return None
        before = self._step if self._looked == self._step else self._step - 1  # looked at, or passed without need
        looks = 0 if before >= steps else math.ceil(steps / every) - max(before, 0) // every
        return (steps - self._step) * step_seconds + looks * self._look


def clock(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> clock(75), clock(3661)
    ('1:15', '1:01:01')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
