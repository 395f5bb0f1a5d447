"""`serve()`: the map of captures in a browser, from a server that only this machine can reach.

A fixed table of paths below a random token; Host and Origin are checked; every answer forbids what is foreign. What is
shown is computed in `pyramid`, one tile at a time and away from the loop that answers. Knows nothing of models.
"""

import asyncio
import json
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sightline.pyramid import EXACT_LEVEL, Pyramid, encode
from sightline.viewer.editions import Edition
from sightline.viewer.manifest import named, parse_heads
from sightline.viewer.page import Captures, asset, page

PORT = 8765
PORTS = 100
"""How many ports are tried before any free one is taken."""
WAITING = 4096
"""Tiles that may wait for their turn; more are refused."""
LONGEST_ADDRESS = 2048
CHUNK = 4096
"""Tokens in one piece of text."""
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
SAFE = [
    (b"content-security-policy", POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
FOREVER = {"cache-control": "private, max-age=31536000, immutable"}
NOW = {"cache-control": "no-store"}
OCTETS = "application/octet-stream"
TYPES = {"map.html": "text/html", "map.css": "text/css", "map.js": "text/javascript"}


class Server:
    """A map that is being served from a thread; `close` ends it, as leaving a `with` does."""

    def __init__(self, edition: "Edition", port: int) -> None:
        self._socket, self.port = _listen(port)
        self._atlas = Atlas(edition)
        token = secrets.token_urlsafe(24)
        self.url = f"http://127.0.0.1:{self.port}/{token}/"
        """The link; who does not have it gets nothing."""
        config = uvicorn.Config(
            guarded(self._atlas.application(), token, self.port),
            log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none", loop="asyncio",
            http="h11", limit_concurrency=WAITING,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="sightline", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, captures: Captures, *, goal: int | None = None) -> None:
        """Show these from now on; pages that are open follow, each head where it was.

        `goal` says that a model is writing, and how many tokens there will be. From one thread at a time.
        """
        self._atlas.edition = Edition(named(captures), goal)

    def wait(self) -> None:
        """Until it ends, or Ctrl-C."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # without a limit Windows would not hear Ctrl-C

    def close(self) -> None:
        """End at once: what has not been answered is not answered."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(5)
        self._atlas.close()
        self._socket.close()


def serve(
    captures: Captures,
    *,
    goal: int | None = None,
    port: int = PORT,
    open_browser: bool = False,
    block: bool = True,
) -> Server:
    """Show captures in a browser, as a map to move through: all heads, one head large, single weights, the text.

    Several captures (by name, where they are given as a dict) are compared. Prints the link, which holds a random
    token; only programs on this machine can open it. Ctrl-C ends it; without `block` it goes on in a thread until
    `close`. Where the port is taken it is the next free one, and 0 is any. `goal` says that a model is writing, and how
    many tokens there will be in the end; `Server.show` shows more of them.

    Raises:
        ValueError: no capture, or a port that does not exist.

    >>> from sightline.inspection import capture
    >>> from sightline.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.modern(vocabulary=9, d_model=32, num_layers=1))
    >>> with serve(capture(model, [3, 1, 4]), port=0, block=False) as server:  # doctest: +ELLIPSIS
    ...     server.url.startswith("http://127.0.0.1:")
    http://127.0.0.1:...
    True
    """
    server = _started(captures, goal, port, open_browser, "  (Ctrl-C ends it)" if block else "")
    if block:
        try:
            server.wait()
        finally:
            server.close()
    return server


def follow(stages: Iterable[tuple[Captures, int | None]], *, port: int = PORT, open_browser: bool = False) -> None:
    """Serve captures until Ctrl-C, each in the place of the one before it.

    Beside each stands its `goal`, as for `serve`: None for the last.

    Raises: as `serve`.
    """
    _expect_port(port)  # before the captures are made
    server = None
    try:
        for captures, goal in stages:
            if server is None:
                server = _started(captures, goal, port, open_browser, "  (Ctrl-C ends it)")
            else:
                server.show(captures, goal=goal)
        if server is not None:
            server.wait()
    finally:
        if server is not None:
            server.close()


def _started(captures: Captures, goal: int | None, port: int, open_browser: bool, hint: str) -> Server:
    _expect_port(port)
    by_name = named(captures)
    if not by_name:
        raise ValueError("serve: there is no capture to show; give at least one")
    server = Server(Edition(by_name, goal), port)
    if port not in (0, server.port):
        print(f"port {port} is taken, so this one is at {server.port}")
    print(server.url + hint, flush=True)
    if open_browser:
        webbrowser.open(server.url)
    return server


def _expect_port(port: int) -> None:
    if not 0 <= port < 2**16:
        raise ValueError(f"serve: a port is from 0 to 65535, got {port}")


def _listen(port: int) -> tuple[socket.socket, int]:
    """A socket of this machine alone, at the port or the next free one."""
    for candidate in [*range(port, min(port + PORTS, 2**16)), 0] if port else [0]:
        # Named TCP, or asyncio leaves Nagle's algorithm on and every small answer waits 40 ms.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name != "nt":  # where it would share a port that is in use
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", candidate))
            listening.listen(128)
        except OSError as error:
            listening.close()
            if candidate == 0:
                raise ValueError(f"serve: this machine gives no port to listen on: {error.strerror}") from error
        else:
            return listening, listening.getsockname()[1]
    raise AssertionError("0 is tried last")


def guarded(application: ASGIApp, token: str, port: int) -> ASGIApp:
    """The application below the token, for this machine's own pages alone; every answer forbids what is foreign."""
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *SAFE]}
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        first, _, rest = scope["path"].removeprefix("/").partition("/")
        refusal = None
        if headers.get(b"host", "") not in hosts:
            refusal = PlainTextResponse(f"this server answers to 127.0.0.1:{port}, not to another Host", 403)
        elif headers.get(b"origin", f"http://{headers[b'host']}").removeprefix("http://") not in hosts:
            refusal = PlainTextResponse("this server answers its own pages, not another Origin", 403)
        elif len(scope["path"]) + len(scope["query_string"]) > LONGEST_ADDRESS:
            refusal = PlainTextResponse(f"an address has at most {LONGEST_ADDRESS} characters", 414)
        elif not secrets.compare_digest(first.encode("utf-8"), token.encode("ascii")) or scope["path"] == f"/{token}":
            refusal = PlainTextResponse("there is nothing without the token of the link", 404)
        inside = application if refusal is None else refusal
        await inside({**scope, "path": f"/{rest}"}, receive, send_safe)

    return answer


