"""What a check found: a line a law, the mistakes that explain it, a small example; as text for people and as JSON."""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor

from sightline.checking.mistakes import Mistake
from sightline.checking.subject import Raised

Status = Literal["ok", "fail", "note", "skip"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One law, and whether it holds: `note` is no failure but worth knowing, `skip` does not apply."""

    law: str
    status: Status
    said: str
    mistakes: tuple[Mistake, ...] = ()


_Case = TypeVar("_Case")


def hold(case: _Case, laws: Mapping[str, Callable[[_Case], Finding | None]]) -> list[Finding]:
    """What each law finds; one that its code does not come through, though it came through others, fails."""
    found: list[Finding] = []
    for name, law in laws.items():
        try:
            finding = law(case)
        except Raised as error:
            finding = Finding(law=name, status="fail", said=str(error))
        found += [] if finding is None else [finding]
    return found


@dataclass(frozen=True, kw_only=True)
class Example:
    """A few numbers where theirs differ from the definition's."""

    said: str
    inputs: dict[str, list[list[float]]]
    expected: list[list[float]]
    yours: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that `check()` tells. `passed` is False where a law fails."""

    subject: str
    convention: str
    findings: tuple[Finding, ...]
    example: Example | None = None
    printed: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return all(finding.status != "fail" for finding in self.findings)

    @property
    def mistakes(self) -> tuple[Mistake, ...]:
        """The likely mistakes, each once."""
        return tuple({mistake.name: mistake for one in self.findings for mistake in one.mistakes}.values())

    def to_json(self) -> dict[str, Any]:
        """The same for programs: verdict, laws, mistakes, example."""
        return {
            "subject": self.subject,
            "verdict": "pass" if self.passed else "fail",
            "convention": self.convention,
            "laws": [{"law": one.law, "status": one.status, "said": one.said} for one in self.findings],
            "mistakes": [{"name": one.name, "what": one.what, "fix": one.fix} for one in self.mistakes],
            "example": None if self.example is None else _finite(dataclasses.asdict(self.example)),
            "printed": self.printed,
            "notes": list(self.notes),
        }

    def text(self, width: int = 80) -> str:
        """The report in lines of at most `width` characters, where words allow it."""
        lines = [self.subject, *_wrapped(" ", self.convention, width), ""]
        name = max(len(finding.law) for finding in self.findings)
        for finding in self.findings:
            sign = "FAIL" if finding.status == "fail" else finding.status
            lines += _wrapped(f"  {sign:<5} {finding.law:<{name}}", finding.said, width)
        for mistake in self.mistakes:
            lines += ["", *_wrapped("Likely:", f"{mistake.what}.", width), *_wrapped("   Fix:", mistake.fix, width)]
        failed = sum(finding.status == "fail" for finding in self.findings)
        if failed and not self.mistakes:
            lines += ["", "None of the known mistakes gives these numbers."]
        if self.example is not None:
            lines += ["", *_drawn(self.example, width)]
        lines += [line for note in self.notes for line in _wrapped("Note:", note, width)]
        if self.printed:
            first, *more = self.printed.splitlines() or [""]
            rest = f" (and {len(more)} more lines)" if more else ""
            lines += _wrapped("Note:", f"it printed {first[:60]!r}{rest}", width)
        held = sum(finding.status == "ok" for finding in self.findings)
        lines += ["", f"{failed} of {failed + held} laws fail" if failed else f"all {held} laws hold"]
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    """JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wrapped(head: str, text: str, width: int) -> list[str]:
    lines = textwrap.wrap(
        text,
        max(width, len(head) + 24),
        initial_indent=f"{head} ",
        subsequent_indent=" " * (len(head) + 1),
        break_on_hyphens=False,
    )
    return lines or [head]


def _drawn(example: Example, width: int) -> list[str]:
    lines = _wrapped("Example:", example.said, width)
    for name, rows in example.inputs.items():
        lines.append(f"  {name} " + ", ".join("[" + " ".join(f"{number:g}" for number in row) + "]" for row in rows))
    cells = [[f"{number:.4f}" for number in row] for row in (*example.expected, *example.yours)]
    size = max(len(cell) for row in cells for cell in row)
    expected = ["  ".join(f"{number:>{size}.4f}" for number in row) for row in example.expected]
    yours = ["  ".join(f"{number:>{size}.4f}" for number in row) for row in example.yours]
    across = len(expected[0])
    if 2 * across + 8 > width:
        return [*lines, "  expected", *(f"  {row}" for row in expected), "  yours", *(f"  {row}" for row in yours)]
    lines.append(f"  {'expected':<{across}}    yours")
    return lines + [f"  {left}    {right}" for left, right in zip(expected, yours, strict=True)]


def rows(tensor: Tensor) -> list[list[float]]:
    """A small matrix as numbers.

    >>> import torch
    >>> rows(torch.eye(2))
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return [[float(number) for number in row] for row in tensor]


def number(value: float) -> str:
    """A difference, to two digits.

    >>> number(0.0000123), number(float("inf"))
    ('1.2e-05', 'not finite')
    """
    return f"{value:.1e}" if value < float("inf") else "not finite"


def changes(mistakes: Sequence[Mistake]) -> dict[str, Any]:
    """The steps that some mistakes replace together."""
    return {name: step for mistake in mistakes for name, step in mistake.steps.items()}
