"""The map in a real browser: what a person sees and points at. Needs playwright and Chromium."""

import io
import math
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captures import structured
from PIL import Image
from test_page import NASTY

from sightline.captures import Capture
from sightline.inspection import capture
from sightline.masks import Allowed, Causal, Mask, Padding, Window
from sightline.models import Decoder, DecoderConfig
from sightline.recording import Recorder
from sightline.viewer.page import page
from sightline.viewer.server import Server, serve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PICTURES = Path(__file__).parent / "pictures"
SOURCES = ("server", "file")
METRICS = ("entropy", "sink", "distance", "previous", "induction")


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
    """Opens captures; afterwards the console must be empty and nothing but the page's own addresses asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 720}, reduced_motion="reduce", has_touch=True)
    said, asked, own, servers, forgiven = [], [], [], [], []

    def open_page(captures, fragment="#theme=light", source="server"):
        if isinstance(captures, Server):
            own.append(captures.url)
        elif source == "server":
            servers.append(serve(captures, port=0, block=False))
            own.append(servers[-1].url)
        elif source == "file":
            own.append(page(captures, tmp_path / f"map-{len(own)}.html").as_uri())
        else:  # what an earlier page wrote
            own.append(Path(source).as_uri())
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(own[-1] + fragment)
        still(tab)
        return tab

    open_page.forgiven = forgiven
    yield open_page
    context.close()
    for server in servers:
        server.close()
    assert [text for text in said if not any(part in text for part in forgiven)] == []
    assert asked and all(url.startswith((*own, "blob:", "data:")) for url in asked), asked


def still(tab) -> None:
    """Until everything that is on show has come."""
    tab.evaluate("() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))")
    until(
        tab, "document.getElementById('weight').value !== '' && document.getElementById('stage').ariaBusy === 'false'"
    )


def until(tab, condition: str) -> None:
    """Asked from outside: the page's policy forbids it to evaluate a string."""
    for _ in range(400):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(25)
    raise AssertionError(f"never so: {condition}; the page says {tab.inner_text('#status')!r}")


def pointed(tab) -> tuple[int, int, float]:
    """The query and the key that the page speaks of, and the weight it gives them."""
    row, column = int(tab.inner_text("#row")), int(tab.inner_text("#column"))
    return row, column, float(tab.get_attribute("#weight", "value"))


def check(tab, seen: Capture, layer: int, head: int) -> tuple[int, int]:
    row, column, weight = pointed(tab)
    row -= len(seen.key_tokens) - len(seen.query_tokens) if seen.same_text else 0
    exact = seen.weights(layer, head, queries=slice(row, row + 1), keys=slice(column, column + 1)).item()
    if math.isnan(weight):
        allowed, _ = seen.mask(layer, head).dense(len(seen.query_tokens), len(seen.key_tokens))
        assert not allowed.expand(1, 1, -1, -1)[0, 0, row, column] and tab.inner_text("#weight") == "hidden"
    else:
        assert weight == pytest.approx(exact, rel=2e-5, abs=1e-12)
        assert float(tab.inner_text("#weight")) == pytest.approx(weight, rel=1e-3)
    return row, column


def names(tab) -> list[str]:
    return tab.locator("#wall li:not([hidden]) strong").all_text_contents()


def link(tab) -> dict[str, str]:
    """What the address holds, once it has been written."""
    tab.wait_for_timeout(400)
    return dict(part.split("=", 1) for part in tab.url.split("#")[1].split("&"))


