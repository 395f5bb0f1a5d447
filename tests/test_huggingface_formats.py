"""Folders of transformers: written by us and opened there, written there and opened by us, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import sightline as sl
from sightline.cli import main
from sightline.huggingface.families import FAMILIES, place
from sightline.huggingface.settings import read_settings, write_settings

TEXT = "the cat sat on the mat\nand the dog <unk> ate, Ärger  twice.\n" * 3
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
OPT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
THEIRS = {
    "llama": ("llama", LLAMA),
    "llama, biases, tied, wide heads": (
        "llama",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32},
    ),
    "llama 3.1": ("llama", LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "mistral, window": ("mistral", LLAMA | {"sliding_window": 7}),
    "mistral, no window": ("mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("qwen2", LLAMA | {"rms_norm_eps": 1e-4}),
    "qwen2, window": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 32, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2 | {"layer_norm_epsilon": 1e-3}),
    "gpt2, untied, relu": (
        "gpt2",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 100, "activation_function": "relu"},
    ),
    "opt": ("opt", OPT | {"activation_function": "gelu"}),
    "opt, post-norm": ("opt", OPT | {"do_layer_norm_before": False}),
}
OURS = {
    "modern": sl.DecoderConfig.modern(vocabulary=97, context=64, d_model=64, num_layers=2, num_groups=2),
    "window": sl.DecoderConfig.modern(vocabulary=97, context=64, d_model=64, num_layers=2, window_before=3),
    "classic": sl.DecoderConfig.classic(vocabulary=97, context=64, d_model=64, num_layers=2),
    "pre-norm": sl.DecoderConfig.classic(vocabulary=97, context=64, d_model=64, num_layers=2, norm_first=True),
}


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers", reason="compares with transformers: pip install transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def bold(model):
    """The same model with large random numbers in all places, so that nothing hides behind a small one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / parameter.shape[-1] ** 0.5 + (parameter.ndim == 1))
    return model.eval()


def ours(name: str = "modern", kind: str | None = None) -> sl.Decoder:
    config = OURS[name]
    if kind is None:
        return bold(sl.Decoder(config))
    tokenizer = sl.Tokenizer.train(kind, [TEXT], 300 if kind == "bpe" else None)
    model = bold(sl.Decoder(sl.DecoderConfig.from_dict(config.to_dict() | {"vocabulary": len(tokenizer)})))
    model.tokenizer = tokenizer
    return model


def theirs(transformers, name: str):
    kind, settings = THEIRS[name]
    config = transformers.AutoConfig.for_model(kind, **settings, bos_token_id=None, eos_token_id=None)
    return bold(transformers.AutoModelForCausalLM.from_config(config))


def some_tokens(most: int = 97) -> torch.Tensor:
    return torch.randint(most, (2, 64), generator=torch.Generator().manual_seed(5))


def rewrite(file: Path, **changes) -> None:
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value != "drop"}))


# Theirs, opened by us


@torch.no_grad()
@pytest.mark.parametrize("name", THEIRS)
def test_their_model_gives_the_same_logits_here_and_again_there(transformers, tmp_path, name):
    model = theirs(transformers, name)
    model.save_pretrained(tmp_path / "theirs")
    opened = sl.load(tmp_path / "theirs")
    tokens = some_tokens()
    logits = model(tokens).logits
    torch.testing.assert_close(opened(tokens), logits, rtol=0, atol=1e-5)
    sl.save(tmp_path / "back", opened, format="huggingface")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(again(tokens).logits, logits, rtol=0, atol=1e-5)
    assert sl.load(tmp_path / "back").config == opened.config


