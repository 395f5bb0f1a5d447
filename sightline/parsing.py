"""The arguments of a command line become a call; a mistake in them becomes one line.

The parser tells a mistake in a box with its help. What the box says is told here as every other mistake is: what was
expected, what came, what to do.
"""

import contextlib
import difflib
import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff, PositionalMetavarFromFieldName

_KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "FLOAT FLOAT": "two numbers",
    "INT,INT": "whole numbers such as 0,2",
    "{[FLOAT [FLOAT ...]]}": "numbers",
}
"""What the parser calls the values of an option, in words."""


def named(name: str, commands: Mapping[str, Callable[..., None]]) -> Callable[..., None]:
    """The command of that name. Raises: ValueError, with the nearest name, where there is none."""
    if name in commands:
        return commands[name]
    near = difflib.get_close_matches(name, commands, 1)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
    raise ValueError(f"there is no command {name!r}; {meant}")


def parsed(command: Callable[..., None], arguments: Sequence[str], prog: str) -> Callable[[], Any]:
    """The call of `command` that the arguments ask for.

    Raises: ValueError for a mistake in them; SystemExit where they ask for help, which has been printed.
    """

    @functools.wraps(command)
    def later(*values: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(command, *values, **named)

    told = io.StringIO()
    shown = (FlagCreatePairsOff, PositionalMetavarFromFieldName)
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(later, args=list(arguments), prog=prog, config=shown)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_line(told.getvalue(), prog)) from None


def _line(box: str, prog: str) -> str:
    """The parser's box as one line."""
    # Its lines stand behind a border, or, where the terminal cannot show one, two spaces; its title does not.
    rows = [row[2:].rstrip(" │") for row in box.splitlines() if row.startswith(("│ ", "  "))]
    said = " ".join(re.split("[─-]{5}", " ".join(rows))[0].split())
    options = [match[1] for row in rows if (match := re.match(r" {4}(--\S+|[A-Z]+)\b", row))]
    if said.startswith("Missing from"):
        wanted = [one for one in options if re.search(rf"(?<!\S){one}(?!\S)", said)]
        unknown = "".join(f", got {one}" for one in options if one not in wanted)
        return f"expected {' and '.join(wanted)}{unknown}; {prog} --help tells what to give"
    if found := re.match(r"Missing value for argument '(\S+)'", said):
        return f"expected a value after {found[1]}; {prog} --help tells which"
    if found := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*?),?\)", said):
        choices = ", ".join(sorted(re.findall(r"'(.*?)'", found[3])))
        return f"expected one of {choices} for {found[2]}, got {found[1]!r}"
    if found := re.match(r"Error parsing (\S+): .*?(?:from \[(.*?)\]\.|: ('.*'))", said):
        return f"expected {_kinds(rows)} for {found[1]}, got {found[3] or found[2].replace(', ', ' ')}"
    if found := re.match(r"Unrecognized options: ([^,]*)", said):
        if not found[1].startswith("-"):
            return f"there is no place for {found[1]!r}: put a text or a name of several words in quotes"
        meant = f"did you mean {options[0]}?" if options else f"{prog} --help lists those there are"
        return f"there is no option {found[1]}: {meant}"
    return said


def _kinds(rows: list[str]) -> str:
    """What the help says that an option takes, in words."""
    shown = next(match[1] for row in rows if (match := re.match(r" {4}(?:--\S+ )?(.*)", row)))
    kinds = [one if one.startswith("{[") else one.strip("{}") for one in shown.split("|")]
    return " or ".join(_KINDS.get(one, one) for one in sorted(kinds, key="None".__eq__))
