"""The page as a file: what is in it, that it asks for nothing, and that no text can become markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from captures import structured

from sightline.inspection import capture
from sightline.masks import Allowed, Bias, Causal, Mask, Padding, Segments, Window
from sightline.models import Decoder, DecoderConfig
from sightline.pyramid import Pyramid
from sightline.viewer import page as page_module
from sightline.viewer.page import page

NASTY = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "]]>",
    "&amp;&lt;",
    "\u202eright to left\u202c",
    "\u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f4bb",
    "\u200b\u2028\u2029\ufeff",
    "\x00\x07\x1b[31m",
    "'\"`",
    "{{script}}",
    "\\u003c",
    "\ud83d",
    "",
)


class Tags(HTMLParser):
    """The elements of a page, and the text inside each script by its id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self._open: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open = dict(attrs).get("id") or tag

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data


def facts(html: str) -> dict:
    return json.loads(Tags(html).scripts["manifest"])


def array(html: str, name: str) -> np.ndarray:
    kind = facts(html)["embedded"]["arrays"][name]
    values = np.frombuffer(
        base64.b64decode(Tags(html).scripts[f"array-{name}"]), np.dtype(kind["dtype"]).newbyteorder("<")
    )
    return values.reshape(kind["shape"])


def tokens(html: str, side: str, number: int = 0) -> list[str]:
    return json.loads(Tags(html).scripts[f"array-c{number}-{side}tokens"])


def recomputed(html: str, layer: int, head: int) -> np.ndarray:
    """The weights of one head from nothing but the page, as its script computes them; NaN where hidden."""
    said = facts(html)
    seen, numbers = said["captures"][0], said["embedded"]["captures"][0]
    row = seen["layers"].index(layer)
    mask, length = seen["masks"][row], numbers["lengths"][row]
    query = array(html, f"c0-l{layer}-h{head}-queries").astype(np.float64)
    key = array(html, f"c0-l{layer}-g{head * numbers['groups'] // numbers['heads']}-keys").astype(np.float64)
    queries, keys = len(query), len(key)
    assert (queries, keys) == (seen["queries"], seen["keys"])
    scores = numbers["scales"][row] * query @ key.T
    if numbers["softcaps"][row] is not None:
        scores = numbers["softcaps"][row] * np.tanh(scores / numbers["softcaps"][row])
    distance = np.arange(queries)[:, None] + keys - queries - np.arange(keys)
    if numbers["slopes"][row]:
        scores -= numbers["slopes"][row][head] * abs(distance)
    if f"c0-l{layer}-h{head}-extra" in said["embedded"]["arrays"]:
        scores = scores + array(html, f"c0-l{layer}-h{head}-extra")
    hidden = scores == -np.inf
    hidden |= distance > (np.inf if mask["before"] is None else mask["before"])
    hidden |= -distance > (np.inf if mask["after"] is None else mask["after"])
    hidden |= np.arange(keys) >= (keys if length is None else length)
    logsumexp = array(html, f"c0-l{layer}-h{head}-logsumexp")
    return np.where(hidden, np.nan, np.exp(scores - np.where(hidden, 0, logsumexp[:, None])))


@pytest.mark.parametrize(
    "seen",
    [
        structured(),
        structured(mask=Mask()),
        structured(mask=Causal() & Window(before=3, after=0)),
        structured(mask=Window(before=1, after=2) & Padding([7])),
        structured(mask=Causal() & Mask(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]))),
        structured(mask=Bias(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))),
        structured(mask=Causal() & Allowed(torch.rand(1, 4, 10, 10, generator=torch.Generator().manual_seed(0)) > 0.5)),
        structured(mask=Causal() & Segments(torch.arange(10)[None] // 4)),
        structured(softcap=2.0),
        structured(sinks=torch.tensor([0.0, 1.0, 2.0, 3.0])),
        structured(("x", "y", "z"), keys=tuple("abcdefg"), mask=Mask()),
        structured(("f", "g"), keys=tuple("abcdefg")),
    ],
    ids=[
        "causal",
        "full",
        "window",
        "padding",
        "slopes",
        "bias",
        "allowed",
        "segments",
        "softcap",
        "sinks",
        "cross",
        "newest",
    ],
)
def test_the_page_holds_what_the_weights_need(seen):
    html = page(seen)
    for layer in seen.layers:
        for head in range(seen.num_heads):
            found, expected = recomputed(html, layer, head), seen.weights(layer, head).double().numpy()
            np.testing.assert_allclose(np.nan_to_num(found), expected, atol=2e-6, rtol=1e-5)
            allowed, _ = seen.mask(layer, head).dense(*expected.shape)
            if allowed is not None:
                np.testing.assert_array_equal(np.isnan(found), ~allowed.expand(1, 1, *expected.shape)[0, 0].numpy())


