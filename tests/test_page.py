"""The page as a file: what is in it, that it asks for nothing, and that no text can become markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
import torch
from captures import structured

from sightline.inspection import Capture, capture
from sightline.masks import Allowed, Bias, Causal, Mask, Padding, Window
from sightline.models import Decoder, DecoderConfig
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
    return json.loads(Tags(html).scripts["capture"])


def array(html: str, name: str, dtype: str = "<f4") -> np.ndarray:
    return np.frombuffer(base64.b64decode(Tags(html).scripts[name]), dtype)


def recomputed(html: str, row: int, head: int) -> np.ndarray:
    """The weights of one head from nothing but the page, as its script computes them; NaN where hidden."""
    said = facts(html)
    queries, keys, width = len(said["query_tokens"]), len(said["key_tokens"]), said["width"]
    mask = said["masks"][row]
    query = array(html, f"queries-{row}").reshape(said["heads"], queries, width)[head].astype(np.float64)
    key = array(html, f"keys-{row}").reshape(said["groups"], keys, width)
    scores = said["scales"][row] * query @ key[head * said["groups"] // said["heads"]].T
    if said["softcaps"][row] is not None:
        scores = said["softcaps"][row] * np.tanh(scores / said["softcaps"][row])
    distance = np.arange(queries)[:, None] + keys - queries - np.arange(keys)
    if mask["slopes"]:
        scores -= mask["slopes"][head] * abs(distance)
    if mask["extra"]:
        extra = array(html, f"extra-{row}").reshape(mask["extra"], queries, keys)
        scores = scores + extra[head if mask["extra"] > 1 else 0]
    hidden = scores == -np.inf
    hidden |= distance > (np.inf if mask["before"] is None else mask["before"])
    hidden |= -distance > (np.inf if mask["after"] is None else mask["after"])
    hidden |= np.arange(keys) >= (keys if mask["length"] is None else mask["length"])
    logsumexp = array(html, "logsumexp").reshape(-1, said["heads"], queries)[row, head]
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
        structured(softcap=2.0),
        structured(sinks=torch.tensor([0.0, 1.0, 2.0, 3.0])),
        structured(("x", "y", "z"), keys=tuple("abcdefg"), mask=Mask()),
        structured(("f", "g"), keys=tuple("abcdefg")),
    ],
    ids=["causal", "full", "window", "padding", "slopes", "bias", "allowed", "softcap", "sinks", "cross", "newest"],
)
def test_the_page_holds_what_the_weights_need(seen):
    html = page(seen)
    for row, layer in enumerate(seen.layers):
        for head in range(seen.num_heads):
            found, expected = recomputed(html, row, head), seen.weights(layer, head).double().numpy()
            np.testing.assert_allclose(np.nan_to_num(found), expected, atol=2e-6, rtol=1e-5)
            allowed, _ = seen.mask(layer, head).dense(*expected.shape)
            if allowed is not None:
                np.testing.assert_array_equal(np.isnan(found), ~allowed.expand(1, 1, *expected.shape)[0, 0].numpy())


def test_the_page_of_a_model_with_groups():
    torch.manual_seed(0)
    config = DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=2, num_heads=4, num_groups=2)
    seen = capture(Decoder(config), torch.arange(70) % 9, layers=[1])
    html = page(seen)
    for head in range(4):
        exact = seen.weights(1, head).numpy()
        np.testing.assert_allclose(np.nan_to_num(recomputed(html, 0, head)), exact, atol=1e-6)
    said = facts(html)
    assert said["layers"] == [1] and said["thumb"] == [64, 64]
    np.testing.assert_allclose(said["summaries"]["previous"], seen.previous_token.flatten().numpy(), rtol=1e-6)
    np.testing.assert_allclose(array(html, "received").reshape(4, 70), seen.received[0].numpy())


def test_the_small_maps_show_the_largest_weight_of_each_square():
    seen = structured(tuple("ab" * 50), layers=(0,))
    thumbs = array(page(seen), "thumbs", "u1").reshape(4, 64, 64)
    weights = seen.weights(0, 3).numpy()
    for y, x in [(0, 0), (63, 0), (40, 21), (63, 63)]:
        square = weights[y * 100 // 64 : -(-(y + 1) * 100 // 64), x * 100 // 64 : -(-(x + 1) * 100 // 64)]
        assert thumbs[3, y, x] == 1 + round(254 * max(0, 1 + np.log10(max(square.max(), 1e-4)) / 4))
    assert thumbs[3, 0, 63] == 0 and thumbs[3, 63, 0] > 0


def test_nothing_is_asked_for():
    html = page(structured())
    assert re.findall(r"https?://[^\s'\"]+", html) == ["http://www.w3.org/2000/svg"]
    assert not re.search(
        r"url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon|\bimport\(|innerHTML|eval\(", html
    )
    tags = Tags(html)
    links = [(tag, value) for tag, attrs in tags.elements for name, value in attrs.items() if name in ("src", "href")]
    assert [(tag, value[:5]) for tag, value in links] == [("link", "data:")]
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
    assert facts(html)["query_tokens"] == list(NASTY)
    inside = re.search(r'id="capture">(.*?)</script>', html, re.DOTALL)[1]
    assert inside.isascii() and not re.search("[<>&]", inside)
    assert "alert(1)</script>" not in html and "<img" not in html


def test_the_same_capture_gives_the_same_bytes(tmp_path):
    first, second = page(structured()), page(structured())
    assert first == second
    file = page(structured(), tmp_path / "attention.html")
    assert file == tmp_path / "attention.html" and file.read_bytes() == first.encode("utf-8")
    assert page(structured(), str(file)) == file


def test_the_assets_are_small():
    folder = resources.files("sightline.viewer").joinpath("assets")
    sizes = {item.name: len(item.read_bytes()) for item in folder.iterdir()}
    assert set(sizes) == {"page.html", "page.css", "page.js"}
    assert sum(sizes.values()) < 60_000


def test_line_ends_of_a_windows_checkout_do_not_break_the_hash(monkeypatch, tmp_path):
    expected = page(structured())
    source, folder = resources.files("sightline.viewer").joinpath("assets"), tmp_path / "assets"
    folder.mkdir()
    for item in source.iterdir():
        folder.joinpath(item.name).write_bytes(item.read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setattr(page_module.resources, "files", lambda package: tmp_path)
    assert page(structured()) == expected


def long(count: int) -> Capture:
    model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=4, num_layers=1, num_heads=1, context=2000))
    return capture(model, [1] * count, top=1)


def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"at most 1024 tokens, this capture has 1025; .*tokens\[:1024\]"):
        page(long(1025))
    with pytest.raises(ValueError, match=r"page: cannot write .*No such file or directory"):
        page(structured(), tmp_path / "missing" / "attention.html")
    monkeypatch.setattr(page_module, "MOST_BYTES", 1000)
    with pytest.raises(
        ValueError, match=r"2 layers take 0 MiB.* capture fewer, capture\(model, text, layers=\[0, 1\]\)"
    ):
        page(structured())


def test_the_longest_page():
    assert len(facts(page(long(1024)))["key_tokens"]) == 1024