@pytest.mark.slow
@torch.no_grad()
def test_each_special_setting_would_be_missed(transformers, tmp_path):
    for name, change in {
        "mistral, window": {"sliding_window": None},
        "llama 3.1": {"rope_parameters": "drop", "rope_scaling": None, "rope_theta": 500000.0},
        "gpt2": {"layer_norm_epsilon": 1e-5},
        "opt": {"activation_function": "gelu_new"},
        "opt, post-norm": {"num_attention_heads": 2},
        "qwen3": {"rms_norm_eps": 1e-2},
    }.items():
        model = theirs(transformers, name)
        model.save_pretrained(tmp_path / name)
        rewrite(tmp_path / name / "config.json", **change)
        difference = (sl.load(tmp_path / name)(some_tokens()) - model(some_tokens()).logits).abs().max()
        assert difference > 1e-4, name


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama, biases, tied, wide heads", "gpt2"])
def test_files_in_shards_are_one_model(transformers, tmp_path, name):
    model = theirs(transformers, name)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(sl.load(tmp_path)(some_tokens()), model(some_tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_half_precision_stays(transformers, tmp_path):
    model = theirs(transformers, "qwen2").bfloat16()
    model.save_pretrained(tmp_path / "theirs")
    opened = sl.load(tmp_path / "theirs")
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.bfloat16}
    sl.save(tmp_path / "back", opened, format="huggingface")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", torch_dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def sentence_pieces() -> tokenizers.Tokenizer:
    """Llama's rules: no space is a token of its own, what is unknown falls back to bytes, every text has a start."""
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"theca son m"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    tokens = dict.fromkeys([*alphabet, *(left + right for left, right in merges)])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace, prepend = tokenizers.normalizers.Replace(" ", "▁"), tokenizers.normalizers.Prepend("▁")
    backend.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    parts = tokenizers.decoders
    backend.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return backend


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's rules and its one special token."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "backend"), [("llama", sentence_pieces()), ("gpt2", byte_level()), ("qwen3", byte_level())]
)
@pytest.mark.parametrize("prompt", ["the cat", "the cat sat on Ärger"])
def test_a_foreign_tokenizer_writes_the_same_greedy_text(transformers, tmp_path, name, backend, prompt):
    kind, settings = THEIRS[name]
    size = backend.get_vocab_size() + 7  # as the tables of real models, which are rounded up
    config = transformers.AutoConfig.for_model(
        kind, **(settings | {"vocab_size": size}), bos_token_id=None, eos_token_id=None
    )
    model = bold(transformers.AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    wrapped.save_pretrained(tmp_path)
    opened = sl.load(tmp_path)
    assert opened.tokenizer is not None and opened.tokenizer.kind == "other" and len(opened.tokenizer) == size
    given = wrapped(prompt, return_tensors="pt")["input_ids"]
    assert given[0].tolist() == [*opened.tokenizer.start, *opened.tokenizer.encode(prompt)]
    written = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=30, do_sample=False)[0]
    text = "".join(sl.generate(opened, prompt, sl.SampleConfig(tokens=30, top_k=1)))
    before = opened.tokenizer.decode(given[0].tolist())
    assert before + text == wrapped.decode(written, clean_up_tokenization_spaces=False)


