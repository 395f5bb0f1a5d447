"""The page in a real browser: what a person sees and points at. Needs playwright and Chromium."""

import math
import os
import shutil

import pytest
import torch
from captures import structured
from test_page import NASTY

from sightline.masks import Allowed, Causal, Mask, Padding, Window
from sightline.viewer.page import page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path: install chromium")
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # its sandbox does not start as root
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if root else [])
        yield running
        running.close()


@pytest.fixture
def look(browser, tmp_path):
    """Opens a capture; afterwards the console must be empty and nothing but the file asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
    said, asked, address = [], [], (tmp_path / "attention.html").as_uri()

    def open_page(capture, fragment=""):
        page(capture, tmp_path / "attention.html")
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address + fragment)
        tab.wait_for_timeout(100)  # the first frame
        return tab

    yield open_page
    context.close()
    assert said == [] and {url.split("#")[0] for url in asked} <= {address}
    assert asked


def pointed(tab) -> tuple[int, int, float]:
    """The query and the key that the page speaks of, and the weight it gives them."""
    row, column = int(tab.inner_text("#row")), int(tab.inner_text("#column"))
    return row, column, float(tab.get_attribute("#weight", "value"))


def names(tab) -> list[str]:
    return tab.locator("#wall strong").all_inner_texts()


def check(tab, capture, layer: int, head: int) -> None:
    row, column, weight = pointed(tab)
    row -= len(capture.key_tokens) - len(capture.query_tokens) if capture.same_text else 0
    exact = capture.weights(layer, head, queries=slice(row, row + 1), keys=slice(column, column + 1)).item()
    if math.isnan(weight):
        allowed, _ = capture.mask(layer, head).dense(len(capture.query_tokens), len(capture.key_tokens))
        assert not allowed.expand(1, 1, -1, -1)[0, 0, row, column] and tab.inner_text("#weight") == "hidden"
    else:
        assert weight == pytest.approx(exact, rel=2e-5, abs=1e-12)
        assert float(tab.inner_text("#weight")) == pytest.approx(weight, rel=1e-3)


def test_the_weight_under_the_pointer_is_exact(look):
    capture = structured()
    tab = look(capture, "#layer=3&head=3&theme=light")
    box, seen = tab.locator("#overlay").bounding_box(), set()
    for y in range(4, 19):
        for x in range(4, 19, 2):
            tab.mouse.move(box["x"] + box["width"] * x / 20, box["y"] + box["height"] * y / 20)
            check(tab, capture, 3, 3)
            seen.add(pointed(tab)[:2])
    assert len(seen) > 50


@pytest.mark.parametrize(
    "capture",
    [
        structured(mask=Causal() & Window(before=3, after=0)),
        structured(mask=Window(before=2, after=1) & Padding([7])),
        structured(mask=Causal() & Mask(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])), softcap=2.0),
        structured(mask=Allowed(torch.rand(1, 4, 10, 10, generator=torch.Generator().manual_seed(0)) > 0.5)),
        structured(sinks=torch.tensor([0.0, 1.0, 2.0, 3.0])),
        structured(("x", "y", "z"), keys=tuple("abcdefg"), mask=Mask()),
        structured(("f", "g"), keys=tuple("abcdefg")),
    ],
    ids=["window", "padding", "slopes", "allowed", "sinks", "cross", "newest"],
)
def test_every_cell_of_every_kind_of_mask(look, capture):
    tab = look(capture, "#layer=0&head=3")
    rows, columns = len(capture.query_tokens), len(capture.key_tokens)
    for key in ("ArrowUp", "ArrowLeft"):
        tab.keyboard.press("Shift+" + key)
    for row in range(rows):
        for column in range(columns):
            check(tab, capture, 0, 3)
            if column < columns - 1:
                tab.keyboard.press("ArrowRight")
        tab.keyboard.press("Shift+ArrowLeft")
        tab.keyboard.press("ArrowDown")
        assert row == rows - 1 or pointed(tab)[1] == 0


def test_the_wall_sorts_and_opens_heads(look):
    capture = structured()
    tab = look(capture)
    assert names(tab) == [f"L{layer} H{head}" for layer in (0, 3) for head in range(4)]
    for order, values in [
        ("entropy", capture.mean_entropy),
        ("sink", capture.mean_sink),
        ("distance", capture.mean_distance),
        ("previous", capture.previous_token),
    ]:
        tab.select_option("#order", order)
        expected = values.flatten().sort(descending=True, stable=True).indices.tolist()
        assert names(tab) == [f"L{capture.layers[i // 4]} H{i % 4}" for i in expected]
    assert names(tab)[0] in ("L0 H0", "L3 H0")  # the heads that look at the token before
    first = names(tab)
    tab.click("#direction")
    assert names(tab)[-1] in first[:2] and names(tab)[0] in first[4:]
    tab.click("#wall li:nth-child(2) button")
    layer, head = names(tab)[1][1:].split(" H")
    assert tab.inner_text("#name") == f"Layer {layer}, head {head}"
    tab.keyboard.press("]")
    layer, head = names(tab)[2][1:].split(" H")
    assert tab.inner_text("#name") == f"Layer {layer}, head {head}"


def test_pinning_a_query_lists_its_top_keys_and_marks_them(look):
    capture = structured()
    tab = look(capture, "#layer=0&head=3")
    tab.click("#text .token >> nth=8")
    assert tab.get_attribute("#pin", "aria-pressed") == "true"
    listed = [float(text) for text in tab.locator("#top .share").all_inner_texts()]
    weights, keys = capture.weights(0, 3)[8].topk(8)
    assert listed == pytest.approx(weights.tolist(), abs=6e-5)
    assert [int(text) for text in tab.locator("#top .place").all_inner_texts()] == keys.tolist()
    assert tab.locator("#text .token.top").count() == 8 and tab.locator("#text .token.unseen").count() == 1
    tab.hover("#map", force=True, position={"x": 300, "y": 300})
    assert tab.get_attribute("#pin", "aria-pressed") == "true"
    tab.keyboard.press("Escape")
    assert tab.get_attribute("#pin", "aria-pressed") == "false"


def test_zoom_drag_scales_and_themes_draw(look):
    tab = look(structured(), "#theme=light")
    views = [tab.screenshot()]
    box = tab.locator("#overlay").bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.7

    def drag():
        tab.mouse.down()
        tab.mouse.move(centre[0] - 90, centre[1] - 60, steps=4)
        tab.mouse.up()

    tab.mouse.move(*centre)
    steps = [
        lambda: tab.mouse.wheel(0, -300),
        drag,
        lambda: tab.click("#fit"),
        lambda: tab.keyboard.press("l"),
        lambda: tab.keyboard.press("t"),
        lambda: tab.set_viewport_size({"width": 700, "height": 900}),
    ]
    for action in steps:
        action()
        tab.wait_for_timeout(80)
        views.append(tab.screenshot())
    assert len(set(views)) == len(views)
    assert tab.get_attribute("html", "data-theme") == "dark"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_any_text_looks_like_itself(look):
    tab = look(structured(NASTY), "#layer=0&head=1")
    text = tab.inner_text("#text")
    assert "</script><script>alert(1)</script>" in text and "<img src=x onerror=alert(1)>" in text
    assert "\u2039202E\u203aright to left\u2039202C\u203a" in text and "\U0001f469\u200d\U0001f4bb" in text
    assert tab.locator("img").count() == 0
    assert tab.locator("#text .token").count() == len(NASTY)


def test_controls_have_names(look):
    tab = look(structured())
    for control in tab.locator("button, select, [role=application], canvas[role=img]").all():
        name = control.get_attribute("aria-label") or control.inner_text()
        assert name.strip(), control.evaluate("node => node.outerHTML")
    tab.click("#help")
    assert tab.locator("#shortcuts").is_visible()
    tab.keyboard.press("Escape")
    assert not tab.locator("#shortcuts").is_visible()
