"""The laws of self-attention in a module: its own maps with numbers that we draw, then those of attention."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sightline.checking.attention_mistakes import CAUSAL, MASKS, NOT_CAUSAL, OVERFLOW, SCORES
from sightline.checking.definitions import Maps, Steps, causal, multi_head
from sightline.checking.discovery import PATTERNS
from sightline.checking.findings import Example, Finding, changes, hold, number, rows
from sightline.checking.maps import readings, strangers
from sightline.checking.mistakes import TOLERANCE, Mistake, difference, explain
from sightline.checking.module_mistakes import HEADS, LOST, ROLES
from sightline.checking.subject import CheckError, Nothing, Raised, Subject

BATCH, TOKENS = 2, 5


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a module takes its input."""

    words: str
    give: Callable[[Tensor], Tensor]
    take: Callable[[Tensor], Tensor]
    batch: int = BATCH


LAYOUTS = (
    Layout(words="(batch tokens d_model)", give=lambda x: x, take=lambda x: x),
    Layout(words="(tokens batch d_model)", give=lambda x: x.transpose(0, 1), take=lambda x: x.transpose(0, 1)),
    Layout(words="(tokens d_model)", give=lambda x: x[0], take=lambda x: x[None], batch=1),
    Layout(words="(d_model tokens)", give=lambda x: x[0].mT, take=lambda x: x.mT[None], batch=1),
)


@dataclass(kw_only=True)
class Module:
    """One module under check, with the numbers drawn for it."""

    subject: Subject
    library: str
    inputs: int
    """How often it takes its input: once, or as query, key and value."""
    mask: str | None
    mask_required: bool
    hide: bool
    x: Tensor
    layout: Layout = LAYOUTS[0]
    maps: Maps
    strangers: list[str]
    steps: Steps
    mistakes: tuple[Mistake, ...] | None = None

    @property
    def holds(self) -> bool:
        return self.mistakes == ()

    def __str__(self) -> str:
        heads = f"{self.maps.heads} head{'s' * (self.maps.heads > 1)}"
        joined = "query, key, value and output" if "output" in self.maps.weights else "query, key and value"
        return f"{self.library}, {self.layout.words}, {heads}, maps to {joined}"

    @property
    def pattern(self) -> str:
        return next((name for name, steps in PATTERNS.items() if steps.pattern is self.steps.pattern), "full")

    def call(
        self,
        x: Tensor,
        *,
        doing: str,
        mask: Tensor | None = None,
        cotangent: Tensor | None = None,
        bfloat16: bool = False,
    ) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
        """The output (batch tokens d_out), and all that was told. Raises: CheckError."""
        dtype = torch.float32 if self.library == "torch" else torch.float64
        dtype = torch.bfloat16 if bfloat16 else dtype
        tensors = {"x": self.layout.give(x).contiguous().to(dtype)}
        named: dict[str, Any] = {}
        if mask is None and self.mask_required:
            mask = torch.full((TOKENS, TOKENS), not self.hide)
        if mask is not None:
            tensors["mask"] = mask
            named[str(self.mask)] = ["tensor", "mask"]
        if cotangent is not None:
            tensors["cotangent"] = self.layout.give(cotangent).contiguous().to(dtype)
        told, found = self.subject.ask(
            "call",
            doing,
            tensors,
            arguments=[["tensor", "x"]] * self.inputs,
            named=named,
            library=self.library,
            gradients=cotangent is not None,
            bfloat16=bfloat16,
        )
        output = found["result.0"].double()
        return (self.layout.take(output) if output.ndim == self.layout.give(x).ndim else output), told, found

    def result(self, steps: Steps, allowed: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        return multi_head(self.x if x is None else x, allowed, self.maps, steps)[0]

    def own(self) -> Steps:
        return self.steps.wrong(**changes(self.mistakes or ()))


def examine(
    subject: Subject,
    weights: dict[str, Tensor],
    *,
    d_model: int | None,
    heads: int | None,
    scale: float | None,
    hide: bool,
    expect_causal: bool | None,
) -> tuple[Module, list[Finding], Example | None]:
    """Draw its parameters, find out how it is called, try every law. Raises: CheckError."""
    random = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(weight.shape, generator=random, dtype=torch.float64).mul(0.6).to(weight.dtype)
        for name, weight in weights.items()
    }
    subject.ask("draw", "its parameters were set", drawn)
    meant = list(itertools.islice(readings(drawn, d_model=d_model, heads=heads), 64))
    if not meant:
        raise CheckError("its maps to query, key and value do not have one width; a number of heads does not divide it")
    parameters = subject.told["parameters"]
    masks = [one["name"] for one in parameters if "mask" in one["name"].lower()]
    module = Module(
        subject=subject,
        library="torch" if subject.told["torch"] else "numpy",
        inputs=3 if sum(one["required"] and one["name"] not in masks for one in parameters) >= 3 else 1,
        # nn.MultiheadAttention has two, and the first is for padding.
        mask="attn_mask" if "attn_mask" in masks else masks[0] if masks else None,
        mask_required=any(one["required"] and one["name"] in masks for one in parameters),
        hide=hide or subject.told["multihead"],
        x=torch.randn(BATCH, TOKENS, len(meant[0].weights["query"]), generator=random).double(),
        maps=meant[0],
        strangers=strangers(weights),
        steps=Steps() if scale is None else Steps(divisor=lambda sizes: 1 / scale),
    )
    if hide and module.mask is None:
        raise CheckError("it takes no mask, so what True means in one was said in vain")
    names = [name for name in ("full", "causal") if expect_causal is None or (name == "causal") == expect_causal]
    output = _discover(module, meant, names)
    shape = tuple(module.result(Steps()).shape)
    if tuple(output.shape) != shape:
        return module, [Finding(law="shape", status="fail", said=f"expected {shape}, got {tuple(output.shape)}")], None
    findings = [Finding(law="shape", status="ok", said=f"{shape}"), *_definition(module, output)]
    findings += hold(module, LAWS)
    example = None
    if not module.holds:
        size = min(3, shape[-1])
        example = Example(
            said=f"the first 3 tokens of a sequence, columns 0 to {size - 1} of the output, parameters drawn by us",
            inputs={},
            expected=rows(module.result(module.steps)[0, :3, :size]),
            yours=rows(output[0, :3, :size]),
        )
    return module, findings, example