def modelled(count: int = 700) -> Capture:
    torch.manual_seed(3)
    config = DecoderConfig.modern(
        vocabulary=50, d_model=32, num_layers=2, num_heads=4, num_groups=2, head_width=16, context=2048
    )
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    seen = capture(model, (torch.arange(count) * 7 + torch.arange(count) ** 2 // 5) % 50)
    words = tuple(("\n" if n % 11 == 10 else f"w{token} ") for n, token in enumerate(seen.ids))
    return replace(seen, query_tokens=words, key_tokens=words, separator="")


@pytest.mark.parametrize("source", SOURCES)
def test_the_weight_under_the_pointer_is_exact(look, source):
    seen = structured()
    tab = look(seen, "#layer=3&head=3&theme=light", source)
    box, places = tab.locator("#overlay").bounding_box(), set()
    for step in range(16):
        tab.mouse.move(box["x"] + 170 + (step * 61) % 420, box["y"] + 130 + (step * 97) % 420)
        still(tab)
        places.add(check(tab, seen, 3, 3))
    assert len(places) > 10


MASKS = {
    "window": structured(mask=Causal() & Window(before=3, after=0)),
    "padding": structured(mask=Window(before=2, after=1) & Padding([7])),
    "slopes": structured(mask=Causal() & Mask(slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])), softcap=2.0),
    "allowed": structured(mask=Allowed(torch.rand(1, 4, 10, 10, generator=torch.Generator().manual_seed(0)) > 0.5)),
    "sinks": structured(sinks=torch.tensor([0.0, 1.0, 2.0, 3.0])),
    "cross": structured(("x", "y", "z"), keys=tuple("abcdefg"), mask=Mask()),
    "tall cross": structured(keys=tuple("abc"), mask=Mask()),
    "newest": structured(("f", "g"), keys=tuple("abcdefg")),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", MASKS)
def test_cells_of_every_kind_of_mask(look, kind, source):
    seen = MASKS[kind]
    tab = look(seen, "#layer=0&head=3&theme=light", source)
    moves = ["ArrowLeft", "ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowUp", "Shift+ArrowLeft", "Shift+ArrowUp"]
    for key in [*moves, *["ArrowRight", "ArrowDown"] * 3]:
        tab.keyboard.press(key)
        still(tab)
        check(tab, seen, 0, 3)
    assert "query" in tab.inner_text("#announce")


@pytest.mark.parametrize("source", SOURCES)
def test_squares_of_every_level(look, source):
    seen = modelled()
    tab = look(seen, "#layer=1&head=2&theme=light", source)
    weights = seen.weights(1, 2)
    allowed = torch.ones_like(weights).tril()
    box = tab.locator("#overlay").bounding_box()
    for _ in range(4):
        tab.mouse.move(box["x"] + 300, box["y"] + 480)
        for pool in ("max", "mass"):
            tab.click(f"#{pool}")
            still(tab)
            row, column, weight = pointed(tab)
            told = re.match(r"(\w+) of its (\d+) .*: (.*)", tab.inner_text("#second"))
            if told is None:
                assert weight == pytest.approx(weights[row, column].item(), rel=2e-5)
                continue
            size = int(told[2])
            top, left = row // size * size, column // size * size
            square = weights[top : top + size, left : left + size]
            expected = square.max() if pool == "max" else square.sum() / len(square)
            assert allowed[top : top + size, left : left + size].any()
            assert float(told[3]) == pytest.approx(expected.item(), rel=6e-3)
        tab.mouse.move(box["x"] + 300, box["y"] + 480)
        tab.mouse.wheel(0, -240)


def test_the_wall_sorts_filters_and_opens_heads(look):
    seen = structured()
    tab = look(seen)
    assert names(tab) == [f"L{layer} H{head}" for layer in (0, 3) for head in range(4)]
    values = [seen.mean_entropy, seen.mean_sink, seen.mean_distance, seen.previous_token, seen.induction]
    for order, numbers in zip(METRICS, values, strict=True):
        tab.select_option("#order", order)
        expected = numbers.flatten().sort(descending=True, stable=True).indices.tolist()
        assert names(tab) == [f"L{seen.layers[i // 4]} H{i % 4}" for i in expected]
    tab.select_option("#order", "layer")
    tab.click("#direction")
    assert names(tab)[0] == "L3 H3"
    tab.click("#direction")
    tab.fill("#filter", "L3")
    assert names(tab) == [f"L3 H{head}" for head in range(4)] and tab.inner_text("#count") == "4 of 8"
    sinks = seen.mean_sink.flatten()
    for text, keep in [("sink>0.9", sinks >= 0.9), ("sink 0.2 - 0.9", (sinks >= 0.2) & (sinks <= 0.9))]:
        tab.fill("#filter", text)
        assert names(tab) == [f"L{seen.layers[i // 4]} H{i % 4}" for i in range(8) if keep[i]]
    assert tab.get_attribute("#filter", "aria-invalid") == "false"
    tab.fill("#filter", "?!")
    assert tab.get_attribute("#filter", "aria-invalid") == "true"
    tab.fill("#filter", "")
    tab.click("#wall li:nth-child(2) button")
    assert tab.inner_text("#name") == "Layer 0, head 1"
    tab.focus("#overlay")
    tab.keyboard.press("]")
    assert tab.inner_text("#name") == "Layer 0, head 2"
    tab.keyboard.press("[")
    assert tab.get_attribute("#wall li:nth-child(2) button", "aria-pressed") == "true"


@pytest.mark.parametrize("source", SOURCES)
def test_a_pinned_word_tells_what_it_looks_at_and_what_looks_at_it(look, source):
    seen = structured()
    tab = look(seen, "#layer=0&head=3&theme=light", source)
    tab.click("#text .token >> nth=8")
    still(tab)
    assert tab.get_attribute("#pin", "aria-pressed") == "true"
    weights = seen.weights(0, 3)

    def listed(name: str) -> list[str]:
        return tab.locator(f"#top {name}").all_inner_texts()

    strongest, keys = weights[8].topk(8)
    assert [float(text) for text in listed(".share")] == pytest.approx(strongest.tolist(), abs=6e-5)
    assert [int(text) for text in listed(".place")] == keys.tolist()
    assert tab.locator("#text .token.top").count() == 8
    tab.click("#seen")
    still(tab)
    strongest, queries = weights[8:, 8].sort(descending=True)
    assert [float(text) for text in listed(".share")] == pytest.approx(strongest.tolist(), abs=6e-5)
    assert [int(text) for text in listed(".place")] == (queries + 8).tolist()
    tab.click("#top li:nth-child(2) button")
    still(tab)
    assert pointed(tab)[:2] == (int(queries[1]) + 8, 8)
    tab.keyboard.press("Escape")
    still(tab)
    assert tab.get_attribute("#pin", "aria-pressed") == "false"


@pytest.mark.parametrize("source", SOURCES)
def test_comparing_two_heads(look, source):
    seen = structured()
    tab = look(seen, "#layer=0&head=3&theme=light", source)
    tab.keyboard.press("c")
    tab.select_option("#other", label="L3 H3")
    still(tab)
    assert tab.locator("#mode").input_value() == "side" and not tab.locator("#heads").is_visible()
    box = tab.locator("#overlay").bounding_box()
    for x in (0.3, 0.8):  # both maps point at the same cells
        tab.mouse.move(box["x"] + box["width"] * x, box["y"] + 300)
        still(tab)
        row, column = check(tab, seen, 0, 3)
        other = seen.weights(3, 3)[row, column].item()
        assert float(re.search(r"L3 H3: (\S+),", tab.inner_text("#second"))[1]) == pytest.approx(other, rel=1e-4)
    tab.click("#swap")
    still(tab)
    assert tab.inner_text("#name") == "Layer 3, head 3" and tab.locator("#other").input_value() == "0/0/3"
    tab.keyboard.press("c")
    still(tab)
    assert tab.locator("#mode").input_value() == "difference"
    assert tab.locator("#ticks span").first.inner_text() == "\u22121" and "minus L0 H3" in tab.get_attribute(
        "#colours", "aria-label"
    )


def test_comparing_two_checkpoints(look):
    first, second = structured(), structured(softcap=1.0)
    tab = look({"one": first, "two": second}, "#capture=0&layer=0&head=3&compare=difference&theme=light")
    assert tab.locator("#other").input_value() == "1/0/3" and tab.inner_text("#capture option >> nth=1") == "two"
    row, column = check(tab, first, 0, 3)
    there = second.weights(0, 3)[row, column].item()
    assert float(re.search(r"L0 H3 of two: (\S+),", tab.inner_text("#second"))[1]) == pytest.approx(there, rel=1e-4)
    tab.select_option("#capture", "1")
    still(tab)
    check(tab, second, 0, 3)


@pytest.mark.parametrize("source", SOURCES)
def test_search_jumps_from_place_to_place(look, source):
    seen = modelled()
    tab = look(seen, source=source)
    tab.keyboard.press("/")
    tab.keyboard.type("W7 W")
    until(tab, "document.getElementById('found').textContent.startsWith('1 /')")
    text = "".join(seen.key_tokens).lower()
    starts = np.cumsum([0, *map(len, seen.key_tokens)])
    expected = [int(np.searchsorted(starts, hit.start(), "right")) - 1 for hit in re.finditer("w7 w", text)]
    assert tab.inner_text("#found") == f"1 / {len(expected)}" and len(expected) > 2
    still(tab)
    found = [pointed(tab)[1]]
    for key in ("Enter", "Enter", "Shift+Enter"):
        tab.keyboard.press(key)
        still(tab)
        found.append(pointed(tab)[1])
    assert found == [expected[0], expected[1], expected[2], expected[1]]
    tab.fill("#search", "nowhere")
    until(tab, "document.getElementById('found').textContent === 'not found'")
    assert tab.locator("#next").is_disabled()


def test_a_link_restores_the_view_and_does_not_flood_the_history(look):
    seen = modelled()
    tab = look({"one": seen, "two": replace(seen, model="twin")}, "")
    before = tab.evaluate("history.length")
    for key in ["t", "m", "l", "]", "]", "c", "+", "+", "+", "ArrowUp", "ArrowUp"]:
        tab.keyboard.press(key)
    tab.click("#text .token >> nth=30")
    still(tab)
    said = link(tab)
    assert tab.evaluate("history.length") == before
    assert {"capture", "layer", "head", "pool", "scale", "theme", "at", "pin", "compare", "with"} <= set(said)
    again = tab.context.new_page()
    again.goto(tab.url)
    still(again)
    for page_ in (tab, again):
        page_.mouse.move(5, 300)
    for what in ("#name", "#asker", "#weight"):
        assert again.inner_text(what) == tab.inner_text(what)
    assert link(again) == said
    shots = [np.asarray(Image.open(io.BytesIO(one.locator("#map").screenshot()))).astype(int) for one in (tab, again)]
    assert np.abs(shots[0] - shots[1]).mean() < 1
    again.close()


def saved(tab, button: str, folder: Path) -> Path:
    with tab.expect_download() as waiting:
        tab.click(button)
    file = folder / waiting.value.suggested_filename
    waiting.value.save_as(file)
    until(tab, "document.getElementById('exporting').textContent === 'done'")
    return file


@pytest.mark.parametrize("fragment", ["#theme=light", "#compare=side&theme=dark", "#compare=difference&at=300/290/40"])
def test_pictures_for_print(look, tmp_path, fragment):
    seen = modelled()
    tab = look(seen, fragment)
    tab.keyboard.press("e")
    picture = Image.open(saved(tab, "#png", tmp_path))
    drawing = saved(tab, "#svg", tmp_path)
    root = ElementTree.parse(drawing).getroot()
    width, height = float(root.get("width")), float(root.get("height"))
    assert picture.size == (round(3 * width), round(3 * height)) and width > 400
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("Layer 0, head 0") for text in texts) and "received" in texts and "entropy" in texts
    assert ("+1" if "difference" in fragment else "1") in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}image"))) == (3 if "side" in fragment else 2)
    tab.keyboard.press("Escape")


