"""What the benchmarks share: peak memory, and a report that names the machine and its versions."""

import argparse
import datetime
import platform
from pathlib import Path

import torch

import sightline
from sightline.memory import peak_bytes as peak_bytes  # the benchmarks take it from here

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name as the system gives it, with its family and model, which a virtual machine seldom hides."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8").split("\n\n")[0].splitlines())
    told = {name.strip(): value.strip() for name, _, value in lines}
    numbers = [f"{name.split()[-1]} {told[name]}" for name in ("cpu family", "model") if name in told]
    return ", ".join((told.get("model name") or platform.machine(), *numbers))


class Report:
    """Markdown, printed as it grows and written to results/DATE-NAME.md at the end."""

    def __init__(self, title: str) -> None:
        self.lines: list[str] = []
        self.say(f"# {title}\n")
        self.say(
            f"{datetime.date.today()}, {processor()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}, "
            f"torch {torch.__version__}, sightline {sightline.__version__}. Medians; the sides of a row take turns.\n"
        )

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def table(self, *header: str) -> None:
        self.say("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))

    def row(self, *cells: object) -> None:
        self.say("| " + " | ".join(str(cell) for cell in cells) + " |")

    def write(self, name: str) -> None:
        file = RESULTS / f"{datetime.date.today()}-{name}.md"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        print(f"\nwritten to {file}")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds a row (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="write the report to benchmarks/results/")
    return parser
