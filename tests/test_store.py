"""Captures on disk: the same again without the model, mapped into memory, whole or not at all."""

import json
import shutil

import pytest
import torch
from captures import structured
from safetensors.torch import load_file

from sightline import store
from sightline.captures import AXES, Capture
from sightline.inspection import capture
from sightline.masks import Allowed, Bias, Causal, Mask, Padding, Segments, Window
from sightline.models import Decoder, DecoderConfig
from sightline.store import Store, load_capture, save_capture


def small() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig.modern(vocabulary=20, d_model=32, num_layers=3, num_heads=4, num_groups=2))


def assert_same(first: Capture, second: Capture) -> None:
    for name in AXES:
        assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert getattr(first, name).dtype == getattr(second, name).dtype
    for name in ("model", "query_tokens", "key_tokens", "ids", "separator", "same_text", "prompt", "layers", "chosen"):
        assert getattr(first, name) == getattr(second, name), name
    for name in ("scales", "softcaps", "sink_keys", "map_block"):
        assert getattr(first, name) == getattr(second, name), name
    for one, other in zip(first.masks, second.masks, strict=True):
        assert (one.before, one.after) == (other.before, other.after)
        for name in ("lengths", "allowed", "bias", "slopes"):
            left, right = getattr(one, name), getattr(other, name)
            assert (left is None and right is None) or torch.equal(left, right), name


def test_the_comparison_can_fail():
    seen = structured()
    for other in (structured(softcap=2.0), structured(mask=Mask()), seen.select([(0, 1)])):
        with pytest.raises(AssertionError):
            assert_same(seen, other)


@pytest.mark.parametrize(
    "seen",
    [
        structured(),
        structured(("x", "\ud83d", "</script>\u202e"), keys=tuple("abcdefg"), mask=Mask()),
        structured(mask=Window(before=1, after=2) & Padding([7])),
        structured(mask=Causal() & Mask(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]))),
        structured(mask=Bias(torch.randn(1, 1, 10, 1)) & Allowed(torch.rand(1, 4, 10, 10) > 0.5)),
        structured(mask=Causal() & Segments(torch.arange(10)[None] // 4)),
        structured(softcap=2.0).select([(3, 1), (0, 2)]),
    ],
    ids=["causal", "cross", "padding", "slopes", "tensors", "segments", "softcap and chosen"],
)
def test_what_was_saved_comes_back(seen, tmp_path):
    folder = save_capture(seen, tmp_path / "seen")
    again = load_capture(str(folder))
    assert_same(seen, again)
    torch.testing.assert_close(again.weights(3, 1), seen.weights(3, 1))
    assert [item.name for item in tmp_path.iterdir()] == ["seen"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_than_float32(dtype, tmp_path):
    seen = capture(small().to(dtype), [1, 2, 3, 4, 5])
    assert seen.queries.dtype == dtype and seen.top_keys.dtype == torch.int32
    assert_same(seen, load_capture(save_capture(seen, tmp_path / "seen")))


def test_a_capture_is_written_as_it_is_made(tmp_path):
    model, ids = small(), list(range(19))
    kept, written = capture(model, ids, layers=[0, 2]), capture(model, ids, layers=[0, 2], folder=tmp_path / "seen")
    assert_same(kept, written)
    assert_same(kept, load_capture(tmp_path / "seen"))
    assert set(load_file(tmp_path / "seen" / "tensors.safetensors")) == set(AXES)


def test_a_large_one_lies_in_a_file_without_a_name(monkeypatch):
    model, ids = small(), list(range(19))
    kept = capture(model, ids)
    monkeypatch.setattr(store, "MEMORY", 1000)
    opened = []
    monkeypatch.setattr(store.Store, "release", lambda self: opened.append(self._map is not None))
    assert_same(kept, capture(model, ids))
    assert opened == [True] * 3


def test_released_memory_is_read_again():
    room = Store({"a": (torch.float32, (3, 1000)), "b": (torch.bfloat16, (5,)), "c": (torch.float64, (2,))}, None)
    assert room._map is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "MEMORY", 0)
        room = Store({"b": (torch.bfloat16, (5,)), "a": (torch.float32, (3, 1000)), "c": (torch.float64, (2,))})
    for tensor in room.tensors.values():
        tensor.fill_(3)
    room.release()
    assert all(bool((tensor == 3).all()) for tensor in room.tensors.values())


def test_nothing_is_left_of_a_capture_that_stopped(tmp_path, monkeypatch):
    model = small()
    monkeypatch.setattr(model.blocks[2].attention, "_mask", lambda given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture(model, [1, 2, 3], folder=tmp_path / "seen")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path):
    folder = save_capture(structured(), tmp_path / "seen")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for write in (lambda: save_capture(structured(), folder), lambda: capture(small(), [1], folder=folder)):
        with pytest.raises(ValueError, match=r"expected a new or empty folder, but .* holds something: choose another"):
            write()
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "empty").mkdir()
    assert_same(structured(), load_capture(save_capture(structured(), tmp_path / "empty")))
    with pytest.raises(ValueError, match="expected to write"):
        save_capture(structured(), folder / "capture.json" / "seen")


def edited(folder, **changes):
    """Change what capture.json says; None takes a key away."""
    file = folder / "capture.json"
    said = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in said.items() if value != "gone"}), encoding="utf-8")


DAMAGES = {
    "no folder": (lambda f: shutil.rmtree(f), "holds no capture.json"),
    "no description": (lambda f: (f / "capture.json").unlink(), "holds no capture.json"),
    "no tensors": (lambda f: (f / "tensors.safetensors").unlink(), "tensors.safetensors, but it is missing"),
    "half a file": (
        lambda f: cut(f / "tensors.safetensors", 0.5),
        "tensors.safetensors to be a whole safetensors file",
    ),
    "no file at all": (
        lambda f: cut(f / "tensors.safetensors", 0),
        "tensors.safetensors to be a whole safetensors file",
    ),
    "half a description": (lambda f: cut(f / "capture.json", 0.5), "capture.json to be JSON"),
    "a list": (lambda f: (f / "capture.json").write_text("[]"), "capture.json to hold a JSON object"),
    "a newer format": (lambda f: edited(f, format=2), "say format 1 and kind 'capture', got 2 and 'capture'"),
    "another program's": (lambda f: edited(f, kind="gone"), "got 1 and None: it was written by another program"),
    "a missing key": (lambda f: edited(f, layers="gone"), "to hold 'layers' as save_capture writes it"),
    "a wrong kind": (lambda f: edited(f, layers="zero"), "to hold 'layers' as"),
    "a wrong mask": (lambda f: edited(f, masks=[{"before": -1, "after": 0}] * 2), "to hold 'masks' as"),
    "fewer tokens": (lambda f: edited(f, key_tokens=["a"], ids=[1]), "its files are of two captures"),
    "fewer layers": (lambda f: edited(f, layers=[0]), "expected 1 layers in queries of .*, got 2"),
    "fewer scales": (lambda f: edited(f, scales=[1.0]), "its files are of two captures"),
    "another block": (lambda f: edited(f, map_block=64), "expected 1 query_blocks in map_sum"),
    "a foreign mask": (lambda f: shutil.copy(f / "tensors.safetensors", f / "masks.safetensors"), "expected no tensor"),
}


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_foreign_gets_one_clear_line(damage, tmp_path):
    folder = save_capture(structured(), tmp_path / "seen")
    load_capture(folder)
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_capture(folder)
    assert "\n" not in str(error.value)
