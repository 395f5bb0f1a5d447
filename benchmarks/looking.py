"""The map of a long text: capture, memory, tiles, and fifty clients at once.

    python benchmarks/looking.py [--tokens 131072] [--text FILE] [--seconds 60] [--million] [--save]

4 layers, 4 heads, width 128, rotary, random weights; the text is the embedded corpus again and again, or FILE. Times
are those that a browser on this machine would see: over HTTP, from asking to the last byte. What the browser draws is
measured by map_browser.py.
"""

import hashlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import torch
from measure import Report, arguments, peak_bytes

import sightline as sl
from sightline.corpora import open_corpus
from sightline.kernels import cpu
from sightline.looking import beginning
from sightline.pyramid import Pyramid, encode

CLIENTS = 50
KNOWN = 100
"""Tiles whose bytes are known beforehand, and compared whenever a client gets one of them."""
LEVELS = 5
POOLS = ("max", "sum")


def model(tokens: int, *, layers: int = 4, heads: int = 4, text: str | None = None) -> tuple[sl.Decoder, list[int]]:
    """A model with random weights, and what it is to read."""
    corpus = open_corpus(text or "embedded")
    tokenizer = sl.Tokenizer.train("bpe", corpus.texts("train"), vocabulary=1024)
    ids = beginning(corpus, tokenizer.encode, tokens)
    torch.manual_seed(0)
    shape = {"d_model": 32 * heads, "num_layers": layers, "num_heads": heads, "context": tokens}
    decoder = sl.Decoder(sl.DecoderConfig(vocabulary=len(tokenizer), **shape))
    decoder.tokenizer = tokenizer
    return decoder, (ids * -(-tokens // len(ids)))[:tokens]


def resident_bytes() -> int:
    """What this process holds now."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


class Client:
    """One connection to the server, kept open."""

    def __init__(self, url: str) -> None:
        self.base = urlsplit(url)
        self.connection = HTTPConnection(self.base.hostname, self.base.port, timeout=120)

    def get(self, path: str) -> tuple[int, bytes, float]:
        """Status, body, seconds."""
        start = time.perf_counter()
        self.connection.request("GET", self.base.path + path)
        answer = self.connection.getresponse()
        body = answer.read()
        return answer.status, body, time.perf_counter() - start


def places(said: dict, levels: int, draw: random.Random) -> Iterator[tuple[int, int, str, int, int, int]]:
    """Random tiles that show something: layer, head, pool, level, row, column."""
    while True:
        layer, head = draw.choice(said["pairs"])
        level = draw.randrange(levels)
        row = draw.randrange(-(-said["queries"] // (256 << level)))
        yield layer, head, draw.choice(POOLS), level, row, draw.randrange(row + 1)


def path_of(layer: int, head: int, pool: str, level: int, row: int, column: int) -> str:
    return f"tile/0/{layer}/{head}/{pool}/{level}/{row}/{column}"


def late(times: list[float]) -> float:
    """The 99th percentile."""
    return sorted(times)[min(len(times) - 1, int(0.99 * len(times)))]


def tiles(report: Report, client: Client, said: dict, rounds: int) -> None:
    report.say("\n## A tile, cold: random heads, pools and places")
    report.table("level", "tokens a pixel", "median ms", "99th percentile ms", "n")
    draw, all_times = random.Random(0), []
    for level in range(said["levels"]):
        place = (place for place in places(said, said["levels"], draw) if place[3] == level)
        count = 12 * rounds if level < LEVELS else rounds
        answers = [client.get(path_of(*next(place))) for _ in range(count)]
        assert all(status == 200 for status, _, _ in answers)
        times = [seconds for _, _, seconds in answers]
        all_times += times if level < LEVELS else []
        report.row(level, 1 << level, f"{median(times) * 1e3:.1f}", f"{late(times) * 1e3:.1f}", count)
    report.row("0 to 4", "", f"{median(all_times) * 1e3:.1f}", f"{late(all_times) * 1e3:.1f}", len(all_times))


def others(report: Report, client: Client, said: dict, rounds: int) -> None:
    report.say("\n## The rest")
    report.table("what", "median ms", "99th percentile ms", "n")
    draw, length = random.Random(1), said["queries"]

    def somewhere() -> str:
        layer, head = draw.choice(said["pairs"])
        return f"{layer}/{head}"

    asked: dict[str, Callable[[], str]] = {
        "one weight": lambda: f"weight/0/{somewhere()}/{draw.randrange(length)}/{draw.randrange(length)}",
        "what a query looks at": lambda: f"query/0/{somewhere()}/{draw.randrange(length)}",
        "what looks at a key": lambda: f"key/0/{somewhere()}/{draw.randrange(length)}",
        "a track, all of the text": lambda: f"track/0/{somewhere()}/received/{said['levels'] - 1}/0",
        "a search": lambda: "search/0?text=" + draw.choice(["the", "statement", "expression", "zzz"]),
    }
    for name, ask in asked.items():
        times = [client.get(ask())[2] for _ in range(4 * rounds)]
        report.row(name, f"{median(times) * 1e3:.1f}", f"{late(times) * 1e3:.1f}", len(times))


def crowd(report: Report, server: "sl.viewer.server.Server", pyramid: Pyramid, said: dict, seconds: int) -> None:
    """Clients in a process of their own; this one serves."""
    draw = random.Random(2)
    known = {}
    for _, at in zip(range(KNOWN), places(said, LEVELS, draw), strict=False):
        body = encode(pyramid.tile(*at), kind="tile", level=at[3])
        known[path_of(*at)] = hashlib.sha256(body).hexdigest()
    before = resident_bytes()
    work = json.dumps({"url": server.url, "known": known, "seconds": seconds})
    done = subprocess.run([sys.executable, __file__, "--crowd"], input=work, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    report.say(f"\n## {CLIENTS} clients at once for {seconds} s, each asking for the next tile when it has one")
    report.table(
        "answers", "errors", "known tiles compared", "wrong", "median ms", "99th percentile ms", "memory before, after"
    )
    report.row(
        f"{found['answers']:,}", len(found["errors"]), f"{found['compared']:,}", found["wrong"],
        f"{found['median'] * 1e3:.0f}", f"{found['late'] * 1e3:.0f}",
        f"{before / 1e9:.2f}, {resident_bytes() / 1e9:.2f} GB",
    )  # fmt: skip
    for error in found["errors"][:5]:
        report.say(error)


def be_the_crowd() -> None:
    work = json.load(sys.stdin)
    url, known = work["url"], work["known"]
    said = json.loads(Client(url).get("manifest.json")[1])["captures"][0]
    end = time.monotonic() + work["seconds"]
    times, errors, wrong, compared = [], [], [], []

    def move(number: int) -> None:
        draw, client = random.Random(number), Client(url)
        anywhere = places(said, LEVELS, draw)
        while time.monotonic() < end:
            path = draw.choice(list(known)) if draw.random() < 0.3 else path_of(*next(anywhere))
            try:
                status, body, seconds = client.get(path)
            except OSError as error:
                errors.append(f"{path}: {error}")
                client = Client(url)
                continue
            times.append(seconds)
            if status != 200 or body[:4] != b"SLT1":
                errors.append(f"{path}: {status} {body[:80]!r}")
            elif path in known:
                compared.append(path)
                if hashlib.sha256(body).hexdigest() != known[path]:
                    wrong.append(path)

    clients = [threading.Thread(target=move, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    found = {"answers": len(times), "errors": errors, "compared": len(compared), "wrong": len(wrong)}
    print(json.dumps(found | {"median": median(times), "late": late(times)}))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=131_072, help="length of the text (default: %(default)s)")
    parser.add_argument("--text", help="a text instead of the embedded one")
    parser.add_argument("--seconds", type=int, default=60, help="how long the clients move (default: %(default)s)")
    parser.add_argument("--million", action="store_true", help="1,048,576 tokens, 1 layer, 1 head; no clients")
    parser.add_argument("--crowd", action="store_true", help="be the clients of a server (started by this script)")
    options = parser.parse_args()
    if options.crowd:
        be_the_crowd()
        return
    tokens, layers, heads = (1_048_576, 1, 1) if options.million else (options.tokens, 4, 4)
    decoder, ids = model(tokens, layers=layers, heads=heads, text=options.text)
    kernel = f"native kernel, {cpu.instructions()}" if not cpu.MISSING else "tiled kernel"
    report = Report(f"Looking at {tokens:,} tokens: {layers} x {heads} heads of width 32, {kernel}")
    before = peak_bytes()
    start = time.perf_counter()
    seen = sl.capture(decoder, ids)
    captured = time.perf_counter()
    with sl.serve(seen, port=0, block=False) as server:
        client = Client(server.url)
        said = json.loads(client.get("manifest.json")[1])["captures"][0]
        client.get("wall/0")
        ready = time.perf_counter()
        report.table("what", "")
        report.row("capture", f"{captured - start:.1f} s")
        report.row("from tokens to the page with its wall", f"{ready - start:.1f} s")
        report.row("peak memory until then", f"{peak_bytes() / 1e9:.2f} GB ({before / 1e9:.2f} GB before)")
        tiles(report, client, said, options.rounds)
        others(report, client, said, options.rounds)
        if not options.million:
            crowd(report, server, Pyramid(seen), said, options.seconds)
        report.say(f"\nPeak memory of capture and server at the end: {peak_bytes() / 1e9:.2f} GB.")
    if options.save:
        report.write("looking-million" if options.million else "looking")


if __name__ == "__main__":
    main()
