"""A subject that answers in this process: for tests of the laws, with code that is known to end."""

from pathlib import Path

from sightline.checking.checks import CheckConfig, examine
from sightline.checking.findings import Report
from sightline.checking.subject import CheckError, Raised, Subject
from sightline.checking.worker import Worker

IMPORTS = """
import math
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
"""


class Here(Subject):
    """As `Subject`, without a process and its limits."""

    def __init__(self, file: Path, name: str | None = None) -> None:
        self.file, self._kept, self._memory = file, "", 0
        self._worker = Worker()
        self.told = self._open(name)
        self.name = self.told["name"]

    def ask(self, question, doing, tensors=None, **content):
        try:
            return getattr(self._worker, question)(tensors or {}, **content)
        except Exception as error:
            raise self._raised(self._worker.tell(error), doing) from error

    def renew(self) -> None: ...


def checked(folder: Path, code: str, name: str | None = None, **config) -> Report:
    """The report on some code, with the usual imports before it."""
    file = folder / "mine.py"
    file.write_text(IMPORTS + code, encoding="utf-8")
    return examine(Here(file, name), CheckConfig(**config))


def refusal(folder: Path, code: str, name: str | None = None, **config) -> str:
    """The line that is said where some code cannot be run."""
    try:
        checked(folder, code, name, **config)
    except CheckError as error:
        return str(error)
    raise AssertionError("it could be run")


__all__ = ["Here", "Raised", "checked", "refusal"]