class Lane:
    """Work that is done one piece after the other in a thread of its own, as torch uses all cores for each."""

    def __init__(self, name: str) -> None:
        self.turn = asyncio.Lock()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"sightline-{name}")
        self.waiting = 0

    async def run(self, request: Request, work: Callable[[], Any]) -> Any:
        """The work's result; nothing is done for who has gone before it was their turn."""
        if self.waiting >= WAITING:
            raise HTTPException(503, f"{WAITING} pictures are waiting already; ask again later")
        self.waiting += 1
        try:
            async with self.turn:
                if await request.is_disconnected():
                    raise HTTPException(499, "gone before its turn")
                return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        finally:
            self.waiting -= 1


class Atlas:
    """What is served: the newest edition."""

    def __init__(self, edition: Edition) -> None:
        self.edition = edition
        self.lanes = {name: Lane(name) for name in ("quick", "slow")}

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.thread.shutdown(wait=False, cancel_futures=True)

    def application(self) -> Starlette:
        """The table of paths."""
        head = "{capture:int}/{layer:int}/{head:int}"
        paths: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/": partial(_asset, "map.html"),
            "/map.css": partial(_asset, "map.css"),
            "/map.js": partial(_asset, "map.js"),
            "/manifest.json": self._manifest,
            "/text/{capture:int}/{side}/{chunk:int}": self._text,
            f"/tile/{head}/{{pool}}/{{level:int}}/{{row:int}}/{{column:int}}": self._tile,
            f"/track/{head}/{{name}}/{{level:int}}/{{index:int}}": self._track,
            "/wall/{capture:int}": self._wall,
            f"/weight/{head}/{{query:int}}/{{key:int}}": self._weight,
            f"/query/{head}/{{query:int}}": self._query,
            f"/key/{head}/{{key:int}}": self._key,
            "/search/{capture:int}": self._search,
            "/export": self._export,
        }
        routes = [Route(path, answer) for path, answer in paths.items()]
        application = Starlette(routes=routes, exception_handlers={HTTPException: _refuse, ValueError: _refuse})
        application.router.redirect_slashes = False
        return application

    async def _manifest(self, request: Request) -> Response:
        if request.query_params.get("v") == self.edition.version:
            return Response(status_code=204, headers=NOW)
        return _json(self.edition.manifest, NOW)

    async def _text(self, request: Request) -> Response:
        edition, at = self._asked(request)
        capture = edition.pyramid(at["capture"]).capture
        side, chunk = at["side"], at["chunk"]
        if side not in ("query", "key"):
            raise HTTPException(404, f"a text has the sides query and key, not {side!r}")
        tokens = (capture.query_tokens if side == "query" else capture.key_tokens)[chunk * CHUNK : (chunk + 1) * CHUNK]
        if not tokens:
            raise HTTPException(404, f"the text has no piece {chunk}")
        return _json(tokens, _age(request, edition))

    async def _tile(self, request: Request) -> Response:
        edition, at = self._asked(request)
        pyramid, level = edition.pyramid(at.pop("capture")), at["level"]
        from_map = pyramid.map_level is not None and level >= pyramid.map_level
        lane = "quick" if level < EXACT_LEVEL or from_map else "slow"
        return await self._picture(request, edition, lane, lambda: encode(pyramid.tile(**at), kind="tile", level=level))

    async def _track(self, request: Request) -> Response:
        edition, at = self._asked(request)
        pyramid = edition.pyramid(at.pop("capture"))
        work = partial(_track, pyramid, at)
        return await self._picture(request, edition, "quick", work)

    async def _wall(self, request: Request) -> Response:
        edition, at = self._asked(request)
        pyramid = edition.pyramid(at["capture"])
        level = pyramid.thumbnail_level
        return await self._picture(
            request, edition, "slow", lambda: encode(pyramid.wall.flatten(0, 1), kind="wall", level=level)
        )

    async def _weight(self, request: Request) -> Response:
        return await self._facts(request, lambda pyramid, at: {"weight": pyramid.weight(**at)})

    async def _query(self, request: Request) -> Response:
        return await self._facts(request, lambda pyramid, at: pyramid.query_facts(**at))

    async def _key(self, request: Request) -> Response:
        return await self._facts(request, lambda pyramid, at: pyramid.key_facts(**at))

    async def _facts(self, request: Request, look: Callable[[Pyramid, dict[str, Any]], dict[str, Any]]) -> Response:
        edition, at = self._asked(request)
        pyramid = edition.pyramid(at.pop("capture"))
        return _json(await self.lanes["quick"].run(request, lambda: look(pyramid, at)), _age(request, edition))

    async def _search(self, request: Request) -> Response:
        edition, at = self._asked(request)
        wanted, after = request.query_params.get("text", ""), request.query_params.get("after", "0")
        passages = edition.text(at["capture"])
        if not after.isdecimal():
            raise HTTPException(400, f"after must be the number of a token, got {after!r}")
        hits = await self.lanes["quick"].run(request, lambda: passages.search(wanted, int(after)))
        return _json(hits._asdict(), _age(request, edition))

    async def _export(self, request: Request) -> Response:
        edition = self.edition
        number, heads = request.query_params.get("capture", "0"), request.query_params.get("heads", "")
        if not number.isdecimal() or int(number) >= len(edition.pyramids):
            raise HTTPException(404, f"there is no capture {number!r}")
        capture = edition.pyramids[int(number)].capture
        chosen = {edition.names[int(number)]: capture.select(parse_heads(heads))}
        html = await self.lanes["slow"].run(request, lambda: page(chosen))
        attached = {"content-disposition": 'attachment; filename="attention.html"'}
        return Response(html, media_type="text/html", headers=NOW | attached)

    def _asked(self, request: Request) -> tuple[Edition, dict[str, Any]]:
        """The edition that the answer is of, should another come meanwhile, and what of it is asked for."""
        return self.edition, dict(request.path_params)

    async def _picture(self, request: Request, edition: Edition, lane: str, work: Callable[[], bytes]) -> Response:
        """What was computed before, or what the work gives."""
        name = request.url.path
        picture = edition.cached(name)
        if picture is None:
            picture = await self.lanes[lane].run(request, lambda: edition.cached(name) or work())
            edition.keep(name, picture)
        return Response(picture, media_type=OCTETS, headers=_age(request, edition))


def _track(pyramid: Pyramid, at: dict[str, Any]) -> bytes:
    return encode(pyramid.track(**at), kind="track", level=at["level"])


def _age(request: Request, edition: Edition) -> dict[str, str]:
    return FOREVER if request.query_params.get("v") == edition.version else NOW


async def _asset(name: str, request: Request) -> Response:
    return Response(asset(name), media_type=TYPES[name], headers=NOW)


async def _refuse(request: Request, error: Exception) -> Response:
    """One line that says what is wrong; what is not there is 404."""
    code, reason = (error.status_code, error.detail) if isinstance(error, HTTPException) else (404, str(error))
    return PlainTextResponse(reason, code, headers=NOW)


def _json(value: Any, headers: Mapping[str, str]) -> Response:
    """ASCII, since a token may be half of a surrogate pair."""
    return Response(json.dumps(value, allow_nan=False), media_type="application/json", headers=dict(headers))