def test_an_exported_page_opens_from_disk(look, tmp_path):
    seen = modelled()
    tab = look(seen)
    tab.keyboard.press("e")
    assert tab.locator("#chosen").input_value() == "0.0"
    tab.fill("#chosen", "0.1, 1.3")
    file = saved(tab, "#html", tmp_path)
    opened = look(None, "#layer=1&head=3&theme=light", str(file))
    assert names(opened) == ["L0 H1", "L1 H3"] and opened.locator("#pages").is_hidden()
    check(opened, seen, 1, 3)


@pytest.mark.parametrize("source", SOURCES)
def test_any_text_looks_like_itself(look, source, tmp_path):
    tab = look(structured(NASTY), "#layer=0&head=1&theme=light", source)
    text = tab.inner_text("#text")
    assert "</script><script>alert(1)</script>" in text and "<img src=x onerror=alert(1)>" in text
    assert "\u2039202E\u203aright to left\u2039202C\u203a" in text and "\U0001f469\u200d\U0001f4bb" in text
    assert "\u2039200B\u203a" in text and "\u241b[31m" in text and "\u2400\u2407" in text
    assert tab.locator("main img, main script").count() == 0
    assert tab.locator("#text .token").count() == len(NASTY)
    tab.fill("#search", "<IMG")
    until(tab, "document.getElementById('found').textContent === '1 / 1'")
    still(tab)
    tab.click("#export")
    drawn = ElementTree.parse(saved(tab, "#svg", tmp_path)).getroot()
    assert not list(drawn.iter("{http://www.w3.org/2000/svg}script"))


