"""Compile the native CPU kernel into the package: `python -m sightline.kernels.build`.

One kernel source becomes one object for each instruction set, with that set's flags and no other; the common code
picks one when it is loaded. Needs a C++17 compiler and the torch that is installed (for its headers). Run as a file,
`python sightline/kernels/build.py`, it imports neither torch nor the rest of this package. Nothing is built unasked.
"""

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
LIBRARY = Path(__file__).parent / "libsightline.so"

COMMON = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-warning-option",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
KERNEL = ["-ffp-contract=off", "-fno-exceptions", "-fno-math-errno", "-fno-trapping-math"]
"""Fused multiply-adds stand in the source: where the compiler chose them, two ways through the code could differ."""
TORCH = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
INSTRUCTIONS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vbmi2"],
}
EMULATED = {"avx512_emulated": [*AVX512, "-DSIGHTLINE_EMULATE_DOT"]}
"""The code of avx512_bf16 with its dot product in floats: tests it on a CPU that has only AVX-512."""
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


def find_compiler() -> str | None:
    """The C++ compiler that CXX names, else the first found; None without one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def instruction_sets() -> dict[str, list[str]]:
    """What a library built on this machine holds, least first, and the compiler's flags for each."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {name: flags for name, flags in INSTRUCTIONS.items() if x86 or not flags}


def build(library: Path = LIBRARY, *, sanitize: bool = False, emulate: bool = False, strict: bool = False) -> Path:
    """Compile and link; the library appears whole or not at all.

    Raises:
        RuntimeError: no compiler, no torch, or an error of the compiler; with `strict` a warning too.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler found; install g++ or clang++ (or set CXX) and run this again")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed here; its headers are needed: pip install torch")
    torch = Path(spec.origin).parent
    extra = [*(SANITIZE if sanitize else []), *(["-Werror"] if strict else [])]
    define = ["-DSIGHTLINE_EMULATED"] if emulate else []
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        commands = [
            [*COMMON, *TORCH, *define, *extra, "-isystem", str(torch / "include"), "-c", str(NATIVE / "attention.cpp"),
             "-o", f"{folder}/attention.o"]
        ]  # fmt: skip
        for name, flags in (instruction_sets() | (EMULATED if emulate else {})).items():
            source = ["-c", str(NATIVE / "kernels.cpp"), "-o", f"{folder}/{name}.o"]
            commands.append([*COMMON, *KERNEL, *flags, f"-DSIGHTLINE_ISA={name}", *extra, *source])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: _run([compiler, *command]), commands))
        objects = [command[-1] for command in commands]
        made = f"{folder}/{library.name}"
        _run([compiler, "-shared", *extra, *objects, "-o", made, f"-L{torch / 'lib'}", "-ltorch_cpu"])
        Path(made).replace(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the compiler failed: {' '.join(command)}\n{done.stderr}")
    sys.stderr.write(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sightline.kernels.build", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=LIBRARY, help="where the library goes (default: the package)")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--emulate", action="store_true", help="with the bf16 dot product in floats too, for tests")
    parser.add_argument("--strict", action="store_true", help="take the compiler's warnings for errors")
    options = vars(parser.parse_args())
    try:
        print(f"built {build(options.pop('output'), **options)}")
    except RuntimeError as error:
        sys.exit(f"build: {error}")


if __name__ == "__main__":
    main()