def _discover(module: Module, meant: list[Maps], names: list[str]) -> Tensor:
    """The layout and the meaning in which it is right; else those in which its mistake is known."""
    refused: Raised | None = None
    outputs: list[tuple[Layout, Tensor, Tensor]] = []
    whole, right = module.x, module.steps
    patterns = [right.wrong(pattern=PATTERNS[name].pattern) for name in names]
    for layout in LAYOUTS:
        module.layout, module.x = layout, whole[: layout.batch]
        try:
            output, _, _ = module.call(module.x, doing="it was called")
        except Raised as error:
            refused = refused or error
            continue
        outputs.append((layout, module.x, output))
        for maps, steps in itertools.product(meant, patterns):
            module.maps, module.steps = maps, steps
            if difference(output, module.result(steps)) <= TOLERANCE:
                module.mistakes = ()
                return output
    if not outputs:
        if isinstance(refused, Nothing):
            raise refused
        raise CheckError(f"{refused}; tried {', '.join(layout.words for layout in LAYOUTS)}")
    for count, tries in ((1, meant[:4]), (2, meant[:1])):
        for (module.layout, module.x, output), maps, steps in itertools.product(outputs, tries, patterns):
            module.maps, module.steps = maps, steps
            known = [*SCORES, *(HEADS if maps.heads > 1 else ()), *LOST, *_roles(maps), *CAUSAL]
            known += [*MASKS, NOT_CAUSAL] if steps.pattern is causal else []
            module.mistakes = explain(output, module.result, steps, known, counts=(count,))
            if module.mistakes is not None:
                return output
    module.layout, module.x, output = outputs[0]
    module.maps, module.steps = meant[0], patterns[0]
    return output


def _roles(maps: Maps) -> list[Mistake]:
    """Those that widths allow: a map stands in for another only where it is as wide."""
    widths = {role: weight.shape[-1] for role, weight in maps.weights.items()}
    inner, outer = maps.weights["output"].shape if "output" in maps.weights else (0, 0)
    possible = []
    for mistake in ROLES:
        roles = mistake.steps.get("roles", {})
        if any(widths[role] != widths[used] for role, used in roles.items()):
            continue
        if mistake.name == "output map unused" and inner != outer:
            continue
        possible.append(mistake)
    return possible


# --- The laws -----------------------------------------------------------------------------------------


