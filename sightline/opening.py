"""What a command is given, opened, or refused with what to do: the folder of a model, a text, a corpus by name.

Knows no command.
"""

import sys
from pathlib import Path
from typing import Any

from sightline.checkpoints import load
from sightline.corpora import Corpus, Errors, open_corpus
from sightline.downloads import DOWNLOADS, cache_folder, download
from sightline.encoder_decoder import EncoderDecoder
from sightline.huggingface.folders import is_foreign
from sightline.models import Decoder
from sightline.terminal import note


def open_model(folder: Path, *kinds: type) -> Any:
    """The model of a folder, with its tokenizer.

    Raises: ValueError for a model of other kinds, or without a tokenizer, or as `load`.
    """
    try:
        model = load(folder)
    except ValueError as error:
        if not folder.exists() or not is_foreign(folder):
            raise
        takes = "a run of sightline train --task translate"
        if Decoder in kinds:
            takes = "a run or a Decoder's folder; generate and look take any causal language model of transformers"
        raise ValueError(f"{error}; this command takes {takes}") from error
    if not isinstance(model, kinds):
        words = ("an encoder-decoder", "translate") if isinstance(model, EncoderDecoder) else ("a decoder", "generate")
        raise ValueError(f"{folder} holds {words[0]}, which this command does not take: try sightline {words[1]}")
    if model.tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer.json, so it knows no text: put the model's own there")
    return model


def open_text(source: str, errors: Errors) -> Corpus:
    """A text; a note tells what of it was left out. Raises: ValueError as `open_corpus`."""
    corpus = open_corpus(source, errors=errors)
    if corpus.left_out:
        note(corpus.left_out)
    return corpus


def fetch(source: str) -> None:
    """Fetches a corpus by its name, and says what and from where. Raises: ValueError as `download`."""
    if source not in DOWNLOADS:
        raise ValueError(f"--download fetches {' or '.join(DOWNLOADS)}, not {source!r}; drop it for a text of your own")
    wanted = DOWNLOADS[source]
    print(f"fetching {wanted.url} ({wanted.size / 1e6:.1f} MB, {wanted.licence})", file=sys.stderr)
    download(source, cache_folder())
