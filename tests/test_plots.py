"""Figures: what stands in them, and that matplotlib is left as it was."""

import io
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from captures import TOKENS, structured

from sightline.masks import Allowed, Bias, Causal
from sightline.positions import Learned, Sinusoidal, sinusoidal
from sightline.viewer.plots import plot_heads, plot_positions, plot_weights


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).softmax(-1)


def shown(figure) -> np.ma.MaskedArray:
    """The numbers in the heat map."""
    return np.ma.masked_invalid(figure.axes[0].images[0].get_array())


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_a_heat_map_of_one_head_and_one_sequence():
    batch = weights(3, 2, 5, 5)
    figure = plot_weights(batch, sequence=1, head=0, tokens=list("abcde"))
    heat, bar = figure.axes
    np.testing.assert_array_equal(shown(figure), batch[1, 0].numpy())
    assert (heat.get_xlabel(), heat.get_ylabel(), bar.get_ylabel()) == ("key", "query", "weight")
    assert heat.get_title() == "Sequence 1, head 0"
    assert labels(heat.xaxis) == labels(heat.yaxis) == list("abcde")
    assert heat.yaxis_inverted()  # the first query stands at the top
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (1, 1, 4, 4)])
def test_indices_may_be_left_out_where_there_is_one(shape):
    assert shown(plot_weights(weights(*shape))).shape == (4, 4)


def test_hidden_weights_are_empty_and_not_zero():
    figure = plot_weights(structured(), layer=3, head=3)
    np.testing.assert_array_equal(np.ma.getmaskarray(shown(figure)), np.triu(np.ones((10, 10)), 1) > 0)
    assert figure.axes[0].get_title() == "Layer 3, head 3"
    assert labels(figure.axes[0].yaxis) == ["the", "cat", "sat", "\\n", "the", "dog", "ran", ",", "the", "end"]
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert np.ma.getmaskarray(shown(plot_weights(matrix))).tolist() == [[False, True], [True, False]]
    seen = plot_weights(matrix, mask=Causal())
    assert np.ma.getmaskarray(shown(seen)).tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("make", [Allowed, lambda may: Bias(torch.zeros(may.shape).masked_fill(~may, -torch.inf))])
def test_masks_of_one_sequence_and_head(make):
    may = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    figure = plot_weights(weights(2, 3, 4, 4), sequence=1, head=2, mask=make(may))
    np.testing.assert_array_equal(np.ma.getmaskarray(shown(figure)), ~may[1, 2].numpy())


def test_padding_is_cut_off_and_each_sequence_has_its_own_length():
    batch = weights(3, 2, 6, 6)
    for sequence, length in enumerate([6, 4, 1]):
        figure = plot_weights(batch, sequence=sequence, head=1, lengths=torch.tensor([6, 4, 1]), tokens="abcdef")
        np.testing.assert_array_equal(shown(figure), batch[sequence, 1, :length, :length].numpy())
        assert labels(figure.axes[0].xaxis) == list("abcdef")[:length]
    rectangle = plot_weights(weights(1, 2, 6), lengths=[4])
    assert shown(rectangle).shape == (2, 4)


def test_fewer_queries_are_named_by_the_newest_tokens():
    figure = plot_weights(weights(2, 5), tokens=list("abcde"))
    assert labels(figure.axes[0].yaxis) == ["d", "e"]
    figure = plot_weights(weights(2, 5), tokens=list("abcde"), query_tokens=["x", "y"])
    assert labels(figure.axes[0].yaxis) == ["x", "y"]


def test_positions_stand_where_tokens_do_not_fit():
    figure = plot_weights(weights(60, 60), tokens=["word"] * 60)
    assert all(float(text.replace("\u2212", "-")).is_integer() for text in labels(figure.axes[0].xaxis))


def test_the_logarithmic_scale_keeps_small_weights_apart():
    figure = plot_weights(torch.tensor([[0.9989, 0.001, 0.0001]]), scale="log")
    levels = figure.axes[0].images[0].norm(shown(figure)).tolist()[0]
    assert levels[0] == pytest.approx(1) and 0.2 < levels[1] < 0.3 and levels[2] == pytest.approx(0, abs=1e-3)


def test_any_token_is_drawn_without_a_warning():
    nasty = ["$x$", "a\nb", " ", "", "\u202eabc", "\U0001f469\u200d\U0001f4bb", "\x00", "\u4e2d", "x" * 60, "<b>"]
    figure = plot_weights(weights(10, 10), tokens=nasty, title="$not math$")
    png(figure)
    texts = labels(figure.axes[0].yaxis)
    assert texts[:3] == ["$x$", "a\\nb", "\u2423"] and texts[6] == "\\x00" and len(texts[8]) == 16
    assert all(text.isprintable() for text in texts)


