"""What a command says on a terminal: notes and errors beside the text, and text that obeys nobody.

Knows no model and no command.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path


def note(message: Warning | str, *_: object) -> None:
    print(f"note: {message}", file=sys.stderr)


def fail(where: str, message: str, code: int = 2) -> int:
    print(f"{where}: {message}", file=sys.stderr)
    return code


def stream(prompt: str, pieces: Iterator[str]) -> None:
    def told(message: Warning | str, *_: object) -> None:
        if sys.stdout.isatty() and sys.stderr.isatty():
            print(file=sys.stderr)  # ends the line of text that the note would stand in
        note(message)

    warnings.showwarning = told
    print(prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(harmless(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    finally:
        print()


def harmless(text: str) -> str:
    """What a terminal shows and does not obey: a model may write any byte."""
    lines = text.replace("\r\n", "\n")  # which a model of a text with such line ends writes
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in lines)


def has_screen() -> bool:
    """Else the system's browser may be one that takes over the terminal."""
    by_window = sys.platform in ("win32", "darwin") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return sys.stdout.isatty() and by_window


def free(out: Path) -> Path:
    """`out`, or the first of out-2, out-3, ... where something is already: a demo never overwrites."""
    number = 2
    free = out
    while free.exists():
        free, number = out.with_name(f"{out.name}-{number}"), number + 1
    return free
