"""The pictures of docs/people, of the models of those pages: drawn at random, nothing is fetched; needs transformers.

python docs/pictures/people.py
"""

from pathlib import Path
from typing import Any

import torch

import sightline as sl

FOLDER = Path(__file__).parent
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sightline",
}
PASSAGE = slice(40, 50)


def seen(model: Any, tokens: int) -> sl.Capture:
    with sl.huggingface.watch(model.eval()) as watched, torch.no_grad():
        model(torch.randint(3, 64, (1, tokens)))
    return watched.capture()


def researcher() -> None:
    """All heads of a model with a window."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    capture = seen(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)), 64)
    sl.plot_heads(capture, title="A random mistral: each query sees 16 keys").savefig(FOLDER / "heads.png", dpi=80)


def engineer() -> None:
    """The weight of each head on a passage, for every query after it."""
    from matplotlib.figure import Figure
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    windows = {"sliding_window": 32, "max_position_embeddings": 1024, "head_dim": 16}
    capture = seen(Gemma2ForCausalLM(Gemma2Config(**SHAPE, **windows)), 300)
    axes = (figure := Figure(figsize=(7, 3), layout="constrained")).add_subplot()
    for layer, colour in zip(capture.layers, ("tab:orange", "tab:blue"), strict=True):
        for head in range(capture.num_heads):
            weights = capture.weights(layer, head, queries=slice(0, 300), keys=PASSAGE).sum(-1)
            axes.plot(weights, linewidth=1, color=colour, label=f"layer {layer}" if head == 0 else None)
    axes.axvspan(PASSAGE.start, PASSAGE.stop, color="0.9")
    axes.set(xlabel="query", ylabel="weight on the passage")
    axes.legend()
    figure.savefig(FOLDER / "passage.png", dpi=80)


if __name__ == "__main__":
    sl.huggingface.enable()
    researcher()
    engineer()
