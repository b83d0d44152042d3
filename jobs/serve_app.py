"""The service's HTTP side: routes, admission, and what a browser may do with it.

It knows of the detector only what `Detect` says, and nothing of Ray.
"""

import asyncio
import ipaddress
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.serve_metrics import Metrics
from jobs.serve_requests import Limits, Refused, images, media_type, query, read_body

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
PATHS = (*PAGE_FILES, "/detect", "/health", "/metrics", "/model")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
RETRY_AFTER = {"Retry-After": "1"}


class Unavailable(Exception):
    """The detector is not there just now: it starts, or starts again."""


Detect = Callable[[bytes, float, int], Awaitable[dict[str, Any]]]
"""(encoded image, threshold, most) -> {width, height, detections, batch}, with `damage` of a file
some of whose pixels are wrong, or {error} for bytes that are not an image; batch is the number of
images that the model took at once, for one image of a batch, and 0 for the others. Raises
`Unavailable`."""


@dataclass
class Service:
    """The service for one detector: what it asks, and what it grants its clients."""

    detect: Detect
    is_ready: Callable[[], Awaitable[bool]]
    model: dict[str, Any]
    """What GET /model answers."""
    limits: Limits = field(default_factory=Limits)
    names: Collection[str] = ()
    """Host names, besides addresses and localhost, under which clients may ask for it."""
    metrics: Metrics = field(default_factory=Metrics)
    held: int = 0
    """Images received, waiting or looked at."""

    def application(self) -> ASGIApp:
        app = Starlette(
            routes=[
                *(Route(path, self._page) for path in PAGE_FILES),
                Route("/detect", self._post, methods=["POST"]),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/model", self._model),
            ],
            exception_handlers={Refused: _refused, HTTPException: _http_error, Exception: _failed},
        )
        app.router.redirect_slashes = False
        return self._guarded(app)

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        """Refuses what another site's page sent, adds headers, counts, and keeps failures in."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            began = time.perf_counter()
            path = scope["path"] if scope["path"] in PATHS else "other"
            status = 0

            async def answer(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                    message = {**message, "headers": [*message["headers"], *extra]}
                await send(message)

            request = Request(scope, receive)
            try:
                problem = self._stranger(request)
                if problem:
                    await _refused(request, problem)(scope, receive, answer)
                else:
                    await app(scope, receive, answer)
            except Exception:  # answered already
                traceback.print_exc(file=sys.stderr)
            finally:
                self.metrics.requests.labels(path, status).inc()
                if path == "/detect":
                    self.metrics.seconds.observe(time.perf_counter() - began)

        return guarded

    def _stranger(self, request: Request) -> Refused | None:
        """What is wrong with the Host or the Origin of a request, if anything.

        A foreign page's script can have its own name lead here (DNS rebinding) or post here from
        the user's browser; it can choose neither header.
        """
        host = request.headers.get("host", "")
        if not _known(host, self.names):
            return Refused(
                421,
                f"Host: got {host[:80]!r}, expected an address or localhost; the service takes "
                f"other names that --names lists",
            )
        origin = request.headers.get("origin")
        own = (f"http://{host}".lower(), f"https://{host}".lower())  # https: by a reverse proxy
        foreign = origin is not None and origin.lower() not in own
        site = request.headers.get("sec-fetch-site", "none")
        if request.method != "GET" and (foreign or site not in ("none", "same-origin")):
            return Refused(403, "a page of another site may not use this service")
        return None

    async def _post(self, request: Request) -> Response:
        began = time.perf_counter()
        kind = media_type(request)
        asked = query(request, self.limits)
        received = False
        try:
            async with asyncio.timeout(self.limits.seconds), self._hold(1):
                body = await read_body(request, self.limits)
                given = await images(request, kind, body, self.limits)
                del body
                received = True
                async with self._hold(len(given) - 1):
                    answers = await self._all(given, asked.threshold, asked.most)
        except TimeoutError:
            seconds = f"{self.limits.seconds:g} s"
            if received:
                raise Refused(504, f"no detections within {seconds}", RETRY_AFTER) from None
            message = f"the request did not arrive within {seconds}"
            raise Refused(408, message, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise Refused(499, "the client went away") from None  # for the metrics alone
        except Unavailable:
            raise Refused(503, "the detector is starting; try again", RETRY_AFTER) from None
        if all("error" in answer for answer in answers):
            first = answers[0]["error"]
            raise Refused(400, f"image 1 of {len(answers)}: {first}" if len(answers) > 1 else first)
        content = {"images": answers, "seconds": round(time.perf_counter() - began, 4)}
        return JSONResponse(content)

    @asynccontextmanager
    async def _hold(self, count: int) -> AsyncIterator[None]:
        """Has room for `count` more images while it lasts. Raises `Refused` 503 without room."""
        if self.held + count > self.limits.queue:
            message = f"{self.held} images wait already, of at most {self.limits.queue}; try again"
            raise Refused(503, message, {**RETRY_AFTER, "Connection": "close"})
        self.held += count
        self.metrics.queue.set(self.held)
        try:
            yield
        finally:
            self.held -= count
            self.metrics.queue.set(self.held)

    async def _all(
        self, given: list[bytes | Refused], threshold: float, most: int
    ) -> list[dict[str, Any]]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._one(image, threshold, most)) for image in given]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _one(self, image: bytes | Refused, threshold: float, most: int) -> dict[str, Any]:
        if isinstance(image, Refused):
            answer: dict[str, Any] = {"error": str(image)}
        else:
            answer = dict(await self.detect(image, threshold, most))
        batch = answer.pop("batch", 0)
        if batch:
            self.metrics.batches.observe(batch)
        self.metrics.images.labels("refused" if "error" in answer else "detected").inc()
        return answer

    async def _health(self, request: Request) -> Response:
        ready = await self.is_ready()
        content = {"status": "ready" if ready else "starting"}
        return JSONResponse(content, 200 if ready else 503, None if ready else RETRY_AFTER)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self.model)

    async def _page(self, request: Request) -> Response:
        return FileResponse(PAGE / PAGE_FILES[request.url.path])


def _known(host: str, names: Collection[str]) -> bool:
    """Whether a Host header is an address (with a port or not), localhost, or one of `names`."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name in names:
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse({"error": str(error)}, error.status, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    return _refused(request, Refused(500, "the service failed; its log says why"))


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: "not found: expected POST /detect, GET /, /model, /health or /metrics",
        405: f"{request.method[:20]} is not for this path: POST is for /detect, GET for the others",
    }.get(error.status_code, error.detail)
    return JSONResponse({"error": message}, error.status_code, error.headers)
