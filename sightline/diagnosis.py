"""What this machine offers, and what `auto` would take for which call, and why. Changes nothing."""

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from sightline.attention import Choice, choose
from sightline.kernels import build, cpu
from sightline.masks import ALiBi, Causal, Mask, Padding, Window
from sightline.schedule import has_bfloat16

LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "tyro", "rich", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `doctor()` found."""

    machine: dict[str, str]
    """Versions and features by name."""
    choices: dict[str, Choice]
    """What `auto` takes, and why, by the description of a call: 8 heads of width 64, float32, on the CPU."""

    def __str__(self) -> str:
        widest = max(map(len, (*self.machine, *self.choices)))
        facts = [f"{name:<{widest}}  {fact}" for name, fact in self.machine.items()]
        taken = [f"{call:<{widest}}  {name:<9}  {reason}" for call, (name, reason) in self.choices.items()]
        return "\n".join([*facts, "", f"{'call':<{widest}}  {'auto takes':<9} because", *taken])


def doctor() -> Diagnosis:
    """Look at the machine, and ask `auto` about typical calls.

    >>> "attention, 32,768 tokens, dropout" in doctor().choices
    True
    """
    return Diagnosis(machine=_machine(), choices=_choices())


def _machine() -> dict[str, str]:
    from sightline import __version__

    facts = {"python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})"}
    facts |= {"sightline": __version__, **{name: _version(name) for name in LIBRARIES}}
    facts["CPU"] = f"{os.cpu_count()} cores, threads used by torch: {torch.get_num_threads()}"
    facts["CPU instructions"] = torch.backends.cpu.get_cpu_capability()
    native = "in hardware" if has_bfloat16(torch.device("cpu")) else "emulated: training takes float32"
    facts["bfloat16 on the CPU"] = native
    facts |= _native() | {"products in float32": _multiplier()}
    facts["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    return facts


def _native() -> dict[str, str]:
    """The native kernel: whether it is there, in which instructions, and how to change either."""
    if cpu.MISSING:
        compiler = build.find_compiler()
        found = f"{compiler} is here" if compiler else "there is none here: install g++ or clang++ first"
        return {"native CPU kernel": f"{cpu.MISSING}; {found}"}
    here = cpu.available()
    others = " or ".join(f'"{name}"' for name in here if name != cpu.instructions())
    change = f"; sightline.kernels.cpu.use_instructions({others}) takes others" if others else ""
    return {
        "native CPU kernel": f"built for {', '.join(build.instruction_sets())}; this CPU has {', '.join(here)}",
        "its instructions": f"{cpu.instructions()}{change}",
    }


def _multiplier() -> str:
    name = cpu.multiplier()
    others = [other for other in cpu.multipliers() if other != name]
    return name + "".join(f'; sightline.kernels.cpu.use_multiplier("{other}") takes the other' for other in others)


def _choices() -> dict[str, Choice]:
    calls: dict[str, tuple[int, int, Mask, dict[str, float]]] = {
        "attention, 512 tokens, causal": (512, 512, Causal(), {}),
        "attention, 32,768 tokens, causal": (32768, 32768, Causal(), {}),
        "attention, 32,768 tokens, padded": (32768, 32768, Padding([32768]), {}),
        "attention, 2,048 tokens, window": (2048, 2048, Window(before=255, after=0), {}),
        "attention, 32,768 tokens, window": (32768, 32768, Window(before=255, after=0), {}),
        "attention, 32,768 tokens, ALiBi": (32768, 32768, ALiBi(8) & Causal(), {}),
        "attention, 32,768 tokens, dropout": (32768, 32768, Causal(), {"dropout": 0.1}),
        "attention, 32,768 tokens, soft cap": (32768, 32768, Causal(), {"softcap": 50.0}),
        "decoding, 1 query, 8,192 keys": (1, 8192, Causal(), {}),
        "observe, any length": (32768, 32768, Causal(), {"observing": True}),
    }
    return {name: _choose(*call) for name, call in calls.items()}


def _choose(queries: int, keys: int, mask: Mask, options: dict[str, float]) -> Choice:
    query, key = (torch.empty(1, 8, 1, 64).expand(1, 8, length, 64) for length in (queries, keys))
    return choose(query, key, key, mask, **options)  # pyright: ignore[reportArgumentType] (options by name)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
