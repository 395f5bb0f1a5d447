import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sightline import schedule
from sightline.schedule import TrainConfig, choose_device, choose_precision

shares = st.floats(0, 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": -1}, "steps of at least 1, got -1"),
        ({"steps": 0}, "steps of at least 1, got 0"),
        ({"minutes": 0.0}, "minutes above 0, got 0.0"),
        ({"minutes": float("nan")}, "minutes above 0, got nan"),
        ({"batch": 0}, "batch of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate above 0, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate above 0, got inf"),
        ({"clip": 0.0}, "clip above 0, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay of at least 0, got -0.1"),
        ({"warmup": 0.6, "cooldown": 0.5}, "sum to at most 1, got 0.6 and 0.5"),
        ({"warmup": -0.1}, "shares warmup and cooldown of at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas of at least 0 and under 1, got \(0.9, 1.0\)"),
        ({"evaluate_every": 0}, "evaluate_every of at least 1, got 0"),
        ({"evaluate_batches": 0}, "evaluate_batches of at least 1, got 0"),
        ({"patience": 0}, "patience of at least 1, got 0"),
        ({"steps": 2.5}, "a whole number of steps of at least 1, got 2.5"),
        ({"betas": (0.9,)}, r"two betas of at least 0 and under 1, got \(0.9,\)"),
        ({"seed": -1}, "a seed from 0 to"),
        ({"precision": "float16"}, "precision to be one of auto, float32, bfloat16, got 'float16'"),
        ({"device": "gpu"}, "device to be one of auto, cpu, cuda, mps, got 'gpu'"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "steps"), [({}, 2000), ({"minutes": 1.0}, None), ({"steps": 7}, 7), ({"steps": 7, "minutes": 1.0}, 7)]
)
def test_what_ends_a_run(setting, steps):
    assert TrainConfig(**setting).step_limit == steps


@given(done=shares, warmup=st.floats(0, 0.5), cooldown=st.floats(0, 0.5))
def test_the_rate_stays_between_0_and_its_highest(done, warmup, cooldown):
    config = TrainConfig(learning_rate=0.5, warmup=warmup, cooldown=cooldown)
    assert 0 <= config.rate(done) <= 0.5
    if warmup <= done <= 1 - cooldown:
        assert config.rate(done) == 0.5


def test_the_rate_rises_and_falls_in_straight_lines():
    config = TrainConfig(learning_rate=1.0, warmup=0.1, cooldown=0.4)
    assert [config.rate(done) for done in (0.0, 0.05, 0.1, 0.6, 0.8, 1.0)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


def test_no_warmup_and_no_cooldown_is_constant():
    config = TrainConfig(learning_rate=1.0, warmup=0.0, cooldown=0.0)
    assert [config.rate(done) for done in (0.0, 0.5, 1.0)] == [1, 1, 1]


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="a device that this machine has, got 'cuda': choose cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_bfloat16_only_where_the_hardware_has_it(monkeypatch, there):
    monkeypatch.setattr(schedule, "has_bfloat16", lambda device: there)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == (torch.bfloat16 if there else torch.float32)
    assert choose_precision("float32", cpu) == torch.float32


def test_emulated_bfloat16_warns(monkeypatch):
    monkeypatch.setattr(schedule, "has_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="this cpu has no bfloat16 arithmetic: it is emulated, and slower"):
        assert choose_precision("bfloat16", torch.device("cpu")) == torch.bfloat16


@given(
    steps=st.integers(100, 100_000),
    share=st.floats(0.01, 0.5),
    d_model=st.sampled_from([64, 512, 1024]),
    at=st.floats(0, 1),
)
def test_the_decay_inverse_sqrt_is_the_papers(steps, share, d_model, at):
    warmup_steps, step = share * steps, max(1.0, at * steps)
    rate = (d_model * warmup_steps) ** -0.5
    config = TrainConfig(decay="inverse-sqrt", learning_rate=rate, warmup=share, cooldown=0.0)
    paper = d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)
    assert config.rate(step / steps) == pytest.approx(paper)
