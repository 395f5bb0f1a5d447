"""The README's examples run, and its commands are commands with those options."""

import re
import shlex
from pathlib import Path

import pytest

from sightline import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", blocks("python"))
def test_examples_run_and_are_ten_lines_at_most(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "transformers" in example:
        pytest.importorskip("transformers")
    exec(compile(example, "README.md", "exec"), {})
    assert len(example.strip().splitlines()) <= 10


def test_commands_parse(capsys):
    lines = [line.split("#")[0] for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("sightline ")]
    assert len(commands) == 6
    for command in commands:
        assert cli.main([*command, "--help"]) == 0  # help comes after the options before it have been parsed
        assert cli.main([*command, "--no-such-option", "1"]) == 2
        assert "no-such-option" in capsys.readouterr().err
