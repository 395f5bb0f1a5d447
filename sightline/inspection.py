"""`capture()`: run a model once over a text, or over a source and its target, and keep what every head saw.

Between the model and whatever draws it. Knows nothing of browsers and figures.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from sightline.captures import Capture
from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from sightline.files import new_folder
from sightline.layers import MultiHeadAttention
from sightline.masks import Mask
from sightline.models import Decoder, evaluating
from sightline.pairs import line_end
from sightline.recording import Recorder, record
from sightline.store import load_capture, write_description

if TYPE_CHECKING:
    from sightline.tokenizers import Tokenizer


@overload
def capture(
    model: Decoder,
    text_or_tokens: str | Sequence[int] | Tensor,
    target: None = None,
    *,
    layers: Sequence[int] | None = None,
    top: int = 8,
    map_block: int | None = None,
    prompt: int | None = None,
    folder: str | Path | None = None,
) -> Capture: ...
@overload
def capture(
    model: EncoderDecoder,
    text_or_tokens: str | Sequence[int] | Tensor,
    target: str | Sequence[int] | Tensor,
    *,
    layers: Sequence[int] | None = None,
    top: int = 8,
    map_block: int | None = None,
    prompt: int | None = None,
) -> dict[str, Capture]: ...
@torch.no_grad()
def capture(
    model: Decoder | EncoderDecoder,
    text_or_tokens: str | Sequence[int] | Tensor,
    target: str | Sequence[int] | Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    top: int = 8,
    map_block: int | None = None,
    prompt: int | None = None,
    folder: str | Path | None = None,
) -> Capture | dict[str, Capture]:
    """Run the model once over a text, and keep what every head saw: O(N) numbers a head, never the matrix.

    An `EncoderDecoder` reads a source and a target, and gives three captures by name: "cross", the rectangle of the
    target's tokens on the source's, "encoder" and "decoder". Texts are read as in training: the source ends, and the
    target begins, with the end of a line; ids are taken as they are. Layers are those of each part.

    `layers` None means all; `top` and `map_block` are `observe()`'s. `map_block` None is the smallest power of two,
    64 or more, with at most 1,024 blocks along the text. `prompt` says that the model wrote all but so many first
    tokens (of the target). With `folder` the capture is written there as it is made, as `save_capture` would; without,
    one of more than 512 MiB lies in a temporary file. The model reads in evaluation mode, and is afterwards as it was,
    also after an error. A decoder reads no further than the weights of the last layer asked for.

    Raises:
        ValueError: a text for a model without tokenizer, an empty one, one longer than the model's context, words
            that the vocabulary lacks, ids outside of it, a layer that the model does not have, top or map_block
            below 1, a prompt longer than the text, a folder that holds something or cannot be written, or a target
            that is missing or that nothing reads.

    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2))
    >>> seen = capture(model, [3, 1, 4, 1, 5], layers=[1])
    >>> seen.layers, tuple(seen.entropy.shape)
    ((1,), (1, 4, 5))
    >>> from sightline.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
    >>> translator = EncoderDecoder(EncoderDecoderConfig(vocabulary=9, d_model=32, num_layers=2))
    >>> seen = capture(translator, [3, 1, 4, 1, 5], [0, 2, 7])
    >>> {part: tuple(one.weights(0, 2).shape) for part, one in seen.items()}
    {'cross': (3, 5), 'encoder': (5, 5), 'decoder': (3, 3)}
    """
    options: dict[str, Any] = {"top": top, "map_block": map_block}
    if isinstance(model, EncoderDecoder):
        if target is None:
            raise ValueError("capture: an encoder-decoder reads a source and a target, and the target is missing")
        if folder is not None:
            raise ValueError("capture: a folder holds one capture, and these are three: use save_capture for each")
        source, written = _sides(model, text_or_tokens, target)
        _check_prompt(prompt, written)
        return _translation(model, source, written, layers, prompt, options)
    if not isinstance(model, Decoder):
        other = "sl.huggingface.watch sees models of transformers, sl.record any other"
        raise ValueError(f"capture: expected a Decoder or an EncoderDecoder, got {type(model).__name__}: {other}")
    if target is not None:
        raise ValueError("capture: a decoder reads one text, so a target beside it has no effect: leave it out")
    ids = _ids(model, text_or_tokens)
    _check_prompt(prompt, ids)

    def seen(file: Path | None) -> Capture:
        watching = watched(model, layers, file=file, **options)
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
        separator=_separator(model.tokenizer),
        prompt=prompt,
    )


def _translation(
    model: EncoderDecoder,
    source: Sequence[int],
    target: Sequence[int],
    layers: Sequence[int] | None,
    prompt: int | None,
    options: dict[str, Any],
) -> dict[str, Capture]:
    """What each kind of attention sees while a model reads a source and a target."""
    modules: dict[str, list[Any]] = {
        "cross": [block.cross_attention for block in model.blocks],
        "encoder": [block.attention for block in model.encoder.blocks],
        "decoder": [block.attention for block in model.blocks],
    }
    chosen = {part: _chosen(layers, len(those)) for part, those in modules.items()}
    device = model.head_weight.device
    with evaluating(model), ExitStack() as stack:
        seen = {
            part: stack.enter_context(
                record([those[i] for i in chosen[part]], chosen[part], same_text=part != "cross", **options)
            )
            for part, those in modules.items()
        }
        model.decode(torch.tensor([target], device=device), model.encode(torch.tensor([source], device=device)))
    texts, written = _texts(model.tokenizer, source), _texts(model.tokenizer, target)
    given: dict[str, dict[str, Any]] = {
        "cross": {"key_tokens": texts, "query_tokens": written, "ids": source},
        "encoder": {"key_tokens": texts, "ids": source},
        "decoder": {"key_tokens": written, "ids": target, "prompt": prompt},
    }
    said: dict[str, Any] = {"model": _description(model), "separator": _separator(model.tokenizer)}
    return {part: seen[part].capture(**given[part], **said) for part in modules}


def _check_prompt(prompt: int | None, ids: Sequence[int]) -> None:
    if prompt is not None and not 0 <= prompt <= len(ids):
        raise ValueError(f"capture: prompt must be from 0 to the {len(ids)} tokens there are, got {prompt}")


def _chosen(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not chosen:
        raise ValueError(f"capture: no layer asked for; layers are 0 to {count - 1}, and None means all")
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(f"capture: layers are 0 to {count - 1}, got {layer}")
    return chosen


def _sides(
    model: EncoderDecoder, source: str | Sequence[int] | Tensor, target: str | Sequence[int] | Tensor
) -> tuple[list[int], list[int]]:
    """What the encoder reads and what the decoder reads: a text as in training, with the end of its line."""
    read = [*_ids(model, source), _line_end(model)] if isinstance(source, str) else source
    written = [_line_end(model), *_encoded(model, target)] if isinstance(target, str) else target
    return _ids(model, read), _ids(model, written)


def _line_end(model: EncoderDecoder) -> int:
    return line_end(_tokenizer(model))


def _ids(model: Decoder | EncoderDecoder, source: str | Sequence[int] | Tensor) -> list[int]:
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


def _encoded(model: Decoder | EncoderDecoder, text: str) -> list[int]:
    tokenizer = _tokenizer(model)
    unknown = tokenizer.unknown_words(text)
    if unknown:
        named = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"capture: not in the vocabulary: {named} ({len(unknown)} in all); "
            "use other words, or accept <unk> for them with capture(model, model.tokenizer.encode(text))"
        )
    ids = tokenizer.encode(text)
    return [*tokenizer.start, *ids] if ids else ids


def _tokenizer(model: Decoder | EncoderDecoder) -> "Tokenizer":
    if model.tokenizer is None:
        raise ValueError(
            "capture: this model has no tokenizer to read text with; set model.tokenizer, or give token ids"
        )
    return model.tokenizer


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


def _separator(tokenizer: "Tokenizer | None") -> str:
    return " " if tokenizer is None or tokenizer.kind == "words" else ""


def _description(model: Decoder | EncoderDecoder) -> str:
    config = model.config
    layers = f"{config.num_layers}"
    if isinstance(config, EncoderDecoderConfig):
        layers += f" + {config.decoder_layers}"
    return f"{type(model).__name__}, {layers} x {config.num_heads} heads, d_model {config.d_model}"
