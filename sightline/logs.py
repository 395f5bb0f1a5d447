"""Reading the log of a run, at its end or while it is being written. Knows nothing about who writes it."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sightline.events import Event, of_record
from sightline.locks import LOCK, Lock

LOG = "log.jsonl"
"""Its name in the folder of a run."""

# How often a run that goes on is asked for news, in seconds.
_POLL = 0.5


def read_log(run: Path) -> list[dict[str, Any]]:
    """The events in the log of a run as what JSON holds, but for a last line that is not whole.

    Raises:
        ValueError: the folder has no log, or a line is no event.
    """
    file = _file(run)
    lines = file.read_bytes().splitlines(keepends=True)
    return [record(line, number, file) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def follow(run: Path) -> Iterator[Event]:
    """The events of a run from its first, and then as they come, until no process trains it any more.

    Raises:
        ValueError: as `read_log`.
    """
    file, lock = _file(run), Lock(run / LOCK)
    inode, at, number = -1, 0, 0
    while True:
        goes_on = lock.is_held()  # asked before reading, so that what is written last is read too
        with file.open("rb") as log:
            if os.fstat(log.fileno()).st_ino != inode:  # at first, and when a resumed run cuts its log
                inode, at, number = os.fstat(log.fileno()).st_ino, 0, 0
            log.seek(at)
            for line in log:
                if line.endswith(b"\n"):
                    at, number = at + len(line), number + 1
                    event = of_record(record(line, number, file))
                    if event is not None:
                        yield event
        if not goes_on:
            return
        time.sleep(_POLL)


def record(line: bytes, number: int, file: Path) -> dict[str, Any]:
    """One line of a log as what JSON holds.

    Raises:
        ValueError: it is no event with a step.
    """
    try:
        event = json.loads(line)
    except ValueError:  # both JSONDecodeError and UnicodeDecodeError
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("step"), int) or "event" not in event:
        raise ValueError(
            f"expected line {number} of {file} to be an event with a step, got "
            f"{line[:80].decode(errors='replace')!r}: remove the file, only the log is lost"
        )
    return event


def _file(run: Path) -> Path:
    file = run / LOG
    if not file.is_file():
        raise ValueError(f"expected the folder of a run, but {run} has no {LOG}: give what --out was")
    return file
