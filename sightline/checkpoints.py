"""Models as folders of safetensors and JSON: `save`, `load`.

A checkpoint is `model.safetensors`, `config.json` and, where the model has one, `tokenizer.json`; `manifest.json`
holds the sha256 of each, so that a damaged byte is found before it is believed. Nothing is pickled, so opening a
stranger's checkpoint runs no code. Knows nothing about training.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from sightline.files import (
    MANIFEST,
    check_whole,
    expect_file,
    is_whole,
    new_folder,
    read_json,
    read_tensors,
    write_json,
    write_manifest,
)
from sightline.models import Decoder, DecoderConfig
from sightline.tokenizers import OTHER, Tokenizer

Format = Literal["sightline", "huggingface"]
Model = Decoder | EncoderDecoder
"""What can be saved."""
FORMAT = 1
_SINCE = {"norm_epsilon", "rotary_scaling", "window_before", "query_key_value_bias", "counts", "pointer"}
"""Settings that older checkpoints lack: their defaults say what was so before."""
STEP_FOLDER = re.compile(r"step-\d+")
_KINDS = {"decoder": (Decoder, DecoderConfig), "encoder-decoder": (EncoderDecoder, EncoderDecoderConfig)}
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


# --- Writing -----------------------------------------------------------------------------------------


def write_model(folder: Path, model: Model, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes the files of a checkpoint into an existing folder; `weights` stand for the model's own."""
    tensors = own_tensors(model) if weights is None else weights
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    tokenizer = model.tokenizer
    kind = None if tokenizer is None else tokenizer.kind
    head = {
        "format": FORMAT,
        "model": next(name for name, (kind, _) in _KINDS.items() if isinstance(model, kind)),
        "tokenizer": kind,
        "tokens_sha256": tokenizer and tokenizer.tokens_sha256,
    }
    if tokenizer is not None and tokenizer.ends:
        head["ends"] = sorted(tokenizer.ends)
    write_json(folder / "config.json", {**head, **model.config.to_dict()})
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")


def save(folder: str | Path, model: Model, *, format: Format = "sightline") -> Path:
    """Saves a model and its tokenizer as a new folder of safetensors and JSON, whole or not at all.

    Tied weights are stored once. Returns the folder.

    `format="huggingface"` writes what `transformers` opens with `AutoModelForCausalLM` and `AutoTokenizer`, and `load`
    opens as well: `modern` as Qwen3, `classic` as OPT, others as Llama, Mistral, Qwen2 or GPT-2, where that computes
    the same. Dropout, which is a matter of training, is written as far as they have a place for it.

    Raises:
        ValueError: the folder holds something already, or cannot be written; or the model is none that
            `transformers` has, and the line names the setting.

    >>> import tempfile
    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig(vocabulary=10, context=8, d_model=16, num_layers=1, num_heads=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load(save(folder + "/model", model))
    >>> again.config == model.config
    True
    """
    folder = Path(folder)
    if format not in get_args(Format):
        raise ValueError(f"expected format to be {' or '.join(get_args(Format))}, got {format!r}")
    if format == "huggingface" and not isinstance(model, Decoder):
        raise ValueError("expected a Decoder for the format huggingface, got an EncoderDecoder: save it as sightline")
    with new_folder(folder) as temporary:
        if format == "huggingface":
            # Imported when it is asked for: it writes and reads with what stands here.
            from sightline.huggingface.formats import write_huggingface

            assert isinstance(model, Decoder)
            write_huggingface(temporary, model)
        else:
            write_model(temporary, model)
            write_manifest(temporary)
    return folder


# --- Reading -----------------------------------------------------------------------------------------


def load(folder: str | Path) -> Any:
    """Opens a checkpoint: a run's folder (its best step), one of its steps, or what `save` or `transformers` wrote.

    It is a `Decoder` or an `EncoderDecoder`, as the folder says.

    The model comes back on the CPU, in evaluation mode, in the dtype of the file, with its tokenizer. A folder that
    was put together by hand needs no manifest.json; where there is one, every file must be as it says. Of
    `transformers`' models those of the types llama, mistral, qwen2, qwen3, gpt2 and opt are read, from safetensors
    in one file or several, without needing that library.

    Raises:
        ValueError: a file is missing, damaged or foreign; the line names the file, what is wrong, and the other step
            of the run that is whole.

    Example: see `save`.
    """
    folder = step_folder(folder)
    config_file = folder / "config.json"
    if config_file.is_file() and b'"model_type"' in config_file.read_bytes():
        from sightline.huggingface.formats import read_huggingface

        return read_huggingface(folder).eval()
    if (folder / MANIFEST).exists():
        try:
            check_whole(folder)
        except ValueError as error:
            otherwise = f"copy it again, or, if you changed it yourself, remove {MANIFEST}"
            raise _with_a_whole_step(error, folder.parent, otherwise) from None
    config, tokenizer = read_config(folder)
    with torch.random.fork_rng(devices=[]):  # building a model draws numbers that are thrown away
        model = EncoderDecoder(config) if isinstance(config, EncoderDecoderConfig) else Decoder(config)
    model.tokenizer = tokenizer
    load_weights(model, folder)
    return model.eval()


def _with_a_whole_step(error: ValueError, out: Path, otherwise: str) -> ValueError:
    whole_step = next(filter(is_whole, steps(out)), None)
    return ValueError(f"{error}; {otherwise if whole_step is None else f'{whole_step} is whole: give that'}")


