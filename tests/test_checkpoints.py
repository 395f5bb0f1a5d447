import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sightline import checkpoints, files
from sightline.checkpoints import load, save, step_folder
from sightline.files import check_whole, replace_text, whole, write_manifest
from sightline.models import Decoder, DecoderConfig
from sightline.tokenizers import Tokenizer

TEXT = "the cat sat on the mat\nand the dog sat on the cat\n"


def decoder(preset=DecoderConfig.modern, **changes):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train("characters", [TEXT])
    small = {"context": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, **changes}
    model = Decoder(preset(vocabulary=len(tokenizer), **small))
    model.tokenizer = tokenizer
    return model.eval()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "model", decoder())


SHAPES = [
    (DecoderConfig.modern, {}),
    (DecoderConfig.modern, {"tied": False, "num_groups": 1}),
    (DecoderConfig.classic, {}),
    (DecoderConfig.classic, {"positions": "learned", "tied": False}),
    (DecoderConfig.modern, {"positions": "alibi"}),
]


@pytest.mark.parametrize(("preset", "changes"), SHAPES)
def test_what_is_saved_comes_back(tmp_path, preset, changes):
    model = decoder(preset, **changes)
    again = load(save(tmp_path / "model", model))
    tokens = torch.tensor([model.tokenizer.encode("the cat")])
    assert torch.equal(again(tokens), model(tokens))
    assert again.config == model.config
    assert again.tokenizer.hash == model.tokenizer.hash
    assert not again.training


def test_the_files_and_nothing_else(saved):
    assert names(saved) == ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
    assert names(saved.parent) == [saved.name]
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config.items() >= {"format": 1, "model": "decoder", "tokenizer": "characters", "d_model": 16}.items()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_the_files_follow_the_umask(saved):
    assert {(saved / name).stat().st_mode for name in names(saved)} == {(saved / "config.json").stat().st_mode}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once(tmp_path, tied):
    model = decoder(tied=tied)
    stored = load_file(save(tmp_path / "model", model) / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters
    if tied:
        again = load(tmp_path / "model")
        assert again.num_parameters == model.num_parameters


def test_weights_come_back_in_their_dtype_and_own_their_memory(tmp_path):
    model = decoder().to(torch.bfloat16)
    again = load(save(tmp_path / "model", model))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.embedding.weight, model.embedding.weight)


def test_a_model_without_a_tokenizer(tmp_path):
    model = decoder()
    model.tokenizer = None
    assert load(save(tmp_path / "model", model)).tokenizer is None
    assert not (tmp_path / "model" / "tokenizer.json").exists()


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_over_something_is_refused(saved):
    with pytest.raises(ValueError, match=r"new or empty folder, but .*model holds something"):
        save(saved, decoder())
    with pytest.raises(ValueError, match="holds something"):
        save(saved / "config.json", decoder())


def test_saving_into_an_empty_folder(tmp_path):
    assert load(save(tmp_path, decoder())).config.d_model == 16


# --- Whole or not at all ------------------------------------------------------------------------------


