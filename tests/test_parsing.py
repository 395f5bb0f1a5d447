"""A mistake in the arguments is one line; what is given reaches the command as it was meant."""

import pytest

from sightline.cli import COMMANDS
from sightline.options import given
from sightline.parsing import parsed

MISTAKES = {
    "train": "expected SOURCE and --out; sightline train --help tells what to give",
    "train x": "expected --out; sightline train --help tells what to give",
    "train x --outt y": "expected --out, got --outt; sightline train --help tells what to give",
    "train x --out": "expected a value after --out; sightline train --help tells which",
    "train x --out y --steps abc": "expected a whole number or recipe or None for --steps, got 'abc'",
    "train x --out y --betas 0.9 z": "expected two numbers or recipe for --betas, got '0.9' 'z'",
    "train x --out y --task no": "expected one of text, translate for --task, got 'no'",
    "train x --out y --device gpu": "expected one of auto, cpu, cuda, mps, recipe for --device, got 'gpu'",
    "train x --out y --stpes 3": "there is no option --stpes: did you mean --steps?",
    "doctor --json": "there is no option --json: sightline doctor --help lists those there are",
    "generate --model m It was": "there is no place for 'was': put a text or a name of several words in quotes",
    "generate --model m --words many": "expected a whole number for --words, got 'many'",
    "look --layers a": "expected whole numbers such as 0,2 or None for --layers, got 'a'",
    "look --layers 0,x 2": "expected whole numbers such as 0,2 or None for --layers, got '0,x 2'",
    "look --layers 0,": "expected whole numbers such as 0,2 or None for --layers, got '0,'",
    "train x --out y --steps 0,2": "expected a whole number or recipe or None for --steps, got '0,2'",
}


def call(line: str):
    name, *arguments = line.split()
    return parsed(COMMANDS[name], arguments, f"sightline {name}")


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line, capsys):
    with pytest.raises(ValueError) as caught:
        call(line)
    assert str(caught.value) == MISTAKES[line]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "expected"), [("0,2", (0, 2)), ("0 2", (0, 2)), ("3", (3,)), ("0,1 2", (0, 1, 2)), ("None", None)]
)
def test_layers_stand_with_commas_or_without(given, expected):
    assert call(f"look --layers {given} --tokens 3").keywords["layers"] == expected


def test_an_option_left_out_is_the_recipes_and_none_is_a_value():
    plain, told = (call(f"train x --out y{more}").keywords for more in ("", " --clip None --steps 3 --bias False"))
    assert given(plain["schedule"]) == given(plain["model"]) == {}
    assert given(told["schedule"]) == {"clip": None, "steps": 3}
    assert given(told["model"]) == {"bias": False}


def test_help_is_printed_and_ends(capsys):
    with pytest.raises(SystemExit) as caught:
        call("doctor --help")
    assert not caught.value.code
    assert "usage: sightline doctor" in capsys.readouterr().out
