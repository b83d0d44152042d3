"""Requests of the service to encoded images, with a limit on all that a client decides."""

import asyncio
import base64
import binascii
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

LINGER = 2.0  # seconds for a client to finish sending what is refused, so that it hears why
CHUNK = 1 << 16


class Refused(Exception):
    """An answer that is an HTTP error: its status, and one line for the client."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and `threshold` and `most` where it does not say."""

    megabytes: float = 20.0
    """Of a request's body, in units of 1e6 bytes."""
    megapixels: float = 50.0
    """Of an image, in units of 1e6 pixels."""
    longest_side: int = 0
    """Of an image, in pixels. 0: any."""
    images: int = 16
    """In a request."""
    queue: int = 64
    """Images that are received, wait or are looked at, of all requests together."""
    seconds: float = 60.0
    """From a request's first byte to its answer."""
    threshold: float = 0.3
    most: int = 100


@dataclass(frozen=True)
class Asked:
    """What a request wants. An image that cannot be had is the `Refused` that says why."""

    threshold: float
    most: int
    images: list[bytes | Refused] = field(default_factory=list)


def query(request: Request, limits: Limits) -> Asked:
    """`threshold` and `most` of the URL. Raises `Refused` 422 for others, misspelled ones too."""
    given = dict(request.query_params)
    unknown = sorted(given.keys() - {"threshold", "most"})
    if unknown:
        raise Refused(422, f"unknown parameter {unknown[0][:40]!r}: expected threshold or most")
    text = given.get("threshold", str(limits.threshold))
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise Refused(422, f"threshold: got {text[:40]!r}, expected a number from 0 to 1")
    text = given.get("most", str(limits.most))
    most = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0
    if not 1 <= most <= limits.most:
        raise Refused(422, f"most: got {text[:40]!r}, expected 1 to {limits.most}")
    return Asked(threshold, most)


def media_type(request: Request) -> str:
    """The kind of body: `json`, `form` or `image`. Raises `Refused` 415 for another."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise Refused(415, f"Content-Encoding: got {coding[:40]!r}, expected none")
    if kind == "application/json":
        return "json"
    if kind == "multipart/form-data":
        return "form"
    if kind.startswith("image/"):
        return "image"
    raise Refused(
        415,
        f"Content-Type: got {kind[:80]!r}, expected application/json, multipart/form-data or the "
        f"image's own, such as image/jpeg",
    )


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises `Refused`: 413 as soon as it is known to be too large."""
    most = int(limits.megabytes * 1e6)
    refusal = Refused(
        413,
        f"the request is larger than {limits.megabytes:g} MB: send a smaller image, or fewer",
        {"Connection": "close"},
    )
    declared = request.headers.get("content-length", "0")
    large = not declared.isdecimal() or len(declared) > 18 or int(declared) > most
    if large and "expect" in request.headers:
        raise refusal  # the client waits for a word before it sends
    body = bytearray()
    stream = request.stream()
    if not large:
        async for chunk in stream:
            body += chunk
            if len(body) > most:
                large = True
                break
    if large:
        body.clear()
        await _let_finish(stream, 4 * most)
        raise refusal
    return bytes(body)


async def _let_finish(stream: AsyncIterator[bytes], most: int) -> None:
    """Drops what is still sent, up to `most` bytes and for a moment: a connection that is closed
    upon a client that writes does not show it the answer."""
    try:
        async with asyncio.timeout(LINGER):
            async for chunk in stream:
                most -= len(chunk)
                if most < 0:
                    return
    except TimeoutError:
        return


async def images(request: Request, kind: str, body: bytes, limits: Limits) -> list[bytes | Refused]:
    """The encoded images of a body, in their order, at least one.

    Raises `Refused`: 400 for a body that is not what it says, 422 for one without images or with
    too many.
    """
    if kind == "image":
        found: list[bytes | Refused] = [body]
        if not body:
            raise Refused(422, "the body is empty: expected the bytes of an image file")
    elif kind == "json":
        found = await asyncio.to_thread(from_json, body, limits)
    else:
        found = await _from_form(request, body, limits)
    return found


def from_json(body: bytes, limits: Limits) -> list[bytes | Refused]:
    """The images of {"image": base64}, or of a list of such. Raises `Refused`, as `images` does; an
    image alone that is not base64, or empty, stands as one in the list."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON, which its Content-Type says it is") from None
    items = content if isinstance(content, list) else [content]
    _check_count(len(items), limits)
    if not all(isinstance(item, dict) and isinstance(item.get("image"), str) for item in items):
        raise Refused(422, 'expected {"image": "…"} with the file in base64, or a list of such')
    return [_from_base64(item["image"]) for item in items]


def _from_base64(text: str) -> bytes | Refused:
    if text.startswith("data:"):  # as a browser's canvas and file reader give it
        text = text.partition(",")[2]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        return Refused(400, "the image is not base64")
    return data or Refused(400, "the image is empty")


async def _from_form(request: Request, body: bytes, limits: Limits) -> list[bytes | Refused]:
    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(body), CHUNK):
            yield body[at : at + CHUNK]
            await asyncio.sleep(0)  # others have their turn

    broken = Refused(400, "the body is not a form of multipart/form-data, or not the whole of one")
    if body and not body.rstrip().endswith(b"--"):
        raise broken  # cut off, which the parser does not mind
    # One file more than is allowed, to tell too many from a form that is broken.
    parser = MultiPartParser(request.headers, chunks(), max_files=limits.images + 1, max_fields=16)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            _check_count(limits.images + 1, limits)
        raise broken from None
    except (KeyError, ValueError, UnicodeError):
        raise broken from None
    try:
        files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
        _check_count(len(files), limits)
        return [await file.read() or Refused(400, "the file is empty") for file in files]
    finally:
        await form.close()


def _check_count(count: int, limits: Limits) -> None:
    if count == 0:
        raise Refused(422, "the request has no image: expected at least one file")
    if count > limits.images:
        raise Refused(422, f"too many images: expected at most {limits.images} in a request")
