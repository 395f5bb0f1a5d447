"""How somebody's attention is called, and which mistakes explain what it gives: all that the laws start from."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sightline.checking.attention_mistakes import CAUSAL, MASKS, NOT_CAUSAL, SCORES
from sightline.checking.conventions import Answer, Caller, Convention, Problem, Signature, conventions, mask_forms
from sightline.checking.definitions import Steps, causal, causal_from_the_first
from sightline.checking.findings import Example, changes, rows
from sightline.checking.mistakes import TOLERANCE, Mistake, difference, explain
from sightline.checking.module_mistakes import HEADS
from sightline.checking.subject import CheckError, Nothing, Raised, Subject

PATTERNS: dict[str, Steps] = {
    "full": Steps(),
    "causal": Steps(pattern=causal),
    "causal, from the first key": Steps(pattern=causal_from_the_first),
}


@dataclass(kw_only=True)
class Case:
    """One function under check: how it is called, and what is known of it so far."""

    caller: Caller
    problem: Problem
    answer: Answer
    right: Steps
    """The definition, with the scale that was asked for."""
    steps: Steps
    """The same, with what it hides on its own."""
    pattern: str = "full"
    mistakes: tuple[Mistake, ...] | None = None
    """Those that explain the plain call; None where none do."""
    example: Example | None = None

    @property
    def holds(self) -> bool:
        return self.mistakes == ()

    @property
    def shaped(self) -> bool:
        return self.answer.output is not None

    def differs_in_sizes(self, other: Convention) -> bool:
        own = self.caller.convention
        return own.library == other.library and own.sizes != other.sizes

    def expecting(self, pattern: str, mistakes: tuple[Mistake, ...] | None = None) -> "Case":
        steps = self.right.wrong(pattern=PATTERNS[pattern].pattern)
        return replace(self, pattern=pattern, steps=steps, mistakes=mistakes)

    def own(self) -> Steps:
        """The definition with the mistakes that are known already, so that others can be seen beside them."""
        return self.steps.wrong(**changes(self.mistakes or ()))


def discover(subject: Subject, *, scale: float | None, hide: bool, expect_causal: bool | None) -> Case:
    """The first convention in which it is right; else the first in which its mistake is known, or its shape right."""
    signature = Signature.of(subject.told["parameters"])
    if hide and signature.mask is None:
        raise CheckError("it takes no mask, so what True means in one was said in vain")
    right = Steps() if scale is None else Steps(divisor=lambda sizes: 1 / scale)
    if expect_causal is None and signature.causal is None and "causal" in subject.name.lower():
        expect_causal = True
    names = [name for name in PATTERNS if expect_causal is None or name.startswith("causal") == expect_causal]
    tried: list[Case] = []
    refused: dict[bool, Raised] = {}
    for convention in conventions(subject.told["torch"], 1 if signature.heads is None else 2):
        if any(case.shaped and case.differs_in_sizes(convention) for case in tried):
            continue  # what is right only where all sizes are equal is wrong
        caller = Caller(subject=subject, signature=signature, convention=convention, hide=hide)
        try:
            case = _first_call(caller, Problem.draw(convention), right)
        except Raised as error:
            refused.setdefault(convention.columns, error)
            continue
        tried.append(case)
        for name in names:
            if _holds(case.expecting(name)):
                return case.expecting(name, ())
    if not tried:
        if isinstance(refused[False], Nothing):
            raise refused[False]
        raise CheckError(f"{refused[False]}; tried torch and numpy, 2 to 4 axes, tokens in rows and in columns")
    return _wrong(tried, names)


def _holds(case: Case) -> bool:
    """Whether it is right; of a pattern also where there are as many queries as keys, and no doubt who sees whom."""
    if case.answer.output is None or difference(case.answer.output, case.problem.result(case.steps)[0]) > TOLERANCE:
        return False
    return case.pattern == "full" or case.caller.convention.sizes != "any" or _holds(_square(case))


def _square(case: Case) -> Case:
    """The same function, called with as many queries as keys."""
    convention = replace(case.caller.convention, sizes="square")
    caller, problem = replace(case.caller, convention=convention), Problem.draw(convention)
    answer = caller(problem, doing="it was called with as many queries as keys")
    return replace(case, caller=caller, problem=problem, answer=answer)


def _first_call(caller: Caller, problem: Problem, right: Steps) -> Case:
    """The plain call; where a mask is required, one that hides nothing, in the first form that is taken."""
    if not caller.signature.mask_required:
        answer = caller(problem, doing="it was called")
        return Case(caller=caller, problem=problem, answer=answer, steps=right, right=right)
    error = None
    for form in mask_forms(caller.convention):
        asked = replace(caller, form=form)
        try:
            answer = asked(problem, doing="it was called with a mask that hides nothing")
        except Raised as raised:
            error = error or raised
        else:
            return Case(caller=asked, problem=problem, answer=answer, steps=right, right=right)
    assert error is not None
    raise error


def _wrong(tried: list[Case], names: list[str]) -> Case:
    """The convention, the pattern and the fewest mistakes that explain what it gives."""
    shaped = [case for case in tried if case.shaped]
    if not shaped:
        return tried[0].expecting(names[0])
    first = shaped[0]
    squares = [_square(first)] if first.caller.convention.sizes == "any" else []
    for count, cases in ((1, shaped + squares), (2, [first, *squares])):
        for case, name in itertools.product(cases, [name for name in ("full", "causal") if name in names]):
            some = _explained(case.expecting(name), (count,))
            if some is None:
                continue
            patterned = name == "causal" or any("pattern" in mistake.steps for mistake in some)
            if patterned and case.caller.convention.sizes == "any":
                square = _square(case).expecting(names[-1] if names[-1] == "full" else "causal")
                again = _explained(square, (1, 2))
                if again is not None:
                    return replace(square, mistakes=again)
            return case.expecting(name, some)
    case = first.expecting(names[0])
    assert case.answer.output is not None
    return replace(case, mistakes=_fitted(case.answer.output, case.problem, case.steps))


def _explained(case: Case, counts: tuple[int, ...]) -> tuple[Mistake, ...] | None:
    known = [*SCORES, *(HEADS if case.problem.heads > 1 else ())]
    known += CAUSAL if case.pattern == "full" else [*CAUSAL, NOT_CAUSAL, *MASKS]
    assert case.answer.output is not None
    return explain(case.answer.output, lambda steps: case.problem.result(steps)[0], case.steps, known, counts)


def _fitted(output: Tensor, problem: Problem, steps: Steps) -> tuple[Mistake, ...] | None:
    """The scale that would explain it, where one does."""

    def error(log: float) -> float:
        return difference(output, problem.result(steps.wrong(divisor=lambda sizes: math.exp(log)))[0])

    low = min((-7 + i * 0.1 for i in range(141)), key=error) - 0.1
    high = low + 0.2
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if error(left) < error(right) else (left, high)
    middle = (low + high) / 2
    divisor, own = math.exp(middle), steps.divisor(problem.sizes)
    if error(middle) > TOLERANCE or abs(divisor - own) < 0.01 * own:  # else noise is blamed on the scale
        return None
    return (constant_scale(divisor, problem.sizes.width),)


def constant_scale(divisor: float, width: int) -> Mistake:
    return Mistake(
        name="wrong scale",
        what=f"the scores are divided by {divisor:.4g}; at width {width} sqrt(width) is {width**0.5:.4g}",
        fix="scores = query @ key.T / sqrt(width), where width is the last axis of query",
        steps={"divisor": lambda sizes: divisor},
    )


def show(case: Case, masked: bool | None, *, flag: bool) -> None:
    """Three queries and three keys by hand: values that are the unit vectors make the output the weights."""
    if case.example is not None:
        return
    convention = case.caller.convention
    width = 4
    query = torch.tensor([[2.0, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 2]], dtype=torch.float64)
    key = torch.tensor([[1.0, 0, 1, 1], [0, 2, 0, 0], [1, 1, 0, 1]], dtype=torch.float64)
    value = torch.eye(3, width if convention.sizes == "equal" or convention.heads > 1 else 3, dtype=torch.float64)
    columns = 3 if convention.heads == 1 else value.shape[-1]
    problem = Problem(query=query[None, None], key=key[None, None], value=value[None, None], heads=convention.heads)
    allowed = causal(3, 3) if masked else None
    output = case.caller(problem, allowed, causal=flag, doing="a small example was computed").output
    steps = case.right.wrong(pattern=causal) if flag else case.steps
    wanted = problem.result(steps, allowed)[0]
    if output is None or difference(output, wanted) <= TOLERANCE:
        return
    what = (
        "the output" if convention.heads > 1 else "the weights (value holds unit vectors, so the output is the weights)"
    )
    under = ", with a causal mask" if masked or flag or case.pattern != "full" else ""
    case.example = Example(
        said=f"{what}, a row for each query{under}",
        inputs={"query": rows(query), "key": rows(key), "value": rows(value)},
        expected=rows(wanted[0, 0, :, :columns]),
        yours=rows(output[0, 0, :, :columns]),
    )
