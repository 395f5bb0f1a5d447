"""Tiny randomly initialised models of transformers, one a family: nothing is downloaded."""

from typing import Any

import torch
import transformers

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WIDE = SMALL | {"head_dim": 8}
ENCODER = {name: SMALL[name] for name in SMALL if name not in ("num_key_value_heads", "eos_token_id")}
PICTURE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 61, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
ALTERNATE = ["sliding_attention", "full_attention"]

SINCE_5 = {"bert", "roberta", "t5", "qwen2_moe"}
"""Families whose attention goes through the interface from transformers 5.0 on."""

# Family -> what makes the model, its config's class, and the config's options.
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL),
    "qwen2-window": (
        "Qwen2ForCausalLM", "Qwen2Config",
        SMALL | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        SMALL | {
            "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", WIDE),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        WIDE | {
            "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3, "layer_types": ALTERNATE,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        WIDE | {"sliding_window": 5, "query_pre_attn_scalar": 3, "layer_types": ALTERNATE},
    ),
    "gpt-oss": (
        "GptOssForCausalLM", "GptOssConfig",
        WIDE | {
            "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ALTERNATE,
            "rope_scaling": None,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": None},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SMALL),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        SMALL | {
            "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
    ),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
         "word_embed_proj_dim": 32},
    ),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        WIDE | {
            "intermediate_size_mlp": 48, "attention_chunk_size": 5, "num_local_experts": 2,
            "layer_types": ["chunked_attention", "full_attention"], "attn_temperature_tuning": False,
            "rope_scaling": None,
        },
    ),
}  # fmt: skip
ENCODERS = {
    "bert": ("BertModel", "BertConfig", ENCODER),
    "roberta": ("RobertaModel", "RobertaConfig", ENCODER),
    "vit": ("ViTModel", "ViTConfig", PICTURE | {"image_size": 12, "patch_size": 4}),
    "clip": (
        "CLIPModel", "CLIPConfig",
        {"text_config": PICTURE | {"vocab_size": 61, "max_position_embeddings": 32, "eos_token_id": 2},
         "vision_config": PICTURE | {"image_size": 12, "patch_size": 4}, "projection_dim": 16},
    ),
}  # fmt: skip
PAIRS = {
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
         "eos_token_id": 2, "decoder_start_token_id": 0},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", PAIR | {"max_position_embeddings": 64}),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        PAIR | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
    ),
}  # fmt: skip
FAMILIES = DECODERS | ENCODERS | PAIRS


def build(family: str, implementation: str, **changes: Any) -> Any:
    """The same weights for every implementation; large enough that heads differ in what they look at."""
    made, shape, options = FAMILIES[family]
    config = getattr(transformers, shape)(**(options | changes))
    torch.manual_seed(0)
    model = getattr(transformers, made)._from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25, generator=generator)
            elif not parameter.any():
                parameter.normal_(0, 0.5, generator=generator)
    return model


def inputs(family: str, *, batch: int = 2, tokens: int = 14) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, 61, (batch, tokens))
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 12, 12)}
    if family == "clip":
        return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 12, 12)}
    if family == "whisper":
        return {"input_features": torch.randn(batch, 8, 40), "decoder_input_ids": ids[:, :6]}
    if family in PAIRS:
        return {"input_ids": ids, "decoder_input_ids": ids[:, :6].flip(0)}
    return {"input_ids": ids}
