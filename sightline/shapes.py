"""Axis words in a signature, checked when the function is called.

    def attention(query: Annotated[Tensor, "batch (heads) queries width"], ...)

One word is one size: every tensor of the call that names an axis must agree on it. An axis in
parentheses may be absent, from all tensors of the call together. Dtypes and values are not looked at.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeVar

from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


class ShapeError(ValueError):
    """A tensor does not have the axes that the signature names."""


class _Axes(NamedTuple):
    full: tuple[str, ...]
    short: tuple[str, ...]  # without the axes in parentheses


def shaped(function: Function) -> Function:
    """Raise ShapeError, before `function` runs, where its tensors and its annotations disagree.

    >>> import torch
    >>> @shaped
    ... def dot(left: Annotated[Tensor, "batch width"], right: Annotated[Tensor, "batch width"]) -> Tensor:
    ...     return (left * right).sum(-1)
    >>> dot(torch.ones(2, 3), torch.ones(2, 4))
    Traceback (most recent call last):
    ...
    sightline.shapes.ShapeError: dot: width is 4 in right but 3 before it
      left     (2, 3)             batch width
      right    (2, 4)             batch width
    """
    names = tuple(inspect.signature(function).parameters)
    hints = typing.get_type_hints(function, include_extras=True)
    plan = tuple((i, name, axes) for i, name in enumerate(names) if (axes := _axes(hints.get(name))))
    where = function.__name__

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        sizes: dict[str, int] = {}
        short: bool | None = None
        given = len(args)
        for index, name, axes in plan:
            tensor = args[index] if index < given else kwargs.get(name)
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
            shape = tensor.shape
            if short is None:
                short = len(shape) == len(axes.short)
            words = axes.short if short else axes.full
            if len(shape) != len(words):
                raise _error(f"{name} has {len(shape)} axes, not {len(words)}", where, plan, args, kwargs, short)
            for axis, size in zip(words, shape, strict=True):
                if size != sizes.setdefault(axis, size):
                    message = f"{axis} is {size} in {name} but {sizes[axis]} before it"
                    raise _error(message, where, plan, args, kwargs, short)
        return function(*args, **kwargs)

    return typing.cast(Function, checked)


def _axes(hint: Any) -> _Axes | None:
    for option in (hint, *typing.get_args(hint)):  # `Annotated[...] | None` has two
        if typing.get_origin(option) is Annotated:
            words = option.__metadata__[0].split()
            full = tuple(word.strip("()") for word in words)
            return _Axes(full, tuple(word for word in words if not word.startswith("(")))
    return None


def _error(
    problem: str,
    where: str,
    plan: tuple[tuple[int, str, _Axes], ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    short: bool,
) -> ShapeError:
    rows = [f"{where}: {problem}"]
    for index, name, axes in plan:
        tensor = args[index] if index < len(args) else kwargs.get(name)
        if isinstance(tensor, Tensor):
            words = " ".join(axes.short if short else axes.full)
            rows.append(f"  {name:<8} {tuple(tensor.shape)!s:<18} {words}")
    return ShapeError("\n".join(rows))