def test_the_page_of_a_model_with_groups():
    torch.manual_seed(0)
    config = DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2, num_heads=4, num_groups=2)
    seen = capture(Decoder(config), torch.arange(70) % 9, layers=[1], prompt=50)
    html = page(seen)
    for head in range(4):
        exact = seen.weights(1, head).numpy()
        np.testing.assert_allclose(np.nan_to_num(recomputed(html, 1, head)), exact, atol=1e-6)
        for name in ("entropy", "sink", "distance", "received"):
            np.testing.assert_array_equal(array(html, f"c0-l1-h{head}-{name}"), getattr(seen, name)[0, head].numpy())
        np.testing.assert_array_equal(array(html, f"c0-l1-h{head}-topkeys"), seen.top_keys[0, head].numpy())
        np.testing.assert_array_equal(array(html, f"c0-l1-h{head}-topweights"), seen.top_weights[0, head].numpy())
        np.testing.assert_array_equal(array(html, f"c0-l1-h{head}-top"), seen.top_weights[0, head, :, 0].numpy())
    (said,) = facts(html)["captures"]
    assert (said["layers"], said["heads"], said["prompt"]) == ([1], 4, 50)
    assert said["pairs"] == [[1, 0], [1, 1], [1, 2], [1, 3]]
    np.testing.assert_allclose(said["summaries"]["previous"], seen.previous_token.flatten().numpy(), rtol=1e-6)


def test_only_what_is_chosen_is_in_the_page():
    seen = structured().select([(3, 1), (0, 2)])
    html = page(seen)
    names = facts(html)["embedded"]["arrays"]
    assert {name for name in names if name.endswith("queries")} == {"c0-l3-h1-queries", "c0-l0-h2-queries"}
    assert facts(html)["captures"][0]["pairs"] == [[3, 1], [0, 2]]
    assert array(html, "c0-wall").shape == (20, 10) and len(html) < len(page(structured()))
    np.testing.assert_allclose(np.nan_to_num(recomputed(html, 3, 1)), seen.weights(3, 1).numpy(), atol=2e-6)


def test_pooled_pictures_are_those_of_the_pyramid():
    seen = structured(tuple("ab" * 50), layers=(0,))
    html, pyramid = page(seen), Pyramid(seen)
    wall = array(html, "c0-wall").astype(np.float64).reshape(4, 50, 50) / 4096
    np.testing.assert_allclose(wall, pyramid.wall.numpy(), rtol=1e-3, atol=1e-8)
    assert np.isnan(wall[3, 0, 1]) and facts(html)["captures"][0]["wall"] == [50, 50]
    for name, pool in (("mapmax", "max"), ("mapmass", "sum")):
        found = array(html, f"c0-l0-h3-{name}").astype(np.float64) / 4096
        np.testing.assert_allclose(found, pyramid.whole(0, 3, pool, 2).numpy(), rtol=1e-3, atol=1e-8)


def test_two_captures_are_compared():
    html = page({"before": structured(), "after": structured(("x", "y"), keys=tuple("abcd"), mask=Mask())})
    assert [one["name"] for one in facts(html)["captures"]] == ["before", "after"]
    assert tokens(html, "key", 1) == list("abcd") and tokens(html, "query", 1) == ["x", "y"]
    assert array(html, "c1-l3-h0-queries").shape == (2, 4)


def test_a_long_text_holds_half_floats():
    config = DecoderConfig.modern(vocabulary=9, d_model=4, num_layers=1, num_heads=1, context=5000)
    seen = capture(Decoder(config), [1, 2, 3] * 1400, top=1)
    names = facts(page(seen))["embedded"]["arrays"]
    assert names["c0-l0-h0-queries"]["dtype"] == names["c0-l0-g0-keys"]["dtype"] == "float16"
    assert names["c0-l0-h0-logsumexp"]["dtype"] == "float32"


