"""`sightline generate` and `look` on folders of transformers that are no `Decoder` of ours."""

import json
import shutil
import socket
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from families import build  # noqa: E402 (after the skip)

import sightline as sl  # noqa: E402
from sightline.cli import main  # noqa: E402
from sightline.huggingface.folders import is_foreign  # noqa: E402
from sightline.tokenizers import Tokenizer  # noqa: E402

TEXT = "the cat sat on the mat and the dog sat on the cat\n" * 4


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A model with a soft cap, which is no `Decoder`."""
    sl.huggingface.enable()
    folder = tmp_path_factory.mktemp("gemma")
    build("gemma2", "eager").save_pretrained(folder)
    save_tokenizer(folder, TEXT + string.digits + string.ascii_letters[:48] + " \n")
    return folder


def save_tokenizer(folder, text):
    Tokenizer.train("characters", [text]).save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def run(capsys, *arguments):
    code = main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_generate_writes_the_likeliest_text_of_eager_attention(gemma, capsys):
    options = ("--top-k", 1, "--tokens", 6)
    code, printed, _ = run(capsys, "generate", "--model", gemma, "the cat", *options)
    assert code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma)
    model = transformers.AutoModelForCausalLM.from_pretrained(gemma, attn_implementation="eager")
    given = tokenizer("the cat", return_tensors="pt").input_ids
    written = model.generate(given, max_new_tokens=6, do_sample=False)
    assert printed == tokenizer.decode(written[0]) + "\n"


def test_look_saves_a_capture_and_writes_a_page(gemma, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    options = (
        "--tokens",
        20,
        "--write",
        3,
        "--layers",
        1,
        "--out",
        tmp_path / "page.html",
        "--save",
        tmp_path / "seen",
    )
    code, _, told = run(capsys, "look", "--model", gemma, "--text", tmp_path / "text.txt", *options)
    assert code == 0, told
    seen = sl.load_capture(tmp_path / "seen")
    assert (seen.layers, seen.prompt, len(seen.tokens)) == ((1,), 20, 23)
    assert "Gemma2" in (tmp_path / "page.html").read_text()


def test_two_models_are_compared_one_of_which_is_a_decoder(gemma, tmp_path, capsys):
    tokenizer = Tokenizer.train("characters", [TEXT])
    decoder = sl.Decoder(sl.DecoderConfig.modern(vocabulary=len(tokenizer), context=64, d_model=32, num_layers=1))
    decoder.tokenizer = tokenizer
    ours = sl.save(tmp_path / "ours", decoder)
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--text", tmp_path / "text.txt", "--tokens", 20, "--out", tmp_path / "page.html")
    code, _, told = run(capsys, "look", "--model", ours, "--compare", gemma, *options)
    assert code == 0 and told.count("captured") == 2, told
    text = (tmp_path / "page.html").read_text()
    assert str(gemma) in text and str(ours) in text
    code, _, told = run(capsys, "look", "--model", ours, "--compare", gemma, *options, "--write", 3)
    assert code == 2 and "--write and --compare" in told and told.count("\n") == 1


def test_ids_that_the_tokenizer_does_not_know_are_shown_as_numbers(gemma, tmp_path):
    save_tokenizer(tmp_path, "abc")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(gemma, attn_implementation="sightline")
    with sl.huggingface.watch(model) as seen, torch.no_grad():
        model(torch.tensor([[1, 2, 60]]))
    assert seen.capture(tokenizer).tokens == ("a", "b", "<60>")


def test_what_cannot_be_opened_is_one_line(gemma, tmp_path, capsys, monkeypatch):
    def refused(*_, **__):
        raise OSError("no network in a test")

    monkeypatch.setattr(socket.socket, "connect", refused)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    for folder in (bad, tmp_path / "nothing"):
        code, _, told = run(capsys, "generate", "--model", folder, "the")
        assert code == 2 and told.count("\n") == 1, told
    for how, line in (("missing", "lack 1 of the model's tensors, such as model.norm.weight"), ("cut", "cannot open")):
        shutil.copytree(gemma, tmp_path / how)
        weights = tmp_path / how / "model.safetensors"
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
        if how == "cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        code, _, told = run(capsys, "generate", "--model", tmp_path / how, "the")
        assert code == 2 and line in told and told.count("\n") == 1, told
    code, _, told = run(capsys, "look", "--model", gemma, "--text", __file__, "--tokens", 5000)
    assert code == 2 and "context of 128 together" in told


def test_a_name_of_the_hub_is_one_whose_first_part_is_no_folder(tmp_path, monkeypatch, gemma):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_foreign(Path("owner/name")) and is_foreign(gemma)
    assert not any(map(is_foreign, (Path("runs/name"), Path("name"), Path("/a/b"), Path("../name"), tmp_path)))


def test_without_a_network_the_hub_is_asked_once(tmp_path, monkeypatch, capsys):
    asked = []

    def nobody(*given, **_):
        asked.append(given)
        raise socket.gaierror("no network in a test")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    code, _, told = run(capsys, "generate", "--model", "owner/name", "the")
    assert code == 2 and told.count("\n") == 1 and len(asked) <= 2, told
    assert "owner/name as a language model: it is no folder here, and the hub does not give it" in told


def test_writing_stops_where_it_is_told(gemma):
    from sightline.generation import SampleConfig
    from sightline.huggingface.folders import Foreign

    model = Foreign(gemma)
    whole = "".join(model.write("the", SampleConfig(tokens=40, seed=1)))
    assert (
        "".join(model.write("the", SampleConfig(tokens=40, seed=1, stop=whole[5:8])))
        == whole[: whole.index(whole[5:8])]
    )
    assert len("".join(model.write("the", SampleConfig(words=2, seed=1))).split()) <= 3
    with pytest.raises(ValueError, match="from 1 to 127 tokens for this model, got 0"):
        list(model.write("", SampleConfig(tokens=1)))
    assert torch.is_grad_enabled()