def _definition(module: Module, output: Tensor) -> list[Finding]:
    law = "the definition"
    error = difference(output, module.result(module.steps))
    if module.holds:
        return [Finding(law=law, status="ok", said=f"{module.pattern}, largest difference {number(error)}")]
    said = f"largest difference {number(error)}"
    if module.mistakes is None and module.strangers:
        said += f"; the definition has no place for its {', '.join(module.strangers)}"
    found = [Finding(law=law, status="fail", said=said, mistakes=module.mistakes or ())]
    if any("divisor" in mistake.steps for mistake in module.mistakes or ()):
        found.append(Finding(law="scale", status="fail", said="not 1/sqrt(width of one head)"))
    return found


def _weights(module: Module) -> Finding | None:
    _, told, found = module.call(module.x, doing="it was called")
    if told["results"] < 2:
        return None
    law, given = "the weights", found["result.1"].double()
    _, wanted = multi_head(module.x, None, module.maps, module.own())
    for one in (wanted, wanted.flatten(0, 1), wanted.mean(1), wanted[0], wanted[0].mean(0), wanted[0, 0]):
        turned = one.mT if module.layout.words == "(d_model tokens)" else one
        if any(given.shape == way.shape and difference(given, way) <= TOLERANCE for way in (one, turned)):
            return Finding(law=law, status="ok", said=f"{tuple(given.shape)}, and the output is their mixture")
    said = f"the second result, {tuple(given.shape)}, is not the weights that the output was mixed with"
    return Finding(law=law, status="fail", said=said)


def _permutation(module: Module) -> Finding | None:
    law = "order of tokens"
    if module.pattern != "full" or any("pattern" in mistake.steps for mistake in module.mistakes or ()):
        return Finding(law=law, status="skip", said="does not apply to causal attention")
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    output, _, _ = module.call(module.x, doing="it was called")
    permuted, _, _ = module.call(module.x[:, order], doing="its tokens were permuted")
    if difference(permuted, output[:, order]) > TOLERANCE:
        return Finding(law=law, status="fail", said="permuting the tokens does not permute the output alike")
    return Finding(law=law, status="ok", said="permuting the tokens permutes the output")


def _causal(module: Module) -> Finding | None:
    law = "causality"
    if module.pattern == "full":
        return None
    if module.holds:
        return Finding(law=law, status="ok", said="no token sees the future, each sees itself")
    if any({"pattern", "hide"} & mistake.steps.keys() for mistake in module.mistakes or ()):
        return Finding(law=law, status="fail", said="not what causal attention hides")
    return None


def _mask(module: Module) -> Finding | None:
    if module.mask is None:
        return None
    law = "mask"
    grid = torch.arange(TOKENS)[:, None] * 3 + torch.arange(TOKENS) * 2
    allowed = (grid % 5 < 3) | torch.eye(TOKENS, dtype=torch.bool)
    added = torch.zeros(TOKENS, TOKENS).masked_fill(~allowed, -torch.inf)
    told, wrong = "", ()
    for mask, words in ((~allowed if module.hide else allowed, "bool"), (added, "added to the scores, 0 or -inf")):
        for shape in (
            (TOKENS, TOKENS),
            (module.layout.batch, TOKENS, TOKENS),
            (module.layout.batch, 1, TOKENS, TOKENS),
        ):
            try:
                output, _, _ = module.call(module.x, mask=mask.expand(shape), doing="it was called with a mask")
            except Raised as error:
                told = told or str(error)
                continue
            some = explain(output, lambda steps: module.result(steps, allowed), module.own(), MASKS)
            if some == ():
                meaning = "True = may not attend" if module.hide else "True = may attend"
                return Finding(law=law, status="ok", said=meaning if words == "bool" else words)
            wrong = wrong or some or ()
    if wrong:
        return Finding(law=law, status="fail", said="does not hide what it must: True = may attend", mistakes=wrong)
    return Finding(law=law, status="fail", said=f"none of the masks that were tried does what it says. {told}".strip())


def _scored(module: Module, largest: float) -> Tensor:
    """Its input times a power of two, so that the largest score is about this."""
    _, scores = multi_head(module.x, None, module.maps, module.steps.wrong(softmax=lambda scores: scores))
    size = scores[scores.isfinite()].abs().max().item()
    return module.x * 2.0 ** round(math.log2(largest / size) / 2)