def colour_at(tab, selector: str, x: int, y: int) -> tuple[int, ...]:
    return Image.open(io.BytesIO(tab.locator(selector).screenshot())).convert("RGB").getpixel((x, y))


@pytest.mark.parametrize("source", SOURCES)
def test_padding_rectangles_and_generated_text_are_shown_for_what_they_are(look, source):
    padded = structured(mask=Causal() & Padding([7]))
    tab = look(padded, source=source)
    assert "3 of padding" in tab.inner_text("#model")
    written = replace(structured(), prompt=6)
    tab = look(written, source=source)
    assert "4 written by the model" in tab.inner_text("#model")
    assert tab.locator("#text .token.written").count() == 4
    cross = structured(("x", "y", "z"), keys=tuple("abcdefg"), mask=Mask())
    tab = look(cross, source=source)
    assert "3 queries, 7 keys" in tab.inner_text("#model")
    assert tab.locator("#text h3").all_inner_texts() == ["queries", "keys"]
    tab.click("#text .token[title='1'] >> nth=0")
    still(tab)
    assert tab.inner_text("#asker") == "Keys that query \u201cy\u201d looks at" and link(tab)["pin"] == "1/"
    check(tab, cross, 0, 0)


def test_a_wrong_number_is_never_shown(look):
    seen = structured()
    tab = look(seen, "#layer=0&head=3&theme=light")
    box, held = tab.locator("#overlay").bounding_box(), []
    tab.route("**/weight/**", lambda route: held.append(route))
    tab.mouse.move(box["x"] + 300, box["y"] + 400)
    tab.wait_for_timeout(200)
    assert len(held) == 1 and tab.inner_text("#weight") == ""
    tab.mouse.move(box["x"] + 300, box["y"] + 500)
    tab.wait_for_timeout(200)
    held[0].continue_()
    tab.wait_for_timeout(100)
    assert len(held) == 2 and tab.inner_text("#weight") == ""
    held[1].continue_()
    still(tab)
    check(tab, seen, 0, 3)


