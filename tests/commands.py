"""Commands run inside the test's own process, and the one line that a bad input must end in."""

from sightline.cli import main
from sightline.events import Stepped
from sightline.progress import TrainProgress


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def check_line(command: str, code: int, out: str, err: str, *says: str, after_progress: bool = False) -> None:
    """Exit code 2, nothing on stdout, and on stderr one line beside the notes, which says all of `says`.

    `after_progress`: lines of training may stand before it, but none that names the program.
    """
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == 2
    assert out == ""
    assert lines
    assert after_progress or len(lines) == 1, err
    assert not any(line.startswith("sightline ") or "Traceback" in line for line in lines[:-1])
    assert lines[-1].startswith(f"sightline {command}: ")
    for part in says:
        assert part in lines[-1]


def refused(capsys, *arguments, says: tuple[str, ...], after_progress: bool = False) -> None:
    """Run a command that must end in one line, as `check_line` says."""
    capsys.readouterr()
    code = run(*arguments)
    check_line(arguments[0], code, *capsys.readouterr(), *says, after_progress=after_progress)


def stop_at(step: int, monkeypatch) -> None:
    """Ctrl-C when training tells of that step; 0: of anything."""

    def call(self, event, original=TrainProgress.__call__):
        original(self, event)
        if step == 0 or (isinstance(event, Stepped) and event.step == step):
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainProgress, "__call__", call)
