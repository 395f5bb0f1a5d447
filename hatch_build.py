"""A wheel holds the native kernel where the tree does, and then says for which systems it is.

The kernel knows no Python and speaks torch's stable ABI: one wheel serves every Python and torch 2.10 and newer.
Nothing is compiled here, since that needs torch: `make wheel` compiles first. Without the kernel the wheel is pure.
"""

import re
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "sightline/kernels/libsightline.so"
GLIBC_OF_LIBSTDCXX = {24: 28, 28: 31, 29: 34, 30: 35, 33: 39}
"""GLIBCXX_3.4.x, and the x of the first manylinux_2_x whose systems all have it."""


class KernelHook(BuildHookInterface):
    """Adds the library and the wheel's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        library = Path(self.root) / LIBRARY
        if version != "editable" and library.exists():
            build_data["artifacts"].append(LIBRARY)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_of(library.read_bytes())}"


def platform_of(library: bytes) -> str:
    """The platform part of the tag: on Linux the oldest manylinux that has all symbols the library asks for."""
    here = re.sub(r"[-.]", "_", sysconfig.get_platform())
    glibc = [int(x) for x in re.findall(rb"GLIBC_2\.(\d+)", library)]
    if not here.startswith("linux_") or not glibc:
        return here
    cxx = max((int(x) for x in re.findall(rb"GLIBCXX_3\.4\.(\d+)", library)), default=0)
    known = [glibc for newest, glibc in GLIBC_OF_LIBSTDCXX.items() if cxx <= newest]
    return f"manylinux_2_{max(*glibc, known[0])}_{here.removeprefix('linux_')}" if known else here
