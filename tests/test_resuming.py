"""What is not the run in a folder is not gone on with, and what is damaged is named."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import CONFIG, DATA, decoder, token_file

from sightline.files import write_manifest
from sightline.tokenizers import Tokenizer
from sightline.training import fit

OTHERS = [
    ({"model": {"d_model": 32}}, {}, r"expected the model of the run .* whose d_model is 16 in .*, got d_model 32"),
    ({"model": {"tied": False}}, {}, r"whose tied is True in .*, got tied False"),
    (
        {"data": token_file(2001, 0)},
        {},
        r"text of the run to resume, got another than .*step-2 has learned from",
    ),
    ({}, {"seed": 1}, r"expected the config of the run .* whose seed is 0 in .*, got seed 1: give the same, or"),
    ({}, {"learning_rate": 0.02}, r"whose learning_rate is 0.01 in .*, got learning_rate 0.02"),
    ({}, {"betas": (0.8, 0.9)}, r"whose betas is \[0.9, 0.99\] in .*, got betas \[0.8, 0.9\]"),
]


@pytest.mark.parametrize(("given", "settings", "message"), OTHERS)
def test_another_run_cannot_be_resumed(tmp_path, given, settings, message):
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=2))
    before = (tmp_path / "log.jsonl").read_bytes()
    data = replace(DATA, train=given["data"]) if "data" in given else DATA
    config = replace(CONFIG, steps=4, **settings)
    with pytest.raises(ValueError, match=message):
        fit(decoder(**given.get("model", {})), data, tmp_path, config, resume=True)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_another_tokenizer_cannot_be_resumed(tmp_path):
    model = decoder()
    model.tokenizer = Tokenizer.train("characters", ["abcdef"])
    fit(model, DATA, tmp_path, replace(CONFIG, steps=2))
    model.tokenizer = Tokenizer.train("characters", ["fedcbx"])
    with pytest.raises(ValueError, match="expected the tokenizer of the run to resume"):
        fit(model, DATA, tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize("name", ["training.json", "training.safetensors", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_state_is_named(tmp_path, name, damage):
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=2))
    file = tmp_path / "step-2" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=name):
        fit(decoder(), DATA, tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", "abc", r"'step' in .*training.json to be int, got 'abc'"),
        ("seconds", None, r"'seconds' in .*training.json to be int \| float, got None"),
        ("data", "x", r"'data' in .*training.json to be dict, got 'x'"),
        ("config", [], r"'config' in .*training.json to be dict, got \[\]"),
        ("best_step", "2", r"'best_step' in .*training.json to be int \| None, got '2'"),
        ("advice", {"a": 1}, r"training.json: expected advice of steps, mean, .*, got {'a': 1}"),
        ("start", {"a": 1}, r"'start' in .*training.json to hold bytes, loss, tokens, unknown, got {'a': 1}"),
    ],
)
def test_a_foreign_state_is_named(tmp_path, key, value, message):
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=2))
    file = tmp_path / "step-2" / "training.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    write_manifest(file.parent)
    with pytest.raises(ValueError, match=message):
        fit(decoder(), DATA, tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize("name", ["embedding.weight.step", "blocks.0.attention.query.weight.momentum_buffer"])
@pytest.mark.parametrize("tensor", [None, torch.zeros(3), torch.zeros(3, dtype=torch.uint8)])
def test_a_foreign_tensor_of_the_state_is_named(tmp_path, name, tensor):
    fit(decoder(), DATA, tmp_path, replace(CONFIG, steps=2))
    file = tmp_path / "step-2" / "training.safetensors"
    tensors = {**load_file(file), name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)
    write_manifest(file.parent)
    with pytest.raises(ValueError, match=f"expected the training state {name} of shape"):
        fit(decoder(), DATA, tmp_path, CONFIG, resume=True)
