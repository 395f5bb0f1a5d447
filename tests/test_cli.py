"""The command line as a person meets it: every command, and every bad input that must end in one clear line."""

import dataclasses
import functools
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from commands import check_line, run, stop_at

import sightline
from sightline import bench, cli, demo
from sightline.checkpoints import save
from sightline.cli import COMMANDS
from sightline.files import write_manifest
from sightline.models import Decoder, DecoderConfig
from sightline.schedule import TrainConfig
from sightline.terminal import free, has_screen
from sightline.tokenizers import Tokenizer
from sightline.trainer import Trainer

pytestmark = [
    pytest.mark.filterwarnings("always::sightline.generation.ContextWarning"),
    pytest.mark.usefixtures("no_pictures"),
]

TEXT = "".join(f"line {i}: the cat sat on the mat, and the dog ran after the cat.\n" for i in range(40))
SHAPE = ("--d-model", 16, "--num-layers", 1, "--num-heads", 2, "--context", 16)
TINY = (*SHAPE, "--steps", 4, "--batch", 2, "--evaluate-every", 2)
CHARACTERS = ("--tokenizer", "characters")


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def looked(stderr: str) -> tuple[str, ...]:
    """What `look` captured, and the notes after that."""
    first, *rest = (line.removeprefix("note: ") for line in stderr.splitlines())
    told = re.fullmatch(r"captured the first (.*) in \d+\.\d s, with \d+\.\d GB of memory at most", first)
    assert told, first
    return told[1], *rest


