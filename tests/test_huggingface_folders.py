"""`sightline generate` and `look` on folders of transformers that are no `Decoder` of ours."""

import json
import shutil
import socket
import string
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from families import FAMILIES, build  # noqa: E402 (after the skip)

import sightline as sl  # noqa: E402
from sightline.cli import main  # noqa: E402
from sightline.generation import SampleConfig, draw  # noqa: E402
from sightline.huggingface.folders import Foreign, is_foreign  # noqa: E402
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
    for how, line in (
        ("missing", "lack 1 of the model's tensors, such as model.norm.weight: copy"),
        ("cut", "cut/model.safetensors to be a whole safetensors file"),
    ):
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
    assert code == 2 and "--tokens must be from 1 to 128, what the model's context holds; got 5000" in told
    code, _, told = run(capsys, "look", "--model", gemma, "--text", __file__, "--tokens", 120, "--write", 20)
    assert code == 2 and "--tokens must be from 1 to 108, what the model's context holds; got 120" in told


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
    model = Foreign(gemma)
    whole = "".join(model.write("the", SampleConfig(tokens=40, seed=1)))
    assert (
        "".join(model.write("the", SampleConfig(tokens=40, seed=1, stop=whole[5:8])))
        == whole[: whole.index(whole[5:8])]
    )
    assert len("".join(model.write("the", SampleConfig(words=2, seed=1))).split()) <= 3
    assert torch.is_grad_enabled()


def test_without_a_prompt_it_starts_as_a_text_does(gemma):
    model = Foreign(gemma)
    (line_end,) = model.encode("\n")
    starts = {"bos_token": [3], "eos_token": [4], None: [line_end]}
    for name, start in starts.items():
        model = Foreign(gemma)
        if name is not None:
            setattr(model.tokenizer, name, model.tokenizer.convert_ids_to_tokens(start[0]))
        written = "".join(model.write("", SampleConfig(tokens=5, seed=1)))
        expected = list(islice(model._tokens(start, SampleConfig(tokens=5, seed=1)), 5))
        assert written == model.decode([*start, *expected])[1:] and len(written) == 5


@pytest.mark.filterwarnings("always::sightline.generation.ContextWarning")
def test_a_text_outgrows_the_context_with_a_note_as_a_decoders_does(gemma, capsys):
    options = ("--tokens", 80, "--seed", 3, "--temperature", 0.5)
    prompt = "the cat sat on the mat " * 3
    code, printed, told = run(capsys, "generate", "--model", gemma, prompt, *options)
    assert code == 0 and told.count("outgrown the model's context of 128 tokens") == 1, told
    # The definition: no cache, and the newer half whenever there are more than the context holds.
    model, config = Foreign(gemma), SampleConfig(tokens=80, seed=3, temperature=0.5)
    generator = config.generator()
    ids = model.encode(prompt)
    window = list(ids)
    for _ in range(80):
        window = window if len(window) <= 128 else window[-64:]
        with torch.no_grad():
            token = draw(model.model(torch.tensor([window])).logits[0, -1], config, generator)
        ids, window = [*ids, token], [*window, token]
    assert printed == model.decode(ids) + "\n"
    code, _, told = run(capsys, "generate", "--model", gemma, prompt * 4, "--tokens", 1)
    assert code == 0 and "outgrown" in told


