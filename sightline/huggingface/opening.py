"""A language model of transformers with its tokenizer, from a folder or the hub, or a line that says what to do.

A name of the hub is fetched, because it was named. No code of a model's folder is run, and no pickle is opened.
"""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sightline.files import open_tensors
from sightline.huggingface.formats import INDEX, WEIGHTS, expect_weights, read_index
from sightline.huggingface.interface import NAME, enable

OPTIONS: dict[str, Any] = {
    "attn_implementation": NAME,
    "dtype": "auto",
    "use_safetensors": True,
    "trust_remote_code": False,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # they are refused here, by name
}
"""How transformers opens a model."""
DESCRIPTION = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
"""Of a model on the hub the files of settings and tokenizers."""
VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
"""What a folder's tokenizer may be in."""


def open_language_model(name: Path) -> tuple[Any, Any]:
    """A causal language model on our attention, in evaluation mode, and its tokenizer.

    Raises: ValueError where transformers is missing or cannot open it, where it writes no text from left to right,
        where its attention cannot be ours, and for a tokenizer that is missing or of another model.
    """
    try:
        enable()
    except ImportError as error:
        raise ValueError(str(error)) from error
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        folder = name if name.exists() else _fetched(name.as_posix())
        config = AutoConfig.from_pretrained(folder.as_posix(), trust_remote_code=False)
    except Exception as error:  # transformers raises what any part of it does
        raise _refusal(name, error) from error
    _expect_writing(name, config)
    expect_weights(folder)
    tokenizer = _tokenizer(name, folder)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(folder.as_posix(), **OPTIONS)
    except Exception as error:  # as above
        if isinstance(error, SafetensorError):
            for file in sorted(folder.glob("*.safetensors")):
                with open_tensors(file):  # tells which is damaged
                    pass
        raise _refusal(name, error) from error
    model, found = opened
    _expect_whole(name, found)
    _expect_ids(name, config, tokenizer)
    return model.eval(), tokenizer


def _refusal(name: Path, error: Exception) -> ValueError:
    import transformers

    line, said = _line(error), str(error)
    if "custom code" in said:
        line = "it comes with code of its own, which may do anything and is never run here; open it from Python"
    elif found := re.search(r"model type `(.*?)` but Transformers does not recognize", said):
        version = transformers.__version__
        line = f"transformers {version} knows no model_type {found[1]!r}; pip install --upgrade transformers"
    return ValueError(f"transformers cannot open {name} as a language model: {line}")


def _line(error: Exception) -> str:
    """The first sentence of an error, with its kind where the library did not foresee it."""
    line = re.sub(r":\n\s*", ": ", str(error).strip()).split("\n")[0]
    foreseen = isinstance(error, (ImportError, OSError, RuntimeError, ValueError)) or type(error) is Exception
    return line if foreseen else f"{type(error).__name__}: {line}"


def _expect_writing(name: Path, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if masked or getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        made, *_ = config.architectures or [type(config).__name__]
        raise ValueError(
            f"{name} is no language model that writes on from a text ({made}): open it from Python, where "
            "sl.huggingface.watch shows it"
        )


def _expect_whole(name: Path, found: dict[str, Any]) -> None:
    """What transformers would draw at random was read."""
    missing, other = (sorted(found[kind], key=str) for kind in ("missing_keys", "mismatched_keys"))
    same = "copy config.json and the weights from one checkpoint"
    if missing:
        raise ValueError(
            f"the weights in {name} lack {len(missing)} of the model's tensors, such as {missing[0]}: {same}"
        )
    if other:
        # transformers before 5 tells the names alone.
        first, *shapes = [other[0]] if isinstance(other[0], str) else other[0]
        told = ", {} in place of {}".format(*map(tuple, shapes)) if shapes else ""
        raise ValueError(
            f"{len(other)} tensors in {name} have other shapes than config.json says, such as {first}{told}: {same}"
        )


def _tokenizer(name: Path, folder: Path) -> Any:
    from transformers import AutoTokenizer

    held = any(any(folder.glob(pattern)) for pattern in VOCABULARIES)
    lacking = f"{name} holds no tokenizer.json, so it knows no text: put the model's own there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.as_posix(), trust_remote_code=False)
    except Exception as error:  # tokenizers raises no narrower type
        if not held:
            raise ValueError(lacking) from error
        if "custom code" in str(error):
            raise _refusal(name, error) from error
        raise ValueError(
            f"transformers cannot read the tokenizer in {name} ({_line(error)}): copy the model's own again, or "
            "pip install --upgrade transformers"
        ) from error
    # Without its file transformers 5 makes a tokenizer to which all text is unknown.
    if not held and tokenizer.vocab_files_names:
        raise ValueError(lacking)
    return tokenizer


def vocabulary(config: Any) -> int:
    """How many ids a model has."""
    return config.get_text_config().vocab_size


def _expect_ids(name: Path, config: Any, tokenizer: Any) -> None:
    """Tokens that were added, such as one that stands for a picture, may be beyond the model's: text has none."""
    size, added = vocabulary(config), getattr(tokenizer, "added_tokens_decoder", {})
    most = max((number for number in tokenizer.get_vocab().values() if number not in added), default=-1)
    if most >= size:
        raise ValueError(f"{name}: the model has {size} tokens, but the tokenizer has one with the id {most}")


def _fetched(name: str) -> Path:
    """The folder of a model of the hub, newly fetched or kept from before: safetensors and what describes them.

    Everything at once: transformers would ask for each file, and wait and ask again for a minute without a network.

    Raises: OSError for a name that the hub does not have or does not give, no way to it, or weights of another form.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=["config.json", INDEX]))
        weights = set(read_index(folder / INDEX).values()) if (folder / INDEX).exists() else {WEIGHTS}
        # With one file that is there for certain: the library warns of patterns without any.
        snapshot_download(name, revision=folder.name, allow_patterns=["config.json", *sorted(weights)])
        if all((folder / file).exists() for file in weights):
            snapshot_download(name, revision=folder.name, allow_patterns=DESCRIPTION)
            return folder
    except GatedRepoError as error:
        raise OSError(
            "the hub gives it to those alone who were let in: ask on its page, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            "it is no folder here and no public model of the hub; of a private one, `hf auth login`"
        ) from error
    except OSError as error:
        line = next(iter(str(error).strip().split("\n")), "").removeprefix("Got: ")
        raise OSError(f"it is no folder here, and the hub does not give it ({line})") from error
    raise OSError(
        "it has no safetensors: weights of another form may run any program when they are opened, and are not fetched"
    )
