"""Ctrl-C and SIGTERM while a run goes on. Knows nothing about what they interrupt."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """A context in which Ctrl-C and SIGTERM are the same: a KeyboardInterrupt, or, `held`, only `came`.

    Processes that work together hold them, until all have agreed that one came.

    >>> with Interrupts(held=True) as interrupts:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     interrupts.came
    True
    """

    def __init__(self, *, held: bool) -> None:
        self.held = held
        self.came = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # no other is interrupted
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._come)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler or signal.SIG_DFL)

    def _come(self, number: int, frame: FrameType | None) -> None:
        if not self.held:
            raise KeyboardInterrupt
        self.came = True

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Holds one back until the block is done, so that a step is taken whole or not at all."""
        held, self.held = self.held, True
        try:
            yield
        finally:
            self.held = held
        if self.came and not held:
            raise KeyboardInterrupt