def edited(gemma, folder, **changes):
    """A copy of a model with another config.json."""
    shutil.copytree(gemma, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def larger_tokenizer(folder):
    save_tokenizer(folder, string.printable)


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def part_lost(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def nothing(folder):
    pass


CODE = {"AutoConfig": "configuration_w.W", "AutoModelForCausalLM": "modeling_w.M"}
REFUSED = {
    "no tokenizer": (no_tokenizer, {}, "holds no tokenizer.json, so it knows no text: put the model's own there"),
    "larger tokenizer": (larger_tokenizer, {}, "the model has 61 tokens, but the tokenizer has one with the id 100"),
    "broken tokenizer": (broken_tokenizer, {}, "cannot read the tokenizer in"),
    "pickled": (pickled, {}, "can run any program when it is opened, so it is refused; save the model again"),
    "part lost": (part_lost, {}, "model-1.safetensors, but it is missing"),
    "other shapes": (nothing, {"intermediate_size": 50}, "6 tensors in"),
    "own code": (nothing, {"model_type": "wonder", "auto_map": CODE}, "code of its own, which may do anything and"),
    "newer": (nothing, {"model_type": "wonder"}, "knows no model_type 'wonder'; pip install --upgrade"),
    "no number": (nothing, {"num_attention_heads": 0}, "cannot open"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_folder_that_is_not_whole_is_refused_with_what_to_do(how, gemma, tmp_path, capsys):
    change, settings, line = REFUSED[how]
    folder = edited(gemma, tmp_path / "bad", **settings)
    change(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    look = ("look", "--model", folder, "--text", tmp_path / "text.txt", "--out", tmp_path / "page.html")
    for command in (("generate", "--model", folder, "the"), look):
        code, printed, told = run(capsys, *command)
        assert code == 2 and line in told and told.count("\n") == 1 and not printed, told
    assert not (tmp_path / "page.html").exists()


def test_a_token_that_was_added_beyond_the_models_is_refused_where_the_text_has_it(gemma, tmp_path, capsys):
    folder = edited(gemma, tmp_path / "added")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    while len(tokenizer) < 61:
        tokenizer.add_tokens([f"<{len(tokenizer)}>"])
    tokenizer.add_tokens(["<picture>"])
    tokenizer.save_pretrained(folder)
    code, printed, told = run(capsys, "generate", "--model", folder, "the cat", "--tokens", 2, "--seed", 1)
    assert code == 0, told
    code, printed, told = run(capsys, "generate", "--model", folder, "the <picture>", "--tokens", 2)
    assert code == 2 and "the model has 61 tokens, and '<picture>' has the id 61: leave it out" in told and not printed


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_what_writes_no_text_is_for_python(family, tmp_path, capsys):
    build(family, "eager").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, TEXT)
    for command in (("generate", "--model", tmp_path, "the"), ("look", "--model", tmp_path, "--text", __file__)):
        code, _, told = run(capsys, *command)
        assert code == 2 and "is no language model that writes" in told and "sl.huggingface.watch" in told
        assert told.count("\n") == 1


def test_the_decoder_of_a_pair_writes_where_it_was_saved_alone(tmp_path, capsys):
    _, shape, sizes = FAMILIES["bart"]
    transformers.BartForCausalLM(getattr(transformers, shape)(**sizes)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, TEXT)
    code, printed, told = run(capsys, "generate", "--model", tmp_path, "the cat", "--tokens", 2, "--seed", 1)
    assert code == 0 and printed.startswith("the cat"), told


def test_a_model_without_attention_has_none_to_show(tmp_path, capsys):
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    save_tokenizer(tmp_path / "mamba", TEXT)
    options = ("--text", __file__, "--tokens", 8, "--out", tmp_path / "page.html")
    code, _, told = run(capsys, "look", "--model", tmp_path / "mamba", *options)
    assert code == 2 and "mamba has no attention to show: it is a MambaForCausalLM" in told and told.count("\n") == 1
    code, printed, _ = run(capsys, "generate", "--model", tmp_path / "mamba", "the cat", "--tokens", 3, "--top-k", 1)
    model = transformers.MambaForCausalLM.from_pretrained(tmp_path / "mamba")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "mamba")
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    for _ in range(3):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert (code, printed) == (0, tokenizer.decode(ids[0]) + "\n")


def test_a_command_that_does_not_take_it_says_why_and_which_models_it_takes(gemma, capsys):
    why = "the model_type 'gemma2' cannot be opened as a Decoder; llama, mistral, qwen2, qwen3, gpt2, opt can; this "
    code, _, told = run(capsys, "evaluate", "embedded", "--model", gemma)
    assert code == 2 and f"{why}command takes a run or a Decoder's folder; generate and look take any causal" in told
    code, _, told = run(capsys, "translate", "--model", gemma, "the cat")
    assert code == 2 and f"{why}command takes a run of sightline train --task translate" in told
    code, _, told = run(capsys, "look", "--model", gemma, "--text", "the cat", "--target", "cat")
    assert code == 2 and "--target is of a translation" in told


def test_a_layer_that_is_not_there_is_told(gemma, tmp_path, capsys):
    options = ("look", "--model", gemma, "--text", __file__, "--tokens", 5, "--out", tmp_path / "page.html")
    for given, line in ((["--layers", "0,7"], "has no layer 7"), (["--layers"], "no layer asked for; give some, such")):
        code, _, told = run(capsys, *options, *given)
        assert code == 2 and line in told and told.count("\n") == 1, told


def test_the_notes_of_look_are_those_of_a_decoder(gemma, tmp_path, capsys):
    folder = edited(gemma, tmp_path / "unknown")
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (tmp_path / "text.txt").write_text("the cat é\n" * 9)
    options = ("--text", tmp_path / "text.txt", "--tokens", 12, "--write", 3, "--out", tmp_path / "page.html")
    code, _, told = run(capsys, "look", "--model", folder, *options)
    first, second = told.splitlines()
    assert code == 0 and first.startswith("note: captured the first 12 tokens of text and 3 that the model wrote in ")
    assert first.endswith(" GB of memory at most") and "are <unk>: text that the model's vocabulary lacks" in second
