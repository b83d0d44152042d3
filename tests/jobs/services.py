"""A service in this process, with a detector of the test's own, and a client of sockets."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jobs.serve import listening
from jobs.serve_app import Service
from jobs.serve_door import Door
from jobs.serve_requests import Limits

MODEL = {
    "recipe": "demo",
    "classes": [{"category_id": 1, "name": "circle"}, {"category_id": 4, "name": "<b>star</b>"}],
}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    service: Service
    port: int
    door: Door

    def ask(self, method="POST", path="/detect", body=None, headers=None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            names = {k.lower(): v for k, v in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def post(self, body, kind="image/png", path="/detect", **headers) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", path, body, {"Content-Type": kind, **named})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=120)


@contextmanager
def running(detect, limits=None, names=(), ready=True):
    """The service on a free port of loopback while it lasts; `detect` as `serve_app.Detect`."""

    async def is_ready():
        return ready

    limits = limits or Limits()
    model = {**MODEL, "limits": vars(limits)}
    service = Service(detect, is_ready, model, limits, set(names))
    opened = threading.Event()
    with listening("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        door = Door(service.application())
        thread = threading.Thread(target=door.run, args=(sock, opened.set))
        thread.start()
        try:
            assert opened.wait(120)
            yield Running(service, port, door)
        finally:
            door.should_exit = True
            thread.join(120)
    assert not thread.is_alive()
