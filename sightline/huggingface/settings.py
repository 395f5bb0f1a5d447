"""A config.json of `transformers` as a `DecoderConfig`, and back: exactly, or refused by the setting's name.

A setting is read, or checked to have the one value that a `Decoder` can have, or known to change no number.
Knows nothing of files and tensors.
"""

from collections.abc import Mapping
from typing import Any

from sightline.huggingface.families import BENIGN, FAMILIES, Family
from sightline.models import DecoderConfig
from sightline.rows import EPSILON

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


# --- From theirs ---------------------------------------------------------------------------------------


def read_settings(config: Mapping[str, Any]) -> tuple[Family, DecoderConfig]:
    """What a config.json of `transformers` says.

    Raises: ValueError for a model that is no `Decoder`, naming the setting.

    >>> sizes = {"vocab_size": 9, "n_embd": 32, "n_layer": 2, "n_head": 4}
    >>> family, config = read_settings({"model_type": "gpt2", **sizes})
    >>> config.positions, config.activation, config.context
    ('learned', 'gelu_tanh', 1024)
    """
    family = _family(config)
    name = family.name
    for key, value in config.items():
        if key in family.only and value != family.only[key]:
            raise ValueError(f"{key} {value!r} of a {name} is not built here; it must be {family.only[key]!r}")
        if key not in family.only and key not in family.defaults and key not in BENIGN:
            raise ValueError(f"{key} {value!r} is not known of a {name}; remove it if it changes no number")
    for key, default in family.defaults.items():
        if default is None and config.get(key) is None:
            raise ValueError(f"the setting {key} of a {name} is missing")
    values = {key: config.get(key, default) for key, default in family.defaults.items()}
    read = {"gpt2": _of_gpt2, "opt": _of_opt}.get(name)
    return family, read(values) if read else _of_llama(name, values)


def _family(config: Mapping[str, Any]) -> Family:
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"the model_type {name!r} cannot be opened as a Decoder; {', '.join(FAMILIES)} can")
    family = FAMILIES[name]
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise ValueError(f"expected the architecture {family.architecture}, which writes text, got {architectures[0]}")
    return family


def _of_llama(name: str, values: Mapping[str, Any]) -> DecoderConfig:
    attention_bias, mlp_bias = (bool(values.get(key)) for key in ("attention_bias", "mlp_bias"))
    if attention_bias != mlp_bias:
        raise ValueError(f"attention_bias {attention_bias} beside mlp_bias {mlp_bias} is not built here")
    base, scaling = _rotary(values)
    return DecoderConfig(
        vocabulary=values["vocab_size"],
        context=values["max_position_embeddings"],
        d_model=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_groups=values["num_key_value_heads"] or 0,
        head_width=values["head_dim"] or 0,
        d_ff=values["intermediate_size"],
        norm="rms",
        norm_epsilon=values["rms_norm_eps"],
        positions="rotary",
        rotary_base=base,
        rotary_scaling=scaling,
        window_before=_window_before(values),
        activation="swiglu",
        bias=attention_bias,
        query_key_value_bias=name == "qwen2",
        query_key_norm=name == "qwen3",
        tied=values["tie_word_embeddings"],
    )


def _rotary(values: Mapping[str, Any]) -> tuple[float, tuple[float, ...]]:
    """Base and scaling, in the settings' form before transformers 5 and since."""
    given = (values["rope_scaling"] or {}) | (values["rope_parameters"] or {})
    kind = given.get("rope_type", given.get("type", "default"))
    base = given.get("rope_theta", values["rope_theta"])
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {given['partial_rotary_factor']!r} is not built here; it must be 1.0")
    if kind == "default":
        return base, ()
    if kind != "llama3":
        raise ValueError(f"the rope_type {kind!r} is not built here; it must be 'default' or 'llama3'")
    for key in _LLAMA3:
        if key not in given:
            raise ValueError(f"the rope_type 'llama3' needs the setting {key}, which is missing")
    return base, tuple(float(given[key]) for key in _LLAMA3)


def _window_before(values: Mapping[str, Any]) -> int:
    window, layers = values.get("sliding_window"), values["num_hidden_layers"]
    if "use_sliding_window" in values:  # Qwen's, which lets some layers slide
        sliding = bool(values["use_sliding_window"] and window)
        first = values["max_window_layers"] if sliding else layers
        kinds = values["layer_types"] or [_kind(layer >= first) for layer in range(layers)]
        if set(kinds) not in ({_kind(True)}, {_kind(False)}):
            raise ValueError(f"layers of more than one kind are not built here; layer_types has {sorted(set(kinds))}")
        if kinds[0] == _kind(False):
            return 0
        if not sliding:
            raise ValueError(f"layer_types says {kinds[0]}, but use_sliding_window is false")
    if window == 1:
        raise ValueError("sliding_window 1 is not built here; a token must see at least one before its own")
    return window - 1 if window else 0  # theirs counts the token itself