def steps(out: Path) -> list[Path]:
    """The step folders of a run, newest first."""
    found = [path for path in out.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def read_config(folder: Path) -> tuple[DecoderConfig | EncoderDecoderConfig, Tokenizer | None]:
    """What a checkpoint's model is, without its weights: its config and its tokenizer."""
    file = folder / "config.json"
    data = read_json(file)
    head = {key: data.pop(key, None) for key in ("format", "model", "tokenizer", "tokens_sha256", "ends")}
    if head["format"] != FORMAT or head["model"] not in _KINDS:
        raise ValueError(
            f"expected {file} to say format {FORMAT} and model {' or '.join(map(repr, _KINDS))}, "
            f"got {head['format']!r} and {head['model']!r}: it was written by another program or a newer version"
        )
    _, made_of = _KINDS[head["model"]]
    missing = [field.name for field in fields(made_of) if field.name not in {*data} | _SINCE]
    if missing:
        raise ValueError(f"expected {file} to hold the key {missing[0]!r}, but it is missing")
    try:
        config = made_of.from_dict(data)
    except ValueError as error:
        raise ValueError(f"in {file}: {error}") from error
    if head["tokenizer"] is None:
        return config, None
    file = folder / "tokenizer.json"
    tokenizer = _read_tokenizer(file, head["tokenizer"], config.vocabulary, head["ends"])
    if tokenizer.tokens_sha256 != head["tokens_sha256"]:
        raise ValueError(f"expected {file} to hold the tokens that the model was trained with, got others: {_FOREIGN}")
    return config, tokenizer


def load_weights(model: Model, folder: Path) -> None:
    """Fills a model's parameters from `model.safetensors`."""
    weights = read_weights(model, folder)
    for name, tensor in own_tensors(model).items():
        tensor.data = weights[name].to(tensor.device)


def read_weights(model: Model, folder: Path) -> dict[str, Tensor]:
    """Reads `model.safetensors`, and checks every name and shape against a model."""
    file = folder / "model.safetensors"
    stored = read_tensors(file)
    own = own_tensors(model)
    for name in [*own, *stored]:
        if name not in stored:
            raise ValueError(f"expected {file} to hold the tensor {name}, but it is missing: {_FOREIGN}")
        if name not in own:
            raise ValueError(f"expected no tensor {name} in {file}: {_FOREIGN}")
        free = own[name].ndim == stored[name].ndim == 1 and not len(own[name])  # not counted yet: any number fits
        if own[name].shape != stored[name].shape and not free:
            raise ValueError(
                f"expected {name} in {file} to have the shape {tuple(own[name].shape)} that config.json "
                f"asks for, but it has {tuple(stored[name].shape)}: {_FOREIGN}"
            )
        dtype, floats = own[name].dtype, stored[name].is_floating_point()
        if not floats if dtype.is_floating_point else stored[name].dtype != dtype:
            wanted = "floats" if dtype.is_floating_point else str(dtype)
            raise ValueError(
                f"expected {name} in {file} to hold {wanted}, but it holds {stored[name].dtype}: {_FOREIGN}"
            )
    return stored


_FOREIGN = "the file belongs to another model than config.json; copy both from the same checkpoint"


_GIVE = "give the folder that a run was written to, one of its steps, or a model's folder of transformers"


def step_folder(folder: str | Path) -> Path:
    """The folder that holds the weights: for a run's folder its best step, else the folder itself."""
    folder = Path(folder)
    if folder.suffix.lower() in _PICKLES:
        raise ValueError(
            f"expected a folder with model.safetensors, got {folder}: a pickled file can run any program "
            "when it is opened, so it is refused; save the weights as safetensors"
        )
    if not folder.exists():
        raise ValueError(f"expected a checkpoint's folder, but {folder} does not exist: {_GIVE}")
    if not folder.is_dir():
        raise ValueError(f"expected a checkpoint's folder, got the file {folder}: {_GIVE}")
    if not (folder / "checkpoint.json").exists():
        if not any(folder.glob("*.safetensors")) and not (folder / "config.json").exists():
            raise ValueError(f"expected a checkpoint's folder, but {folder} holds none: {_GIVE}")
        return folder
    try:
        return folder / read_pointer(folder)["best"]
    except ValueError as error:
        raise _with_a_whole_step(error, folder, "name one of its steps") from None


def read_pointer(out: Path) -> dict[str, str]:
    """Reads a run's checkpoint.json: the names of its best and its latest step."""
    file = out / "checkpoint.json"
    pointer = read_json(file)
    for key in ("best", "latest"):
        name = pointer.get(key)
        if not isinstance(name, str) or not STEP_FOLDER.fullmatch(name):
            raise ValueError(f"expected {key!r} in {file} to name a step such as 'step-100', got {name!r}")
        if not (out / name).is_dir():
            raise ValueError(f"expected the folder {out / name} that {file} names as {key}, but it is missing")
    return pointer


def _read_tokenizer(file: Path, kind: object, vocabulary: int, ends: Any) -> Tokenizer:
    expect_file(file)
    tokenizer = Tokenizer.load(file, size=vocabulary if kind == OTHER else None, ends=ends or ())
    if (tokenizer.kind, len(tokenizer)) != (kind, vocabulary):
        raise ValueError(
            f"expected {file} to hold the {vocabulary} tokens of the kind {kind!r} that config.json asks for, got "
            f"{len(tokenizer)} of {tokenizer.kind!r}: copy both from the same checkpoint"
        )
    return tokenizer


def own_tensors(model: Model) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; those that share one tensor once, under the first name."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor))
    return dict(tensors.values())
