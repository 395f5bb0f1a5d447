"""What to train and how, when nothing else is said: a few named recipes, each with its reason.

Knows nothing about files of text, and trains nothing.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sightline.schedule import Device, TrainConfig

RecipeName = Literal["auto", "quick", "short", "words", "counted", "long", "plain"]

# Up to so many tokens a model of a few million weights reads its text many times over, and learns it by heart.
SHORT_TEXT = 5_000_000
# From so many tokens on, most weights and most of the time belong to the vocabulary.
LARGE_VOCABULARY = 4096


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a model and of its training that belong together. Whoever trains may change any of them."""

    name: str
    reason: str
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `DecoderConfig`; for the preset modern."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig`."""

    def __str__(self) -> str:
        return f"recipe {self.name}: {self.reason}"


def choose_recipe(name: RecipeName, *, tokens: int, vocabulary: int) -> Recipe:
    """The recipe of that name for a text of so many training tokens; auto: the one that the text asks for.

    | recipe | for | what it does |
    |---|---|---|
    | words | short texts, a vocabulary of 4,096 and more | little beside the tied vocabulary, much dropout |
    | short | other texts of up to 5 million tokens | dropout, four layers |
    | long | longer texts | `modern` as it is: the text is too long to be learned by heart |
    | counted | whoever asks: the lowest loss on a short text | `short` or `words` beside counts of the text |
    | quick | whoever asks: seconds | one layer beside counts |
    | plain | whoever asks | the defaults of `DecoderConfig` and of `TrainConfig` with AdamW for everything |

    Counts (`DecoderConfig.counts`) are no part of Qwen3: a model with them cannot be written for `transformers`, so
    that auto takes none; a recipe that is asked for by name may.

    Raises: ValueError for an unknown name.

    >>> print(choose_recipe("auto", tokens=1_000_000, vocabulary=65))
    recipe short: a text that can be learned by heart: few layers and dropout
    >>> choose_recipe("auto", tokens=10**9, vocabulary=16384).name
    'long'
    """
    if name not in get_args(RecipeName):
        raise ValueError(f"expected a recipe of {', '.join(get_args(RecipeName))}, got {name!r}")
    if name == "auto" and tokens > SHORT_TEXT:
        name = "long"
    elif name == "auto":
        name = "words" if vocabulary >= LARGE_VOCABULARY else "short"
    many = vocabulary >= LARGE_VOCABULARY
    # Longer runs of characters cost more than they tell; of words, four are seen twice too seldom for a fifth.
    longest = 7 if vocabulary < 256 else 4 if vocabulary < 1 << 15 else 3
    short: dict[str, Any] = {"d_model": 192, "num_layers": 4, "dropout": 0.2, "tied": False}
    words: dict[str, Any] = {"d_model": 128, "num_layers": 2, "context": 128, "dropout": 0.1}
    slow, fast = {"embedding_rate": 0.03, "cooldown": 0.6}, {"batch": 8, "learning_rate": 0.01, "cooldown": 0.6}
    return {
        "quick": Recipe(
            name="quick",
            reason="one layer beside counts of the text, and rates for a run of seconds",
            model={"d_model": 128, "num_layers": 1, "d_ff": 256, "context": 128, "tied": many, "counts": longest},
            training={"batch": 8, "learning_rate": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.0, "cooldown": 0.6},
        ),
        "short": Recipe(
            name="short",
            reason="a text that can be learned by heart: few layers and dropout",
            model=short,
            training=slow,
        ),
        "words": Recipe(
            name="words",
            reason="many words and little text: two layers, the head tied to the embedding, dropout",
            model=words,
            training=fast,
        ),
        "counted": Recipe(
            name="counted",
            reason="what counting knows of a short text is counted, what it does not a network learns",
            # The words of an article are in the article: the further a pointer reaches, the more it finds.
            model={
                **(words | {"context": 1024, "dropout": 0.2} if many else short),
                "counts": longest,
                "pointer": many,
            },
            training=fast | {"batch": 1} if many else slow,
        ),
        "long": Recipe(name="long", reason="a text too long to be learned by heart: modern as it is, and Muon"),
        "plain": Recipe(
            name="plain", reason="AdamW for everything", training={"optimizer": "adamw", "learning_rate": 2e-3}
        ),
    }[name]


def check_changes(recipe: RecipeName | None, config: TrainConfig | Mapping[str, Any] | None) -> Device:
    """Refuses, before any text is read, what no recipe could make right; the device that was asked for.

    Raises: ValueError for an unknown or a bad setting, or a recipe beside a whole config.

    >>> check_changes(None, {"step": 3})
    Traceback (most recent call last):
    ...
    ValueError: TrainConfig has no setting 'step'
    """
    if isinstance(config, TrainConfig):
        if recipe is not None:
            raise ValueError(f"expected settings beside the recipe {recipe!r} as a mapping, got a whole TrainConfig")
        return config.device
    names = {each.name for each in dataclasses.fields(TrainConfig)}
    for name in config or {}:
        if name not in names:
            raise ValueError(f"TrainConfig has no setting {name!r}")
    return TrainConfig(**(config or {})).device


def settle(
    recipe: RecipeName | None,
    config: TrainConfig | Mapping[str, Any] | None,
    model: Mapping[str, Any],
    preset: str,
    *,
    tokens: int,
    vocabulary: int,
) -> tuple[TrainConfig, dict[str, Any], str | None]:
    """How to train, which fields of the model differ from the preset, and what to say of the recipe.

    A whole config takes no recipe; the preset classic keeps its shape.
    """
    if isinstance(config, TrainConfig):
        return config, dict(model), None
    chosen = choose_recipe(recipe or "auto", tokens=tokens, vocabulary=vocabulary)
    changes = shape(chosen, model) if preset == "modern" else dict(model)
    return cook(chosen, config or {}), changes, str(chosen)


def shape(recipe: Recipe, model: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's model with what is given in the place of what it says.

    >>> shape(choose_recipe("quick", tokens=1000, vocabulary=65), {"d_ff": 128})["d_ff"]
    128
    """
    return {**recipe.model, **model}


def cook(recipe: Recipe, config: Mapping[str, Any]) -> TrainConfig:
    """The recipe's training with what is given in the place of what it says.

    What has no effect on the given optimiser is left out, if only the recipe says it.

    >>> cook(choose_recipe("quick", tokens=1000, vocabulary=65), {"batch": 4, "steps": 50}).batch
    4
    """
    said = dict(recipe.training)
    if config.get("optimizer") == "adamw":
        said = {name: value for name, value in said.items() if name not in TrainConfig.NOT_WITH_ADAMW}
    return TrainConfig(**{**said, **config})