def test_tiles_that_are_no_longer_needed_are_called_off(look):
    seen = modelled(1500)
    tab = look(seen)
    held, failed = [], []
    tab.on("requestfailed", lambda request: failed.append(request.url))
    tab.route(re.compile(r"/tile/.*/max/0/"), lambda route: held.append(route))
    box = tab.locator("#overlay").bounding_box()
    tab.mouse.move(box["x"] + 200, box["y"] + 500)
    for _ in range(9):
        tab.mouse.wheel(0, -240)
    tab.wait_for_timeout(300)
    assert held
    tab.keyboard.press("]")  # another head
    tab.wait_for_timeout(300)
    assert any(route.request.url in failed for route in held)
    tab.unroute_all(behavior="ignoreErrors")
    still(tab)


def test_a_refusal_is_told_and_forgotten_when_it_is_over(look):
    tab = look(modelled(900))
    look.forgiven.append("503")  # the browser itself puts a failed request on the console
    tab.route("**/tile/0/1/**", lambda route: route.fulfill(status=503, body="too many pictures are waiting"))
    tab.keyboard.press("]")
    for _ in range(4):
        tab.keyboard.press("]")
    until(tab, "document.getElementById('status').textContent === 'too many pictures are waiting'")
    tab.unroute_all(behavior="ignoreErrors")
    tab.keyboard.press("[")
    tab.keyboard.press("[")
    still(tab)
    assert tab.inner_text("#status") == ""