def _large(module: Module) -> Finding:
    law = "large scores"
    if not module.holds:
        return Finding(law=law, status="skip", said="not tried: the definition does not hold")
    x = _scored(module, 4096)
    output, _, _ = module.call(x, doing="scores were in the thousands")
    if not output.isfinite().all():
        return Finding(law=law, status="fail", said="NaN or infinite for scores in the thousands", mistakes=(OVERFLOW,))
    error = difference(output, module.result(module.steps, x=x))
    if error > 0.02:
        return Finding(law=law, status="fail", said=f"largest difference {number(error)} for scores in the thousands")
    return Finding(law=law, status="ok", said="scores in the thousands give no NaN")


def _inputs(module: Module) -> Finding:
    _, told, _ = module.call(module.x, doing="it was called")
    if told["changed"]:
        return Finding(law="inputs", status="fail", said="it changes its input in place")
    return Finding(law="inputs", status="ok", said="left as they were")


def _repeats(module: Module) -> Finding:
    one, other = (module.call(module.x, doing="it was called once more")[0] for _ in range(2))
    if not torch.equal(one.nan_to_num(), other.nan_to_num()):
        return Finding(law="twice the same", status="fail", said="the same call gave two results, dropout off")
    return Finding(law="twice the same", status="ok", said="bit for bit")


def _bfloat16(module: Module) -> Finding | None:
    if module.library != "torch" or not module.holds:
        return None
    law, low = "bfloat16", torch.bfloat16
    x = _scored(module, 4).to(low)
    try:
        output, _, found = module.call(x, doing="it and its input were bfloat16", bfloat16=True)
    except Raised as error:
        return Finding(law=law, status="note", said=f"not taken: {error}")
    weights = {role: weight.to(low) for role, weight in module.maps.weights.items()}
    biases = {role: bias.to(low) for role, bias in module.maps.biases.items()}
    plain, _ = multi_head(x, None, replace(module.maps, weights=weights, biases=biases), module.steps)
    weights = {role: weight.double() for role, weight in weights.items()}
    biases = {role: bias.double() for role, bias in biases.items()}
    exact, _ = multi_head(x.double(), None, replace(module.maps, weights=weights, biases=biases), module.steps)
    error, usual = difference(output, exact), difference(plain.double(), exact)
    said = f"error {number(error)}, the definition's own {number(usual)}"
    if found["result.0"].dtype != low:
        return Finding(law=law, status="note", said=f"{said}; it gives {found['result.0'].dtype} for bfloat16")
    # Each of seven roundings to eight bits, at the size of the largest number.
    return Finding(law=law, status="ok" if error <= max(4 * usual, 7 * 2**-8) else "fail", said=said)


def _gradients(module: Module) -> Finding | None:
    if module.library != "torch" or not module.holds:
        return None
    law = "gradients"
    cotangent = torch.randn(module.result(module.steps).shape, generator=torch.Generator().manual_seed(2)).double()
    _, told, found = module.call(module.x, cotangent=cotangent, doing="its gradients were asked for")
    if not told["differentiable"]:
        return Finding(law=law, status="fail", said="none reach its parameters: it cannot be trained")
    x = module.x.clone().requires_grad_()
    biases = {role: bias.clone().requires_grad_() for role, bias in module.maps.biases.items()}
    weights = {role: weight.clone().requires_grad_() for role, weight in module.maps.weights.items()}
    maps = replace(module.maps, weights=weights, biases=biases)
    wanted = torch.autograd.grad((multi_head(x, None, maps, module.steps)[0] * cotangent).sum(), [x, *weights.values()])
    given = module.layout.take(found["gradient.x"].double())
    error = difference(given, wanted[0])
    if error > 10 * TOLERANCE:
        return Finding(law=law, status="fail", said=f"of its input: largest difference {number(error)}")
    sums = sorted(gradient.square().sum().item() for gradient in wanted[1:])
    theirs = {name: g for name, g in found.items() if name.startswith("gradient.") and name != "gradient.x"}
    size = sum(gradient.double().square().sum().item() for gradient in theirs.values() if gradient.ndim > 1)
    if abs(size - sum(sums)) > 0.01 * sum(sums):
        return Finding(law=law, status="fail", said="of its input right, but of its weights not: is one detached?")
    return Finding(law=law, status="ok", said=f"of the input and of the weights, largest difference {number(error)}")


LAWS: dict[str, Callable[[Module], Finding | None]] = {
    "the weights": _weights,
    "order of tokens": _permutation,
    "causality": _causal,
    "mask": _mask,
    "large scores": _large,
    "inputs": _inputs,
    "twice the same": _repeats,
    "bfloat16": _bfloat16,
    "gradients": _gradients,
}
