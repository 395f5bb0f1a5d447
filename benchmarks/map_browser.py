"""The map in Chromium: time to the first picture, and frames while a hand drags and zooms.

    python benchmarks/map_browser.py [--tokens 131072] [--layers 1] [--capture FOLDER] [--keep FOLDER] [--save]

The capture is that of looking.py with one layer, as a picture is of one head or two; or one that was saved: FOLDER is
what `save_capture` wrote. Server and browser share this machine. Needs playwright and Chromium.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

import looking
from measure import Report, arguments
from playwright.sync_api import Browser, Page, sync_playwright

import sightline as sl

SMOOTH = 33.0
"""Milliseconds from one frame to the next that still look like movement."""
SECONDS = 12
"""How long each movement is watched."""
RECORD = """() => {
  const frames = window.frames_ = [];
  const next = (time) => { frames.push(time); requestAnimationFrame(next); };
  requestAnimationFrame(next);
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # its sandbox does not start as root
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


def opened(browser: Browser, url: str) -> tuple[Page, float]:
    """A fresh page without a cache, and the milliseconds from its navigation to the first tile drawn."""
    page = browser.new_context(viewport={"width": 1280, "height": 720}).new_page()
    page.goto(url)
    while (at := page.evaluate("performance.getEntriesByName('sightline:first-tile')[0]?.startTime ?? null")) is None:
        page.wait_for_timeout(5)
    return page, at


def drag(page: Page, box: Any) -> None:
    """Back and forth across the map, a press and a release each way."""
    x, y = box["x"] + 250, box["y"] + 200
    page.mouse.move(x + 300, y + 300)
    page.mouse.down()
    page.mouse.move(x, y, steps=40)
    page.mouse.up()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 280, y + 290, steps=40)
    page.mouse.up()


def zoom(page: Page, box: Any) -> None:
    """From the whole text to single weights at the diagonal, and back."""
    page.mouse.move(box["x"] + 420, box["y"] + 400)
    for delta in (-120, 120):
        for _ in range(34):
            page.mouse.wheel(0, delta)
            page.wait_for_timeout(8)


def watch(page: Page, movement: Any) -> list[float]:
    """Milliseconds between frames during some seconds of a movement."""
    box = page.locator("#overlay").bounding_box()
    start = page.evaluate("performance.now()")
    while page.evaluate("performance.now()") < start + 1000 * SECONDS:
        movement(page, box)
    times = [time for time in page.evaluate("window.frames_") if time >= start]
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=1, help="four heads each (default: %(default)s)")
    parser.add_argument("--capture", help="a saved capture to look at instead")
    parser.add_argument("--keep", help="save the capture in this folder")
    options = parser.parse_args()
    if options.capture:
        seen = sl.load_capture(options.capture)
    else:
        model, ids = looking.model(options.tokens, layers=options.layers)
        seen = sl.capture(model, ids)
    if options.keep:
        sl.save_capture(seen, options.keep)
    report = Report(f"The map of {len(seen.key_tokens):,} tokens, {len(seen.heads)} heads, in Chromium at 1280 x 720")
    with sl.serve(seen, port=0, block=False) as server, chromium() as browser:
        report.say(
            f"Chromium {browser.version}, headless, without a graphics card; server and browser share the cores."
        )
        opened(browser, server.url)[0].context.close()  # the first start of a browser reads it from the disk
        first = []
        for _ in range(options.rounds):
            page, at = opened(browser, server.url)
            first.append(at)
            page.context.close()
        report.table("first picture", "median ms", "worst ms", "n")
        report.row("navigation to the first tile drawn", f"{median(first):.0f}", f"{max(first):.0f}", len(first))
        report.table("frames", "under 33 ms", "median ms", "99th percentile ms", "n")
        for name, fragment, movement in [
            ("drag, whole words", "#at=100000/99990/16", drag),
            ("drag, 64 tokens a pixel", "#at=65536/60000/0.0157", drag),
            ("zoom, whole text to weights and back", "", zoom),
            ("zoom, two heads side by side", "#compare=side", zoom),
            ("zoom, difference of two heads", "#compare=difference", zoom),
        ]:
            page, _ = opened(browser, server.url + fragment)
            page.wait_for_timeout(1500)
            page.evaluate(RECORD)
            gaps = watch(page, movement)
            smooth = sum(gap < SMOOTH for gap in gaps) / len(gaps)
            late = sorted(gaps)[int(0.99 * len(gaps))]
            report.row(name, f"{smooth:.1%}", f"{median(gaps):.1f}", f"{late:.1f}", len(gaps))
            page.context.close()
    if options.save:
        report.write("map-browser")


if __name__ == "__main__":
    main()
