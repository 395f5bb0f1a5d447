"""What `sightline train --plan` promises, beside the run: seconds, memory, parameters; and the time left.

    python benchmarks/planning.py --shakespeare PATH/TO/input.txt --words PATH/TO/wikitext-2 [--rows plan] [--save]

Plan and run are the same command, each in a process of its own, one after the other. The run's seconds and peak memory
are those of its log; its seconds a step leave the first one out, as the plan does. The time left is what the progress
display says at the first event after a minute.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import Report, arguments

from sightline.events import Ended, Event, Stepped, of_record
from sightline.logs import read_log
from sightline.memory import shown
from sightline.pace import Pace

# The command, which after --plan also prints the plan's numbers as they are: what a person reads is rounded.
PROGRAM = """
import json, sys
from dataclasses import asdict
from sightline import plan as planning
from sightline.cli import main
def kept(*arguments, plan=planning.plan, **named):
    made = plan(*arguments, **named)
    numbers = {"parameters": made.parameters, "steps": made.steps, "memory": made.memory.total}
    print(json.dumps(numbers | asdict(made.seconds)))
    return made
planning.plan = kept
sys.exit(main(sys.argv[1:]))
"""
MINUTE = 60.0

Row = dict[str, Any]


def kinds(shakespeare: Path, words: Path) -> dict[str, list[object]]:
    """What is planned and then done: about twenty seconds each."""
    few = ["--evaluate-batches", 8]
    return {
        "characters, quick": [shakespeare, "--tokenizer", "characters", "--recipe", "quick", "--steps", 100],
        "characters, counted": [shakespeare, "--tokenizer", "characters", "--recipe", "counted", "--steps", 20, *few],
        "auto": [shakespeare, "--steps", 24, "--evaluate-every", 8, *few],
        "words": [words, "--steps", 30, *few],
        "words, counted": [words, "--recipe", "counted", "--steps", 30, *few],
        "BPE, long": [words, "--tokenizer", "bpe", "--vocabulary", 8192, "--recipe", "long", "--steps", 10, *few],
        "classic, accumulated": [
            *(shakespeare, "--preset", "classic", "--tokenizer", "characters", "--d-model", 256, "--num-layers", 6),
            *("--context", 256, "--batch", 16, "--accumulate", 4, "--steps", 8, *few),
        ],
    }  # fmt: skip


def minutes(shakespeare: Path, words: Path) -> dict[str, list[object]]:
    """Runs of a minute and a half and more: of steps, with evaluations and checkpoints, and within a time."""
    return {
        "steps alone": [words, "--steps", 1000, "--evaluate-every", 1000, "--evaluate-batches", 8],
        "evaluations": [shakespeare, "--tokenizer", "characters", "--recipe", "quick", "--steps", 5000,
                        "--evaluate-every", 100],
        "a limit of time": [shakespeare, "--minutes", 1.5, "--evaluate-every", 20],
    }  # fmt: skip


def planned(command: list[object]) -> Row:
    """The numbers of a plan."""
    with tempfile.TemporaryDirectory() as folder:
        said = _ran(command, Path(folder) / "run", "--plan")
    return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


def trained(command: list[object]) -> list[Event]:
    """The events of a run."""
    with tempfile.TemporaryDirectory() as folder:
        _ran(command, Path(folder) / "run")
        events = (of_record(record) for record in read_log(Path(folder) / "run"))
        return [event for event in events if event is not None]


def _ran(command: list[object], out: Path, *more: str) -> str:
    run = [sys.executable, "-c", PROGRAM, "train", *map(str, command), "--out", str(out), *more]
    return subprocess.run(run, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout


def came_to(events: list[Event]) -> Row:
    """What a run was, in a plan's words."""
    steps = [now.seconds - before.seconds for before, now in pairwise(events) if isinstance(now, Stepped)]
    ended = events[-1]
    assert isinstance(ended, Ended)
    return {
        "parameters": events[0].parameters,  # pyright: ignore[reportAttributeAccessIssue] (Started)
        "memory": ended.peak_bytes,
        "step": statistics.fmean(steps[1:]),
        "total": ended.seconds,
    }


def foreseen(events: list[Event]) -> tuple[float, float, float, float]:
    """At the first event after a minute: seconds left as foreseen, and as they came; the worst later error, the end."""
    pace, errors = Pace(), []
    end, first = events[-1].seconds, None
    for event in events[:-1]:
        pace.hear(event)
        if event.seconds >= MINUTE and pace.left is not None:
            first = first or (pace.left, end - event.seconds)
            errors.append(abs(event.seconds + pace.left - end))
    assert first is not None, f"a run of {end:.0f} s has no minute"
    return *first, max(errors), end


def plans(report: Report, options: Any) -> None:
    report.table(
        *("", "parameters", "s a step, promised", "real", "ratio"),
        *("s in all, promised", "real", "ratio", "memory, promised", "real", "ratio"),
    )
    for name, command in kinds(options.shakespeare, options.words).items():
        if options.only and name not in options.only:
            continue
        for _ in range(options.rounds):
            plan, run = planned(command), came_to(trained(command))
            assert plan["parameters"] == run["parameters"]
            cells = [f"{run['parameters']:,}"]
            for what, say in (("step", "{:.3f}"), ("total", "{:.1f}"), ("memory", None)):
                both = (shown(row[what]) if say is None else say.format(row[what]) for row in (plan, run))
                cells += [*both, f"{plan[what] / run[what]:.2f}"]
            report.row(name, *cells)


def left(report: Report, options: Any) -> None:
    report.say("\nThe time left, at the first event after a minute:")
    report.table("", "foreseen", "came", "foreseen / came", "worst of the end, later", "of the run")
    for name, command in minutes(options.shakespeare, options.words).items():
        if options.only and name not in options.only:
            continue
        said, came, worst, end = foreseen(trained(command))
        report.row(name, f"{said:.1f} s", f"{came:.1f} s", f"{said / came:.2f}", f"{worst:.1f} s", f"{end:.0f} s")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(rounds=1)
    parser.add_argument("--shakespeare", type=Path, required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--words", type=Path, required=True, help="a folder of three files by words")
    parser.add_argument("--rows", choices=["plan", "left", "all"], default="all")
    parser.add_argument("--only", nargs="*", help="names of rows")
    options = parser.parse_args()
    report = Report("Promised and kept")
    if options.rows != "left":
        plans(report, options)
    if options.rows != "plan":
        left(report, options)
    if options.save:
        report.write("planning")


if __name__ == "__main__":
    main()
