"""Chromium without a window, over its DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from websockets.sync.client import connect

PATIENCE = 120.0  # seconds until what is waited for must have come


def chromium() -> str | None:
    """The one that CHROMIUM names, else the first of the usual names that PATH has."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Page:
    """A tab. Events that the browser sends in between are dropped."""

    def __init__(self, socket):
        self.socket = socket
        self.last = 0

    def call(self, method: str, **parameters):
        self.last += 1
        self.socket.send(json.dumps({"id": self.last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(PATIENCE))
            if message.get("id") == self.last:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str):
        """The value of an expression of JavaScript; a promise's once it is kept."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, script: str):
        """Waits until the expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)

    def open(self, url: str, ready: str):
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && ({ready})")

    def size(self, width: int, height: int):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip

    def scheme(self, name: str):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def choose(self, selector: str, *files: Path):
        """Gives files to an input, as the dialogue of the browser does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(f) for f in files])

    def drop(self, x: float, y: float, *files: Path):
        """Drags files from outside over the page, and lets them go at (x, y)."""
        data = {"items": [], "files": [str(f) for f in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def move(self, x: float, y: float):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def key(self, name: str, code: int):
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code
            )

    def picture(self, file: Path, kind: str = "png"):
        shot = self.call("Page.captureScreenshot", format=kind)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browsing(binary: str):
    """A tab of a fresh browser, which ends with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
             "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + PATIENCE
            while not port_file.exists() or port_file.read_text().count("\n") < 1:
                assert process.poll() is None, "the browser ended"
                assert time.monotonic() < deadline, "the browser does not start"
                time.sleep(0.1)
            port, path = port_file.read_text().split()
            with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as root:
                target = Page(root).call("Target.createTarget", url="about:blank")["targetId"]
            with connect(f"ws://127.0.0.1:{port}/devtools/page/{target}", max_size=None) as tab:
                page = Page(tab)
                for domain in ("Page", "DOM", "Runtime"):
                    page.call(f"{domain}.enable")
                yield page
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