def test_nothing_is_asked_for():
    html = page(structured())
    assert set(re.findall(r"https?://[^\s'\"<>]+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|XMLHttpRequest|WebSocket|sendBeacon|\bimport\(|innerHTML|eval\(", html)
    tags = Tags(html)
    links = [(tag, value) for tag, attrs in tags.elements for name, value in attrs.items() if name in ("src", "href")]
    assert [(tag, value[:5]) for tag, value in links] == [("link", "data:")]
    assert "map.js" not in html and "map.css" not in html
    assert not any(name.startswith("on") or name == "style" for _, attrs in tags.elements for name in attrs)


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else():
    html = page(structured())
    tags = Tags(html)
    metas = [attrs for tag, attrs in tags.elements if tag == "meta" and "http-equiv" in attrs]
    policy = dict(part.split(" ", 1) for part in metas[0]["content"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for part, tag in (("script-src", "script"), ("style-src", "style")):
        text = re.search(rf"<{tag}(?: type=\"module\")?>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[part] == f"'sha256-{digest}'"


def test_no_text_becomes_markup():
    plain, nasty = structured(tuple(map(str, range(len(NASTY))))), structured(NASTY)
    elements = [[tag for tag, _ in Tags(page(seen)).elements] for seen in (plain, nasty)]
    assert elements[0] == elements[1]
    html = page(nasty)
    assert tokens(html, "key") == list(NASTY)
    for name in ("manifest", "array-c0-keytokens"):
        inside = re.search(rf'id="{name}">(.*?)</script>', html, re.DOTALL)[1]
        assert inside.isascii() and not re.search("[<>&]", inside)
    assert "alert(1)</script>" not in html and "<img" not in html


def test_the_same_capture_gives_the_same_bytes(tmp_path):
    first, second = page(structured()), page(structured())
    assert first == second
    file = page(structured(), tmp_path / "attention.html")
    assert file == tmp_path / "attention.html" and file.read_bytes() == first.encode("utf-8")
    assert page(structured(), str(file)) == file


def test_the_assets_are_small():
    assert sum(len(page_module.asset(f"map.{kind}").encode("utf-8")) for kind in ("html", "css", "js")) <= 80_000


def test_the_parts_of_the_script_are_all_joined_and_each_is_one_idea():
    folder = resources.files("sightline.viewer").joinpath("assets", "map")
    parts = {item.name: item.read_text(encoding="utf-8") for item in folder.iterdir()}
    assert sorted(parts) == sorted(f"{name}.js" for name in page_module.PARTS)
    assert all(text.count("\n") <= 250 for text in parts.values())
    said = [
        re.sub(r"(^| )// .*", "", line.strip())
        for name in page_module.PARTS
        for line in parts[f"{name}.js"].splitlines()
    ]
    assert page_module.asset("map.js").splitlines() == [line for line in said if line]


def test_line_ends_of_a_windows_checkout_do_not_break_the_hash(monkeypatch, tmp_path):
    expected = page(structured())
    source, folder = resources.files("sightline.viewer").joinpath("assets"), tmp_path / "assets"
    for item in (path for path in Path(str(source)).rglob("*") if path.is_file()):
        copy = folder / item.relative_to(str(source))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(item.read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setattr(page_module.resources, "files", lambda package: tmp_path)
    assert page(structured()) == expected


def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"page: cannot write .*No such file or directory"):
        page(structured(), tmp_path / "missing" / "attention.html")
    monkeypatch.setattr(page_module, "MOST_BYTES", 5000)
    with pytest.raises(
        ValueError, match=r"page: 8 heads take 0 MiB.*; choose about \d, capture\.select\(\[.*serve\(capture"
    ):
        page(structured())
    page(structured().select([(0, 1)]))


def test_the_size_is_known_before_the_page_is_made():
    for seen in (structured(tuple("ab" * 100)), structured(tuple("ab" * 100)).select([(0, 1)])):
        arrays = facts(page(seen))["embedded"]["arrays"].items()
        size = sum(
            np.prod(kind["shape"]) * np.dtype(kind["dtype"]).itemsize for name, kind in arrays if "wall" not in name
        )
        assert abs(page_module._size(seen) - size) < 0.05 * size
