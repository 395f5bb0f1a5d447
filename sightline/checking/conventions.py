"""How somebody's attention wants to be called: with torch or numpy, how many axes, tokens in rows or in columns.

`Caller` speaks that convention, so that everyone else sees (batch heads tokens width) in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sightline.checking.definitions import Sizes, Steps, attend
from sightline.checking.subject import CheckError, Subject

Library = Literal["torch", "numpy"]
HEADS = 2
"""Heads that a function with an argument for their number is asked for."""

CAUSAL_NAMES = ("causal", "is_causal", "masked", "use_causal", "autoregressive")
HEADS_NAMES = ("num_heads", "n_heads", "heads", "n_head", "nhead", "nheads", "h")
_FACTS = ("need_weights", "return_weights", "return_attention", "return_attn", "output_attentions")
_WIDTH = ("d_k", "dk", "d", "dim", "width", "head_dim")
_NO_DROPOUT = ("dropout", "dropout_p", "p")


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What the parameters of an attention function mean, by their names and places."""

    order: tuple[str, ...]
    """Which of query, key and value the first three are."""
    mask: str | None = None
    mask_required: bool = False
    causal: str | None = None
    heads: str | None = None
    settings: dict[str, Any]
    """Others that get a value."""
    width: str | None = None
    scale: str | None = None

    @classmethod
    def of(cls, parameters: list[dict[str, Any]]) -> "Signature":
        """Raises: CheckError where it is not (query, key, value) and what is known by name."""
        first, rest = parameters[:3], parameters[3:]
        if len(first) < 3:
            raise CheckError(
                f"expected a function of (query, key, value), got ({', '.join(one['name'] for one in parameters)})"
            )
        found = cls(order=_order([one["name"].lower() for one in first]), settings={})
        for i, one in enumerate(rest):
            found = found._with(one["name"], required=one["required"], fourth=i == 0)
        return found

    def _with(self, name: str, *, required: bool, fourth: bool) -> "Signature":
        low = name.lower()
        if self.mask is None and ("mask" in low and low not in CAUSAL_NAMES):
            return replace(self, mask=name, mask_required=required)
        if low in CAUSAL_NAMES:
            return replace(self, causal=name)
        if low in HEADS_NAMES:
            return replace(self, heads=name)
        if low in _FACTS:
            return replace(self, settings={**self.settings, name: True})
        if required and low in _WIDTH:
            return replace(self, width=name)
        if required and "scale" in low:
            return replace(self, scale=name)
        if required and (low in _NO_DROPOUT or low == "training"):
            return replace(self, settings={**self.settings, name: 0.0 if low in _NO_DROPOUT else False})
        if required and fourth:
            return replace(self, mask=name, mask_required=True)
        if required:
            raise CheckError(f"what to give for its parameter {name!r} is not known: give it a default")
        return self


def _order(names: list[str]) -> tuple[str, ...]:
    """Some write (values, keys, queries): the names tell, where all three do."""
    letters = {"q": "query", "k": "key", "v": "value"}
    found = tuple(letters.get(name[0], "") for name in names)
    return found if set(found) == set(letters.values()) else ("query", "key", "value")