@pytest.mark.slow
@torch.no_grad()
def test_a_token_that_ends_a_text_ends_it_here(transformers, tmp_path):
    model = ours(kind="bpe")
    sl.save(tmp_path / "folder", model, format="huggingface")
    plain = "".join(sl.generate(model, "the", sl.SampleConfig(tokens=8, top_k=1)))
    first = next(sl.generation.sample_tokens(model, model.tokenizer.encode("the"), sl.SampleConfig(tokens=1, top_k=1)))
    (tmp_path / "folder" / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    ended = sl.load(tmp_path / "folder")
    assert plain and "".join(sl.generate(ended, "the", sl.SampleConfig(tokens=8, top_k=1))) == ""
    for format in ("sightline", "huggingface"):
        again = sl.load(sl.save(tmp_path / format, ended, format=format))
        assert again.tokenizer is not None and again.tokenizer.ends == {first}
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface").eval()
    given = torch.tensor([model.tokenizer.encode("the")])
    assert there.generate(given, max_new_tokens=8, do_sample=False, pad_token_id=0).shape[1] == given.shape[1] + 1


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_the_pipeline_takes_a_batch_with_a_token_to_pad(transformers, tmp_path, kind):
    folder = sl.save(tmp_path / "m", ours(kind=kind), format="huggingface")
    pipeline = transformers.pipeline("text-generation", model=str(folder))
    pipeline.tokenizer.pad_token_id = 0
    texts, options = ["the", "the cat sat", "on"], {"max_new_tokens": 6, "do_sample": False}
    together = pipeline(texts, batch_size=3, **options)
    assert together == [pipeline(text, **options) for text in texts]


def test_a_token_that_ends_a_text_pads_in_their_batches(transformers, tmp_path):
    backend = sentence_pieces()
    size = backend.get_vocab_size()
    model = bold(sl.Decoder(sl.DecoderConfig.modern(vocabulary=size, context=32, d_model=32, num_layers=1)))
    model.tokenizer = sl.Tokenizer(backend, size=size, ends=[2])
    folder = sl.save(tmp_path / "ended", model, format="huggingface")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(["the cat", "the"], padding=True)
    assert given["input_ids"][1][0] == 2 and given["attention_mask"][1][0] == 0
    again = sl.load(folder)
    assert again.tokenizer is not None and again.tokenizer.ends == {2}


def test_a_foreign_tokenizer_stays_in_our_own_format(tmp_path):
    backend = sentence_pieces()
    size = backend.get_vocab_size() + 3
    model = bold(sl.Decoder(sl.DecoderConfig.modern(vocabulary=size, context=32, d_model=32, num_layers=1)))
    model.tokenizer = sl.Tokenizer(backend, size=size, ends=[2])
    again = sl.load(sl.save(tmp_path / "own", model))
    assert again.tokenizer is not None
    assert (again.tokenizer.kind, again.tokenizer.start, again.tokenizer.ends) == ("other", (1,), {2})
    seen = sl.capture(again, "the cat")
    assert seen.tokens == ("<s>", " the", " cat") and seen.separator == ""
    unnamed = again.tokenizer
    assert unnamed.decode([size - 1]) == "" and unnamed.text_of(size - 1) == ""
    assert unnamed.pieces([size - 1, 1]) == ["", "<s>"] and unnamed.unknown_words("zebra") == []


# Ours, opened there


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["bpe", "words", "characters"])
@pytest.mark.parametrize("name", OURS)
def test_our_model_gives_the_same_logits_and_greedy_tokens_there(transformers, tmp_path, name, kind):
    model = ours(name, kind)
    folder = sl.save(tmp_path / "folder", model, format="huggingface")
    there = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = model.tokenizer.encode(TEXT)
    assert tokenizer(TEXT)["input_ids"] == ids and tokenizer.decode(ids) == model.tokenizer.decode(ids)
    tokens = torch.tensor([ids[:40]])
    torch.testing.assert_close(there(tokens).logits, model(tokens), rtol=0, atol=1e-5)
    written = there.generate(
        tokens[:, :9], attention_mask=torch.ones(1, 9), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    greedy = sl.SampleConfig(tokens=40, top_k=1)
    assert written[0, 9:].tolist() == list(sl.generation.sample_tokens(model, ids[:9], greedy))
    back = sl.load(folder)
    assert back.tokenizer is not None and back.tokenizer.kind == kind
    torch.testing.assert_close(back(tokens), model(tokens), rtol=0, atol=1e-6)


def test_the_pipeline_runs(transformers, tmp_path):
    model = ours(kind="bpe")
    pipeline = transformers.pipeline("text-generation", model=str(sl.save(tmp_path / "m", model, format="huggingface")))
    (written,) = pipeline("the cat", max_new_tokens=20, do_sample=False)
    ours_too = "".join(sl.generate(model, "the cat", sl.SampleConfig(tokens=20, top_k=1)))
    assert written["generated_text"] == "the cat" + ours_too


@pytest.mark.parametrize(
    ("name", "type"), [("modern", "qwen3"), ("window", "qwen3"), ("classic", "opt"), ("pre-norm", "gpt2")]
)
def test_a_preset_has_its_family(name, type):
    family, settings = write_settings(OURS[name])
    assert settings["model_type"] == family.name == type


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "alibi"}, "positions is 'alibi', and in the nearest, qwen3, it is 'rotary'"),
        ({"norm_first": False}, "norm_first is False, and in the nearest, qwen3, it is True"),
        ({"bias": True}, "bias is True, and in the nearest, qwen3, it is False"),
        ({"activation": "gelu"}, "activation is 'gelu', and in the nearest, qwen3, it is 'swiglu'"),
        ({"scale_embeddings": True}, "scale_embeddings is True"),
        ({"norm": "layer", "bias": True}, "positions is 'rotary', and in the nearest, gpt2, it is 'learned' or 'sinu"),
    ],
)
def test_what_no_model_of_theirs_computes_is_refused_and_leaves_nothing(tmp_path, changes, message):
    model = sl.Decoder(sl.DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=1, **changes))
    with pytest.raises(ValueError, match=message):
        sl.save(tmp_path / "folder", model, format="huggingface")
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected format to be sightline or huggingface, got 'gguf'"):
        sl.save(tmp_path / "folder", ours(), format="gguf")  # type: ignore[arg-type]


# Without transformers


