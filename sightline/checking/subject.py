"""What is being checked, seen from outside: a process of its own with limits of time and memory, asked questions.

What it answers is numbers, which we judge. Code in a file never runs in our process; what our process holds already,
such as a notebook's functions, does: `Here`.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sightline.checking.worker import Worker, receive, send

_PRINTED = 10_000
"""Characters kept of what the code prints."""
_ANSWER = 1 << 30
"""Bytes that an answer may have."""
_START = 120.0
"""Seconds for Python and torch to start, which the code has no part in."""
_GRACE = 1.0
"""Seconds that a process has to tell where it stands when its time is over, before it is killed."""

_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from sightline.checking.worker import main; main()"


class CheckError(ValueError):
    """The code could not be run: one line says why."""


class Raised(CheckError):
    """The code raised an exception of its own."""


class Nothing(Raised):
    """The code came back with None or `...`, as what is still to be written does."""


class Subject:
    """A function, class or object in a file, in a process that ends with the `with` block.

    Raises: CheckError, at any question, where the file cannot be read or imported, has no such name, raises, takes
    longer than `seconds` for all questions together, takes more than `memory` bytes, or ends its process.
    """

    def __init__(self, file: Path, name: str | None, *, seconds: float, memory: int) -> None:
        self.file = file
        if not file.exists():
            raise CheckError(f"there is no file {file}")
        if file.is_dir() or file.suffix != ".py":
            raise CheckError(f"expected a Python file, FILE.py or FILE.py:FUNCTION, got {file}")
        self._seconds, self._limit, self._memory = seconds, seconds, memory
        self._kept = ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *filter(None, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Its own group, so that what it starts ends with it; Ctrl-C is for us to pass on.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()
        try:
            self._answer(_START, "starting")
            self.told = self._open(name)
        except BaseException:
            self.close()
            raise
        self.name: str = self.told["name"]

    @property
    def label(self) -> str:
        """Its name in a report."""
        return f"{self.file}:{self.name}"

    def __enter__(self) -> "Subject":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open(self, name: str | None) -> dict[str, Any]:
        told, _ = self.ask(
            "open", "being imported", file=str(self.file.resolve()), name=name, memory=self._memory or None
        )
        if "missing" in told:
            there = ", ".join(told["there"]) or "nothing that can be called"
            wanted = f"has no {name!r}" if name is not None else "needs a name, FILE.py:FUNCTION"
            raise CheckError(f"{self.file} {wanted}; it defines {there}")
        if not told["callable"]:
            raise CheckError(f"{self.file}:{told['name']} cannot be called; expected a function, a class or a module")
        return told

    @property
    def printed(self) -> str:
        """The beginning of what the code has printed so far."""
        return self._kept[:_PRINTED]

    def renew(self) -> None:
        """Give it its whole time again."""
        self._limit = self._seconds

    def ask(
        self, question: str, doing: str, tensors: dict[str, Tensor] | None = None, **content: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Ask the worker; `doing` says in a line about a failure what the code was doing."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told below by what the process left behind
            send(self._process.stdin, {"do": question, "seconds": max(self._limit, 0.01), **content}, tensors or {})
        start = time.monotonic()
        told, found = self._answer(self._limit + _GRACE, doing)
        self._limit -= time.monotonic() - start
        if "raised" in told:
            raise self._raised(told["raised"], doing)
        return told, found

    def _answer(self, seconds: float, doing: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        start = time.monotonic()
        try:
            answer = receive(self._process.stdout, _ANSWER)
        except (ValueError, SafetensorError) as error:
            raise CheckError(f"{self.file} wrote into the answers of its own process, while {doing}") from error
        finally:
            timer.cancel()
        if answer is None:
            over = time.monotonic() - start >= min(seconds, self._limit) - 0.01
            raise self._died(doing, over)
        return answer

    def _raised(self, raised: dict[str, Any], doing: str) -> CheckError:
        if raised["memory"]:
            gb = self._memory / 1e9
            return CheckError(f"{self._at(raised['line'])} needs more than {gb:g} GB of memory, while {doing}")
        if raised["nothing"]:
            return Nothing(f"{self.label} is not written yet, or lacks its return: it gives nothing back")
        message = plain(raised["message"])
        return Raised(
            f"{self._at(raised['line'])} raised {raised['type']}{': ' * bool(message)}{message}, while {doing}"
        )

    def _died(self, doing: str, over: bool) -> CheckError:
        self._kill()
        code = self._process.wait()
        self._reader.join(timeout=_GRACE)
        told = re.escape(str(self.file.resolve()))
        found = re.search(rf'File "{told}", line (\d+)', self._kept)
        at = self._at(found[1] if found else None)
        if over:
            return CheckError(
                f"{at} did not come back within {self._seconds:g} s, while {doing}; is there an endless loop?"
            )
        if code < 0 and code == -signal.SIGKILL:
            return CheckError(f"{self.file} was ended by the system, while {doing}; is there enough memory?")
        if code < 0:
            return CheckError(f"{at} crashed with {signal.Signals(-code).name}, while {doing}")
        return CheckError(f"{at} ended its process with code {code}, while {doing}")

    def _at(self, line: object) -> str:
        return f"{self.file}" if line is None else f"{self.file}, line {line},"

    def _drain(self) -> None:
        """Reads all that is printed, so that nobody waits for room, and keeps a beginning and the newest end."""
        assert self._process.stderr is not None
        while block := self._process.stderr.read1(1 << 16):  # type: ignore[attr-defined] (it is buffered)
            text = block.decode("utf-8", "replace")
            self._kept = (self._kept + text) if len(self._kept) < 4 * _PRINTED else self._kept[: 2 * _PRINTED] + text

    def _kill(self) -> None:
        if self._process.returncode is None:  # not yet waited for, so the number is still its own
            with contextlib.suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()

    def close(self) -> None:
        """End the process and all that it started."""
        self._kill()
        self._process.wait()
        self._reader.join(timeout=_GRACE)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Here(Subject):
    """A function, class or object of this process, where it runs as it is, without limits.

    What it prints is kept; torch's random numbers go on afterwards as if it had drawn none.

    Raises: CheckError, at any question, where it raises or cannot be called.
    """

    def __init__(self, subject: Callable[..., Any]) -> None:
        self._worker, self._kept = Worker(), ""
        self._random = torch.get_rng_state()
        torch.manual_seed(0)
        self.name = getattr(subject, "__name__", type(subject).__name__)
        self.file = Path(self.name)
        if not callable(subject):
            raise CheckError(f"{self.name} cannot be called; expected a function, a class or a module")
        self.told, _ = self.ask("take", "being copied", subject=subject)

    @property
    def label(self) -> str:
        return self.name

    def ask(
        self, question: str, doing: str, tensors: dict[str, Tensor] | None = None, **content: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return getattr(self._worker, question)(tensors or {}, **content)
        except (Exception, SystemExit) as error:
            raise self._raised({**self._worker.tell(error), "memory": False}, doing) from error
        finally:
            self._kept = (self._kept + printed.getvalue())[:_PRINTED]

    def renew(self) -> None: ...

    def close(self) -> None:
        torch.set_rng_state(self._random)


def plain(text: str, longest: int = 200) -> str:
    """The first line of a text with nothing in it that a terminal obeys."""
    line = next((line for line in text.splitlines() if line.strip()), "").strip()
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    return safe if len(safe) <= longest else safe[: longest - 3] + "..."