def test_a_wall_that_is_refused_comes_when_the_refusal_is_over(look):
    tab = look(modelled(300))
    look.forgiven.extend(("503", "readback"))  # said by the browser, of the refusal and of this test's own question
    tab.route("**/wall/**", lambda route: route.fulfill(status=503, body="too many pictures are waiting"))
    tab.reload()
    still(tab)
    drawn = "document.querySelector('#wall canvas').getContext('2d').getImageData(0, 0, 1, 1).data[3] > 0"
    assert not tab.evaluate(drawn)
    tab.unroute_all(behavior="ignoreErrors")
    until(tab, drawn)


def test_zoom_drag_pinch_scales_and_themes_draw(look):
    tab = look(modelled())
    box = tab.locator("#overlay").bounding_box()
    x, y = box["x"] + 330, box["y"] + 400
    views = [tab.screenshot()]

    def drag():
        tab.mouse.down()
        tab.mouse.move(x - 90, y - 60, steps=4)
        tab.mouse.up()

    def pinch():
        session = tab.context.new_cdp_session(tab)
        for kind, spread in [("touchStart", 40), ("touchMove", 60), ("touchMove", 110), ("touchEnd", None)]:
            fingers = [] if spread is None else [{"x": x - spread, "y": y}, {"x": x + spread, "y": y}]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    tab.mouse.move(x, y)
    steps = [
        lambda: tab.mouse.wheel(0, -300),
        drag,
        pinch,
        lambda: tab.click("#fit"),
        lambda: tab.keyboard.press("l"),
        lambda: tab.keyboard.press("m"),
        lambda: tab.keyboard.press("t"),
        lambda: tab.keyboard.press("w"),
        lambda: tab.set_viewport_size({"width": 1024, "height": 768}),
        lambda: tab.set_viewport_size({"width": 700, "height": 900}),
    ]
    for action in steps:
        action()
        tab.wait_for_timeout(120)
        views.append(tab.screenshot())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert len(set(views)) == len(views)
    assert tab.get_attribute("html", "data-theme") == "dark"


def test_controls_have_names_and_keys(look):
    tab = look(structured())
    for control in tab.locator("button, select, input, [role=application], canvas[role=img]").all():
        name = control.get_attribute("aria-label") or control.inner_text() or control.get_attribute("id") == "chosen"
        assert name is True or name.strip(), control.evaluate("node => node.outerHTML")
    for key, dialog in [("?", "#shortcuts"), ("e", "#exports")]:
        tab.keyboard.press(key)
        assert tab.locator(dialog).is_visible()
        tab.keyboard.press("Escape")
        assert not tab.locator(dialog).is_visible()
    tab.focus("#overlay")
    tab.keyboard.press("Enter")
    still(tab)
    assert tab.get_attribute("#pin", "aria-pressed") == "true"
    tab.keyboard.press("b")
    still(tab)
    assert tab.get_attribute("#seen", "aria-pressed") == "true"


def grown(seen: Capture, count: int) -> Capture:
    """The beginning of a capture, as if the rest had not been written yet."""
    words, ids = seen.key_tokens[:count], seen.ids[:count]
    recorder = Recorder(seen.layers)
    for row, layer in enumerate(seen.layers):
        query, key = (part[row : row + 1, :, :count] for part in (seen.queries, seen.keys))
        recorder(layer, query, key, key, seen.masks[row], scale=seen.scales[row])
    return recorder.capture(words, ids=ids, separator=seen.separator, model=seen.model, prompt=60)