def half_written(tensors, file):
    file.write_bytes(b"half a tensor")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_file", half_written)
    with pytest.raises(ValueError, match=r"expected to write .*model, but: .*No space left on device; free some"):
        save(tmp_path / "model", decoder())
    assert names(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs the limits of POSIX")
def test_the_real_library_on_a_full_disk(tmp_path):
    program = """
import resource, sys
from sightline.checkpoints import save
from sightline.models import Decoder, DecoderConfig
model = Decoder(DecoderConfig(vocabulary=99, context=8, d_model=64, num_layers=1, num_heads=2))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(sys.argv[1], model)
except ValueError as error:
    print(error)
"""
    target = tmp_path / "model"
    out = subprocess.run([sys.executable, "-c", program, target], capture_output=True, text=True, check=True).stdout
    assert out.startswith(f"expected to write {target}, but: ") and out.count("\n") == 1
    assert names(tmp_path) == []


def test_ctrl_c_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path):
    (tmp_path / ".writing-folder").mkdir()
    (tmp_path / ".writing-folder" / "half").write_bytes(b"")
    with whole(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("all", encoding="utf-8")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["file"]


def test_replacing_a_text_that_cannot_be_written_keeps_the_old(tmp_path, monkeypatch):
    file = tmp_path / "file"
    replace_text(file, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        replace_text(file, "new")
    assert file.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["file"]


def test_a_disk_on_which_nothing_can_be_removed_either(tmp_path, monkeypatch):
    """On a read-only disk, removing what is not there is an error too."""

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, read_only)
    with pytest.raises(ValueError, match=r"expected to write .*file, but: .*Read-only file system; free some space"):
        replace_text(tmp_path / "file", "new")


# --- Bad checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def by_hand(saved):
    """A checkpoint without a manifest, whose files are believed as far as they make sense together."""
    (saved / "manifest.json").unlink()
    return saved


def test_a_checkpoint_put_together_by_hand_needs_no_manifest(by_hand):
    assert load(by_hand).config == decoder().config


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_byte_is_found_wherever_it_is(saved, name):
    file = saved / name
    content = file.read_bytes()
    before = load(saved).state_dict()
    generator = random.Random(name)
    for at in {0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(25))}:
        damaged = bytearray(content)
        damaged[at] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        try:
            again = load(saved).state_dict()
        except ValueError as error:
            assert str(saved) in str(error) and (name in str(error) or name == "manifest.json")
            assert "\n" not in str(error)
        else:  # white space of the manifest, which says the same with another
            assert name == "manifest.json" and chr(content[at]).isspace()
            assert all(torch.equal(again[key], before[key]) for key in before)
    file.write_bytes(content)
    check_whole(saved)


def test_a_file_that_a_person_changed_is_told_apart_from_nothing(saved):
    change_config(saved, rotary_base=500.0)
    with pytest.raises(ValueError, match=r"config.json is damaged: expected the sha256 .* remove manifest.json"):
        load(saved)
    write_manifest(saved)
    assert load(saved).config.rotary_base == 500


def test_a_manifest_of_something_else(saved):
    (saved / "manifest.json").write_text('{"splits": []}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest.json to hold the sha256 of files, got None: it is damaged"):
        load(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=rf"the file .*{name}, but it is missing"):
        load(saved)


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_a_file_instead_of_its_folder(saved):
    with pytest.raises(ValueError, match=r"got the file .*: give the folder that a run was written to"):
        load(saved / "model.safetensors")


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "last.CKPT"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="a pickled file can run any program when it is opened, so it is refused"):
        load(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(by_hand, keep):
    file = by_hand / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"expected .*model.safetensors to be a whole safetensors file, but"):
        load(by_hand)


