import json
import math

import pytest

from sightline.advice import Advice


def of_size(parameters, tokens, drawn=None):
    return Advice().of_size(parameters=parameters, tokens=tokens, drawn=drawn)


def test_a_text_too_small_for_its_model():
    line = of_size(3_000_000, 100_000)
    assert line.startswith("3,000,000 parameters are many for 100,000 tokens of text")
    assert "--d-model" in line and "--patience" in line and "\n" not in line
    assert of_size(2_000_000, 100_000) is None  # 20 for a token
    assert of_size(3_000_000, 100_000, drawn=100_000) is None  # every token is read once at most
    assert of_size(3_000_000, 100_000, drawn=100_001)


def steps(advice, losses):
    said = [advice.of_step(loss=loss, learning_rate=0.1) for loss in losses]
    return [(i, line) for i, line in enumerate(said) if line]


def noisy(i):
    return 0.4 * math.sin(1.7 * i)


def test_a_loss_that_falls_needs_no_advice():
    assert steps(Advice(), [8 - 4 * i / 400 + noisy(i) for i in range(400)]) == []


def test_a_loss_that_rises_is_told_once_and_soon():
    losses = [4 + noisy(i) for i in range(100)] + [6 + noisy(i) for i in range(300)]
    ((when, line),) = steps(Advice(), losses)
    assert 100 < when < 140
    assert line.startswith("the training loss rises, from ")
    assert line.endswith("start again with a lower --learning-rate (now 0.1)")


def look(advice, loss, best, without_gain):
    return advice.of_evaluation(loss=loss, best=best, best_step=1200, without_gain=without_gain)


def test_a_validation_loss_that_turns_up():
    advice = Advice()
    steps(advice, [2.0] * 100)
    assert look(advice, 1.5, 1.5, 0) is None
    steps(advice, [1.0] * 100)
    assert [look(advice, 1.6, 1.5, count) for count in (1, 2)] == [None, None]
    line = look(advice, 1.6, 1.5, 3)
    assert line.startswith("the validation loss turns up, from 1.5000 at step 1,200 to 1.6000, while the training loss")
    assert "step 1,200 is kept, --patience 3 would stop here" in line and "--dropout" in line
    assert look(advice, 1.7, 1.5, 4) is None


def test_a_validation_loss_that_turns_up_with_the_training_loss_is_another_matter():
    advice = Advice()
    steps(advice, [2.0] * 100)
    look(advice, 1.5, 1.5, 0)
    steps(advice, [2.2] * 100)
    assert look(advice, 1.6, 1.5, 3) is None


def test_a_validation_loss_that_stays_needs_no_advice():
    advice = Advice()
    steps(advice, [2.0] * 100)
    look(advice, 1.5, 1.5, 0)
    steps(advice, [1.9] * 100)
    assert look(advice, 1.5, 1.5, 3) is None


def test_advice_goes_on_from_its_state():
    advice = Advice()
    steps(advice, [4.0] * 60)
    assert Advice.of_state(json.loads(json.dumps(advice.state()))) == advice
    assert Advice.of_state(json.loads(json.dumps(Advice().state()))) == Advice()


@pytest.mark.parametrize("state", [{}, {"steps": 1}, {**Advice().state(), "said": 3}, {**Advice().state(), "more": 1}])
def test_a_foreign_state_is_an_error(state):
    with pytest.raises(ValueError, match="expected advice of steps, mean, lowest, at_best, said, got"):
        Advice.of_state(state)
