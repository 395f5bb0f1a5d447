"""Models of transformers that are no `Decoder` of ours, for the command line: writing, and looked at."""

import inspect
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sightline import generation, looking
from sightline.captures import Capture
from sightline.corpora import Corpus
from sightline.files import read_json
from sightline.generation import SampleConfig, draw, warn_outgrown, words
from sightline.huggingface.opening import open_language_model, vocabulary
from sightline.huggingface.settings import read_settings
from sightline.huggingface.watching import watch
from sightline.models import Decoder
from sightline.store import save_capture

CONTEXT = 4096
"""Of a model that tells none."""


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
            one = Foreign(name).look(corpus, write=write, **options)
        else:
            (one,) = looking.look([load(name, Decoder)], corpus, **options)
        for told in one.notes(corpus.name):
            tell(told)
        captures[str(name)] = one.capture
        if folder is not None:
            tell(f"saved: sightline look --capture {save_capture(one.capture, folder)} shows it again")
    yield captures, None


class Foreign:
    """A language model of transformers with its tokenizer, on our attention.

    Raises: ValueError as `open_language_model`.
    """

    def __init__(self, name: Path) -> None:
        self.name = name
        self.model, self.tokenizer = open_language_model(name)
        settings = self.model.config.get_text_config()
        self.context = int(getattr(settings, "max_position_embeddings", None) or CONTEXT)
        self.size = vocabulary(settings)
        # What `generation` asks of a tokenizer.
        self.kind = "other"
        ends = self.model.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def encode(self, text: str) -> list[int]:
        """Raises: ValueError for a token that the model lacks."""
        ids = self.tokenizer(text)["input_ids"]
        lacking = next((token for token in ids if token >= self.size), None)
        if lacking is not None:
            named = self.tokenizer.convert_ids_to_tokens(lacking)
            raise ValueError(f"the model has {self.size} tokens, and {named!r} has the id {lacking}: leave it out")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        # Cleaning takes spaces away that were shown already.
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def write(self, prompt: str, config: SampleConfig) -> Iterator[str]:
        """What follows a prompt, as `generation.generate` writes.

        Without a prompt it starts as at the beginning of a text, or where no token says so, as after the end of one,
        or of a line.

        Raises: ValueError for a token that the model lacks.
        """
        start = self.encode(prompt) or self._beginning()
        return words(self, start, self._tokens(start, config), config)

    def look(self, corpus: Corpus, *, tokens: int | None, layers: Any, write: int) -> looking.Look:
        """What it sees of the first `tokens` of a text and of `write` more that it writes.

        Raises: ValueError for more tokens than its context holds, a text without any, a layer that it lacks, or a
            model without attention.
        """
        if layers is not None and not layers:
            raise ValueError("no layer asked for; give some, such as 0,2, or None for all")
        most = looking.room(self.context, tokens, write)
        ids = looking.beginning(corpus, self.encode, most)
        if not ids:
            raise ValueError(f"{corpus.name} holds no token; give another text")
        start = time.perf_counter()
        with watch(self.model, layers=layers) as seen, torch.no_grad():
            # One token more than is wanted: to draw it the model reads the last one.
            for _ in self._tokens(ids, SampleConfig(tokens=write + 1, seed=0)):
                pass
        if not seen.stacks:
            which = "" if layers is None else f" in layer {', '.join(map(str, layers))}"
            raise ValueError(f"{self.name} has no attention to show{which}: it is a {type(self.model).__name__}")
        unknown = self.tokenizer.unk_token_id
        return looking.looked(seen.capture(self.tokenizer), start, unknown=unknown, kind="text")

    def _beginning(self) -> list[int]:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self.size:
                return [token]
        return self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:] or [0]

    def _tokens(self, ids: list[int], config: SampleConfig) -> Generator[int, None, None]:
        """Tokens one by one, until the model ends the text; of a full context as `generation.sample_tokens`."""
        generator = config.generator()
        window, unread, cache, outgrown, count = list(ids), list(ids), None, False, 0
        # transformers 5.24 calls it `cache`.
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        while config.tokens is None or count < config.tokens:
            if len(window) > self.context:
                if not outgrown:
                    warn_outgrown(self.context)
                    outgrown = True
                unread = window = window[-((self.context + 1) // 2) :]
                cache = None
            with torch.no_grad():
                given = {} if cache is None else {name: cache}
                output = self.model(torch.tensor([unread]), use_cache=True, **given)
            token = draw(output.logits[0, -1], config, generator)
            if token in self.ends:
                return
            window.append(token)
            cache = output.get(name)  # some models before transformers 5 keep another
            unread = list(window) if cache is None else [token]
            count += 1
            yield token