def _kind(slides: bool) -> str:
    return "sliding_attention" if slides else "full_attention"


def _of_gpt2(values: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        vocabulary=values["vocab_size"],
        context=values["n_positions"],
        d_model=values["n_embd"],
        num_layers=values["n_layer"],
        num_heads=values["n_head"],
        d_ff=values["n_inner"] or 4 * values["n_embd"],
        norm="layer",
        norm_epsilon=values["layer_norm_epsilon"],
        positions="learned",
        activation=_activation(values["activation_function"]),
        bias=True,
        query_key_norm=False,
        tied=values["tie_word_embeddings"],
    )


def _of_opt(values: Mapping[str, Any]) -> DecoderConfig:
    width = values["word_embed_proj_dim"]
    if width and width != values["hidden_size"]:
        raise ValueError(f"word_embed_proj_dim {width} is not built here; it must be hidden_size")
    return DecoderConfig(
        vocabulary=values["vocab_size"],
        context=values["max_position_embeddings"],
        d_model=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        d_ff=values["ffn_dim"],
        norm="layer",
        norm_first=values["do_layer_norm_before"],
        positions="learned",
        activation=_activation(values["activation_function"]),
        bias=True,
        query_key_norm=False,
        tied=values["tie_word_embeddings"],
    )


def _activation(name: str) -> Any:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation_function {name!r} is not built here; {', '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS[name]


# --- To theirs -----------------------------------------------------------------------------------------


def write_settings(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
    """The family that computes the same, and its config.json.

    Raises: ValueError where there is none, naming the setting.
    """
    if config.norm == "rms":
        name = "mistral" if config.window_before else "llama"
        name = "qwen3" if config.query_key_norm else "qwen2" if config.query_key_value_bias else name
        needed: dict[str, tuple[Any, ...]] = {
            "norm_first": (True,),
            "activation": ("swiglu",),
            "positions": ("rotary",),
            "bias": (True, False) if name == "llama" else (False,),
            "query_key_value_bias": (name == "qwen2",),
            "scale_embeddings": (False,),
        }
        settings = _to_llama(name, config)
    else:
        name = "gpt2" if config.norm_first else "opt"
        needed = {
            "positions": ("learned", "sinusoidal"),
            "activation": ("gelu", "gelu_tanh", "relu"),
            "bias": (True,),
            "query_key_norm": (False,),
            "num_groups": (config.num_heads,),
            "head_width": (config.d_model / config.num_heads,),
            "window_before": (0,),
            "norm_epsilon": (EPSILON["layer"],) if name == "opt" else (config.norm_epsilon,),
        }
        settings = _to_gpt2(config) if name == "gpt2" else _to_opt(config)
    for setting, values in {**needed, "counts": (0,), "pointer": (False,)}.items():
        value = getattr(config, setting)
        if value not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(
                f"no model of transformers computes this one: {setting} is {value!r}, and in the nearest, {name}, "
                f"it is {wanted}"
            )
    family = FAMILIES[name]
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    tied = config.tied and not config.scale_embeddings
    head = {"architectures": [family.architecture], "model_type": name}
    return family, {**head, "vocab_size": config.vocabulary, **settings, **tokens, "tie_word_embeddings": tied}


def _to_llama(name: str, config: DecoderConfig) -> dict[str, Any]:
    scaling = dict(zip(_LLAMA3, config.rotary_scaling, strict=False))
    if scaling:
        scaling = {"rope_type": "llama3", **scaling, _LLAMA3[-1]: int(scaling[_LLAMA3[-1]])}
    window = config.window_before + 1 if config.window_before else None
    sliding: dict[str, Any] = {}
    if name == "mistral":
        sliding = {"sliding_window": window}
    elif name.startswith("qwen"):
        sliding = {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window else config.num_layers,
            "layer_types": [_kind(window is not None)] * config.num_layers,
        }
    return {
        "max_position_embeddings": config.context,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_groups,
        "head_dim": config.head_width,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": scaling or None,
        "attention_dropout": config.dropout,
        **({"attention_bias": config.bias, "mlp_bias": config.bias} if name == "llama" else {}),
        **({"attention_bias": False} if name == "qwen3" else {}),
        **sliding,
    }


def _to_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_positions": config.context,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": _their_activation(config),
        "layer_norm_epsilon": config.norm_epsilon,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
    }


def _to_opt(config: DecoderConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.context,
        "hidden_size": config.d_model,
        "word_embed_proj_dim": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.d_ff,
        "do_layer_norm_before": False,
        "activation_function": _their_activation(config),
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
    }


def _their_activation(config: DecoderConfig) -> str | None:
    return next((theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation), None)
