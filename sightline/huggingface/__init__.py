"""Any model of Hugging Face's transformers on Sightline's attention, and what it saw; our own in its world.

>>> import sightline as sl
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> sl.huggingface.enable()
>>> shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
>>> config = LlamaConfig(vocab_size=50, **shape, attn_implementation="sightline")
>>> model = LlamaForCausalLM(config).eval()
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sightline.huggingface.interface import enable as enable
    from sightline.huggingface.watching import watch as watch

# Imported when first asked for: folders of transformers are opened without these.
_LATER = {"enable": "interface", "watch": "watching"}

__all__ = sorted(_LATER)  # pyright: ignore[reportUnsupportedDunderAll] (computed)


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'sightline.huggingface' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sightline.huggingface.{_LATER[name]}"), name)
