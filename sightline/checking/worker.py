"""The process in which a learner's code runs: it answers questions about one function and knows none of the laws.

A question and its answer are a JSON object and tensors. What the code prints goes to standard error, and what it
raises is an answer like any other.
"""

import ast
import copy
import faulthandler
import importlib.util
import inspect
import json
import os
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIZE = struct.Struct("<Q")
_LARGEST = 10_000_000
"""Numbers that a result may have."""

Answer = tuple[dict[str, Any], dict[str, Tensor]]


def send(stream: IO[bytes], content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One message: JSON, then safetensors, each behind its length."""
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    for part in (json.dumps(content).encode(), safetensors.torch.save(whole)):
        stream.write(_SIZE.pack(len(part)))
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes], limit: int) -> Answer | None:
    """The next message; None where the stream ends, or where a part is longer than `limit` bytes."""
    parts = []
    for _ in range(2):
        head = stream.read(_SIZE.size)
        if len(head) < _SIZE.size or _SIZE.unpack(head)[0] > limit:
            return None
        (size,) = _SIZE.unpack(head)
        parts.append(stream.read(size))
        if len(parts[-1]) < size:
            return None
    return json.loads(parts[0]), safetensors.torch.load(parts[1])


def main() -> None:
    """Answer until nobody asks any more."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    worker = Worker()
    send(answers, {"ready": True}, {})
    while (question := receive(questions, 1 << 40)) is not None:
        content, tensors = question
        faulthandler.dump_traceback_later(content.pop("seconds"), exit=True)
        try:
            answer: Answer = getattr(worker, content.pop("do"))(tensors, **content)
        except BaseException as error:  # whatever a learner's code raises, SystemExit too, is told and judged elsewhere
            answer = {"raised": worker.tell(error)}, {}
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.flush()
        send(answers, *answer)


class Nothing(Exception):
    """It came back with None or `...`."""


class Worker:
    """One method a question."""

    def __init__(self) -> None:
        self._file = Path()
        self._subject: Any = None

    def tell(self, error: BaseException) -> dict[str, Any]:
        """What was raised, and the last line of the learner's file that it went through."""
        line = error.lineno if isinstance(error, SyntaxError) else None
        for frame in traceback.extract_tb(error.__traceback__):
            if Path(frame.filename) == self._file:
                line = frame.lineno
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        memory = isinstance(error, MemoryError) or "can't allocate memory" in message
        told = {"type": type(error).__name__, "message": message[:2000], "line": line, "memory": memory}
        return {**told, "nothing": isinstance(error, Nothing)}

    def open(self, _: dict[str, Tensor], file: str, name: str | None, memory: int | None) -> Answer:
        """Import the file and find what is to be checked; without a name, its only public function or class."""
        self._file = Path(file)
        limited = memory is None or _limit_memory(memory)
        sys.path.insert(0, str(self._file.parent))
        # A name that no library has: the file may be called torch.py.
        spec = importlib.util.spec_from_file_location(f"checked_{self._file.stem}", self._file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        there = _defined(module)
        found = name if name is not None else there[0] if len(there) == 1 else None
        if found is None or not hasattr(module, found):
            return {"missing": True, "there": there}, {}
        self._subject = getattr(module, found)
        return {"name": found, "limited": limited, **_described(self._subject, vars(module))}, {}

    def take(self, _: dict[str, Tensor], subject: Any) -> Answer:
        """Check what this process holds already; of an object a copy, whose parameters may be drawn anew."""
        methods = (getattr(subject, name, None) for name in ("forward", "__call__", "__init__"))
        codes = (getattr(one, "__code__", None) for one in (subject, *methods))
        self._file = next((Path(code.co_filename) for code in codes if code), Path())
        self._subject = copy.deepcopy(subject) if _is_object(subject) else subject
        home = sys.modules.get(getattr(subject, "__module__", None) or "")
        around = getattr(subject, "__globals__", None) or (vars(home) if home else {})
        name = getattr(subject, "__name__", type(subject).__name__)
        return {"name": name, "limited": True, **_described(self._subject, around)}, {}

    def build(self, _: dict[str, Tensor], options: dict[str, Any]) -> Answer:
        """Make the object of a class, or what a function without arguments gives."""
        if isinstance(self._subject, type) or options or not _is_object(self._subject):
            self._subject = self._subject(**options)
        if isinstance(self._subject, nn.Module):
            self._subject.eval()
        forward = self._subject.forward if isinstance(self._subject, nn.Module) else self._subject
        numbers = {name: value for name, value in vars(self._subject).items() if isinstance(value, int)}
        kind = {"multihead": isinstance(self._subject, nn.MultiheadAttention), "torch": self._in_torch()}
        weights = {name: parameter.detach() for name, parameter in self._weights().items()}
        return {"parameters": _parameters(forward), "numbers": numbers, **kind}, weights

    def draw(self, tensors: dict[str, Tensor]) -> Answer:
        """Give the object's parameters other values."""
        with torch.no_grad():
            for name, parameter in self._weights().items():
                parameter.copy_(tensors[name])
        return {}, {}

    def call(
        self,
        tensors: dict[str, Tensor],
        arguments: list[Any],
        named: dict[str, Any],
        library: str,
        gradients: bool = False,
        bfloat16: bool = False,
    ) -> Answer:
        """Call it. An argument is ["tensor", name] or ["value", anything]; numpy's results come back as tensors.

        `bfloat16`: a copy of a module in it.
        """
        subject = _lowered(self._subject) if bfloat16 else self._subject
        result, given, parameters = self._run(subject, tensors, arguments, named, library, gradients)
        if result is None or result is ...:
            raise Nothing
        results = _results(result)
        answer = {f"result.{i}": tensor for i, tensor in enumerate(results)}
        changed = [name for name, one in given.items() if not _equal(torch.as_tensor(one), tensors[name])]
        told: dict[str, Any] = {"results": len(results), "changed": changed}
        if gradients:
            told["differentiable"] = results[0].requires_grad
            if results[0].requires_grad:
                leaves = {**{n: t for n, t in given.items() if t.requires_grad}, **parameters}
                found = torch.autograd.grad(results[0], list(leaves.values()), tensors["cotangent"], allow_unused=True)
                for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
                    answer[f"gradient.{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
        return told, answer

    def _run(
        self,
        subject: Any,
        tensors: dict[str, Tensor],
        arguments: list[Any],
        named: dict[str, Any],
        library: str,
        gradients: bool,
    ) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
        wanted = [spec[1] for spec in (*arguments, *named.values()) if spec[0] == "tensor"]
        given: dict[str, Any] = {name: tensors[name].clone() for name in wanted}
        parameters = self._weights() if gradients else {}
        if gradients:
            for tensor in given.values():
                tensor.requires_grad_(tensor.dtype.is_floating_point)
        elif library == "numpy":
            given = {name: tensor.numpy() for name, tensor in given.items()}

        def value(spec: list[Any]) -> Any:
            return given[spec[1]] if spec[0] == "tensor" else spec[1]

        with torch.set_grad_enabled(gradients):
            result = subject(*map(value, arguments), **{name: value(spec) for name, spec in named.items()})
        return result, given, {name: weight for name, weight in parameters.items() if weight.requires_grad}

    def _weights(self) -> dict[str, Any]:
        """The parameters: of a module its own, of another object the float arrays among its attributes."""
        if isinstance(self._subject, nn.Module):
            return dict(self._subject.named_parameters())
        if not _is_object(self._subject):
            return {}
        found = {name: value for name, value in vars(self._subject).items() if _is_array(value)}
        # An array of numpy shares its memory with the tensor, so that `draw` reaches it.
        return {name: torch.as_tensor(value) for name, value in found.items()}

    def _in_torch(self) -> bool:
        if isinstance(self._subject, nn.Module):
            return True
        return any(isinstance(value, Tensor) for value in vars(self._subject).values())

    def time(
        self,
        tensors: dict[str, Tensor],
        arguments: list[Any],
        named: dict[str, Any],
        library: str,
        causal: bool,
        within: float,
    ) -> Answer:
        """Median seconds and peak bytes above the inputs, theirs and those of PyTorch's own, in turn.

        At most five rounds, and no further one after `within` seconds.
        """
        query, key, value = (tensors[f"reference.{name}"] for name in ("query", "key", "value"))
        sides: dict[str, Callable[[], object]] = {
            "theirs": lambda: self._run(self._subject, tensors, arguments, named, library, False)[0],
            "reference": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal),
        }
        begin = time.perf_counter()
        told: dict[str, Any] = {f"{name}_bytes": _peak_bytes(run) for name, run in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        while len(seconds["theirs"]) < 1 or (len(seconds["theirs"]) < 5 and time.perf_counter() - begin < within):
            for name, run in sides.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        return {**told, **{f"{name}_seconds": float(np.median(times)) for name, times in seconds.items()}}, {}


def _limit_memory(limit: int) -> bool:
    """Let this process take `limit` bytes more than it has; False where the system knows no such limit."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        return False
    most = pages * resource.getpagesize() + limit
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return True


def _peak_bytes(run: Callable[[], object]) -> int | None:
    """The most memory that a call held above what was held before; None where the system does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    run()  # what the first call loads is none of its tensors
    if not status.exists() or not os.access(clear, os.W_OK):
        return None
    clear.write_text("5", encoding="ascii")  # the peak is counted anew

    def held(word: str) -> int:
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(word))

    before = held("VmRSS:")
    run()
    return max(0, held("VmHWM:") - before)


def _defined(module: Any) -> list[str]:
    """What the file itself defines, in its order, without names that start with an underscore."""
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    }
    return list(own)


def _described(subject: Any, around: dict[str, Any]) -> dict[str, Any]:
    """What it is; `around`: the names that its code knows."""
    used = _libraries(around.values())
    code = getattr(subject, "__code__", None)
    own = _libraries(around.get(name) for name in code.co_names) if code else set()
    uses = "torch" in own or ("torch" in used and "numpy" not in own)
    is_object = _is_object(subject)
    return {
        "callable": callable(subject),
        "class": isinstance(subject, type),
        "object": is_object,
        "torch": uses,
        "parameters": _parameters(subject) if callable(subject) and not is_object else [],
    }


def _libraries(values: Iterable[Any]) -> set[str]:
    """The packages that some values are, or come from."""
    homes = ((getattr(value, "__name__", ""), getattr(value, "__module__", "")) for value in values)
    return {str(home).split(".")[0] for both in homes for home in both}


def _is_object(subject: Any) -> bool:
    """Neither a class nor a function: something that holds state."""
    return not isinstance(subject, type) and hasattr(subject, "__dict__") and not inspect.isroutine(subject)


def _lowered(subject: Any) -> Any:
    """A module, or another object that holds tensors, in bfloat16."""
    lowered = copy.deepcopy(subject)
    if isinstance(lowered, nn.Module):
        return lowered.bfloat16()
    for name, value in vars(lowered).items():
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            setattr(lowered, name, value.bfloat16())
    return lowered


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "f"
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _parameters(function: Any) -> list[dict[str, Any]]:
    try:
        signature = inspect.signature(function)
    except ValueError:
        signature = _of_docstring(function)
    return [
        {
            "name": parameter.name,
            "required": parameter.default is parameter.empty,
            "named": parameter.kind is not parameter.POSITIONAL_ONLY,
        }
        for parameter in signature.parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _of_docstring(function: Any) -> inspect.Signature:
    """A function written in C has no signature to inspect, but its docstring starts with it."""
    written = (function.__doc__ or "").partition("(")[2]
    inside = written.partition(") ->")[0].replace("*,", "")
    try:
        arguments = ast.parse(f"def f({inside}): pass").body[0].args  # type: ignore[attr-defined] (it is a def)
    except SyntaxError:
        return inspect.Signature([_parameter(name, None) for name in ("query", "key", "value")])
    plain = arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    found = [_parameter(one.arg, default) for one, default in zip(plain, defaults, strict=True)]
    return inspect.Signature(found)


def _parameter(name: str, default: object) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=empty if default is None else default
    )


def _results(result: Any) -> list[Tensor]:
    """What came back as tensors: a tuple's members each, a list as one array where it is one."""
    if isinstance(result, tuple):
        return [_tensor(one) for one in result if one is not None]
    return [_tensor(result)]


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.is_complex() or value.numel() > _LARGEST:
            raise TypeError(f"returned {value.numel()} numbers of {value.dtype}, expected a few real ones")
        return value
    if isinstance(value, list) and value and all(isinstance(one, Tensor) for one in _flat(value)):
        return torch.stack([_tensor(one) for one in value])
    array = np.asarray(value) if isinstance(value, (list, float, int, np.ndarray, np.generic)) else None
    if array is None or array.dtype.kind not in "fiub":
        raise TypeError(f"returned {type(value).__name__}, expected an array or a tuple of arrays")
    return _tensor(torch.from_numpy(np.ascontiguousarray(array)))


def _flat(values: list[Any]) -> Iterable[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else (value,)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().nan_to_num(), other.nan_to_num())
