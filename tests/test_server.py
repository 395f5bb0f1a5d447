"""The server over real sockets: every path, what it refuses, and how it ends."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from captures import structured

from sightline.inspection import capture
from sightline.masks import Mask
from sightline.models import Decoder, DecoderConfig
from sightline.pyramid import Pyramid, encode
from sightline.store import save_capture
from sightline.viewer import editions
from sightline.viewer import server as server_module
from sightline.viewer.server import Server, serve

NASTY = ("</script><script>alert(1)</script>", "\u202e", "\U0001f469\u200d\U0001f4bb", "\x00\x1b[31m", "\ud83d", "&lt;")


@pytest.fixture(scope="module")
def seen():
    torch.manual_seed(0)
    config = DecoderConfig.modern(vocabulary=20, d_model=32, num_layers=2, num_heads=4, num_groups=2, context=700)
    return capture(Decoder(config), [i * i % 19 for i in range(700)])


@pytest.fixture(scope="module")
def served(seen):
    others = {"small": seen, "nasty": structured(NASTY, keys=(*NASTY, "a", "b"), mask=Mask())}
    with serve(others, port=0, block=False) as server:
        yield server


def get(server: Server, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(server.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), {k.lower(): v for k, v in error.headers.items()}


def test_the_page_and_its_parts(served):
    for path, kind in [("", "text/html"), ("map.css", "text/css"), ("map.js", "text/javascript")]:
        code, body, headers = get(served, path)
        assert (code, headers["content-type"]) == (200, f"{kind}; charset=utf-8") and body
    html = get(served, "")[1].decode()
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert {link for link in links if not link.startswith("data:")} == {"map.css", "map.js"}


def test_every_answer_forbids_what_is_foreign(served):
    for path in (
        "",
        "map.js",
        "manifest.json",
        "tile/0/0/0/max/0/0/0",
        "nothing",
        "../x",
        "export?capture=0&heads=0.1",
    ):
        _, _, headers = get(served, path)
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert (
            policy["default-src"]
            == policy["base-uri"]
            == policy["form-action"]
            == policy["frame-ancestors"]
            == "'none'"
        )
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_the_manifest_says_what_there_is(served, seen):
    said = json.loads(get(served, "manifest.json")[1])
    first, second = said["captures"]
    assert (first["name"], first["queries"], first["keys"], first["same"]) == ("small", 700, 700, True)
    assert (second["name"], second["queries"], second["keys"], second["same"]) == ("nasty", 6, 8, False)
    assert first["pairs"] == [[layer, head] for layer in (0, 1) for head in range(4)] and second["layers"] == [0, 3]
    assert (first["levels"], first["map_level"], first["exact_level"], first["wall"]) == (3, 6, 6, [44, 44])
    assert first["masks"] == [{"before": None, "after": 0}] * 2 and first["prompt"] is None and first["length"] is None
    np.testing.assert_allclose(first["summaries"]["induction"], seen.induction.flatten().numpy(), rtol=1e-6)
    np.testing.assert_allclose(first["summaries"]["previous"], seen.previous_token.flatten().numpy(), rtol=1e-6)
    assert [len(values) for values in first["summaries"].values()] == [8] * 5


def test_text_comes_in_pieces_and_stays_itself(served, seen, monkeypatch):
    monkeypatch.setattr(server_module, "CHUNK", 300)
    pieces = [json.loads(get(served, f"text/0/key/{piece}")[1]) for piece in range(3)]
    assert [len(piece) for piece in pieces] == [300, 300, 100] and tuple(chain(*pieces)) == seen.tokens
    assert tuple(json.loads(get(served, "text/1/query/0")[1])) == NASTY
    assert json.loads(get(served, "text/1/key/0")[1])[-2:] == ["a", "b"]


def test_pictures_are_those_of_the_pyramid(served, seen):
    pyramid = Pyramid(seen)
    for pool, level, row, column in [("max", 0, 2, 0), ("sum", 0, 1, 1), ("max", 1, 1, 0), ("sum", 2, 0, 0)]:
        code, body, headers = get(served, f"tile/0/1/3/{pool}/{level}/{row}/{column}")
        assert (code, headers["content-type"]) == (200, "application/octet-stream")
        assert body == encode(pyramid.tile(1, 3, pool, level, row, column), kind="tile", level=level)
    assert get(served, "wall/0")[1] == encode(pyramid.wall.flatten(0, 1), kind="wall", level=4)
    track = encode(pyramid.track(1, 2, "received", 0, 0), kind="track", level=0)
    assert get(served, "track/0/1/2/received/0/0")[1] == track


def test_single_facts(served, seen):
    pyramid = Pyramid(seen)
    assert json.loads(get(served, "weight/0/1/3/600/20")[1]) == {"weight": pyramid.weight(1, 3, 600, 20)}
    assert json.loads(get(served, "weight/0/1/3/20/600")[1]) == {"weight": None}
    assert json.loads(get(served, "query/0/1/3/600")[1]) == pyramid.query_facts(1, 3, 600)
    assert json.loads(get(served, "key/0/1/3/20")[1]) == pyramid.key_facts(1, 3, 20)
    hits = json.loads(get(served, "search/1?text=SCRIPT")[1])
    assert hits == {"at": [0, 0, 0], "length": [1, 1, 1], "more": False}
    assert json.loads(get(served, "search/1?text=a&after=6")[1])["at"] == [6]


def test_what_cannot_change_may_be_kept(served):
    version = json.loads(get(served, "manifest.json")[1])["version"]
    for path in ("tile/0/0/0/max/0/0/0", "track/0/0/0/sink/0/0", "weight/0/0/0/1/1", "text/0/key/0", "wall/0"):
        kept = get(served, f"{path}?v={version}")[2]["cache-control"]
        assert kept == "private, max-age=31536000, immutable"
        assert get(served, path)[2]["cache-control"] == get(served, f"{path}?v=old")[2]["cache-control"] == "no-store"
    assert get(served, "manifest.json")[2]["cache-control"] == get(served, "")[2]["cache-control"] == "no-store"


REFUSED = {
    "nothing": (404, "Not Found"),
    "map.py": (404, "Not Found"),
    "tile/0/0/0/max/0/0": (404, "Not Found"),
    "tile/0/0/0/max/zero/0/0": (404, "Not Found"),
    "tile/0/0/0/max/-1/0/0": (404, "Not Found"),
    "tile/2/0/0/max/0/0/0": (404, "captures are 0 to 1, got 2"),
    "tile/0/7/0/max/0/0/0": (404, "capture: layer 7 is not among the captured ones, 0, 1"),
    "tile/0/0/4/max/0/0/0": (404, "capture: heads are 0 to 3, got head 4"),
    "tile/0/0/0/mean/0/0/0": (404, "pool must be max or sum, got 'mean'"),
    "tile/0/0/0/max/3/0/0": (404, "levels are 0 to 2, got 3"),
    "tile/0/0/0/max/" + "9" * 400 + "/0/0": (404, "levels are 0 to 2"),
    "tile/0/0/0/max/0/3/0": (404, "level 0 has 3 x 3 tiles, got row 3 and column 0"),
    "track/0/0/0/height/0/0": (404, "track must be one of"),
    "track/0/0/0/sink/0/1": (404, "sink has 1 pieces at level 0, got 1"),
    "weight/0/0/0/700/0": (404, "query must be from 0 to 699, got 700"),
    "query/0/0/0/700": (404, "query must be from 0 to 699, got 700"),
    "key/0/0/0/700": (404, "key must be from 0 to 699, got 700"),
    "wall/9": (404, "captures are 0 to 1, got 9"),
    "text/0/side/0": (404, "a text has the sides query and key, not 'side'"),
    "text/0/key/1": (404, "the text has no piece 1"),
    "search/0": (404, "there is nothing to search for: give some text"),
    "search/0?text=a&after=b": (400, "after must be the number of a token, got 'b'"),
    "search/0?text=" + "a" * 3000: (414, "an address has at most 2048 characters"),
    "export?capture=x&heads=0.1": (404, "there is no capture 'x'"),
    "export?capture=0&heads=all": (404, "heads are pairs of layer and head such as 0.1,2.3; got 'all'"),
    "export?capture=0&heads=5.0": (404, "capture: layer 5 is not among the captured ones, 0, 1"),
}


@pytest.mark.parametrize("path", REFUSED, ids=lambda path: path[:30])
def test_what_is_not_there_is_said_in_one_line(served, path):
    code, body, headers = get(served, path)
    assert (code, headers["content-type"]) == (REFUSED[path][0], "text/plain; charset=utf-8")
    assert body.decode().startswith(REFUSED[path][1]) and b"\n" not in body


def test_nothing_but_reading(served):
    request = urllib.request.Request(served.url + "manifest.json", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    with error.value:
        assert error.value.code == 405


def raw(server: Server, path: str, headers: dict[str, str]) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def test_only_the_link_opens_it(served):
    path, port = f"/{served.url.split('/')[3]}/", served.port
    mine = {"Host": f"127.0.0.1:{port}"}
    assert raw(served, path, mine)[0] == 200
    assert raw(served, path, {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"})[0] == 200
    for wrong in (
        "/",
        "/manifest.json",
        f"/{'x' * 32}/",
        path[:-1],
        path[:-2] + "/",
        "/" + path,
        "/caf%C3%A9/",
    ):
        assert raw(served, wrong, mine) == (404, "there is nothing without the token of the link"), wrong
    for headers in (
        {"Host": "example.com"},
        {"Host": f"127.0.0.1:{port + 1}"},
        {"Host": f"127.0.0.1.example.com:{port}"},
        {**mine, "Origin": "http://example.com"},
        {**mine, "Origin": "null"},
        {**mine, "Origin": f"https://127.0.0.1:{port}"},
        {**mine, "Origin": f"http://127.0.0.1:{port + 1}"},
    ):
        code, reason = raw(served, path, headers)
        assert code == 403 and reason.startswith("this server answers")
    assert len(served.url.split("/")[3]) >= 32


def test_only_this_machine_reaches_it(served):
    assert served._socket.getsockname()[0] == "127.0.0.1"


def test_the_export_is_a_page_of_its_own(served):
    code, body, headers = get(served, "export?capture=0&heads=1.2,0.1")
    assert code == 200 and headers["content-disposition"] == 'attachment; filename="attention.html"'
    html = body.decode()
    said = json.loads(re.findall(r'id="manifest">(.*?)</script>', html)[0])
    assert said["captures"][0]["pairs"] == [[1, 2], [0, 1]] and "c0-l1-h2-queries" in said["embedded"]["arrays"]


def test_the_cache_keeps_to_its_size(seen, monkeypatch):
    monkeypatch.setattr(editions, "CACHE_BYTES", 300_000)
    with serve(seen, port=0, block=False) as server:
        for head in range(4):
            first = get(server, f"tile/0/0/{head}/max/0/1/0")[1]
            assert get(server, f"tile/0/0/{head}/max/0/1/0")[1] == first
        edition = server._atlas.edition
        assert edition._bytes == sum(map(len, edition._pictures.values())) <= 300_000
        assert [name.split("/")[-5] for name in edition._pictures] == ["2", "3"]


def test_many_at_once_get_what_one_gets(served, seen):
    pyramid, wrong = Pyramid(seen), []

    def visit(client: int) -> None:
        random = np.random.default_rng(client)
        for _ in range(20):
            level = int(random.integers(3))
            row, column = random.integers(-(-700 // (256 << level)), size=2)
            head, pool = int(random.integers(4)), ["max", "sum"][int(random.integers(2))]
            code, body, _ = get(served, f"tile/0/1/{head}/{pool}/{level}/{row}/{column}")
            tile = pyramid.tile(1, head, pool, level, int(row), int(column))
            if code != 200 or body != encode(tile, kind="tile", level=level):
                wrong.append((client, head, pool, level, row, column))

    clients = [threading.Thread(target=visit, args=(client,)) for client in range(12)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert not wrong


def test_what_nobody_waits_for_is_not_computed(seen, monkeypatch):
    begun, go = [], threading.Event()

    def slowly(self, layer, head, **rest):
        begun.append(head)
        go.wait(10)
        return torch.zeros(1, 1)

    with serve(seen, port=0, block=False) as server:
        monkeypatch.setattr(Pyramid, "tile", slowly)
        token = server.url.split("/")[3]
        sockets = []
        for head in range(3):
            one = socket.create_connection(("127.0.0.1", server.port))
            one.sendall(
                f"GET /{token}/tile/0/0/{head}/max/0/0/0 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
            )
            sockets.append(one)
            while server._atlas.lanes["quick"].waiting < head + 1:
                time.sleep(0.01)
        sockets[1].close()
        time.sleep(0.2)
        go.set()
        for one in (sockets[0], sockets[2]):
            assert one.recv(100).startswith(b"HTTP/1.1 200")
            one.close()
        assert begun == [0, 2]


def test_too_many_waiting_are_refused(seen, monkeypatch):
    monkeypatch.setattr(server_module, "WAITING", 0)
    with Server(editions.Edition({"a": seen}), 0) as server:
        server._server.config.limit_concurrency = None
        code, body, _ = get(server, "tile/0/0/0/max/0/0/0")
        assert code == 503 and b"waiting already; ask again later" in body


def test_the_next_port_where_one_is_taken(seen, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serve(seen, port=port, block=False) as server:
            assert server.port != port and get(server, "manifest.json")[0] == 200
            out = capsys.readouterr().out.splitlines()
            assert out == [f"port {port} is taken, so this one is at {server.port}", server.url]


def test_bad_input_gets_one_clear_line(seen):
    def made_too_early():
        raise AssertionError("the work is done before the port is looked at")
        yield

    for call, message in [
        (lambda: serve([], port=0), "there is no capture to show; give at least one"),
        (lambda: serve(seen, port=65536), "a port is from 0 to 65535, got 65536"),
        (lambda: serve(seen, port=-1), "a port is from 0 to 65535, got -1"),
        (lambda: server_module.follow(made_too_early(), port=99999), "a port is from 0 to 65535, got 99999"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_several_without_names_are_numbered(seen):
    with serve([seen, seen], port=0, block=False) as server:
        names = [one["name"] for one in json.loads(get(server, "manifest.json")[1])["captures"]]
        assert names == [f"1: {seen.model}", f"2: {seen.model}"]


def test_it_ends_and_lets_go_of_the_port(seen):
    server = serve(seen, port=0, block=False)
    assert get(server, "manifest.json")[0] == 200
    server.close()
    assert not server._thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


@pytest.mark.skipif(sys.platform == "win32", reason="sends Ctrl-C as a signal")
def test_ctrl_c_ends_look_at_once(tmp_path):
    folder = save_capture(structured(), tmp_path / "seen")
    command = [sys.executable, "-m", "sightline", "look", "--capture", str(folder), "--no-open"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        # A shell's background job, as these tests may be, ignores Ctrl-C, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    line = process.stdout.readline()
    line = process.stdout.readline() if line.startswith("port ") else line
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/  \(Ctrl-C ends it\)\n", line)
    held = urllib.request.urlopen(line.split()[0] + "manifest.json")  # a browser that is still connected
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    held.close()
    assert (process.returncode, stderr) == (130, "sightline look: stopped\n")


def test_what_is_shown_can_grow(capsys):
    config = DecoderConfig.modern(vocabulary=20, d_model=32, num_layers=1, context=20)
    torch.manual_seed(0)
    model = Decoder(config)
    stages = [({"a": capture(model, list(range(n)), prompt=4)}, None if n == 9 else 9) for n in (4, 6, 9)]
    with serve(stages[0][0], goal=9, port=0, block=False) as server:
        seen = []
        for captures, goal in stages:
            server.show(captures, goal=goal)
            said = json.loads(get(server, "manifest.json")[1])
            assert get(server, f"manifest.json?v={said['version']}")[:2] == (204, b"")
            tile = get(server, f"tile/0/0/0/max/0/0/0?v={said['version']}")
            expected = encode(Pyramid(captures["a"]).tile(0, 0, "max", 0, 0, 0), kind="tile", level=0)
            assert tile[1] == expected and "immutable" in tile[2]["cache-control"]
            assert (said["goal"], said["captures"][0]["keys"]) == (goal, len(captures["a"].tokens))
            seen.append(said["version"])
        assert len(set(seen)) == 3
        assert get(server, f"tile/0/0/0/max/0/0/0?v={seen[0]}")[1:2] == (expected,)
        assert get(server, f"manifest.json?v={seen[0]}")[0] == 200
        server.show(captures, goal=9)  # the same, but not the last
        assert get(server, f"manifest.json?v={seen[-1]}")[0] == 200


def test_stages_are_served_until_they_are_stopped(seen, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(Server, "show", lambda self, captures, goal=None: shown.append(goal))
    monkeypatch.setattr(Server, "wait", lambda self: shown.append(self.port))
    server_module.follow(iter([({"a": seen}, 8), ({"a": seen}, 8), ({"a": seen}, None)]), port=0)
    out = capsys.readouterr().out
    assert out.endswith("  (Ctrl-C ends it)\n") and shown == [8, None, int(re.findall(r":(\d+)/", out)[0])]
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", shown[-1])):
        pass


def test_an_error_while_it_writes_ends_the_server(seen, capsys):
    def stages():
        yield {"a": seen}, 800
        raise ValueError("the logits are no numbers")

    with pytest.raises(ValueError, match="the logits are no numbers"):
        server_module.follow(stages(), port=0)
    port = int(re.findall(r":(\d+)/", capsys.readouterr().out)[0])
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass
