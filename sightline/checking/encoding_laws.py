"""The laws of the sinusoidal positional encoding: a function of (length, d_model), or what adds it to embeddings."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.checking.definitions import EncodingSteps, encoding
from sightline.checking.encoding_mistakes import ENCODINGS
from sightline.checking.findings import Example, Finding, hold, number, rows
from sightline.checking.mistakes import TOLERANCE, difference, explain
from sightline.checking.subject import CheckError, Nothing, Raised, Subject

LENGTHS = (
    "length",
    "seq_len",
    "seq_length",
    "sequence_length",
    "max_len",
    "maxlen",
    "max_length",
    "max_seq_len",
    "num_positions",
    "n_positions",
    "positions",
    "tokens",
    "context",
    "context_length",
    "block_size",
    "n",
    "t",
    "l",
)
WIDTHS = (
    "d_model",
    "dmodel",
    "d",
    "dim",
    "d_embed",
    "embed_dim",
    "emb_dim",
    "embedding_dim",
    "n_embd",
    "width",
    "depth",
)
LENGTH = 20
"""Positions of the first table."""
_WIDTHS = (12, 16, 32, 64, 128, 256, 512)
"""Tried where nothing tells the width of what is already built."""


@dataclass(kw_only=True)
class Table:
    """How somebody's encoding is asked for a table."""

    subject: Subject
    arguments: tuple[str, ...]
    """length and d_model in their order, or x where it is added to embeddings."""
    library: str
    width: int
    """The d_model of the first table, and of every one where it adds to embeddings."""
    columns: bool = False
    tokens_first: bool = False

    @property
    def adds(self) -> bool:
        return self.arguments == ("x",)

    def __str__(self) -> str:
        words = "tokens batch" if self.tokens_first else "batch tokens"
        what = f"({words} d_model) plus its encoding" if self.adds else f"({', '.join(self.arguments)})"
        return f"{self.library}, {what}" if self.adds else f"{what}{', d_model in rows' if self.columns else ''}"

    def __call__(self, length: int, d_model: int, *, doing: str, x: Tensor | None = None) -> Tensor:
        """The result as it came, without axes of size 1 before, turned where d_model is in rows. Raises: CheckError."""
        tensors: dict[str, Tensor] = {}
        arguments: list[list[Any]] = [["value", {"length": length, "d_model": d_model}.get(a)] for a in self.arguments]
        if self.adds:
            dtype = torch.float32 if self.library == "torch" else torch.float64
            whole = torch.zeros(2, length, d_model) if x is None else x
            tensors["x"] = (whole.transpose(0, 1).contiguous() if self.tokens_first else whole).to(dtype)
            arguments = [["tensor", "x"]]
        _, found = self.subject.ask("call", doing, tensors, arguments=arguments, named={}, library=self.library)
        result = found["result.0"].double()
        if not self.adds:
            while result.ndim > 2 and 1 in result.shape:
                result = result.squeeze(list(result.shape).index(1))
        if self.tokens_first and result.ndim == 3:
            return result.transpose(0, 1)
        return result.mT if self.columns else result


def examine(subject: Subject, d_model: int | None) -> tuple[Table, list[Finding], Example | None]:
    """Find out how it is asked, then try every law. Raises: CheckError where it cannot be called."""
    table, first = _discover(subject, (d_model,) if d_model else _WIDTHS)
    width = table.width
    shape = (2, LENGTH, width) if table.adds else (LENGTH, width)
    if tuple(first.shape) != shape:
        said = f"expected {shape} for length {LENGTH} and d_model {width}, got {tuple(first.shape)}"
        return table, [Finding(law="shape", status="fail", said=said)], None
    findings = [Finding(law="shape", status="ok", said=str(shape))]
    own = first[0] if table.adds else first
    wanted = encoding(LENGTH, width, EncodingSteps())
    mistakes = explain(own, lambda steps: encoding(LENGTH, width, steps), EncodingSteps(), ENCODINGS)
    error = difference(own, wanted)
    if mistakes == ():
        findings.append(Finding(law="the definition", status="ok", said=f"largest difference {number(error)}"))
        findings += hold(table, LAWS)
        return table, findings, None
    said = f"largest difference {number(error)} in {LENGTH} positions of d_model {width}"
    findings.append(Finding(law="the definition", status="fail", said=said, mistakes=tuple(mistakes or ())))
    example = Example(
        said=f"positions 0 to 2, columns 0 to 3 of d_model {width}",
        inputs={},
        expected=rows(wanted[:3, :4]),
        yours=rows(own[:3, :4]),
    )
    return table, findings, example


