"""Models of transformers that are no `Decoder` of ours, for the command line: opened, writing, and looked at.

A name of the hub is fetched, because it was named. No code of a model's folder is run, and no pickle is opened.
"""

import inspect
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sightline import generation, looking
from sightline.captures import Capture
from sightline.corpora import Corpus
from sightline.files import read_json
from sightline.generation import SampleConfig, draw
from sightline.huggingface.formats import INDEX, WEIGHTS, read_index
from sightline.huggingface.interface import NAME, enable
from sightline.huggingface.settings import read_settings
from sightline.huggingface.watching import watch
from sightline.models import Decoder
from sightline.store import save_capture

CONTEXT = 4096
"""Of a model that tells none."""
OPTIONS: dict[str, Any] = {
    "attn_implementation": NAME,
    "dtype": "auto",
    "use_safetensors": True,
    "trust_remote_code": False,
    "output_loading_info": True,
}
"""How transformers opens a model."""
DESCRIPTION = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
"""Of a model on the hub the files of settings and tokenizers."""


def is_foreign(name: Path) -> bool:
    """A model that only transformers opens: a folder, or a name of the hub, owner/name, that is no path here.

    A folder of a `Decoder` is none, however damaged: what is wrong with it is to be told.
    """
    if not name.exists():
        return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name.as_posix()) is not None and not name.parent.exists()
    config = name / "config.json"
    if not config.is_file() or b'"model_type"' not in config.read_bytes():
        return False
    settings = read_json(config)
    try:
        read_settings(settings)
    except ValueError:
        return True
    other_tokenizer = any(chain(name.glob("tokenizer*"), name.glob("vocab*")))
    return other_tokenizer and not (name / "tokenizer.json").exists()


def write(name: Path, load: Callable[..., Decoder], prompt: str, config: SampleConfig) -> Iterator[str]:
    """What follows a prompt, by a `Decoder` that `load` opens or by a model that only transformers does."""
    if is_foreign(name):
        return Foreign(name).write(prompt, config)
    return generation.generate(load(name, Decoder), prompt, config)


def stages(
    names: Sequence[Path],
    load: Callable[..., Decoder],
    corpus: Corpus,
    *,
    tell: Callable[[str], None],
    folder: Path | None,
    live: bool,
    write: int,
    **options: Any,
) -> Iterator[tuple[dict[str, Capture], None]]:
    """The one thing to be shown: what models see of a text, by their names, some of which only transformers opens.

    `load` opens the others; `tell` hears the notes. With `folder` the capture of one is saved there. Live or not: it
    is shown when all of it is there.

    Raises: ValueError as `Foreign` and `looking.look`, or for writing while models are compared.
    """
    if write and len(names) > 1:
        raise ValueError("--write and --compare need two models with the same tokens; leave one of them out")
    captures = {}
    for name in names:
        if is_foreign(name):
            seen, seconds = Foreign(name).look(corpus, write=write, **options)
            notes = [f"captured {len(seen.tokens):,} tokens of {corpus.name} in {seconds:.1f} s"]
        else:
            (one,) = looking.look([load(name, Decoder)], corpus, **options)
            seen, notes = one.capture, one.notes(corpus.name)
        for told in notes:
            tell(told)
        captures[str(name)] = seen
        if folder is not None:
            tell(f"saved: sightline look --capture {save_capture(seen, folder)} shows it again")
    yield captures, None


class Foreign:
    """A language model of transformers with its tokenizer, on our attention.

    Raises: ValueError where transformers is missing or cannot open it, or where its attention cannot be ours.
    """

    def __init__(self, name: Path) -> None:
        try:
            enable()
        except ImportError as error:
            raise ValueError(str(error)) from error
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            folder = name if name.exists() else _fetched(name.as_posix())
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder.as_posix(), trust_remote_code=False)
            opened: Any = AutoModelForCausalLM.from_pretrained(folder.as_posix(), **OPTIONS)
        except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            line = next(iter(str(error).strip().split("\n")), "")
            raise ValueError(f"transformers cannot open {name} as a language model: {line}") from error
        self.model, found = opened
        if found["missing_keys"]:  # transformers draws these at random
            missing = sorted(found["missing_keys"])
            raise ValueError(f"the weights in {name} lack {len(missing)} of the model's tensors, such as {missing[0]}")
        self.model.eval()
        self.context = int(getattr(self.model.config.get_text_config(), "max_position_embeddings", CONTEXT))

    def write(self, prompt: str, config: SampleConfig) -> Iterator[str]:
        """What follows a prompt, as soon as it is known, drawn as `SampleConfig` says.

        Raises: ValueError for a prompt without a token, or one that fills the model's context.
        """
        ids = self.tokenizer(prompt)["input_ids"]
        if not 0 < len(ids) < self.context:
            raise ValueError(f"the prompt must have from 1 to {self.context - 1} tokens for this model, got {len(ids)}")
        before, shown, text = len(self.tokenizer.decode(ids)), 0, ""
        for token in self._tokens(ids, config):
            ids = [*ids, token]
            text = self.tokenizer.decode(ids)[before:]
            end = _end(text, config)
            # A word or the text to stop at may be unfinished, and a character too.
            sure = len(text.rstrip("\ufffd")) - len(config.stop or "") if end is None else end
            if sure > shown:
                yield text[shown:sure]
                shown = sure
            if end is not None:
                return
        yield text[shown:]

    def look(self, corpus: Corpus, *, tokens: int | None, layers: Any, write: int) -> tuple[Capture, float]:
        """What it sees of the first `tokens` of a text and of `write` more that it writes; seconds that it took.

        Raises: ValueError for more tokens than its context holds, a text without any, or a layer that it lacks.
        """
        most = self.context - write
        if not 0 <= write < self.context or (tokens is not None and not 1 <= tokens <= most):
            raise ValueError(f"--tokens and --write must be from 1 to the model's context of {self.context} together")
        ids = looking.beginning(
            corpus, lambda text: self.tokenizer(text)["input_ids"], most if tokens is None else tokens
        )
        if not ids:
            raise ValueError(f"{corpus.name} holds no token; give another text")
        start = time.perf_counter()
        with watch(self.model, layers=layers) as seen, torch.no_grad():
            # One token more than is wanted: to draw it the model reads the last one.
            list(self._tokens(ids, SampleConfig(tokens=write + 1, seed=0)))
        return seen.capture(self.tokenizer), time.perf_counter() - start

    def _tokens(self, ids: list[int], config: SampleConfig) -> Iterator[int]:
        """Tokens one by one, until the model ends the text or its context is full."""
        generator = config.generator()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        read, cache, count = ids, None, len(ids)
        # transformers 5.24 calls it `cache`.
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        while count <= self.context and (config.tokens is None or count - len(ids) < config.tokens):
            with torch.no_grad():
                output = self.model(torch.tensor([read]), use_cache=True, **{name: cache})
            token = draw(output.logits[0, -1], config, generator)
            if token in ends:
                return
            yield token
            read, cache, count = [token], output[name], count + 1


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


def _end(text: str, config: SampleConfig) -> int | None:
    """Where a text is to end; None: not yet."""
    if config.stop is not None and config.stop in text:
        return text.index(config.stop)
    if config.tokens is None:
        words = list(re.finditer(r"\S+", text))
        # The last word may go on.
        if len(words) > config.words:
            return words[config.words - 1].end()
    return None