def test_opening_and_writing_need_no_transformers(tmp_path):
    folder = sl.save(tmp_path / "folder", ours("classic", "bpe"), format="huggingface")
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import sightline as sl; model = sl.load(sys.argv[1]); sl.save(sys.argv[2], model, format='huggingface')\n"
        "print(model.tokenizer.kind)"
    )
    run = [sys.executable, "-c", code, folder, tmp_path / "again"]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "bpe\n"
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_tensor_has_a_place_of_its_own(name):
    settings = {"gpt2": GPT2, "opt": OPT}.get(name, LLAMA)
    family, config = read_settings({"model_type": name, **settings})
    places = [place(family, own) for own in sl.Decoder(config).state_dict()]
    assert len(places) == len(set(places))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom' cannot be opened as a Decoder; llama, mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM, which writes text, got LlamaForSeq"),
        ({"hidden_size": None}, "the setting hidden_size of a llama is missing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' of a llama is not built here; it must be 'silu'"),
        ({"attention_bias": True}, "attention_bias True beside mlp_bias False is not built here"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "the rope_type 'yarn' is not built here"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs the setting low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not known of a llama"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 1}, "sliding_window 1 is not built here"),
        (
            {"model_type": "qwen2", "architectures": None, "use_sliding_window": True, "max_window_layers": 1},
            "layers of more than one kind are not built here",
        ),
        (
            {"model_type": "qwen2", "architectures": None, "layer_types": ["sliding_attention"] * 3},
            "but use_sliding_window is false",
        ),
        ({"num_key_value_heads": 3}, "num_heads 4 is not divisible by num_groups 3"),
        ({"vocab_size": "many"}, "vocabulary must be a whole number of at least 1, got 'many'"),
    ],
)
def test_a_setting_that_is_not_built_is_refused_by_name(tmp_path, settings, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, **settings}))
    with pytest.raises(ValueError, match=message) as error:
        sl.load(tmp_path)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"got pytorch_model.bin: a pickled file can run any program"):
        sl.load(tmp_path)


def damaged(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    first, name = tensors["model.norm.weight"], "model.norm.weight"
    if how == "missing":
        del tensors[name]
    elif how == "more":
        tensors["model.more"] = first
    elif how == "shape":
        tensors[name] = first[:3]
    elif how == "dtype":
        tensors[name] = first.to(torch.int8)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, weights)
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "index":
        weights.rename(folder / "elsewhere.safetensors")
        index = {"weight_map": {name: "../elsewhere.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "shard":
        weights.rename(folder / "a.safetensors")
        index = {"weight_map": {name: "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "tokenizer":
        (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "the tensor model.norm.weight is missing"),
        ("more", "the tensor model.more has no place in this qwen3"),
        ("shape", r"the tensor model.norm.weight has the shape \(3,\), not \(64,\)"),
        ("dtype", "the tensor model.norm.weight holds torch.int8"),
        ("cut", "to be a whole safetensors file"),
        ("index", "to name safetensors files beside it, got '../elsewhere.safetensors'"),
        ("shard", "the file .*b.safetensors, but it is missing"),
        ("tokenizer", "is damaged, it should be JSON"),
    ],
)
def test_a_damaged_folder_is_one_line_on_the_command_line(tmp_path, capsys, how, message):
    folder = sl.save(tmp_path / "folder", ours(kind="bpe"), format="huggingface")
    damaged(folder, how)
    with pytest.raises(ValueError, match=message):
        sl.load(folder)
    assert main(["generate", "--model", str(folder), "the"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("sightline generate: ") and line.count("\n") == 1


def test_the_commands_take_such_a_folder(tmp_path, capsys):
    folder = sl.save(tmp_path / "folder", ours(kind="bpe"), format="huggingface")
    (tmp_path / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    assert main(["generate", "--model", str(folder), "the cat", "--tokens", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert main(["evaluate", str(tmp_path / "text.txt"), "--model", str(folder), "--cache", str(tmp_path)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["look", "--model", str(folder), "--text", str(tmp_path / "text.txt"), "--out", str(page)]) == 0
    assert page.stat().st_size > 10_000


def test_older_checkpoints_open(tmp_path):
    folder = sl.save(tmp_path / "folder", ours())
    (folder / "manifest.json").unlink()
    added = dict.fromkeys(("norm_epsilon", "rotary_scaling", "window_before", "query_key_value_bias"), "drop")
    rewrite(folder / "config.json", **added)
    assert sl.load(folder).config == ours().config
