"""How much memory this process and this machine have. Knows nothing about what fills it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

_STATUS = Path("/proc/self/status")
_GROUPS, _LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def peak_bytes(device: torch.device | None = None) -> int:
    """The most memory that this process has held so far: on a GPU the GPU's, else the machine's.

    0 where the system does not tell (Windows).
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():  # getrusage would count what the parent held when it started this process
        return _status("VmHWM")
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_bytes() -> int:
    """What this process holds of the machine's memory now; where the system does not tell, the most it has held."""
    return _status("VmRSS") if _STATUS.exists() else peak_bytes()


def machine_bytes(device: torch.device) -> int | None:
    """All the memory that the device has, or less where a container has less; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return None
    return min((os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_bytes()))


def shown(size: float) -> str:
    """Bytes as a person reads them.

    >>> shown(1_240_000_000), shown(56_000_000), shown(310_000), shown(1200)
    ('1.2 GB', '56 MB', '0.3 MB', '1,200 bytes')
    """
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    if size >= 1e6:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:,.0f} bytes"


def _status(name: str) -> int:
    (line,) = (line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _group_bytes() -> Iterator[int]:
    """What Linux's control groups let this process hold: its own and those around it, as far as they are seen here."""
    for line in _GROUPS.read_text(encoding="utf-8").splitlines() if _GROUPS.exists() else ():
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (_LIMITS / "memory", "memory.limit_in_bytes") if controllers else (_LIMITS, "memory.max")
        inside = PurePosixPath(place).parts[1:]
        # A container may be told its place outside, where only its own group is seen, as the root.
        for depth in range(len(inside) + 1):
            file = root.joinpath(*inside[:depth], name)
            if file.is_file() and (limit := file.read_text(encoding="ascii").strip()) != "max":
                yield int(limit)