def _discover(subject: Subject, widths: tuple[int, ...]) -> tuple[Table, Tensor]:
    names = [one["name"].lower() for one in subject.told["parameters"]]
    required = [one["name"].lower() for one in subject.told["parameters"] if one["required"]]
    orders: list[tuple[str, ...]]
    if len(required) <= 1 and not (names and names[0] in LENGTHS):
        orders = [("x",)]
    elif names[0] in WIDTHS or (len(names) > 1 and names[1] in LENGTHS):
        orders = [("d_model", "length")]
    else:
        orders = [("length", "d_model"), ("d_model", "length")]
    libraries = ("torch", "numpy") if subject.told["torch"] else ("numpy", "torch")
    refused: Raised | None = None
    found: list[tuple[Table, Tensor]] = []
    for order in orders:
        adds = order == ("x",)
        for first, library, width in itertools.product(
            (False, True) if adds else (False,), libraries if adds else libraries[:1], widths if adds else widths[:1]
        ):
            table = Table(subject=subject, arguments=order, library=library, width=width, tokens_first=first)
            try:
                result = table(LENGTH, width, doing="it was called")
            except Raised as error:
                refused = refused or error
                continue
            if adds and result.ndim == 3 and torch.equal(result[0, 0], result[0, 1]):
                continue  # every token of a sequence got the same: the axes are the other way round
            found.append((table, result))
    if not found:
        if isinstance(refused, Nothing):
            raise refused
        raise CheckError(
            f"{refused}; expected a function of (length, d_model), or of embeddings (batch tokens d_model)"
        )
    wanted = encoding(LENGTH, widths[0], EncodingSteps())
    for table, result in found:
        turned = result.mT if result.ndim >= 2 else result
        if not table.adds and tuple(turned.shape) == (LENGTH, widths[0]) and difference(turned, wanted) < 0.5:
            table.columns = True
            return table, turned
    return next(((t, r) for t, r in found if tuple(r.shape[-2:]) == (LENGTH, t.width)), found[0])


def _other_sizes(table: Table) -> Finding | None:
    law = "other sizes"
    sizes = ((7, table.width), (1, table.width)) if table.adds else ((7, 6), (33, 64), (1, 2))
    for length, d_model in sizes:
        result = table(length, d_model, doing=f"length was {length} and d_model {d_model}")
        result = result[0] if table.adds else result
        result = result.reshape(length, d_model) if result.numel() == length * d_model else result
        error = difference(result, encoding(length, d_model, EncodingSteps()))
        if error > TOLERANCE:
            said = f"length {length}, d_model {d_model}: largest difference {number(error)}"
            return Finding(law=law, status="fail", said=said)
    return Finding(law=law, status="ok", said=", ".join(f"{length} x {d_model}" for length, d_model in sizes))


def _odd(table: Table) -> Finding | None:
    if table.adds:
        return None
    law = "odd d_model"
    try:
        result = table(6, 5, doing="d_model was 5")
    except Raised as error:
        return Finding(law=law, status="note", said=str(error))
    error = difference(result, encoding(6, 5, EncodingSteps()))
    if error > TOLERANCE:
        return Finding(law=law, status="note", said=f"d_model 5 gives {tuple(result.shape)}, not its first 5 columns")
    return Finding(law=law, status="ok", said="ends with a sine")


def _far(table: Table) -> Finding | None:
    if table.adds:
        return None
    law = "far positions"
    length = 10_000
    error = difference(table(length, 8, doing=f"length was {length}"), encoding(length, 8, EncodingSteps()))
    if error > 1e-5:
        said = (
            f"error {number(error)} among {length:,} positions: float32 is too short for the angles, compute in float64"
        )
        return Finding(law=law, status="note", said=said)
    return Finding(law=law, status="ok", said=f"error {number(error)} among {length:,} positions")


def _added(table: Table) -> Finding | None:
    if not table.adds:
        return None
    law = "added"
    x = torch.randn(2, LENGTH, table.width, generator=torch.Generator().manual_seed(0))
    result = table(LENGTH, table.width, x=x, doing="embeddings were given")
    wanted = encoding(LENGTH, table.width, EncodingSteps())
    if difference(result, x.double() + wanted) <= TOLERANCE:
        return Finding(law=law, status="ok", said="to every sequence of the batch alike")
    if difference(result, table.width**0.5 * x.double() + wanted) <= TOLERANCE:
        return Finding(law=law, status="note", said="to embeddings times sqrt(d_model), which is part of the embedding")
    error = difference(result, x.double() + wanted)
    return Finding(law=law, status="fail", said=f"embeddings plus encoding: largest difference {number(error)}")


def _repeats(table: Table) -> Finding | None:
    law = "twice the same"
    one, other = (table(LENGTH, table.width, doing="it was called once more") for _ in range(2))
    if not torch.equal(one, other):
        return Finding(law=law, status="fail", said="the same call gave two results: is dropout on?")
    return Finding(law=law, status="ok", said="bit for bit")


LAWS: dict[str, Callable[[Table], Finding | None]] = {
    "other sizes": _other_sizes,
    "odd d_model": _odd,
    "far positions": _far,
    "added": _added,
    "twice the same": _repeats,
}
