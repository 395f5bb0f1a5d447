"""What a mistake is: steps of the definition that it replaces, what is wrong in words, and what to write instead.

`explain()` finds which of the known ones, one or two at a time, give what somebody's code gave.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sightline.checking.definitions import EncodingSteps, Steps

TOLERANCE = 1e-4
"""Of the largest number of the definition's result: mistakes differ by far more, float32 by far less."""

RESHAPED = "reshape was used where a transpose was meant: reshape keeps the order in memory and mixes tokens"


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One known wrong version."""

    name: str
    what: str
    fix: str
    steps: dict[str, Any]

    def __hash__(self) -> int:
        return hash(self.name)


def square(x: Tensor) -> bool:
    return x.shape[-1] == x.shape[-2]


def nothing(x: Tensor) -> Tensor:
    """What nothing equals: this mistake cannot be made here."""
    return x * torch.nan


_Steps = TypeVar("_Steps", Steps, EncodingSteps)


def difference(given: Tensor, wanted: Tensor) -> float:
    """The largest difference where `wanted` is a number, as a share of its largest number; inf for what is none.

    >>> difference(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
    1.0
    """
    if given.shape != wanted.shape:
        return torch.inf
    known = wanted.isfinite()
    if known.double().mean() < 0.5:  # rows that hide all their keys give no number to compare
        return torch.inf
    given, wanted = given[known].double(), wanted[known].double()
    if not given.isfinite().all():
        return torch.inf
    return ((given - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


def explain(
    given: Tensor,
    definition: Callable[[_Steps], Tensor],
    right: _Steps,
    known: Iterable[Mistake],
    counts: Iterable[int] = (0, 1, 2),
) -> tuple[Mistake, ...] | None:
    """The fewest mistakes, of `counts`, with which the definition gives `given`; None where none do.

    >>> from sightline.checking.definitions import encoding
    >>> late = Mistake(name="late", what="positions start at 1", fix="arange(length)", steps={"first": 1})
    >>> table = encoding(4, 8, EncodingSteps(first=1))
    >>> [one.name for one in explain(table, lambda steps: encoding(4, 8, steps), EncodingSteps(), [late])]
    ['late']
    """
    known = list(known)
    for count in counts:
        for some in itertools.combinations(known, count):
            changes = {name: step for mistake in some for name, step in mistake.steps.items()}
            if len(changes) < sum(len(mistake.steps) for mistake in some):
                continue
            wanted = definition(right.wrong(**changes))
            if difference(given, wanted) <= TOLERANCE:
                return some
    return None