@pytest.fixture
def refused(capsys):
    return functools.partial(commands.refused, capsys)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", text, "--out", out, *TINY, *CHARACTERS) == 0
    return out


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """The trained run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="module")
def words(text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("words") / "run"
    assert run("train", text, "--out", out, *TINY, "--tokenizer", "words") == 0
    return out


# --- What goes well -----------------------------------------------------------------------------------


def test_train_resume_evaluate_generate_look(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", text, "--out", out, *TINY, *CHARACTERS) == 0
    stdout, stderr = capsys.readouterr()
    assert re.fullmatch(
        r"best at step \d: loss .* bits per byte \(.*\)\nloss curve: .*\nnext: sightline generate --model .*\n", stdout
    )
    assert stderr.startswith("recipe short: ")
    assert [line.split(":")[0] for line in stderr.splitlines()[2:-1]] == ["step 0", "step 2", "step 4"]
    assert json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))["latest"] == "step-4"

    assert run("train", text, "--out", out, *TINY, *CHARACTERS, "--steps", 6, "--resume") == 0
    assert capsys.readouterr().err.startswith("after step 4, going on with ")
    assert json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))["latest"] == "step-6"

    assert run("evaluate", text, "--model", out) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("cats, valid: loss ")
    assert stderr == ""

    assert run("generate", "the cat", "--model", out / "step-6", "--tokens", 5, "--seed", 1) == 0
    first, stderr = capsys.readouterr()
    assert re.fullmatch(r"(?s)the cat.+\n", first)
    assert stderr == ""
    assert run("generate", "the cat", "--model", out / "step-6", "--tokens", 5, "--seed", 1) == 0
    assert capsys.readouterr().out == first

    page = tmp_path / "heads.html"
    assert run("look", "--model", out, "--text", text, "--out", page, "--tokens", 9, "--layers", 0) == 0
    stdout, stderr = capsys.readouterr()
    assert (stdout, looked(stderr)) == (f"{page}: open it in a browser\n", ("9 tokens of cats",))
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_text_comes_from_standard_input_too(trained, tmp_path, monkeypatch, capsys):
    for command in (
        ("train", "-", "--out", tmp_path / "run", *TINY, *CHARACTERS),
        ("evaluate", "-", "--model", trained),
        ("look", "--text", "-", "--model", trained, "--out", tmp_path / "attention.html"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        assert run(*command) == 0
    assert "the first 16 tokens of standard input" in capsys.readouterr().err


@pytest.mark.filterwarnings("always::UserWarning")
def test_what_is_left_out_of_a_folder_is_told(trained, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    (folder / "b.png").write_bytes(b"\x89PNG\0")
    for command in (
        ("train", folder, "--out", tmp_path / "run", *TINY, *CHARACTERS),
        ("evaluate", folder, "--model", trained),
        ("look", "--text", folder, "--model", trained, "--out", tmp_path / "attention.html"),
    ):
        assert run(*command) == 0
        assert "note: texts: 1 left out: b.png is binary, not text: NUL byte at offset 4\n" in capsys.readouterr().err


def test_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(steps=3, minutes=1, batch=2, evaluate_batches=2)
    monkeypatch.setattr(demo, "TRAINING", config)
    monkeypatch.setattr(demo, "SHAPE", {"context": 64, "d_model": 16, "num_layers": 1, "num_heads": 2})
    monkeypatch.setattr(demo, "VOCABULARY", 300)
    monkeypatch.setattr(demo, "LOOK_TOKENS", 24)
    written = []

    def write(folder, original=demo.write):
        for piece in original(folder):
            written.append(piece)
            yield piece

    monkeypatch.setattr(demo, "write", write)
    assert run("demo") == 0
    stdout = capsys.readouterr().out
    table = re.findall(r"^(\d\.\d{3})  +(.+?) *$", stdout, re.MULTILINE)
    assert [name for _, name in table] == [
        "the model before training",
        "counting tokens (unigram)",
        "counting pairs (bigram)",
        "the model at step 3",
    ]
    assert float(table[2][0]) < float(table[1][0]) < float(table[0][0])
    assert len(written) == 100
    assert demo.PROMPT + "".join(written) in stdout
    names = {file.name for file in Path("sightline-demo").iterdir()}
    assert names >= {"checkpoint.json", "log.jsonl", "attention.html", "heads.png", "head.png", "positions.png"}
    commands = [shlex.split(line) for line in stdout.splitlines() if line.startswith("  sightline ")]
    assert [command[1] for command in commands] == ["generate", "look", "train"]

    Path("README.md").write_text(TEXT, encoding="utf-8")
    assert run(*commands[0][1:], "--words", 3) == 0
    assert run(*commands[1][1:], "--out", "again.html") == 0
    assert free(Path("sightline-demo")) == Path("sightline-demo-2")


def test_doctor(capsys):
    assert run("doctor") == 0
    stdout, stderr = capsys.readouterr()
    assert re.search(r"^torch +2\.", stdout, re.MULTILINE)
    assert re.search(r"^native CPU kernel +(built|the native kernel is not built; build it with)", stdout, re.MULTILINE)
    assert re.search(r"^observe, any length +(cpu|tiled) +\w+", stdout, re.MULTILINE)
    assert stderr == ""


def test_bench(monkeypatch, capsys):
    def timings(original=bench.timings):
        yield from original((64,), rounds=1)
        yield bench.Timing(length=65536, sdpa=1.0, attention=1.0, observe=2.0, eager=None)

    monkeypatch.setattr(bench, "timings", timings)
    assert run("bench") == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r" 64( +\d+\.\d){4} +", rows[0])
    assert rows[1].split() == ["65,536", "1000.0", "1000.0", "2000.0", "too", "large"]


def test_what_the_program_says_of_itself(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"sightline {sightline.__version__}\n"
    for arguments in ((), ("--help",), ("-h",)):
        assert run(*arguments) == 0
        stdout = capsys.readouterr().out
        assert all(f"\n  {name} " in stdout for name in COMMANDS)


def options(stdout: str) -> dict[str, str]:
    """Each option and positional argument of a help page, and what is said of it."""
    found: dict[str, str] = {}
    name = None
    for line in stdout.splitlines():
        row = re.fullmatch(r"[\u2502 ] (.*?) *\u2502?", line)
        if row is None:
            name = None
        elif re.match(r"--?[a-z]|\[?[A-Z]{2,}\]?( |$)", row[1]):
            invocation, _, said = row[1].partition("  ")
            name = re.split("[ ,]", invocation)[0]
            found[name] = said.strip()
        elif row[1].startswith("  ") and name:
            found[name] += " " + row[1].strip()
    return found


def settings(command) -> set[str]:
    """What a command can be told, as its help page should call it."""
    found = set()
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(parameter.default):
            found |= {f"--{field.name}" for field in dataclasses.fields(parameter.default)}
        else:
            found.add(name.upper() if "Positional" in str(parameter.annotation) else f"--{name}")
    return {name.replace("_", "-") for name in found}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_something_of_every_option(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run(name, "--help") == 0
    stdout, stderr = capsys.readouterr()
    assert (COMMANDS[name].__doc__ or "missing").splitlines()[0] in stdout
    assert stderr == ""
    found = options(stdout)
    assert {option.strip("[]") for option in found} == {"-h", *settings(COMMANDS[name])}
    for option, said in found.items():
        assert re.search(r"[A-Za-z]{3}", re.sub(r"\((default: .*|required)\)", "", said)), f"{option} has no help"


def test_the_check_of_help_can_fail():
    assert options("\u2502 --out PATH  (default: x)  \u2502") == {"--out": "(default: x)"}


# --- Notes, endings, mistakes in the command itself ---------------------------------------------------


def test_a_note_is_one_line_beside_the_text(trained, capsys):
    assert run("generate", "the cat", "--model", trained, "--tokens", 30, "--seed", 0) == 0
    stdout, stderr = capsys.readouterr()
    assert "note" not in stdout
    assert re.fullmatch(r"note: the text has outgrown the model's context of 16 tokens: .*\n", stderr)


def test_a_note_on_the_terminal_begins_its_own_line(trained, capsys, monkeypatch):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert run("generate", "the cat", "--model", trained, "--tokens", 30, "--seed", 0) == 0
    assert re.fullmatch(r"\nnote: the text has outgrown .*\n", capsys.readouterr().err)


def test_ctrl_c_while_writing_ends_the_line(trained, capsys, monkeypatch):
    def interrupted(*_):
        yield " sat"
        raise KeyboardInterrupt

    monkeypatch.setattr("sightline.generation.generate", interrupted)
    assert run("generate", "the cat", "--model", trained) == 130
    assert capsys.readouterr() == ("the cat sat\n", "sightline generate: stopped\n")


def test_a_reader_that_goes_away_is_no_error(monkeypatch):
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert run("--help") == 1
    assert sys.stderr.closed


def test_an_unknown_command(capsys):
    for name, say in (("tarin", "did you mean train?"), ("xyzzy", f"there are {', '.join(COMMANDS)}")):
        assert run(name) == 2
        assert capsys.readouterr() == ("", f"sightline: there is no command {name!r}; {say}\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train",), "--out"),
        (("train", "a.txt", "--out", "run", "--step", "3"), "--steps"),
        (("generate", "--model", "run", "--temperature", "warm"), "'warm'"),
        (("evaluate", "a.txt", "--model", "run", "--split", "dev"), "valid"),
    ],
)
def test_a_mistake_in_the_options_names_them(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert says in stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "out", "err"),
    [
        (0, "", "sightline look: no x\n"),
        (2, "half a result", "sightline look: no x\n"),
        (2, "", "sightline look: no x\nand more\n"),
        (2, "", "note: x\n"),
        (2, "", "sightline train: no x\n"),
        (2, "", "sightline look: no y\n"),
    ],
)
def test_the_check_of_one_line_can_fail(code, out, err):
    check_line("look", 2, "", "note: y\nsightline look: no x\n", "no x")
    with pytest.raises(AssertionError):
        check_line("look", code, out, err, "no x")


# --- Bad text -----------------------------------------------------------------------------------------

BAD_TEXTS = {
    "empty": (b"", "is empty, expected text"),
    "binary": (b"\x7fELF\0\0\0\0", "is binary, not text: NUL byte at offset 4"),
    "utf-16": ("the cat".encode("utf-16"), "it looks like UTF-16: convert it to UTF-8"),
    "latin-1": (TEXT.encode() + b"caf\xe9\n" + TEXT.encode(), "is not UTF-8: byte 0xe9 at offset 2553 (line 41)"),
    "one byte": (b"a", "has 1 bytes, too few to cut into train and valid"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_TEXTS)
def test_bad_text(bad, trained, tmp_path, refused):
    content, says = BAD_TEXTS[bad]
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    before = files(trained)
    refused("train", file, "--out", tmp_path / "run", *TINY, says=("bad", says))
    refused("evaluate", file, "--model", trained, says=("bad", says))
    refused("look", "--text", file, "--model", trained, "--out", tmp_path / "attention.html", says=("bad", says))
    assert files(trained) == before
    assert files(tmp_path) == {"bad.txt": content}


def test_bytes_that_are_not_utf_8_can_be_replaced(trained, tmp_path, capsys, refused):
    file = tmp_path / "bad.txt"
    file.write_bytes(BAD_TEXTS["latin-1"][0])
    page = tmp_path / "attention.html"
    refused("train", file, "--out", tmp_path / "run", *TINY, *CHARACTERS, says=("--errors replace",))
    assert run("train", file, "--out", tmp_path / "run", *TINY, *CHARACTERS, "--errors", "replace") == 0
    assert run("evaluate", file, "--model", tmp_path / "run", "--split", "train", "--errors", "replace") == 0
    assert run("look", "--text", file, "--model", trained, "--errors", "replace", "--out", page) == 0


def test_a_source_that_is_not_there(trained, text, tmp_path, refused, monkeypatch):
    for command in (("train", "--out", tmp_path / "run"), ("evaluate", "--model", trained)):
        refused(*command, text.with_name("cast.txt"), says=("no file or folder", "did you mean", "cats.txt?"))
        refused(*command, tmp_path / "texts" / "a.txt", says=(f"there is no folder {tmp_path / 'texts'} either",))
        refused(*command, "embeded", says=("did you mean embedded?",))
        refused(*command, tmp_path, says=("has no text, it is empty",))
    refused("look", "--text", tmp_path / "a.txt", "--model", trained, says=("no file or folder",))
    monkeypatch.setattr("sightline.corpora.cache_folder", lambda: tmp_path)
    refused("train", "wikitext-2", "--out", tmp_path / "run", says=("--download", "would fetch https://", "4.5 MB"))
    refused("train", text, "--download", "--out", tmp_path / "run", says=("--download fetches wikitext-2",))
    assert not any(tmp_path.iterdir())


def test_a_text_shorter_than_one_context(tmp_path, refused):
    file = tmp_path / "short.txt"
    file.write_text(TEXT[:60], encoding="utf-8")
    out = tmp_path / "run"
    long = ("--context", 100)
    refused("train", file, "--out", out, *TINY, *CHARACTERS, *long,
            says=("training text of at least 101 tokens, got 54", "give more text or a smaller --context"))  # fmt: skip
    assert run("train", file, "--out", out, *TINY, *CHARACTERS) == 0


def test_a_split_or_a_context_that_is_not_there(trained, text, refused):
    refused("evaluate", text, "--model", trained, "--split", "test", says=("no test split", "--split train or valid"))
    refused("evaluate", text, "--model", trained, "--context", 17, says=("from 1 to the model's 16, got 17",))


def test_evaluate_tells_of_unknown_words(words, tmp_path, capsys):
    file = tmp_path / "other.txt"
    file.write_text("the zebra sat on the mat\n" * 20, encoding="utf-8")
    assert run("evaluate", file, "--model", words, "--split", "train") == 0
    assert re.fullmatch(r"note: 28\.\d% of the tokens are <unk>, .*\n", capsys.readouterr().err)


# --- Bad checkpoints ----------------------------------------------------------------------------------


def other_model(folder: Path, kind: str, d_model: int) -> Path:
    tokenizer = Tokenizer.train(kind, ["abc def"])
    model = Decoder(
        DecoderConfig(vocabulary=len(tokenizer), context=16, d_model=d_model, num_layers=1, num_heads=2)
    )  # fmt: skip
    model.tokenizer = tokenizer
    return save(folder, model)


def edit(**changes):
    def damage(file: Path) -> None:
        values = json.loads(file.read_text(encoding="utf-8"))
        values |= changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}), encoding="utf-8")

    return damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def foreign(name: str):
    def damage(file: Path) -> None:
        other = other_model(file.parent.parent / "other", "characters", 32)
        (other / name).replace(file)
        shutil.rmtree(other)

    return damage


DAMAGES = {
    "config missing": ("config.json", Path.unlink, ("config.json, but it is missing: the checkpoint is not complete",)),
    "config truncated": ("config.json", cut, ("config.json to be JSON",)),
    "config of another program": (
        "config.json", lambda file: file.write_text('{"n_layer": 12}'), ("written by another program",)),
    "config with an unknown key": ("config.json", edit(d_modle=3), ("unknown key 'd_modle'; did you mean 'd_model'?",)),
    "config without a key": ("config.json", edit(num_heads="drop"), ("the key 'num_heads'", "missing")),
    "config that cannot be": ("config.json", edit(num_heads=3), ("num_heads 3",)),
    "weights missing": ("model.safetensors", Path.unlink, ("model.safetensors, but it is missing",)),
    "weights truncated": ("model.safetensors", cut, ("model.safetensors", "was cut short or is of another format")),
    "weights of another model": (
        "model.safetensors", foreign("model.safetensors"), ("shape", "belongs to another model than config.json")),
    "weights in another format": (
        "model.safetensors", lambda file: file.write_bytes(b"PK\3\4"), ("model.safetensors", "of another format")),
    "tokenizer missing": ("tokenizer.json", Path.unlink, ("tokenizer.json, but it is missing",)),
    "tokenizer truncated": ("tokenizer.json", cut, ("tokenizer.json is damaged, it should be JSON",)),
    "tokenizer of another program": (
        "tokenizer.json", lambda file: file.write_text("{}"), ("is not a tokenizer.json",)),
    "tokenizer of another model": (
        "tokenizer.json", foreign("tokenizer.json"), ("that config.json asks for, got 8", "from the same checkpoint")),
    "no tokenizer": ("config.json", edit(tokenizer=None), ("holds no tokenizer.json, so it knows no text",)),
    "pointer truncated": ("../checkpoint.json", cut, ("checkpoint.json to be JSON",)),
    "pointer to nothing": (
        "../checkpoint.json", edit(best="step-9", latest="step-9"), ("the folder", "step-9", "is missing")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(damage, copy, text, refused):
    name, damaging, says = DAMAGES[damage]
    best = json.loads((copy / "checkpoint.json").read_text(encoding="utf-8"))["best"]
    damaging(copy / best / name)
    (copy / best / "manifest.json").unlink()  # without which a file is believed as far as it makes sense
    before = files(copy)
    refused("generate", "the cat", "--model", copy, says=says)
    refused("evaluate", text, "--model", copy, says=says)
    refused("look", "--text", text, "--model", copy, "--out", copy / "attention.html", says=says)
    assert files(copy) == before


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("training.safetensors", Path.unlink, "training.safetensors, but it is missing"),
        ("training.safetensors", cut, "was cut short or is of another format"),
        ("training.safetensors", foreign("model.safetensors"), "belong to different models"),
        ("training.json", Path.unlink, "training.json, but it is missing"),
        ("training.json", cut, "training.json to be JSON"),
        ("training.json", edit(seconds="drop"), "the key 'seconds' in"),
        ("model.safetensors", cut, "was cut short or is of another format"),
    ],
)
def test_a_damaged_checkpoint_is_not_resumed(name, damage, says, copy, text, refused):
    damage(copy / "step-4" / name)
    write_manifest(copy / "step-4")  # else the step before it would be taken
    before = files(copy)
    refused("train", text, "--out", copy, *TINY, *CHARACTERS, "--steps", 6, "--resume", says=(says,))
    assert files(copy) == before


def test_a_folder_that_is_no_checkpoint(text, tmp_path, refused):
    for command in (("generate",), ("evaluate", text), ("look", "--text", text)):
        refused(*command, "--model", tmp_path / "run", says=("a checkpoint's folder", "does not exist"))
        refused(*command, "--model", tmp_path, says=("holds none", "give the folder that a run was written to"))
        refused(*command, "--model", text, says=("got the file", "give the folder that a run was written to"))
    refused("generate", "--model", tmp_path / "model.pt", says=("a pickled file can run any program",))


# --- Bad settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("--temperature", "0"), "temperature must be a number above 0, but it is 0.0"),
        (("--temperature", "-1"), "temperature must be a number above 0, but it is -1.0"),
        (("--temperature", "nan"), "temperature must be a number above 0, but it is nan"),
        (("--top-p", "0"), "top_p must be above 0 and at most 1, but it is 0.0"),
        (("--top-p", "1.5"), "top_p must be above 0 and at most 1, but it is 1.5"),
        (("--min-p", "1"), "min_p must be at least 0 and below 1, but it is 1.0"),
        (("--top-k", "0"), "top_k must be at least 1, but it is 0"),
        (("--words", "3", "--tokens", "4"), "words=3 and tokens=4 were given: give one of them"),
        (("--stop", ""), "stop must hold at least one character"),
        (("the \u03b1\u03b2\u03b1",), "which lacks '\u03b1', '\u03b2': choose other characters"),
    ],
)
def test_bad_sampling(settings, says, trained, refused):
    refused("generate", "--model", trained, *settings, says=(says,))


def test_a_prompt_with_unknown_words(words, refused):
    refused("generate", "the zebra met the yak", "--model", words, says=("words", "lacks 'zebra', 'met', 'yak'"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("--d-model", 30, "--num-heads", 4), "d_model 30 is not divisible by num_heads 4"),
        (("--num-groups", 3), "num_heads 2 is not divisible by num_groups 3"),
        (("--rotary-base", 500, "--positions", "alibi"), "rotary_base has no effect with positions 'alibi'"),
        (("--steps", 0), "steps of at least 1, got 0"),
        (("--learning-rate", "-1"), "learning_rate above 0, got -1.0"),
        (("--warmup", 0.8), "sum to at most 1, got 0.8 and 0.5"),
        (("--vocabulary", 1), "vocabulary has at least 2 tokens"),
    ],
)
def test_bad_settings_of_training(settings, says, text, tmp_path, refused):
    refused("train", text, "--out", tmp_path / "run", *TINY, *CHARACTERS, *settings, says=(says,))
    assert not (tmp_path / "run" / "checkpoint.json").exists()
    assert run("train", text, "--out", tmp_path / "run", *TINY, *CHARACTERS) == 0


# --- Bad output folders, and training that stops ------------------------------------------------------


def test_an_output_that_cannot_be_written(trained, text, tmp_path, refused):
    file = tmp_path / "file"
    file.write_text("precious", encoding="utf-8")
    refused("train", text, "--out", file, *TINY, says=("is a file: choose another --out",))
    refused("train", text, "--out", file / "run", *TINY, says=("a folder that can be written", "choose another --out"))
    refused("train", text, "--out", tmp_path, *TINY, says=("a new or empty folder", "holds 'file' and no run"))
    refused("train", text, "--out", tmp_path / "run", "--cache", file, *TINY, says=("cannot write token files into",))
    refused("evaluate", text, "--model", trained, "--cache", file, says=("cannot write token files into",))
    refused("look", "--text", text, "--model", trained, "--out", file / "a.html", says=("cannot write",))
    assert file.read_text(encoding="utf-8") == "precious"


def test_a_run_is_never_overwritten(copy, text, tmp_path, refused):
    before = files(copy)
    same = ("train", text, *TINY, *CHARACTERS)
    refused(*same, "--out", copy, says=("holds a run at step 4: add --resume to go on, or choose another --out",))
    refused(*same, "--out", copy, "--resume", says=("ended at step 4", "give a larger --steps to go on"))
    refused(*same, "--out", copy, "--resume", "--steps", 6, "--seed", 1, says=("whose seed is 0", "got seed 1"))
    refused(*same, "--out", tmp_path / "new", "--resume", says=("holds none: leave --resume out to start one",))
    assert files(copy) == before


def test_ctrl_c_saves_and_says_how_to_resume(text, trained, tmp_path, capsys):
    out = tmp_path / "run"
    same = ("train", text, "--out", out, *TINY, *CHARACTERS)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(3, patch)
        assert run(*same) == 130
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    line = (
        f"sightline train: stopped at step 3, saved in {out / 'step-3'}: the same with --resume (resume=True) goes on"
    )
    assert stderr.splitlines()[-1] == line
    assert run("generate", "the cat", "--model", out, "--tokens", 3) == 0
    assert run(*same, "--resume") == 0
    weights = Path("step-4", "model.safetensors")
    assert (out / weights).read_bytes() == (trained / weights).read_bytes()


def test_ctrl_c_before_the_first_step(text, tmp_path, capsys, monkeypatch):
    same = ("train", text, "--out", tmp_path / "run", *TINY, *CHARACTERS)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(0, patch)
        assert run(*same) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("sightline train: stopped")
    assert run(*same) == 0


def test_a_loss_that_turns_nan_keeps_the_last_good_checkpoint(text, tmp_path, capsys):
    out = tmp_path / "run"

    def gradients(self, original=Trainer._gradients):
        loss, norm = original(self)
        return loss * (float("nan") if self.step == 3 else 1), norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_gradients", gradients)
        assert run("train", text, "--out", out, *TINY, *CHARACTERS) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.splitlines()[-1] == (
        f"sightline train: the loss became nan at step 4: {out / 'step-2'} is the last good checkpoint; "
        "start again with a lower --learning-rate (now 0.005)"
    )
    assert run("generate", "the cat", "--model", out, "--tokens", 3) == 0


def test_a_learning_rate_too_large(text, tmp_path, capsys):
    assert run("train", text, "--out", tmp_path / "run", *TINY, *CHARACTERS, "--learning-rate", "1e30") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"sightline train: the .* became (nan|inf) at step \d: nothing was saved yet; .*", line)


# --- Looking ------------------------------------------------------------------------------------------


def in_page(page: Path) -> tuple[dict, str]:
    """What a page says of its first capture, and its text."""
    html = page.read_text(encoding="utf-8")
    (said,) = re.findall(r'id="manifest">(.*?)</script>', html)
    (tokens,) = re.findall(r'id="array-c0-keytokens">(.*?)</script>', html)
    return json.loads(said)["captures"][0], "".join(json.loads(tokens))


def test_look_takes_the_beginning_of_a_longer_text(trained, text, tmp_path, capsys):
    page = tmp_path / "attention.html"
    assert run("look", "--text", text, "--model", trained, "--out", page) == 0
    stdout, stderr = capsys.readouterr()
    assert (stdout, looked(stderr)) == (f"{page}: open it in a browser\n", ("16 tokens of cats",))
    said, shown = in_page(page)
    assert shown == TEXT[:16] and said["name"] == str(trained) and said["prompt"] is None


def test_look_reads_a_short_text_whole_though_a_corpus_is_cut(words, tmp_path, capsys):
    file = tmp_path / "short.txt"
    file.write_text("the cat ran", encoding="utf-8")  # a corpus is cut inside of "ran"
    assert run("look", "--text", file, "--model", words, "--out", tmp_path / "attention.html") == 0
    assert looked(capsys.readouterr().err) == ("3 tokens of short",)


def test_look_tells_of_unknown_words(words, tmp_path, capsys):
    file = tmp_path / "other.txt"
    file.write_text("the zebra met the yak", encoding="utf-8")
    assert run("look", "--text", file, "--model", words, "--out", tmp_path / "attention.html") == 0
    unknown = "3 of them are <unk>: words that the model's vocabulary lacks"
    assert looked(capsys.readouterr().err) == ("5 tokens of other", unknown)


def test_look_shows_what_the_model_writes(trained, text, tmp_path, capsys):
    page = tmp_path / "attention.html"
    same = ("look", "--text", text, "--model", trained, "--out", page)
    assert run(*same, "--tokens", 5, "--write", 7) == 0
    assert looked(capsys.readouterr().err)[0] == "5 tokens of cats and 7 that the model wrote"
    said, shown = in_page(page)
    assert (said["prompt"], said["keys"], shown[:5]) == (5, 12, TEXT[:5])
    assert run(*same, "--write", 4) == 0
    assert in_page(page)[0]["prompt"] == 12  # as much of the text as leaves room


def test_look_saves_and_looks_again_without_the_model(trained, text, tmp_path, capsys):
    folder, first, second = (tmp_path / name for name in ("seen", "first.html", "second.html"))
    assert run("look", "--text", text, "--model", trained, "--save", folder, "--out", first) == 0
    assert looked(capsys.readouterr().err)[1] == f"saved: sightline look --capture {folder} shows it again"
    assert run("look", "--capture", folder, "--out", second, "--heads", "0.1") == 0
    assert capsys.readouterr() == (f"{second}: open it in a browser\n", "")
    said, shown = in_page(second)
    assert shown == in_page(first)[1] and said["pairs"] == [[0, 1]] and said["name"] == str(folder)


def test_look_compares_two_models(trained, words, text, tmp_path, capsys):
    page = tmp_path / "attention.html"
    assert run("look", "--text", text, "--model", trained, "--compare", trained / "step-2", "--out", page) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert looked(first) == looked(second) == ("16 tokens of cats",)
    html = page.read_text(encoding="utf-8")
    names = [one["name"] for one in json.loads(re.findall(r'id="manifest">(.*?)</script>', html)[0])["captures"]]
    assert names == [str(trained), str(trained / "step-2")]
    assert run("look", "--text", text, "--model", trained, "--compare", words, "--tokens", 4, "--out", page) == 0
    texts = re.findall(r'keytokens">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert [json.loads(one) for one in texts] == [list("line"), ["line", "0:", "the", "cat"]]


def test_look_serves_by_default(trained, text, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("sightline.viewer.server.follow", lambda stages, **options: calls.append((*stages, options)))
    assert run("look", "--text", text, "--model", trained, "--layers", 0) == 0
    assert run("look", "--text", text, "--model", trained, "--port", 9000, "--no-open") == 0
    (((captures, goal), first), (_, second)) = calls
    assert list(captures) == [str(trained)] and len(captures[str(trained)].tokens) == 16 and goal is None
    assert first == {"port": 8765, "open_browser": False} and second == {"port": 9000, "open_browser": False}


def test_look_serves_what_a_model_writes_as_it_writes(trained, text, monkeypatch, capsys):
    monkeypatch.setattr("sightline.looking.PACE", 0.0)
    calls = []
    monkeypatch.setattr("sightline.viewer.server.follow", lambda stages, **options: calls.extend(stages))
    assert run("look", "--text", text, "--model", trained, "--tokens", 5, "--write", 3, "--heads", "0.1") == 0
    (seen,) = zip(*(captures.values() for captures, _ in calls), strict=True)
    assert [len(one.tokens) for one in seen] in ([5, 6, 7, 8], [5, 6, 8], [5, 7, 8], [5, 8]) and seen[-1].prompt == 5
    assert [goal for _, goal in calls] == [8] * (len(calls) - 1) + [None]
    assert all(one.heads == ((0, 1),) for one in seen)
    assert looked(capsys.readouterr().err)[0] == "5 tokens of cats and 3 that the model wrote"


@pytest.mark.parametrize(
    ("platform", "terminal", "variables", "expected"),
    [
        ("linux", True, {"DISPLAY": ":0"}, True),
        ("linux", True, {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("linux", True, {}, False),
        ("linux", False, {"DISPLAY": ":0"}, False),
        ("darwin", True, {}, True),
    ],
)
def test_a_browser_opens_where_there_is_a_screen(platform, terminal, variables, expected, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli.sys, "platform", platform)
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: terminal, raising=False)
    assert has_screen() is expected


def test_look_at_what_is_not_there(trained, words, text, tmp_path, refused):
    same = ("look", "--text", text, "--model", trained, "--out", tmp_path / "attention.html")
    refused(*same, "--tokens", 17, says=("--tokens must be from 1 to 16", "got 17"))
    refused(*same, "--tokens", 0, says=("--tokens must be from 1 to 16", "got 0"))
    refused(*same, "--tokens", 10, "--write", 7, says=("--tokens must be from 1 to 9", "got 10"))
    refused(*same, "--write", 16, says=("--write must be from 0 to 15", "got 16"))
    refused(*same, "--write", 2, "--compare", words, says=("need two models with the same tokens",))
    refused(*same, "--layers", 1, says=("layers are 0 to 0, got 1",))
    refused(*same, "--layers", says=("no layer asked for",))
    refused(*same, "--heads", "all", says=("heads are pairs of layer and head such as 0.1,2.3; got 'all'",))
    refused(*same, "--heads", "1.0", says=("layers are 0 to 0, got 1",))
    refused(*same, "--heads", "0.2", says=("heads are 0 to 1, got head 2",))
    refused(*same, "--port", 80, says=("--out writes a page and serves none",))
    refused(*same, "--save", tmp_path / "x", "--compare", words, says=("--save saves one capture",))
    refused(*same, "--compare", trained, says=("--compare takes another model, and this is --model's",))
    refused(*same, "--target", "a", says=("--target is of a translation",))
    refused("look", "--text", text, says=("needs --model and --text, or the --capture",))
    refused("look", "--model", trained, says=("needs --model and --text, or the --capture",))
    refused("look", "--capture", trained, says=("holds no capture.json",))
    refused("look", "--capture", trained, "--tokens", 3, says=("--capture is a capture already",))
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_is_stopped_leaves_nothing_behind(trained, tmp_path, number):
    command = [
        sys.executable,
        "-m",
        "sightline",
        "look",
        "--model",
        str(trained),
        "--text",
        "-",
        "--port",
        "0",
        "--no-open",
    ]
    options = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": os.environ | {"TMPDIR": str(tmp_path)},
    }
    # A shell that starts a program in the background lets it ignore Ctrl-C, and so does a test runner that it started.
    with subprocess.Popen(
        command, **options, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    ) as process:
        process.stdin.write(TEXT)
        process.stdin.close()
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        assert [folder.name.startswith("sightline-") for folder in tmp_path.iterdir()] == [True]
        process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGINT else 143)
    assert not any(tmp_path.iterdir())


def test_the_program_ends_with_the_code_of_main(monkeypatch):
    monkeypatch.setattr(cli, "main", lambda: 130)
    with pytest.raises(SystemExit, match="130"):
        cli.entry()
