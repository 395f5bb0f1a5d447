"""Folders of `transformers`: a `Decoder` written into one, and one opened as a `Decoder`.

Needs no `transformers`: a folder is config.json, tokenizer.json and safetensors.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sightline.files import expect_file, read_json, read_tensors, write_json
from sightline.huggingface import families
from sightline.huggingface.settings import read_settings, write_settings
from sightline.models import Decoder
from sightline.tokenizers import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def write_huggingface(folder: Path, model: Decoder) -> None:
    """Writes the files of a model and its tokenizer into an existing folder; see `save`."""
    family, settings = write_settings(model.config)
    tensors = families.write_tensors(family, model)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    ends = sorted(model.tokenizer.ends) if model.tokenizer is not None else []
    # More than one end is a list there; none is null.
    settings["eos_token_id"] = (ends[0] if len(ends) == 1 else ends) if ends else None
    write_json(folder / "config.json", {**settings, "torch_dtype": dtype})
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if model.tokenizer is None:
        return
    model.tokenizer.save(folder / "tokenizer.json")
    description: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.context,
        "padding_side": "left",  # where a text that is to be written on is padded
        "clean_up_tokenization_spaces": False,
    }
    if ends:
        # It pads too: a batch of texts needs some token for that, and an end is left out of what is shown anyway.
        description["eos_token"] = description["pad_token"] = model.tokenizer.pieces(ends[:1])[0]
    write_json(folder / "tokenizer_config.json", description)


def read_huggingface(folder: Path) -> Decoder:
    """Opens a folder of `transformers`, its tokenizer with it where it has a tokenizer.json; see `load`.

    Raises:
        ValueError: a model that is no `Decoder`, naming the setting or the tensor; pickled weights; a file that is
            missing or damaged.
    """
    config = read_json(folder / "config.json")
    try:
        family, settings = read_settings(config)
    except ValueError as error:
        raise ValueError(f"in {folder / 'config.json'}: {error}") from error
    stored = _stored(folder)
    with torch.random.fork_rng(devices=[]):  # building a model draws numbers that are thrown away
        model = Decoder(settings)
    try:
        tensors = families.read_tensors(family, model, stored)
    except ValueError as error:
        raise ValueError(f"in {folder}: {error}; config.json and the weights must be of one model") from error
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name]
    file = folder / "tokenizer.json"
    if file.exists():
        model.tokenizer = Tokenizer.load(file, size=settings.vocabulary, ends=_ends(folder, config))
    return model


def _ends(folder: Path, config: dict[str, Any]) -> list[int]:
    """The tokens that end a text: what generation_config.json says, else config.json."""
    file = folder / "generation_config.json"
    ends = (read_json(file) if file.exists() else config).get("eos_token_id")
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from those that its index names."""
    index = folder / INDEX
    expect_weights(folder)
    if (folder / WEIGHTS).exists() or not index.exists():
        return read_tensors(folder / WEIGHTS)
    places = read_index(index)
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(places.values()):
        tensors |= read_tensors(folder / name)
    for name in places:
        if name not in tensors:
            raise ValueError(f"expected {folder / places[name]} to hold the tensor {name}, but it is missing")
    return tensors


def expect_weights(folder: Path) -> None:
    """Raises: ValueError for weights that are pickled, or not there."""
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        for name in dict.fromkeys(read_index(folder / INDEX).values()):
            expect_file(folder / name)
        return
    pickled = next((name for name in _PICKLED if (folder / name).exists()), None)
    if pickled is not None and not (folder / WEIGHTS).exists():
        raise ValueError(
            f"expected {folder / WEIGHTS}, got {pickled}: a pickled file can run any program when it is opened, "
            "so it is refused; save the model again with transformers' save_pretrained"
        )
    expect_file(folder / WEIGHTS)


def read_index(index: Path) -> dict[str, str]:
    """Which of the safetensors files beside it holds each tensor.

    Raises: ValueError for an index that says something else.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"expected {index} to hold a weight_map from tensors to files, got {places!r}")
    for name in places.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"expected {index} to name safetensors files beside it, got {name!r}")
    return places
