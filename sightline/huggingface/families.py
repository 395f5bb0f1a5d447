"""Types of models of `transformers` that are a `Decoder`: which settings they have, and where their tensors lie.

Knows nothing of files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sightline.models import Decoder
from sightline.positions import sinusoidal

# These say what was trained or written, and how, but change nothing of what a model computes.
BENIGN = {
    "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "attn_pdrop", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "dropout", "dtype", "embd_pdrop",
    "eos_token_id", "id2label", "init_std", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "layerdrop", "model_type", "n_ctx", "output_attentions", "output_hidden_states", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop", "return_dict", "sep_token_id",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_LAYER_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_MODEL_PARTS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One type of model: its settings, and where its tensors lie."""

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    """Settings that are read, and what they are when config.json does not name them; None: it must."""
    only: Mapping[str, Any]
    """Settings with the one value that a `Decoder` can have."""
    layers: str
    model_parts: Mapping[str, str]
    layer_parts: Mapping[str, str]


_SIZES = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), None
)
_ROTARY = {"rope_theta": 10000.0, "rope_scaling": {}, "rope_parameters": {}}
_SLIDING = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": ()}


def _llama_like(name: str, architecture: str, *, only: Mapping[str, Any] | None = None, **own: Any) -> Family:
    defaults = {"head_dim": 0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return Family(
        name=name,
        architecture=architecture,
        defaults=_SIZES | _ROTARY | defaults | own,
        only={"hidden_act": "silu", "partial_rotary_factor": 1.0, **(only or {})},
        layers="model.layers",
        model_parts=_MODEL_PARTS,
        layer_parts=_LAYER_PARTS,
    )


FAMILIES = {
    family.name: family
    for family in (
        _llama_like(
            "llama",
            "LlamaForCausalLM",
            max_position_embeddings=2048,
            num_key_value_heads=0,
            attention_bias=False,
            mlp_bias=False,
        ),
        _llama_like(
            "mistral",
            "MistralForCausalLM",
            max_position_embeddings=4096 * 32,
            num_key_value_heads=8,
            sliding_window=4096,
        ),
        _llama_like("qwen2", "Qwen2ForCausalLM", max_position_embeddings=32768, num_key_value_heads=32, **_SLIDING),
        _llama_like(
            "qwen3",
            "Qwen3ForCausalLM",
            max_position_embeddings=32768,
            num_key_value_heads=32,
            only={"attention_bias": False},
            **(_SLIDING | {"head_dim": 128}),
        ),
        Family(
            name="gpt2",
            architecture="GPT2LMHeadModel",
            defaults={
                **dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head"), None),
                "n_positions": 1024,
                "n_inner": 0,
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
                "tie_word_embeddings": True,
            },
            only={
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
            layers="transformer.h",
            model_parts={
                "embedding": "transformer.wte",
                "positions": "transformer.wpe",
                "norm": "transformer.ln_f",
                "head": "lm_head",
            },
            layer_parts={
                "attention_norm": "ln_1",
                "attention.query": "attn.c_attn",
                "attention.key": "attn.c_attn",
                "attention.value": "attn.c_attn",
                "attention.output": "attn.c_proj",
                "feed_forward_norm": "ln_2",
                "feed_forward.up": "mlp.c_fc",
                "feed_forward.down": "mlp.c_proj",
            },
        ),
        Family(
            name="opt",
            architecture="OPTForCausalLM",
            defaults={
                **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), None),
                "ffn_dim": 3072,
                "max_position_embeddings": 2048,
                "do_layer_norm_before": True,
                "word_embed_proj_dim": 0,
                "activation_function": "relu",
                "tie_word_embeddings": True,
            },
            only={"enable_bias": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
            layers="model.decoder.layers",
            model_parts={
                "embedding": "model.decoder.embed_tokens",
                "positions": "model.decoder.embed_positions",
                "norm": "model.decoder.final_layer_norm",
                "head": "lm_head",
            },
            layer_parts={
                "attention_norm": "self_attn_layer_norm",
                "attention.query": "self_attn.q_proj",
                "attention.key": "self_attn.k_proj",
                "attention.value": "self_attn.v_proj",
                "attention.output": "self_attn.out_proj",
                "feed_forward_norm": "final_layer_norm",
                "feed_forward.up": "fc1",
                "feed_forward.down": "fc2",
            },
        ),
    )
}


# --- Tensors -------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where one of our tensors lies in theirs, and how."""

    name: str
    transposed: bool = False
    third: int | None = None
    """Queries, keys and values lie in one tensor: the first, second or last third of its last axis."""
    after: int = 0
    """So many rows of theirs stand before our first."""


def place(family: Family, own: str) -> Place:
    """Where the parameter with our name `own` lies.

    >>> place(FAMILIES["gpt2"], "blocks.3.attention.key.weight")
    Place(name='transformer.h.3.attn.c_attn.weight', transposed=True, third=1, after=0)
    """
    part, _, leaf = own.rpartition(".")
    if not part.startswith("blocks."):
        after = 2 if family.name == "opt" and part == "positions" else 0
        return Place(f"{family.model_parts[part]}.{leaf}", after=after)
    _, layer, part = part.split(".", 2)
    name = f"{family.layers}.{layer}.{family.layer_parts[part]}.{leaf}"
    if family.name != "gpt2" or part.endswith("norm"):
        return Place(name)
    kinds = ["attention.query", "attention.key", "attention.value"]
    return Place(name, transposed=leaf == "weight", third=kinds.index(part) if part in kinds else None)


def read_tensors(family: Family, model: Decoder, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names, all in the widest dtype among them; `stored` is emptied on the way.

    Raises: ValueError naming a tensor of theirs that is missing, has another shape, or no place here.
    """
    if family.name == "gpt2" and not any(name.startswith("transformer.") for name in stored):
        # The first GPT-2 files were written from within the model with the head.
        for name in [name for name in stored if name != "lm_head.weight"]:
            stored[f"transformer.{name}"] = stored.pop(name)
    places = {own: place(family, own) for own in model.state_dict()}
    _check(family, model, places, stored)
    dtype = torch.float16
    for tensor in stored.values():
        dtype = tensor.dtype if dtype == torch.float16 else torch.promote_types(dtype, tensor.dtype)
    found: dict[str, Tensor] = {}
    for own, where in places.items():
        tensor = stored[where.name]
        if where.third is not None:
            tensor = tensor.chunk(3, dim=-1)[where.third]
        tensor = (tensor.t() if where.transposed else tensor)[where.after :]
        found[own] = tensor.to(dtype).contiguous()
    return found


def _check(family: Family, model: Decoder, places: Mapping[str, Place], stored: Mapping[str, Tensor]) -> None:
    known = {where.name for where in places.values()}
    for name in known - stored.keys():
        raise ValueError(f"the tensor {name} is missing")
    for name in stored.keys() - known:
        if not _changes_nothing(name, model):
            raise ValueError(f"the tensor {name} has no place in this {family.name}")
    for name, tensor in stored.items():
        if name in known and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"the tensor {name} holds {tensor.dtype}, which is not built here; save it as float")
    for own, tensor in model.state_dict().items():
        name, transposed, third, after = places[own]
        shape = list(reversed(tensor.shape) if transposed else tensor.shape)
        if third is not None:
            shape[-1] *= 3
        shape[0] += after
        if list(stored[name].shape) != shape:
            raise ValueError(f"the tensor {name} has the shape {tuple(stored[name].shape)}, not {tuple(shape)}")


def _changes_nothing(name: str, model: Decoder) -> bool:
    """A second copy of the embedding, or a table that older versions stored."""
    tables = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
    return name.endswith(tables) or (model.head is None and name == "lm_head.weight")


def write_tensors(family: Family, model: Decoder) -> dict[str, Tensor]:
    """A model's tensors under their names."""
    own: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = model.config
    if config.positions == "sinusoidal":  # a table that happens not to be trained
        own["positions.weight"] = sinusoidal(config.context, config.d_model, dtype=own["embedding.weight"].dtype)
    if config.scale_embeddings:
        # Theirs scale nothing: the embedding is stored scaled, and the head, which is not, apart.
        own.setdefault("head.weight", own["embedding.weight"].clone())
        own["embedding.weight"] = own["embedding.weight"] * sqrt(config.d_model)
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in own.items():
        where = place(family, name)
        tensor = tensor.t() if where.transposed else tensor
        if where.after:
            tensor = torch.cat((tensor.new_zeros(where.after, *tensor.shape[1:]), tensor))
        parts.setdefault(where.name, {})[where.third or 0] = tensor
    return {name: _joined(pieces[i] for i in sorted(pieces)) for name, pieces in parts.items()}


def _joined(pieces: Iterable[Tensor]) -> Tensor:
    return torch.cat(tuple(pieces), dim=-1).contiguous()
