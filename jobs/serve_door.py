"""The HTTP server of the service: uvicorn, with a limit on idle clients and an orderly end."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for a new client to send the head of a request
HEAD_BYTES = 32 * 1024  # of a request's head
CONNECTIONS = 512
GRACE = 30  # seconds for requests in hand once the service is told to end


class Client(H11Protocol):
    """A connection that is closed where no request comes; uvicorn itself waits for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.close()
            return
        self.waiting = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if hasattr(self, "waiting"):
            self.waiting.cancel()


class Door(uvicorn.Server):
    """Serves an application at a socket that is bound already; `run` says how it ends."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Client,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEAD_BYTES,
                timeout_keep_alive=10,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self.opened: Callable[[], None] = lambda: None

    def run(self, door: socket.socket, opened: Callable[[], None]) -> None:  # type: ignore[override]
        """Serves at `door` until SIGINT or SIGTERM, and calls `opened` once it does. Requests that
        have come by then are answered; a second signal does not wait for them."""
        self.opened = opened
        try:
            asyncio.run(self.serve(sockets=[door]))
        except KeyboardInterrupt:  # uvicorn passes the signal on when all is done
            return

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.opened()