def test_bad_input_gets_one_clear_line():
    seen, batch = structured(), weights(3, 2, 5, 5)
    for call, message in [
        (lambda: plot_weights(batch, head=0), "sequence is one of 0 to 2; say which with sequence="),
        (lambda: plot_weights(batch, sequence=3, head=0), "sequence is one of 0 to 2; got 3"),
        (lambda: plot_weights(batch, sequence=0, head=-1), "head is one of 0 to 1; got -1"),
        (lambda: plot_weights(weights(6, 5, 5), head=1), r"head=1 needs \(batch heads queries keys\), got \(6, 5, 5\)"),
        (lambda: plot_weights(weights(5, 5), sequence=1), "sequence=1 needs an axis of batch"),
        (lambda: plot_weights(weights(5)), r"expected weights .*got \(5,\)"),
        (lambda: plot_weights([[1.0]]), "expected weights .*got list"),
        (lambda: plot_weights(weights(5, 5), layer=0), "layer=0 is for a Capture"),
        (lambda: plot_weights(weights(5, 5), tokens=["a"]), "1 tokens for 5 keys; give one token each"),
        (lambda: plot_weights(weights(2, 5), query_tokens=["a"]), "1 query_tokens for 2 queries"),
        (lambda: plot_weights(weights(5, 5), lengths=[6]), r"lengths\[0\] must be 1 to 5, the keys there are; got 6"),
        (lambda: plot_weights(batch, sequence=1, head=0, lengths=[4]), "1 lengths, but sequence 1 was asked for"),
        (lambda: plot_weights(weights(5, 5), scale="cubic"), "scale must be one of linear, log, got 'cubic'"),
        (lambda: plot_weights(seen, layer=0), "head is one of 0 to 3; say which with head="),
        (lambda: plot_weights(seen, layer=1, head=0), "layer is one of 0, 3; got 1"),
        (lambda: plot_weights(seen, layer=0, head=0, tokens=TOKENS), "a Capture has its own tokens; drop tokens="),
        (lambda: plot_positions(weights(5)), r"expected a table \(length d_model\), got \(5,\)"),
        (lambda: plot_positions(torch.ones(0, 4)), r"got \(0, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_positions_are_drawn_as_the_classic_picture():
    table = sinusoidal(length=64, d_model=32)
    figure = plot_positions(table)
    heat, bar = figure.axes
    np.testing.assert_array_equal(shown(figure), table.numpy())
    assert (heat.get_xlabel(), heat.get_ylabel()) == ("embedding dimension", "position in sequence")
    assert bar.get_ylabel() == "encoding value" and heat.images[0].get_cmap().name == "viridis"
    np.testing.assert_array_equal(shown(plot_positions(Sinusoidal(d_model=32, length=64))), table.numpy())
    learned = Learned(d_model=4, length=6)
    np.testing.assert_array_equal(shown(plot_positions(learned)), learned.weight.detach().numpy())


def test_a_notebook_shows_every_figure_without_pyplot():
    figures = plot_weights(torch.eye(2)), plot_heads(structured()), plot_positions(sinusoidal(4, 6))
    for figure in figures:
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_arrays_of_numpy_are_drawn_and_what_is_no_array_is_refused():
    weights = np.tril(np.full((3, 3), 0.5))
    np.testing.assert_array_equal(shown(plot_weights(weights)), weights)
    np.testing.assert_array_equal(shown(plot_positions(weights)), weights)
    with pytest.raises(ValueError, match="got list: give a tensor or an array of floats"):
        plot_weights([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got ndarray: give a tensor or an array of floats"):
        plot_positions(np.array([["a"]]))
    with pytest.raises(ValueError, match=r"expected a Capture, as sl\.capture gives one, got Tensor"):
        plot_heads(torch.eye(2))  # type: ignore[arg-type]


def test_matplotlib_is_left_as_it_was():
    before = dict(matplotlib.rcParams)
    png(plot_weights(structured(), layer=0, head=1, scale="log"))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow  # a fresh interpreter imports torch
def test_importing_plots_imports_no_matplotlib_and_drawing_no_pyplot():
    code = (
        "import sys, torch; from sightline.viewer.plots import plot_weights; assert 'matplotlib' not in sys.modules; "
        "plot_weights(torch.eye(2)).savefig(sys.stdout.buffer); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"\x89PNG")
