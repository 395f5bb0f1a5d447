"""A subject that answers in this process: for tests of the laws, with code that is known to end."""

from pathlib import Path

import torch

from sightline.checking.checks import CheckConfig, examine
from sightline.checking.findings import Report
from sightline.checking.subject import CheckError, Here, Raised
from sightline.checking.worker import Worker

IMPORTS = """
import math
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
"""


class InFile(Here):
    """What a file defines, in this process all the same."""

    def __init__(self, file: Path, name: str | None = None) -> None:
        self.file, self._kept, self._memory = file, "", 0
        self._worker, self._random = Worker(), torch.get_rng_state()
        self.told = self._open(name)
        self.name = self.told["name"]

    @property
    def label(self) -> str:
        return f"{self.file}:{self.name}"


def checked(folder: Path, code: str, name: str | None = None, **config) -> Report:
    """The report on some code, with the usual imports before it."""
    file = folder / "mine.py"
    file.write_text(IMPORTS + code, encoding="utf-8")
    return examine(InFile(file, name), CheckConfig(**config))


def refusal(folder: Path, code: str, name: str | None = None, **config) -> str:
    """The line that is said where some code cannot be run."""
    try:
        checked(folder, code, name, **config)
    except CheckError as error:
        return str(error)
    raise AssertionError("it could be run")


__all__ = ["InFile", "Raised", "checked", "refusal"]
