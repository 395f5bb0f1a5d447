"""A capture in other libraries' forms: the same numbers, at the right layer, head, query and key."""

import sys

import numpy as np
import pytest
import torch

import sightline as sl
from sightline.captures import AXES

torch.manual_seed(0)
MODEL = sl.Decoder(sl.DecoderConfig.modern(vocabulary=29, context=40, d_model=32, num_layers=3, num_groups=2)).eval()


@pytest.fixture(scope="module")
def seen():
    return sl.capture(MODEL, torch.arange(20) * 7 % 29, layers=[0, 2], top=4)


def test_numpy_holds_every_tensor_under_its_name(seen):
    arrays = sl.to_numpy(seen)
    assert arrays.keys() == AXES.keys()
    for name, array in arrays.items():
        assert isinstance(array, np.ndarray) and array.shape == getattr(seen, name).shape
        np.testing.assert_array_equal(array, getattr(seen, name).numpy())


def test_half_precision_becomes_float32():
    half = sl.Decoder(MODEL.config).bfloat16().eval()
    arrays = sl.to_numpy(sl.capture(half, [1, 2, 3]))
    assert arrays["queries"].dtype == arrays["keys"].dtype == np.float32


def test_named_axes_agree_with_the_arrays_and_their_coordinates(seen):
    named = sl.to_named(seen)
    sizes = {}
    for variable in [*named["data_vars"].values(), *named["coords"].values()]:
        assert len(variable["dims"]) == variable["data"].ndim
        for axis, size in zip(variable["dims"], variable["data"].shape, strict=True):
            assert sizes.setdefault(axis, size) == size
    assert not sizes.keys() & named["data_vars"].keys()
    assert named["coords"]["layers"]["data"].tolist() == [0, 2]
    assert named["coords"]["query_token"]["data"].tolist() == list(seen.query_tokens)


def test_xarray_takes_them(seen):
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    data = xarray.Dataset.from_dict(sl.to_named(seen))
    assert float(data["entropy"].sel(layers=2, heads=1, queries=5)) == float(seen.entropy[1, 1, 5])


def test_the_long_tables_find_each_number_again(seen):
    pytest.importorskip("pandas", reason="pandas is not installed")
    queries, keys, top = (sl.to_pandas(seen, rows) for rows in ("queries", "keys", "top"))
    assert len(queries) == len(keys) == 2 * 4 * 20
    for layer, head, position in ((0, 0, 0), (2, 3, 19), (2, 1, 7)):
        row, index = (layer, head, position), (seen.index(layer), head, position)
        found = queries.set_index(["layer", "head", "query"]).loc[row]
        for fact in ("entropy", "distance", "sink", "logsumexp"):
            assert found[fact] == getattr(seen, fact)[index].item()
        assert found["token"] == seen.tokens[position]
        assert keys.set_index(["layer", "head", "key"]).loc[row]["received"] == seen.received[index].item()
    for _, found in top.sample(20, random_state=0).iterrows():
        exact = seen.weights(found["layer"], found["head"])[found["query"], found["key"]]
        assert found["weight"] == pytest.approx(exact.item(), rel=1e-4)
        assert (found["token"], found["key_token"]) == (seen.tokens[found["query"]], seen.tokens[found["key"]])
    assert (top.groupby(["layer", "head", "query"]).size().iloc[:3] == [1, 2, 3]).all()  # no more keys than there are


def test_the_newest_queries_have_their_positions():
    pytest.importorskip("pandas", reason="pandas is not installed")
    whole = sl.capture(MODEL, [1, 2, 3, 4, 5])
    from dataclasses import replace

    per_query = ("queries", "logsumexp", "entropy", "distance", "sink", "top_weights", "top_keys")
    newest = {name: getattr(whole, name)[:, :, 3:] for name in per_query}
    late = replace(whole, query_tokens=whole.query_tokens[3:], **newest)
    table = sl.to_pandas(late)
    assert set(table["query"]) == {3, 4} and set(table["token"]) == {"4", "5"}
    assert sl.to_named(late)["coords"]["queries"]["data"].tolist() == [3, 4]


def test_matrices_are_the_exact_weights(seen):
    matrices = sl.to_matrices(seen)
    assert len(matrices) == 2
    for layer, matrix in zip(seen.layers, matrices, strict=True):
        assert matrix.shape == (1, 4, 20, 20)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 4, 20))
        assert torch.equal(matrix[0, 3], seen.weights(layer, 3))


def test_too_large_is_refused_with_its_size(seen):
    with pytest.raises(
        ValueError, match=r"2 layers x 4 heads x 20 x 20 weights take 12,800 bytes, more than the 12,799 bytes"
    ):
        sl.to_matrices(seen, limit_bytes=12_799)
    assert sl.to_matrices(seen, limit_bytes=12_800)


def test_other_rows_and_a_missing_pandas_are_one_line(seen, monkeypatch):
    with pytest.raises(ValueError, match="rows must be one of queries, keys, top, got 'heads'"):
        sl.to_pandas(seen, "heads")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="to_pandas needs pandas, which is not installed: pip install pandas"):
        sl.to_pandas(seen)
