"""`capture()`: run a model once over a text, and keep what every head of every layer saw.

Between the model and whatever draws it. Knows nothing of browsers and figures.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sightline.captures import Capture
from sightline.layers import MultiHeadAttention
from sightline.masks import Mask
from sightline.models import Decoder, evaluating
from sightline.recording import Recorder, record
from sightline.store import load_capture, new_folder, write_description

if TYPE_CHECKING:
    from sightline.tokenizers import Tokenizer


@torch.no_grad()
def capture(
    model: Decoder,
    text_or_tokens: str | Sequence[int] | Tensor,
    *,
    layers: Sequence[int] | None = None,
    top: int = 8,
    map_block: int | None = None,
    prompt: int | None = None,
    folder: str | Path | None = None,
) -> Capture:
    """Run the model once over a text, and keep what every head saw: O(N) numbers a head, never the matrix.

    `layers` None means all; `top` and `map_block` are `observe()`'s. `map_block` None is the smallest power of two,
    64 or more, with at most 1,024 blocks along the text. `prompt` says that the model wrote all but so many first
    tokens. With `folder` the capture is written there as it is made, as `save_capture` would; without, one of more
    than 512 MiB lies in a temporary file. The model reads in evaluation mode, and is afterwards as it was, also
    after an error. It reads no further than the weights of the last layer asked for.

    Raises:
        ValueError: a text for a model without tokenizer, an empty one, one longer than the model's context, words
            that the vocabulary lacks, ids outside of it, a layer that the model does not have, top or map_block
            below 1, a prompt longer than the text, or a folder that holds something or cannot be written.

    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2))
    >>> seen = capture(model, [3, 1, 4, 1, 5], layers=[1])
    >>> seen.layers, tuple(seen.entropy.shape)
    ((1,), (1, 4, 5))
    """
    ids = _ids(model, text_or_tokens)
    if prompt is not None and not 0 <= prompt <= len(ids):
        raise ValueError(f"capture: prompt must be from 0 to the {len(ids)} tokens there are, got {prompt}")

    def seen(file: Path | None) -> Capture:
        watching = watched(model, layers, top=top, map_block=map_block, file=file)
        with evaluating(model), watching as recorder, _as_far_as(model, recorder):
            model.features(torch.tensor([ids], device=model.embedding.weight.device))
        return read(recorder, model, ids, prompt=prompt)

    if folder is None:
        return seen(None)
    with new_folder(folder) as temporary:
        write_description(seen(temporary / "tensors.safetensors"), temporary)
    return load_capture(folder)


@contextmanager
def watched(model: Decoder, layers: Sequence[int] | None = None, **options: Any) -> Iterator[Recorder]:
    """Record what a decoder's layers see while the block runs; `layers` None means all, `options` are `Recorder`'s.

    Raises: ValueError for a layer that the model does not have, top or map_block below 1.
    """
    modules = _attentions(model)
    chosen = _chosen(layers, len(modules))
    with record([modules[layer] for layer in chosen], chosen, **options) as recorder:
        yield recorder


class _Seen(Exception):
    """The last layer that was asked for has been seen."""


@contextmanager
def _as_far_as(model: Decoder, recorder: Recorder) -> Iterator[None]:
    """The model stops behind the weights of the last layer recorded: what it would do with them is not asked for."""
    layer = recorder.layers[-1]

    def look(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, **options: Any) -> Tensor:
        recorder(layer, query, key, value[..., :1], mask, **options)  # one column of the values stands for all
        raise _Seen

    _attentions(model)[layer].observer = look
    with suppress(_Seen):
        yield


def _attentions(model: Decoder) -> list[MultiHeadAttention]:
    return [module for module in model.modules() if isinstance(module, MultiHeadAttention)]


def read(recorder: Recorder, model: Decoder, ids: Sequence[int], *, prompt: int | None = None) -> Capture:
    """What was recorded while a decoder read these tokens."""
    return recorder.capture(
        _texts(model.tokenizer, ids),
        model=_description(model),
        ids=ids,
        separator=" " if model.tokenizer is None or model.tokenizer.kind == "words" else "",
        prompt=prompt,
    )


def _chosen(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not chosen:
        raise ValueError(f"capture: no layer asked for; layers are 0 to {count - 1}, and None means all")
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(f"capture: layers are 0 to {count - 1}, got {layer}")
    return chosen


def _ids(model: Decoder, source: str | Sequence[int] | Tensor) -> list[int]:
    ids = _encoded(model, source) if isinstance(source, str) else _listed_ids(source)
    if not ids:
        raise ValueError("capture: the text holds no token; give at least one")
    if len(ids) > model.config.context:
        raise ValueError(
            f"capture: {len(ids)} tokens are beyond the model's context of {model.config.context}; "
            f"give a shorter text, or tokens[:{model.config.context}]"
        )
    for token in ids:
        if not 0 <= token < model.config.vocabulary:
            raise ValueError(f"capture: token ids are 0 to {model.config.vocabulary - 1}, got {token}")
    return ids


def _encoded(model: Decoder, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError(
            "capture: this model has no tokenizer to read text with; set model.tokenizer, or give token ids"
        )
    unknown = model.tokenizer.unknown_words(text)
    if unknown:
        named = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"capture: not in the vocabulary: {named} ({len(unknown)} in all); "
            "use other words, or accept <unk> for them with capture(model, model.tokenizer.encode(text))"
        )
    ids = model.tokenizer.encode(text)
    return [*model.tokenizer.start, *ids] if ids else ids


def _listed_ids(tokens: Sequence[int] | Tensor) -> list[int]:
    if not isinstance(tokens, Tensor):
        return [int(token) for token in tokens]
    if tokens.is_floating_point() or tokens.ndim not in (1, 2) or (tokens.ndim == 2 and len(tokens) != 1):
        raise ValueError(
            f"capture: expected whole numbers (tokens) or (1 tokens), got {tokens.dtype} {tuple(tokens.shape)}; "
            "one text at a time"
        )
    return tokens.flatten().tolist()


def _texts(tokenizer: "Tokenizer | None", ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as it stands in the text; a token that is no whole character as its bytes."""
    if tokenizer is None:
        return tuple(map(str, ids))
    texts = {}
    for token in set(ids):
        text = tokenizer.text_of(token)
        texts[token] = tokenizer.pieces([token])[0] if "\ufffd" in text else text
    return tuple(texts[token] for token in ids)


def _description(model: Decoder) -> str:
    config = model.config
    return f"Decoder, {config.num_layers} x {config.num_heads} heads, d_model {config.d_model}"
