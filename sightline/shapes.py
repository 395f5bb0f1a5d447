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

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


MOST_AGREED = 1024


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

    agreed: set[tuple[torch.Size | None, ...]] = set()  # shapes that were checked: a lookup costs a fifth of a check

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = len(args)
        tensors = [args[i] if i < given else kwargs.get(name) for i, name, _ in plan]
        if torch.compiler.is_compiling() or not all(t is None or isinstance(t, Tensor) for t in tensors):
            _check(where, plan, tensors)
            return function(*args, **kwargs)
        shapes = tuple([None if t is None else t.shape for t in tensors])
        if shapes not in agreed:
            _check(where, plan, tensors)
            if len(agreed) >= MOST_AGREED:
                agreed.clear()
            agreed.add(shapes)
        return function(*args, **kwargs)

    return typing.cast(Function, checked)


def _axes(hint: Any) -> _Axes | None:
    for option in (hint, *typing.get_args(hint)):  # `Annotated[...] | None` has two
        if typing.get_origin(option) is Annotated:
            words = option.__metadata__[0].split()
            full = tuple(word.strip("()") for word in words)
            return _Axes(full, tuple(word for word in words if not word.startswith("(")))
    return None


def _check(where: str, plan: tuple[tuple[int, str, _Axes], ...], tensors: list[Tensor | None]) -> None:
    sizes: dict[str, int] = {}
    short: bool | None = None
    for (_, name, axes), tensor in zip(plan, tensors, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {name} must be a tensor, got {type(tensor).__name__}")
        shape = tensor.shape
        if short is None:
            short = len(shape) == len(axes.short)
        words = axes.short if short else axes.full
        problem = ""
        if len(shape) != len(words):
            problem = f"{name} has {len(shape)} axes, not {len(words)}"
        else:
            for axis, size in zip(words, shape, strict=True):
                if size != sizes.setdefault(axis, size):
                    problem = f"{axis} is {size} in {name} but {sizes[axis]} before it"
                    break
        if problem:
            raise _error(f"{where}: {problem}", plan, tensors, short)


def _error(
    problem: str, plan: tuple[tuple[int, str, _Axes], ...], tensors: list[Tensor | None], short: bool
) -> ShapeError:
    rows = [problem]
    for (_, name, axes), tensor in zip(plan, tensors, strict=True):
        if isinstance(tensor, Tensor):
            words = " ".join(axes.short if short else axes.full)
            rows.append(f"  {name:<8} {tuple(tensor.shape)!s:<18} {words}")
    return ShapeError("\n".join(rows))