def test_foreign_weights(by_hand):
    (by_hand / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ValueError, match="to be a whole safetensors file"):
        load(by_hand)


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_missing_tensor(by_hand):
    change_tensors(by_hand, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(ValueError, match=r"to hold the tensor norm.weight, but it is missing"):
        load(by_hand)


def test_an_extra_tensor(by_hand):
    change_tensors(by_hand, lambda tensors: tensors.update(more=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"expected no tensor more in .*model.safetensors"):
        load(by_hand)


def test_a_tensor_of_another_shape(by_hand):
    change_tensors(by_hand, lambda tensors: tensors.update({"norm.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"norm.weight in .* the shape \(16,\) .* has \(3,\)"):
        load(by_hand)


def test_a_tensor_of_whole_numbers(by_hand):
    change_tensors(by_hand, lambda tensors: tensors.update({"norm.weight": torch.zeros(16, dtype=torch.int32)}))
    with pytest.raises(ValueError, match=r"norm.weight in .* to hold floats, but it holds torch.int32"):
        load(by_hand)


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    config = {key: value for key, value in config.items() if value != "remove"}
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layer": 2}, r"in .*config.json: .*unknown key 'num_layer'; did you mean 'num_layers'"),
        ({"d_model": "16"}, r"in .*config.json: .*d_model must be a whole number of at least 1, got '16'"),
        ({"num_heads": 3}, r"in .*config.json: .*3"),
        ({"norm": "batch"}, r"norm must be one of rms, layer; got 'batch'"),
        ({"rotary_base": "remove"}, r"config.json to hold the key 'rotary_base', but it is missing"),
        ({"d_ff": 99}, r"the shape \(99, 16\) that config.json asks for, but it has \(\d+, 16\)"),
        ({"format": 2}, r"to say format 1 and model 'decoder' or 'encoder-decoder', got 2 and 'decoder'"),
        ({"format": "remove", "model": "remove"}, r"got None and None: it was written by another program"),
        ({"vocabulary": 99}, r"to hold the 99 tokens of the kind '\w+' that config.json asks for, got \d+"),
        ({"tokens_sha256": "0" * 64}, r"to hold the tokens that the model was trained with, got others"),
        ({"tokenizer": "words"}, r"tokens of the kind 'words' that config.json asks for, got \d+ of 'characters'"),
    ],
)
def test_a_bad_config(by_hand, changes, message):
    change_config(by_hand, **changes)
    with pytest.raises(ValueError, match=message):
        load(by_hand)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "to be JSON, but"), (b"\xff\xfe", "to be JSON, but"), (b"[]", "a JSON object, but it holds a list")],
)
def test_a_config_that_is_no_json(by_hand, content, message):
    (by_hand / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(by_hand)


def test_a_damaged_tokenizer(by_hand):
    (by_hand / "tokenizer.json").write_bytes(b'{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged"):
        load(by_hand)


def test_the_tokenizer_of_another_model(by_hand):
    other = Tokenizer.train("characters", ["abc"])
    other.save(by_hand / "tokenizer.json")
    with pytest.raises(ValueError, match=r"to hold the \d+ tokens of .* that config.json asks for, got 4"):
        load(by_hand)


@pytest.mark.parametrize("manifest", [True, False])
def test_errors_take_one_line(saved, manifest):
    if not manifest:
        (saved / "manifest.json").unlink()
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (saved / name).write_bytes(b"{")
        with pytest.raises(ValueError) as caught:
            load(saved)
        assert "\n" not in str(caught.value)


# --- A run's folder ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    for step, seed in ((100, 1), (200, 2)):
        model = decoder()
        with torch.no_grad():
            model.embedding.weight.fill_(seed)
        save(tmp_path / f"step-{step}", model)
    pointer = {"best": "step-100", "latest": "step-200"}
    replace_text(tmp_path / "checkpoint.json", json.dumps(pointer))
    return tmp_path


def test_a_run_opens_at_its_best(run):
    assert load(run).embedding.weight[0, 0] == 1
    assert load(run / "step-200").embedding.weight[0, 0] == 2
    assert step_folder(run) == run / "step-100"


@pytest.mark.parametrize(
    ("pointer", "message"),
    [
        ({"latest": "step-200"}, r"'best' in .*checkpoint.json to name a step such as 'step-100', got None"),
        ({"best": "../step-1", "latest": "step-200"}, r"got '../step-1'"),
        ({"best": "step-300", "latest": "step-200"}, r"the folder .*step-300 .* names as best, but it is missing"),
    ],
)
def test_a_bad_pointer(run, pointer, message):
    (run / "checkpoint.json").write_text(json.dumps(pointer), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(run)


@pytest.mark.parametrize(("given", "good"), [("", "step-200"), ("step-100", "step-200"), ("step-200", "step-100")])
def test_a_damaged_step_names_the_one_that_is_whole(run, given, good):
    folder = run / (given or "step-100")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model.safetensors is damaged: .*; .*{good} is whole: give that"):
        load(run / given)
    (run / good / "config.json").unlink()
    with pytest.raises(ValueError, match=r"; copy it again, or, if you changed it yourself, remove manifest.json$"):
        load(run / given)


@pytest.mark.parametrize("text", ["{", '{"best": "step-300", "latest": "step-200"}'])
def test_a_damaged_pointer_names_a_step_that_is_whole(run, text):
    (run / "checkpoint.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"checkpoint.json .*; .*step-200 is whole: give that"):
        load(run)


def test_stored_tensors_have_the_models_names(saved):
    with safe_open(saved / "model.safetensors", framework="pt") as stored:
        assert set(stored.keys()) == set(dict(decoder().named_parameters()))
