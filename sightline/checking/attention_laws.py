"""The laws of attention, each a function that asks somebody's code and says in a line whether it holds."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.checking.attention_mistakes import CAUSAL, MASKS, NOT_CAUSAL, OVERFLOW
from sightline.checking.conventions import Caller, MaskForm, Problem, mask_forms
from sightline.checking.definitions import Steps, causal
from sightline.checking.discovery import Case, constant_scale, discover, show
from sightline.checking.findings import Finding, hold, number
from sightline.checking.mistakes import TOLERANCE, Mistake, difference, explain
from sightline.checking.subject import Raised, Subject


def examine(
    subject: Subject, *, scale: float | None, hide: bool, expect_causal: bool | None
) -> tuple[Case, list[Finding]]:
    """Find out how it is called, then try every law.

    Raises: CheckError where it cannot be called.
    """
    case = discover(subject, scale=scale, hide=hide, expect_causal=expect_causal)
    findings = [_shape(case)]
    if case.answer.output is not None:
        findings += hold(case, LAWS)
    return case, findings


# --- The laws -----------------------------------------------------------------------------------------


def _shape(case: Case) -> Finding:
    give, problem = case.caller.convention.give, case.problem
    wanted = tuple(give(problem.query[..., :1].expand(*problem.query.shape[:-1], problem.value.shape[-1])).shape)
    if case.answer.output is None:
        got = case.answer.shapes[0] if case.answer.shapes else "nothing"
        sizes = problem.sizes
        asked = f"{sizes.queries} queries, {sizes.keys} keys, values {sizes.value_width * problem.heads} wide"
        said = f"expected {wanted} for {asked}; got {got}"
        return Finding(law="shape", status="fail", said=said)
    if case.answer.swapped:
        return Finding(
            law="shape", status="note", said=f"{wanted}; returns (weights, output): (output, weights) is usual"
        )
    return Finding(law="shape", status="ok", said=f"{wanted}")


def _rows(case: Case) -> Finding:
    """Values that are all 1 show the sum of each row of weights."""
    ones = replace(case.problem, value=torch.ones_like(case.problem.value))
    sums = case.caller(ones, doing="all values were 1").output
    assert sums is not None
    error = difference(sums, torch.ones_like(sums))
    law = "rows sum to 1"
    if error <= TOLERANCE:
        return Finding(law=law, status="ok", said=f"within {number(error)}")
    finite = sums[sums.isfinite()]
    span = f"{finite.min():.3g} to {finite.max():.3g}" if len(finite) else "no finite number"
    return Finding(law=law, status="fail", said=f"the weights of a query sum to {span}")


def _definition(case: Case) -> Finding:
    assert case.answer.output is not None
    wanted = case.problem.result(case.steps)[0]
    error = difference(case.answer.output, wanted)
    law = "the definition"
    if case.holds:
        return Finding(law=law, status="ok", said=f"{case.pattern}, largest difference {number(error)}")
    show(case, None, flag=False)
    close = " (close: is something computed in half precision?)" if case.mistakes is None and error < 0.02 else ""
    said = f"largest difference {number(error)}{close}"
    return Finding(law=law, status="fail", said=said, mistakes=case.mistakes or ())


def _weights(case: Case) -> Finding | None:
    given = case.answer.weights
    if given is None:
        return None
    wanted = case.problem.result(case.own() if case.mistakes else case.steps)[1]
    law = "the weights"
    if given.shape == wanted.shape and difference(given, wanted) <= TOLERANCE:
        return Finding(law=law, status="ok", said="(queries keys), and the output is their mixture of the values")
    if case.caller.convention.columns and difference(given.mT, wanted) <= TOLERANCE:
        return Finding(law=law, status="ok", said="(keys queries), and the output is their mixture of the values")
    if given.shape[-1] == given.shape[-2] and difference(given.mT, wanted) <= TOLERANCE:
        return Finding(law=law, status="fail", said="returned as (keys queries): transpose them")
    if case.mistakes is None:
        return Finding(law=law, status="fail", said=f"largest difference {number(difference(given, wanted))}")
    return Finding(law=law, status="fail", said="they are not those that the output was mixed with")


def _scale(case: Case) -> Finding:
    law = "scale"
    if not case.holds:
        blamed = tuple(mistake for mistake in case.mistakes or () if "divisor" in mistake.steps)
        if blamed:
            return Finding(law=law, status="fail", said="not 1/sqrt(width)", mistakes=blamed)
        return Finding(law=law, status="skip", said="not tried: the definition does not hold")
    wide = Problem.draw(case.caller.convention, seed=1, width=16)
    output = case.caller(wide, doing="the width was 16").output
    if output is not None and difference(output, wide.result(case.steps)[0]) <= TOLERANCE:
        return Finding(law=law, status="ok", said="the same rule at widths 4 and 16")
    fixed = replace(constant_scale(case.steps.divisor(case.problem.sizes), 16), name="fixed scale")
    same = output is not None and difference(output, wide.result(case.steps.wrong(**fixed.steps))[0]) <= TOLERANCE
    return Finding(law=law, status="fail", said="right at width 4 but not at 16", mistakes=(fixed,) if same else ())


def _permutation(case: Case) -> Finding:
    law = "order of tokens"
    if case.pattern != "full":
        return Finding(law=law, status="skip", said="does not apply to causal attention")
    random = torch.Generator().manual_seed(2)
    keys = torch.randperm(case.problem.sizes.keys, generator=random)
    queries = torch.randperm(case.problem.sizes.queries, generator=random)
    problem = case.problem
    assert case.answer.output is not None
    by_key = replace(problem, key=problem.key[..., keys, :], value=problem.value[..., keys, :])
    output = case.caller(by_key, doing="keys and values were permuted").output
    if output is None or difference(output, case.answer.output) > TOLERANCE:
        return Finding(law=law, status="fail", said="permuting keys and values together changes the output")
    by_query = replace(problem, query=problem.query[..., queries, :])
    output = case.caller(by_query, doing="queries were permuted").output
    if output is None or difference(output, case.answer.output[..., queries, :]) > TOLERANCE:
        return Finding(law=law, status="fail", said="permuting the queries does not permute the output alike")
    return Finding(law=law, status="ok", said="keys in any order give the same, queries permute the output")


def _causal(case: Case) -> Finding:
    law = "causality"
    if case.pattern != "full":
        if case.holds:
            return Finding(law=law, status="ok", said="no query sees the future, each sees itself")
        blamed = tuple(m for m in case.mistakes or () if {"pattern", "hide"} & m.steps.keys())
        if blamed:
            return Finding(law=law, status="fail", said="not what causal attention hides", mistakes=blamed)
        return Finding(law=law, status="skip", said="not tried: the definition does not hold")
    if case.caller.signature.causal is None:
        return Finding(law=law, status="skip", said="not causal, and has no argument for it")
    convention = replace(case.caller.convention, sizes="square" if case.caller.convention.sizes == "any" else "equal")
    caller, problem = replace(case.caller, convention=convention), Problem.draw(convention, seed=3)
    output = caller(problem, causal=True, doing=f"{caller.signature.causal}=True").output
    if output is None:
        return Finding(law=law, status="fail", said=f"{caller.signature.causal}=True changes the shape")
    steps = case.own().wrong(pattern=causal)
    some = explain(output, lambda steps: problem.result(steps)[0], steps, [*CAUSAL, NOT_CAUSAL, *MASKS])
    if some == ():
        return Finding(law=law, status="ok", said="no query sees the future, each sees itself")
    show(case, None, flag=True)
    return Finding(law=law, status="fail", said="not what causal attention hides", mistakes=some or ())


# --- Masks --------------------------------------------------------------------------------------------


def _allowed(case: Case, form: MaskForm) -> Tensor:
    """What no mistake mistakes for another: no row is all one or all the other."""
    sizes = case.problem.sizes
    if form.kind == "flag":
        return causal(sizes.queries, sizes.keys)
    if form.shape == "keys":
        return (torch.arange(sizes.keys) % 3 != 1).expand(sizes.queries, -1)
    grid = torch.arange(sizes.queries)[:, None] * 3 + torch.arange(sizes.keys) * 2
    return (grid % 5 < 3).clone()


def _mask(case: Case) -> Finding | None:
    if case.caller.signature.mask is None:
        return None
    law = "mask"
    wrong: list[tuple[Caller, tuple[Mistake, ...] | None]] = []
    told = ""
    for form in mask_forms(case.caller.convention):
        caller, allowed = replace(case.caller, form=form), _allowed(case, form)
        try:
            output = caller(case.problem, allowed, doing="it was called with a mask").output
        except Raised as error:
            told = told or str(error)
            continue
        if output is None:
            continue
        some = explain(output, lambda steps, a=allowed: case.problem.result(steps, a)[0], case.own(), MASKS)
        if some == ():
            case.caller = caller
            status = "ok" if form.kind in ("bool", "added") else "note"
            return Finding(law=law, status=status, said=str(form))
        wrong.append((caller, some))
        # A mask that is added to the scores, as numbers, has something to add; any other mistake is one.
        if some is not None and [mistake.name for mistake in some] != ["mask added to the scores as 0 and 1"]:
            break
    if not wrong:
        return Finding(law=law, status="fail", said=f"takes none of the masks that were tried: {told}")
    caller, some = next((one for one in wrong if one[1] is not None), wrong[0])
    case.caller = caller
    show(case, True, flag=False)
    said = "does not hide what it must: True = may attend"
    return Finding(law=law, status="fail", said=said, mistakes=some or ())


def _empty_rows(case: Case) -> Finding | None:
    form = case.caller.form
    if case.caller.signature.mask is None or form is None or form.kind == "flag" or not case.holds:
        return None
    law = "empty rows"
    allowed = _allowed(case, form).clone()
    empty = slice(None) if form.shape == "keys" else slice(1, 2)
    allowed[empty] = False
    try:
        output = case.caller(case.problem, allowed, doing="a query was allowed no key").output
    except Raised as error:
        return Finding(law=law, status="note", said=str(error))
    assert output is not None
    row = output[..., empty, :]
    if (row == 0).all():
        return Finding(law=law, status="ok", said="a query that may see nothing gives 0")
    if row.isnan().any():
        return Finding(law=law, status="note", said="NaN for a query that may see nothing; sl.attention gives 0 there")
    return Finding(law=law, status="note", said="a query that may see nothing still mixes values; sl.attention gives 0")


# --- Numbers ------------------------------------------------------------------------------------------


def _large(case: Case) -> Finding:
    law = "large scores"
    large = replace(case.problem, query=case.problem.query * 3000)
    output = case.caller(large, doing="scores were in the thousands").output
    assert output is not None
    # The first causal row sees one key, whatever its score, and some mistakes leave rows without any.
    plain = case.answer.output
    if not output.isfinite().all() and not case.mistakes and plain is not None and plain.isfinite().all():
        return Finding(law=law, status="fail", said="NaN or infinite for scores in the thousands", mistakes=(OVERFLOW,))
    if not case.holds:
        return Finding(law=law, status="skip", said="not tried: the definition does not hold")
    error = difference(output, large.result(case.steps)[0])
    if error > 0.02:
        return Finding(law=law, status="fail", said=f"largest difference {number(error)} for scores in the thousands")
    return Finding(law=law, status="ok", said="scores in the thousands give no NaN")


def _inputs(case: Case) -> Finding:
    law = "inputs"
    if case.answer.changed:
        return Finding(law=law, status="fail", said=f"it changes its {', '.join(case.answer.changed)} in place")
    return Finding(law=law, status="ok", said="left as they were")


def _repeats(case: Case) -> Finding:
    again = case.caller(case.problem, doing="it was called once more").output
    assert case.answer.output is not None and again is not None
    if not torch.equal(again.nan_to_num(), case.answer.output.nan_to_num()):
        return Finding(law="twice the same", status="fail", said="the same call gave two results: is dropout on?")
    return Finding(law="twice the same", status="ok", said="bit for bit")


def _bfloat16(case: Case) -> Finding | None:
    if case.caller.convention.library != "torch" or not case.holds:
        return None
    law = "bfloat16"
    low = torch.bfloat16
    problem = Problem.draw(case.caller.convention, seed=4, width=16, like=low)
    try:
        answer = case.caller(problem, dtype=low, doing="its inputs were bfloat16")
    except Raised as error:
        return Finding(law=law, status="note", said=f"not taken: {error}")
    assert answer.output is not None
    exact = problem.result(case.steps)[0]
    q, k, v = (x.to(low) for x in (problem.query, problem.key, problem.value))
    plain = difference(F.scaled_dot_product_attention(q, k, v).double(), Problem.result(problem, Steps())[0])
    error = difference(answer.output, exact)
    said = f"error {number(error)}, PyTorch's own {number(plain)}"
    if answer.dtype != low:
        return Finding(law=law, status="note", said=f"{said}; it gives {answer.dtype} for bfloat16")
    # Each of five roundings to eight bits, at the size of the largest number.
    return Finding(law=law, status="ok" if error <= max(4 * plain, 5 * 2**-8) else "fail", said=said)


def _gradients(case: Case) -> Finding | None:
    if case.caller.convention.library != "torch" or not case.holds:
        return None
    law = "gradients"
    random = torch.Generator().manual_seed(5)
    assert case.answer.output is not None
    cotangent = torch.randn(case.answer.output.shape, generator=random, dtype=torch.float64)
    try:
        answer = case.caller(case.problem, cotangent=cotangent, doing="its gradients were asked for")
    except Raised as error:
        return Finding(law=law, status="note", said=f"none: {error}")
    if not answer.differentiable or answer.gradients is None:
        return Finding(law=law, status="note", said="none: the output does not depend on its inputs for autograd")
    leaves = {name: getattr(case.problem, name).clone().requires_grad_() for name in ("query", "key", "value")}
    output = replace(case.problem, **leaves).result(case.steps)[0]
    wanted = torch.autograd.grad(output, list(leaves.values()), cotangent)
    take = case.caller.convention.take
    worst = 0.0
    for name, exact in zip(leaves, wanted, strict=True):
        given = take(answer.gradients[name], tuple(exact.shape))
        error = torch.inf if given is None else difference(given, exact)
        if error > 10 * TOLERANCE:
            return Finding(law=law, status="fail", said=f"of the {name}: largest difference {number(error)}")
        worst = max(worst, error)
    return Finding(law=law, status="ok", said=f"largest difference {number(worst)}")


LAWS: dict[str, Callable[[Case], Finding | None]] = {
    "rows sum to 1": _rows,
    "the definition": _definition,
    "the weights": _weights,
    "scale": _scale,
    "order of tokens": _permutation,
    "causality": _causal,
    "mask": _mask,
    "empty rows": _empty_rows,
    "large scores": _large,
    "inputs": _inputs,
    "twice the same": _repeats,
    "bfloat16": _bfloat16,
    "gradients": _gradients,
}