def test_what_a_model_writes_appears_as_it_writes(look):
    whole = modelled(200)

    with serve(grown(whole, 60), goal=200, port=0, block=False) as server:
        tab = look(server)
        assert "writing, 0 of 140" in tab.inner_text("#model") and tab.get_attribute("#model", "aria-busy") == "true"
        for count in (90, 140):
            server.show(grown(whole, count), goal=200)
            until(tab, f"document.getElementById('model').textContent.includes('writing, {count - 60} of 140')")
            still(tab)
            assert check(tab, whole, 0, 0) == (count - 1, count - 1)  # the newest word is followed
        tab.locator("#text .token").nth(100).click()
        server.show(grown(whole, 200), goal=None)
        until(tab, "document.getElementById('announce').textContent === 'The model has written 140 tokens'")
        still(tab)
        assert check(tab, whole, 0, 0)[0] == 100  # a chosen one is not left
        assert tab.get_attribute("#model", "aria-busy") == "false" and "140 written" in tab.inner_text("#model")
        assert len(tab.locator("#text .token.written").all()) == 140


EDITOR = """default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';
    img-src 'self' https: http: data:; font-src 'self' https:; connect-src https:; child-src https: data:"""
"""What Visual Studio Code allows the outputs of a notebook."""


@pytest.mark.parametrize("policy", ["", EDITOR], ids=["notebook", "editor"])
def test_a_cell_of_a_notebook_shows_the_map_again_after_a_reload(browser, tmp_path, policy):
    seen, said = structured(), []
    file = tmp_path / "cell.html"
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">' if policy else ""
    file.write_text(f"<!doctype html><meta charset=utf-8>{head}{seen._repr_html_()}", encoding="utf-8")
    tab = browser.new_page(viewport={"width": 1000, "height": 800})
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(file.as_uri())
    for _ in range(2):
        frame = tab.frame_locator("iframe")
        frame.locator("#weight[value]:not([value=''])").wait_for()
        assert float(frame.locator("#weight").get_attribute("value")) == pytest.approx(
            seen.weights(0, 0)[-1, -1].item()
        )
        assert "run this cell" not in tab.inner_text("body")
        tab.reload()
    tab.close()
    assert said == []


def test_what_the_mask_hides_is_dim_in_the_text(look):
    tab = look(structured(mask=Causal() & Window(before=4, after=0)))
    tab.locator("#text .token").nth(6).click()
    still(tab)
    dim = tab.locator("#text .token").evaluate_all("all => all.map(one => one.classList.contains('masked'))")
    assert dim == [True] * 2 + [False] * 5 + [True] * 3
    tab.click("#seen")
    still(tab)
    dim = tab.locator("#text .token").evaluate_all("all => all.map(one => one.classList.contains('masked'))")
    assert dim == [True] * 6 + [False] * 4


def unlike(found: Image.Image, expected: Image.Image) -> float:
    """Mean difference of two pictures, of 255, with what fonts and their smoothing do blurred away."""
    small = [
        np.asarray(one.convert("RGB").resize((160, 90), Image.Resampling.BOX)).astype(float)
        for one in (found, expected)
    ]
    return float(np.abs(small[0] - small[1]).mean())


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("whole", "#layer=0&head=1&theme=light"),
        ("cells", "#layer=1&head=2&theme=dark&at=200/198/40&pin=200/200"),
        ("difference", "#layer=0&head=1&theme=light&compare=difference&with=0/1/2&at=300/260/4"),
    ],
)
def test_the_expected_look(look, name, fragment, tmp_path):
    tab = look(modelled(), fragment)
    tab.mouse.move(5, 300)
    still(tab)
    found = Image.open(io.BytesIO(tab.screenshot())).convert("RGB").resize((640, 360), Image.Resampling.BOX)
    found.save(tmp_path / f"{name}.png")
    assert unlike(found, Image.open(PICTURES / f"map-{name}.png")) < 4, f"see {tmp_path}"


def test_another_look_is_noticed():
    pictures = [Image.open(PICTURES / f"map-{name}.png") for name in ("whole", "cells", "difference")]
    assert unlike(pictures[0], pictures[0]) == 0
    assert min(unlike(a, b) for a in pictures for b in pictures if a is not b) > 8
