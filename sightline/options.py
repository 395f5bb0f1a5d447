"""What the command line's parser reads in place of a config: the same fields and help, checked by the command."""

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from sightline.beams import DecodeConfig
from sightline.checking.checks import CheckConfig
from sightline.generation import SampleConfig
from sightline.models import DecoderConfig
from sightline.schedule import TrainConfig

BY_RECIPE = "recipe"
"""The value of an option that was not given: the recipe fills it in. None is a value of its own in some."""


def _changes(config: type, *, without: str = "") -> type:
    """A dataclass with the fields of `config`, each left to the recipe unless given, and the same help."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {
        field.target.id: doc.value.value
        for field, doc in pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
    }
    fields = [
        (field.name, Annotated[field.type | Literal["recipe"], arg(help=docs[field.name])], BY_RECIPE)  # pyright: ignore
        for field in dataclasses.fields(config)
        if field.name != without
    ]
    return dataclasses.make_dataclass("Shape", fields, frozen=True, kw_only=True)


Shape: Any = _changes(DecoderConfig, without="vocabulary")
Training: Any = _changes(TrainConfig)


# The parser would draw a box around what a config says of a bad number; so the command checks, not the parser.
@dataclass(frozen=True, kw_only=True)
class Decoding(DecodeConfig):
    """How a target is searched for, and when to stop."""

    def __post_init__(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Sampling(SampleConfig):
    """How the next token is drawn, and when to stop."""

    def __post_init__(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Checking(CheckConfig):
    """What is expected of the code, and how much time and memory it gets."""

    def __post_init__(self) -> None: ...


def _layers(values: list[str]) -> tuple[int, ...] | None:
    numbers = [number for value in values for number in value.split(",")]
    if numbers == ["None"]:
        return None
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"not whole numbers: {' '.join(values)!r}")
    return tuple(map(int, numbers))


Layers = Annotated[
    tuple[int, ...] | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT,INT|None",
        instance_from_str=_layers,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["None"] if value is None else [",".join(map(str, value))],
    ),
]
"""Numbers of layers: 0,2 as the heads of --heads stand, or 0 2."""


def given(options: Any) -> dict[str, Any]:
    """The options that were given, by name."""
    return {name: value for name, value in vars(options).items() if value != BY_RECIPE}
