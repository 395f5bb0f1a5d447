"""Transformers you can see through: train one on your text, write with it, and see where every head looks."""

import importlib
from typing import TYPE_CHECKING, Any

from sightline.attention import attention as attention
from sightline.attention import observe as observe
from sightline.masks import ALiBi as ALiBi
from sightline.masks import Allowed as Allowed
from sightline.masks import Bias as Bias
from sightline.masks import Causal as Causal
from sightline.masks import Mask as Mask
from sightline.masks import Padding as Padding
from sightline.masks import Segments as Segments
from sightline.masks import Window as Window
from sightline.observation import Observation as Observation
from sightline.shapes import ShapeError as ShapeError

if TYPE_CHECKING:
    from sightline import huggingface as huggingface
    from sightline.beams import DecodeConfig as DecodeConfig
    from sightline.beams import find_targets as find_targets
    from sightline.bridges import to_matrices as to_matrices
    from sightline.bridges import to_named as to_named
    from sightline.bridges import to_numpy as to_numpy
    from sightline.bridges import to_pandas as to_pandas
    from sightline.captures import Capture as Capture
    from sightline.checking.checks import CheckConfig as CheckConfig
    from sightline.checking.checks import check as check
    from sightline.checkpoints import load as load
    from sightline.checkpoints import save as save
    from sightline.conversion import from_torch as from_torch
    from sightline.conversion import to_torch as to_torch
    from sightline.conversion import torch_mask as torch_mask
    from sightline.curves import plot_run as plot_run
    from sightline.diagnosis import doctor as doctor
    from sightline.encoder import Classifier as Classifier
    from sightline.encoder import Encoder as Encoder
    from sightline.encoder import EncoderConfig as EncoderConfig
    from sightline.encoder import MaskedWords as MaskedWords
    from sightline.encoder import hide_tokens as hide_tokens
    from sightline.encoder_decoder import EncoderDecoder as EncoderDecoder
    from sightline.encoder_decoder import EncoderDecoderConfig as EncoderDecoderConfig
    from sightline.evaluation import Evaluation as Evaluation
    from sightline.evaluation import evaluate as evaluate
    from sightline.generation import SampleConfig as SampleConfig
    from sightline.generation import generate as generate
    from sightline.inspection import capture as capture
    from sightline.layers import MultiHeadAttention as MultiHeadAttention
    from sightline.layers import SelfAttention as SelfAttention
    from sightline.models import Decoder as Decoder
    from sightline.models import DecoderConfig as DecoderConfig
    from sightline.pairs import open_pairs as open_pairs
    from sightline.positions import Learned as Learned
    from sightline.positions import Rotary as Rotary
    from sightline.positions import Sinusoidal as Sinusoidal
    from sightline.positions import sinusoidal as sinusoidal
    from sightline.recording import Recorder as Recorder
    from sightline.recording import record as record
    from sightline.store import load_capture as load_capture
    from sightline.store import save_capture as save_capture
    from sightline.tokenizers import Tokenizer as Tokenizer
    from sightline.training import TrainConfig as TrainConfig
    from sightline.training import train as train
    from sightline.translation import score_pairs as score_pairs
    from sightline.translation import train_pairs as train_pairs
    from sightline.translation import translate as translate
    from sightline.viewer.page import page as page
    from sightline.viewer.plots import plot_heads as plot_heads
    from sightline.viewer.plots import plot_positions as plot_positions
    from sightline.viewer.plots import plot_weights as plot_weights
    from sightline.viewer.server import serve as serve

__version__ = "0.6.2"

# Imported when first asked for, so that `import sightline` costs little more than `import torch`.
_LATER = {
    "Capture": "captures",
    "CheckConfig": "checking.checks",
    "Classifier": "encoder",
    "DecodeConfig": "beams",
    "Decoder": "models",
    "DecoderConfig": "models",
    "Encoder": "encoder",
    "EncoderConfig": "encoder",
    "EncoderDecoder": "encoder_decoder",
    "EncoderDecoderConfig": "encoder_decoder",
    "Evaluation": "evaluation",
    "Learned": "positions",
    "MaskedWords": "encoder",
    "MultiHeadAttention": "layers",
    "Recorder": "recording",
    "Rotary": "positions",
    "SampleConfig": "generation",
    "SelfAttention": "layers",
    "Sinusoidal": "positions",
    "Tokenizer": "tokenizers",
    "TrainConfig": "training",
    "capture": "inspection",
    "check": "checking.checks",
    "doctor": "diagnosis",
    "evaluate": "evaluation",
    "find_targets": "beams",
    "from_torch": "conversion",
    "generate": "generation",
    "hide_tokens": "encoder",
    "load": "checkpoints",
    "load_capture": "store",
    "open_pairs": "pairs",
    "page": "viewer.page",
    "plot_heads": "viewer.plots",
    "plot_positions": "viewer.plots",
    "plot_run": "curves",
    "plot_weights": "viewer.plots",
    "record": "recording",
    "save": "checkpoints",
    "save_capture": "store",
    "score_pairs": "translation",
    "serve": "viewer.server",
    "sinusoidal": "positions",
    "to_torch": "conversion",
    "torch_mask": "conversion",
    "to_matrices": "bridges",
    "to_named": "bridges",
    "to_numpy": "bridges",
    "to_pandas": "bridges",
    "train": "training",
    "train_pairs": "translation",
    "translate": "translation",
}
_PACKAGES = ["huggingface"]
_NOW = ["ALiBi", "Allowed", "Bias", "Causal", "Mask", "Observation", "Padding", "Segments", "ShapeError", "Window"]

__all__ = sorted([*_LATER, *_NOW, *_PACKAGES, "attention", "observe"])  # pyright: ignore[reportUnsupportedDunderAll] (computed)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"sightline.{name}")
    if name not in _LATER:
        raise AttributeError(f"module 'sightline' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"sightline.{_LATER[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
