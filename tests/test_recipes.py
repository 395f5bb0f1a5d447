"""A recipe is chosen by the text, every part of it gives way to what is said, and training says which it took."""

from typing import Any

import pytest

from sightline.checkpoints import load
from sightline.counts import Counts
from sightline.events import Started
from sightline.huggingface.settings import write_settings
from sightline.models import DecoderConfig
from sightline.recipes import check_changes, choose_recipe, cook, shape
from sightline.schedule import TrainConfig
from sightline.training import train

TINY: dict[str, Any] = {"context": 8, "d_model": 16, "num_layers": 1, "num_heads": 2}
RUN: dict[str, Any] = {"steps": 2, "evaluate_batches": 1, "batch": 2}


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "name"),
    [(1_000_000, 65, "short"), (200_000, 18_000, "words"), (10**8, 65, "long"), (10**8, 50_000, "long")],
)
def test_the_text_chooses(tokens, vocabulary, name):
    assert choose_recipe("auto", tokens=tokens, vocabulary=vocabulary).name == name


@pytest.mark.parametrize("name", ["quick", "short", "words", "counted", "long", "plain"])
def test_every_recipe_can_be_cooked(name):
    recipe = choose_recipe(name, tokens=1000, vocabulary=65)
    assert recipe.name == name and str(recipe).startswith(f"recipe {name}: ")
    DecoderConfig.modern(vocabulary=65, **recipe.model)
    config = cook(recipe, {"steps": 7})
    assert config.steps == 7
    for key, value in recipe.training.items():
        assert getattr(config, key) == value
        assert getattr(cook(recipe, {key: getattr(TrainConfig, key)}), key) == getattr(TrainConfig, key)


@pytest.mark.parametrize("vocabulary", [65, 5000, 18_000, 1 << 15, 200_000])
def test_runs_that_are_counted_have_numbers(vocabulary):
    for name in ("quick", "counted"):
        Counts(vocabulary, longest=choose_recipe(name, tokens=10**6, vocabulary=vocabulary).model["counts"])


@pytest.mark.parametrize("tokens", [10**4, 10**7])
@pytest.mark.parametrize("vocabulary", [65, 18_000])
def test_what_auto_takes_opens_in_transformers(tokens, vocabulary):
    recipe = choose_recipe("auto", tokens=tokens, vocabulary=vocabulary)
    config = DecoderConfig.modern(vocabulary=vocabulary, **recipe.model)
    assert write_settings(config)[0].architecture == "Qwen3ForCausalLM"


def test_adamw_beside_a_recipe_of_muon():
    assert cook(choose_recipe("short", tokens=1000, vocabulary=65), {"optimizer": "adamw"}).optimizer == "adamw"
    with pytest.raises(ValueError, match="matrix_rate has no effect with the optimizer adamw"):
        cook(choose_recipe("short", tokens=1000, vocabulary=65), {"optimizer": "adamw", "matrix_rate": 0.1})


@pytest.mark.parametrize(
    ("changes", "says"), [({"step": 3}, "no setting 'step'"), ({"batch": 0}, "number of batch of at least 1, got 0")]
)
def test_what_no_recipe_makes_right(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        check_changes(None, changes)
    with pytest.raises(ValueError, match=says):
        train("embedded", tmp_path / "run", config=changes)
    assert not list((tmp_path / "run").glob("tokens"))


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match=r"expected a recipe of auto, quick, .*, got 'slow'"):
        choose_recipe("slow", tokens=1, vocabulary=1)  # pyright: ignore[reportArgumentType]


def started(tmp_path, **settings) -> Started:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    events = []
    train(text, tmp_path / "run", tokenizer="characters", model=TINY, listener=events.append, **settings)
    return next(event for event in events if isinstance(event, Started))


def test_training_says_which_recipe_it_took(tmp_path):
    event = started(tmp_path, config=RUN)
    assert event.recipe is not None and event.recipe.startswith("recipe short: ")


def test_a_whole_config_takes_no_recipe(tmp_path):
    assert started(tmp_path, config=TrainConfig(**RUN)).recipe is None
    with pytest.raises(ValueError, match="beside the recipe 'quick' as a mapping, got a whole TrainConfig"):
        started(tmp_path, config=TrainConfig(**RUN), recipe="quick")


def test_classic_keeps_the_shape_of_the_paper(tmp_path):
    quick: dict[str, Any] = {"recipe": "quick", "config": RUN, "listener": None}
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    train(text, tmp_path / "classic", tokenizer="characters", preset="classic", model=TINY, **quick)
    train(text, tmp_path / "modern", tokenizer="characters", model=TINY, **quick)
    assert load(tmp_path / "classic").config.counts == 0
    assert load(tmp_path / "modern").config.counts == 7


@pytest.mark.parametrize("changes", [{"counts": 0}, {"d_model": 256}, {"d_model": 32, "num_heads": 2}])
def test_one_setting_may_be_given_alone(changes):
    for name in ("quick", "short", "words", "counted", "long", "plain"):
        model = shape(choose_recipe(name, tokens=1000, vocabulary=65), changes)
        config = DecoderConfig.modern(vocabulary=65, **model)
        assert {key: getattr(config, key) for key in changes} == changes