@dataclass(frozen=True, kw_only=True)
class Convention:
    """One way to call an attention function."""

    library: Library
    axes: int
    columns: bool = False
    sizes: Literal["any", "square", "equal"] = "any"
    """square: as many queries as keys; equal: values as wide as keys too."""
    heads: int = 1

    def __str__(self) -> str:
        words = ["batch"] * (self.axes > 2) + ["heads"] * (self.axes > 3)
        own = ["width", "tokens"] if self.columns else ["tokens", "width"]
        heads = f", {self.heads} heads inside the width" if self.heads > 1 else ""
        only = {"any": "", "square": ", as many queries as keys", "equal": ", all of one size"}[self.sizes]
        return f"{self.library}, ({' '.join(words + own)}){heads}{only}"

    def give(self, x: Tensor) -> Tensor:
        """(batch heads tokens width) as the function wants it."""
        x = x.mT if self.columns else x
        return (x[0, 0] if self.axes == 2 else x[:, 0] if self.axes == 3 else x).contiguous()

    def take(self, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """A result in (batch heads tokens width) and float64; None where its shape is another."""
        if x.ndim != self.axes:
            return None
        x = x.mT if self.columns else x
        x = x[None, None] if self.axes == 2 else x[:, None] if self.axes == 3 else x
        return x.double() if tuple(x.shape) == shape else None


def conventions(torch_first: bool, heads: int) -> Iterator[Convention]:
    """All, the likelier first."""
    libraries: tuple[Library, ...] = ("torch", "numpy") if torch_first else ("numpy", "torch")
    for library in libraries:
        for sizes in ("any", "square", "equal"):
            for axes in (3, 2, 4) if heads == 1 else (3, 2):
                for columns in (False, True):
                    yield Convention(library=library, axes=axes, columns=columns, sizes=sizes, heads=heads)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Query, key and value: (batch heads tokens width), float64."""

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int = 1
    """Above 1 the width of all heads is in the last axis, and the function splits it."""

    @classmethod
    def draw(
        cls, convention: Convention, *, seed: int = 0, width: int = 4, like: torch.dtype = torch.float32
    ) -> "Problem":
        """Normal numbers, rounded to what the function will see."""
        random = torch.Generator().manual_seed(seed)
        queries, keys, value_width = 5, 7, width + 2
        if convention.sizes != "any":
            keys = queries
        if convention.sizes == "equal":
            value_width = width
        batch, outer = 2 if convention.axes > 2 else 1, 3 if convention.axes > 3 else 1

        def normal(tokens: int, width: int) -> Tensor:
            shape = (batch, outer, tokens, width * convention.heads)
            return torch.randn(shape, generator=random, dtype=torch.float64).to(like).double()

        query, key, value = normal(queries, width), normal(keys, width), normal(keys, value_width)
        return cls(query=query, key=key, value=value, heads=convention.heads)

    @property
    def sizes(self) -> Sizes:
        width, whole = self.query.shape[-1] // self.heads, self.query.shape[-1]
        queries, keys, value_width = self.query.shape[-2], self.key.shape[-2], self.value.shape[-1] // self.heads
        return Sizes(width=width, whole=whole, queries=queries, keys=keys, value_width=value_width)

    def result(self, steps: Steps, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output, in the axes of the value, and weights (batch heads queries keys) by these steps."""
        if self.heads == 1:
            return attend(self.query, self.key, self.value, allowed, steps)
        query, key, value = (steps.split(x[:, 0], self.heads) for x in (self.query, self.key, self.value))
        output, weights = attend(query, key, value, allowed, steps, whole=self.query.shape[-1])
        return steps.join(output)[:, None], weights


MaskShape = Literal["queries keys", "whole", "keys queries", "keys"]
MaskKind = Literal["bool", "added", "number", "flag"]


@dataclass(frozen=True, kw_only=True)
class MaskForm:
    """How a function wants its mask."""

    kind: MaskKind
    shape: MaskShape

    def __str__(self) -> str:
        kinds = {
            "bool": "True = may attend",
            "added": "a mask that is added to the scores, 0 or -inf",
            "number": "1 = may attend, as a number",
            "flag": "mask=True is causal",
        }
        return kinds[self.kind]

    def give(self, allowed: Tensor, convention: Convention, batch: int, hide: bool) -> Tensor:
        mask = ~allowed if hide else allowed
        if self.kind == "added":
            mask = torch.zeros(allowed.shape, dtype=torch.float32).masked_fill(~allowed, -torch.inf)
        elif self.kind == "number":
            mask = mask.float()
        if self.shape == "keys queries":
            return mask.mT.contiguous()
        if self.shape == "keys":
            return mask[0]
        if self.shape == "whole" and convention.axes > 2:
            four = convention.axes == 4 or convention.heads > 1
            return mask.expand(*((batch, 1) if four else (batch,)), *mask.shape).contiguous()
        return mask


def mask_forms(convention: Convention) -> list[MaskForm]:
    """All, the likelier first."""
    kinds: tuple[MaskKind, ...] = ("bool", "added", "number")
    shapes: tuple[MaskShape, ...] = (
        "queries keys",
        "whole",
        *(("keys queries",) if convention.columns else ()),
        "keys",
    )
    return [
        *(MaskForm(kind=kind, shape=shape) for kind in kinds for shape in shapes),
        MaskForm(kind="flag", shape="whole"),
    ]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call gave."""

    output: Tensor | None
    """None where the shape is another than expected."""
    weights: Tensor | None
    shapes: list[tuple[int, ...]]
    swapped: bool
    dtype: torch.dtype
    changed: list[str]
    gradients: dict[str, Tensor] | None = None
    differentiable: bool = False


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Calls the function in its convention."""

    subject: Subject
    signature: Signature
    convention: Convention
    form: MaskForm | None = None
    hide: bool = False
    """Whether its True means hide."""

    def __call__(
        self,
        problem: Problem,
        allowed: Tensor | None = None,
        *,
        doing: str,
        causal: bool = False,
        dtype: torch.dtype | None = None,
        cotangent: Tensor | None = None,
    ) -> Answer:
        """Raises: CheckError, Raised."""
        if dtype is None:
            dtype = torch.float32 if self.convention.library == "torch" else torch.float64
        tensors, arguments, named = self.arguments(problem, allowed, causal, dtype)
        if cotangent is not None:
            tensors["cotangent"] = self.convention.give(cotangent).to(dtype)
        told, found = self.subject.ask(
            "call",
            doing,
            tensors,
            arguments=arguments,
            named=named,
            library=self.convention.library,
            gradients=cotangent is not None,
        )
        return self._read(problem, told, found)

    def arguments(
        self, problem: Problem, allowed: Tensor | None, causal: bool, dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], list[Any], dict[str, Any]]:
        """The tensors of a call, its positional arguments and its named ones."""
        given = {"query": problem.query, "key": problem.key, "value": problem.value}
        tensors = {name: self.convention.give(x).to(dtype) for name, x in given.items()}
        signature, named = self.signature, {}
        if allowed is None and signature.mask_required:
            allowed = torch.ones(problem.sizes.queries, problem.sizes.keys, dtype=torch.bool)
        if allowed is not None:
            assert signature.mask is not None
            form = self.form or MaskForm(kind="bool", shape="queries keys")
            if form.kind == "flag":
                named[signature.mask] = ["value", not allowed.all().item()]
            else:
                tensors["mask"] = form.give(allowed, self.convention, len(problem.query), self.hide)
                named[signature.mask] = ["tensor", "mask"]
        if signature.causal is not None:
            named[signature.causal] = ["value", causal]
        if signature.heads is not None:
            named[signature.heads] = ["value", self.convention.heads]
        if signature.width is not None:
            named[signature.width] = ["value", problem.sizes.width]
        if signature.scale is not None:
            named[signature.scale] = ["value", problem.sizes.width**-0.5]
        named |= {name: ["value", value] for name, value in signature.settings.items()}
        return tensors, [["tensor", role] for role in signature.order], named

    def _read(self, problem: Problem, told: dict[str, Any], found: dict[str, Tensor]) -> Answer:
        results = [found[f"result.{i}"] for i in range(told["results"])]
        shape = (*problem.query.shape[:-1], problem.value.shape[-1])
        taken = [self.convention.take(result, shape) for result in results]
        place = next((i for i, one in enumerate(taken) if one is not None), 0)
        others = [result for i, result in enumerate(results) if i != place]
        gradients = {n.removeprefix("gradient."): g for n, g in found.items() if n.startswith("gradient.")}
        return Answer(
            output=taken[place] if taken else None,
            weights=self._weights(problem, others[0]) if others else None,
            shapes=[tuple(result.shape) for result in results],
            swapped=place > 0,
            dtype=results[place].dtype if results else torch.float32,
            changed=told["changed"],
            gradients=gradients or None,
            differentiable=told.get("differentiable", False),
        )

    def _weights(self, problem: Problem, given: Tensor) -> Tensor | None:
        """(batch heads queries keys), where that is what it can be."""
        sizes = problem.sizes
        if self.convention.columns and tuple(given.shape[-2:]) == (sizes.keys, sizes.queries):
            given = given.mT
        batch, outer = problem.query.shape[:2]
        shape = (batch, outer * problem.heads, sizes.queries, sizes.keys)
        whole = torch.Size(shape).numel() == given.numel() and tuple(given.shape[-2:]) == shape[-2:]
        return given.double().reshape(shape) if whole else None
