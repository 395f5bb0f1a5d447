"""The command `sightline check`: prints a report, and tells by its exit code what came of it."""

import json as library
import shutil
import sys
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from sightline.checking.checks import CheckConfig
from sightline.checking.checks import check as work
from sightline.checking.subject import CheckError
from sightline.options import Checking


def check(
    target: Annotated[Positional[str], arg(help="FILE.py:NAME of a function, a class or a module.")],
    config: OmitArgPrefixes[Checking] = Checking(),  # noqa: B008 (frozen)
    json: Annotated[bool, arg(help="Print one JSON object, for programs.")] = False,
) -> None:
    """Hold your own attention, encoding or module against the laws: exit code 0 where all hold, else 1."""
    try:
        report = work(target, CheckConfig(**vars(config)))
    except CheckError as error:
        if json:
            print(library.dumps({"subject": target, "verdict": "error", "error": str(error)}))
        raise
    print(library.dumps(report.to_json()) if json else report.text(min(shutil.get_terminal_size().columns, 100)))
    if not report.passed:
        sys.exit(1)
