"""`check()`: somebody's attention, positional encoding or module, held against the laws in a process of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sightline.checking import attention_laws, encoding_laws, module_laws
from sightline.checking.attention_laws import Case
from sightline.checking.conventions import CAUSAL_NAMES, HEADS_NAMES, Problem
from sightline.checking.findings import Example, Finding, Report
from sightline.checking.subject import CheckError, Here, Raised, Subject

Kind = Literal["attention", "encoding", "module"]
SPEED_LENGTHS = (512, 1024, 2048)
D_MODEL, NUM_HEADS = 12, 3

_OPTIONS = {
    **dict.fromkeys(("embed_size", "embedding_size", "emb_size", "model_dim", "d", "c", "channels", "units"), D_MODEL),
    **dict.fromkeys(
        ("d_in", "d_input", "input_dim", "in_dim", "in_features", "hidden_size", "size", "hidden_dim"), D_MODEL
    ),
    **dict.fromkeys(("d_out", "output_dim", "out_dim", "out_features"), D_MODEL),
    **dict.fromkeys(
        ("d_k", "d_q", "dk", "dq", "d_key", "d_query", "key_dim", "qk_dim", "d_v", "dv", "d_value", "value_dim"), 6
    ),
    **dict.fromkeys(("head_dim", "head_size", "d_head"), D_MODEL // NUM_HEADS),
    **dict.fromkeys(("dropout", "dropout_p", "p", "attn_dropout"), 0.0),
    **dict.fromkeys(("bias", "qkv_bias"), True),
}


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is expected of the code, and how much time and memory it gets."""

    kind: Kind | None = None
    """What it is. None: told from its parameters."""
    scale: float | None = None
    """What multiplies the scores. None: 1/sqrt(width)."""
    causal: bool | None = None
    """Whether it hides the future without being asked. None: either is right, unless its name says causal."""
    mask_means: Literal["attend", "hide"] = "attend"
    """What True says in its mask."""
    speed: bool = False
    """Measure time and memory beside PyTorch's own, too."""
    seconds: float = 20.0
    """Time for all calls of the code together."""
    memory_gb: float = 4.0
    """Memory that the code may take."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.memory_gb <= 0:
            raise ValueError(f"expected seconds and memory_gb above 0, got {self.seconds:g} and {self.memory_gb:g}")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"expected a scale above 0, got {self.scale:g}; leave it out for 1/sqrt(width)")


def check(target: str | Path | Callable[..., Any], config: CheckConfig | None = None) -> Report:
    r"""Hold a function, class or object against the laws, and tell what is wrong, in words.

    An attention takes (query, key, value[, mask]) and gives the output or (output, weights); an encoding takes
    (length, d_model), or embeddings that it adds itself to; a module has maps to query, key and value. With torch or
    numpy, batched or not, tokens in rows or in columns: the convention is found out.

    What is given as itself, as in a notebook, runs here, an object as a copy: Ctrl-C ends it. What FILE.py:NAME names
    runs in a process of its own with limits of time and memory; that protects from accidents, not from malice.

    Raises: CheckError, a ValueError, where it cannot be run: no such file or name, an exception, a crash, an endless
    loop. ValueError for limits of what runs here.

    >>> def mine(query, key, value):
    ...     return torch.softmax(query @ key.mT, -1) @ value
    >>> print(check(mine).mistakes[0].what)
    the scores are not divided by sqrt(width)
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "mine.py")
    ...     _ = file.write_text("import torch\ndef mine(q, k, v):\n    return torch.softmax(q @ k.mT, -1) @ v\n")
    ...     report = check(f"{file}:mine")
    >>> report.passed, report.mistakes[0].what
    (False, 'the scores are not divided by sqrt(width)')
    """
    config = CheckConfig() if config is None else config
    if not isinstance(target, (str, Path)):
        usual = CheckConfig()
        if (config.seconds, config.memory_gb) != (usual.seconds, usual.memory_gb):
            raise ValueError(
                "seconds and memory_gb limit code in a file, FILE.py:NAME; what is here runs without: drop them"
            )
        with Here(target) as subject:
            return examine(subject, config)
    file, name = _parsed(str(target))
    with Subject(file, name, seconds=config.seconds, memory=int(config.memory_gb * 1e9)) as subject:
        return examine(subject, config)


def examine(subject: Subject, config: CheckConfig) -> Report:
    """`check()` of a subject that is open."""
    options, numbers, weights = _made(subject)
    kind = config.kind or _kind(subject, bool(weights))
    _refuse(config, kind)
    convention, findings, example = _EXAMINED[kind](subject, config, {**numbers, **options}, weights)
    notes = () if subject.told["limited"] else ("this system knows no limit of memory: only time was limited",)
    return Report(
        subject=subject.label,
        convention=convention,
        findings=tuple(findings),
        example=example,
        printed=subject.printed,
        notes=notes,
    )


def _refuse(config: CheckConfig, kind: Kind) -> None:
    """A setting without effect is a mistake."""
    if config.speed and kind != "attention":
        raise ValueError(f"speed is measured of attention functions, and this is checked as {kind}: drop it")
    if kind == "encoding" and (config.scale, config.causal, config.mask_means) != (None, None, "attend"):
        raise ValueError("a positional encoding has neither scale nor causality nor mask: drop what was said of them")


_Examined = tuple[str, list[Finding], Example | None]
_Weights = dict[str, torch.Tensor]


def _attention(subject: Subject, config: CheckConfig, known: dict[str, Any], weights: _Weights) -> _Examined:
    hide = config.mask_means == "hide"
    case, findings = attention_laws.examine(subject, scale=config.scale, hide=hide, expect_causal=config.causal)
    if config.speed:
        findings += _speed(case, config.seconds)
    return str(case.caller.convention), findings, case.example


def _encoding(subject: Subject, config: CheckConfig, known: dict[str, Any], weights: _Weights) -> _Examined:
    table, findings, example = encoding_laws.examine(subject, _first(known, encoding_laws.WIDTHS))
    return str(table), findings, example


def _module(subject: Subject, config: CheckConfig, known: dict[str, Any], weights: _Weights) -> _Examined:
    if not weights:
        raise CheckError(f"{subject.name} has no parameters; expected a module with maps to query, key and value")
    module, findings, example = module_laws.examine(
        subject,
        weights,
        d_model=_first(known, (*encoding_laws.WIDTHS, "d_in", "d_input", "input_dim", "embed_size", "embedding_size")),
        heads=_first(known, HEADS_NAMES),
        scale=config.scale,
        hide=config.mask_means == "hide",
        expect_causal=config.causal,
    )
    return str(module), findings, example


_EXAMINED: dict[Kind, Callable[..., _Examined]] = {"attention": _attention, "encoding": _encoding, "module": _module}


def _first(known: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((known[name] for name in known if name.lower() in names), None)


def _parsed(target: str) -> tuple[Path, str | None]:
    """FILE.py:NAME; a colon may stand in a path too."""
    file, colon, name = target.rpartition(":")
    if colon and file.endswith(".py"):
        return Path(file), name or None
    return Path(target), None


def _made(subject: Subject) -> tuple[dict[str, Any], dict[str, int], _Weights]:
    """A class is built, a function without arguments called: the options, its numbers, its parameters."""
    told, options = subject.told, {}
    if told["class"]:
        options = {one["name"]: value for one in told["parameters"] if (value := _option(one)) is not None}
        unknown = [one["name"] for one in told["parameters"] if one["required"] and one["name"] not in options]
        if unknown:
            raise CheckError(
                f"what to give {subject.name} for {', '.join(unknown)} is not known: give it a default, or name a "
                "function without arguments that builds it"
            )
    elif not told["object"] and told["parameters"]:
        return {}, {}, {}
    made, weights = subject.ask("build", "it was built", options=options)
    # Parameters tell what it computes with; without any, what its file imports does.
    library = made["torch"] if weights else made["torch"] or told["torch"]
    subject.told = {**told, "parameters": made["parameters"], "torch": library, "multihead": made["multihead"]}
    return options, made["numbers"], weights


def _option(parameter: dict[str, Any]) -> Any:
    """What a constructor gets: sizes where they are required, and no dropout."""
    name = parameter["name"].lower()
    if "dropout" in name:
        return 0.0
    if not parameter["required"]:
        return None
    if name in encoding_laws.LENGTHS:
        return 64
    if name in HEADS_NAMES:
        return NUM_HEADS
    if name in CAUSAL_NAMES:
        return False
    if name in encoding_laws.WIDTHS:
        return D_MODEL
    return _OPTIONS.get(name)


def _kind(subject: Subject, weights: bool) -> Kind:
    if weights:
        return "module"
    names = [one["name"].lower() for one in subject.told["parameters"]]
    required = sum(one["required"] for one in subject.told["parameters"])
    sizes = bool(names) and (names[0] in encoding_laws.LENGTHS or names[0] in encoding_laws.WIDTHS) and required < 3
    return "attention" if not sizes and required >= 3 else "encoding"


def _speed(case: Case, seconds: float) -> Iterator[Finding]:
    """Time and memory beside PyTorch's scaled_dot_product_attention: 8 heads or sequences of width 64, by length."""
    caller, subject = case.caller, case.caller.subject
    heads, axes = caller.convention.heads, caller.convention.axes
    for length in SPEED_LENGTHS:
        batch, outer = (1, 1) if axes == 2 else (8, 1) if axes == 3 else (1, 8)
        shape = (3, batch, outer, length, 64 * heads)
        query, key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        problem = Problem(query=query, key=key, value=value, heads=heads)
        tensors, arguments, named = caller.arguments(problem, None, False, torch.float32)
        for name, x in (("query", query), ("key", key), ("value", value)):
            tensors[f"reference.{name}"] = x.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(1, 2)
        subject.renew()
        law = f"{length:,} tokens"
        try:
            told, _ = subject.ask(
                "time",
                f"its speed was measured at {length} tokens",
                tensors,
                arguments=arguments,
                named=named,
                library=caller.convention.library,
                causal=case.pattern != "full",
                within=seconds / 4,
            )
        except Raised as error:
            yield Finding(law=law, status="note", said=str(error))
            return
        yield Finding(law=law, status="note", said=_compared(told))
        # Twice the length takes four times as long, and it is run three times at least.
        if 12 * (told["theirs_seconds"] + told["reference_seconds"]) > seconds:
            yield Finding(law="longer texts", status="skip", said=f"would take more than {seconds:g} s")
            return


def _compared(told: dict[str, Any]) -> str:
    theirs, reference = told["theirs_seconds"], told["reference_seconds"]
    said = f"{theirs * 1e3:.3g} ms, {theirs / reference:.2f} of PyTorch's time"
    if told["theirs_bytes"] is None:
        return said
    return f"{said}; {_mb(told['theirs_bytes'])} MB above the inputs, PyTorch {_mb(told['reference_bytes'])}"


def _mb(count: int) -> str:
    return "under 1" if count < 1e6 else f"{count / 1e6:.0f}"
