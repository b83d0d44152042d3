import io
import json
import os
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.synthesize import synthesize

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def encoded():
    """`encoded(width, height, kind, seed)`: an image file's bytes, of noise."""

    def encode(width=40, height=30, kind="JPEG", seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def drawn(made_once):
    """A small drawn data set."""
    return made_once("shapes", lambda folder: synthesize(folder, 230, 40, 3, 1))


@pytest.fixture
def small(tmp_path, encoded):
    """`small(count)` writes images and an annotation file; returns its content for changing.

    `save(content)` writes the file again.
    """
    folder = tmp_path / "images"
    folder.mkdir()

    class Small:
        images = folder
        annotations = tmp_path / "annotations.json"
        output = tmp_path / "shards"

        def __call__(self, count=4):
            content = {
                "info": {"year": 2020},
                "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "brush"}],
                "images": [],
                "annotations": [],
            }
            for i in range(count):
                (folder / f"{i}.jpg").write_bytes(encoded(seed=i))
                record = {"id": 10 + i, "file_name": f"{i}.jpg", "width": 40, "height": 30}
                content["images"].append(record)
                content["annotations"].append(
                    {
                        "id": 100 + i,
                        "image_id": 10 + i,
                        "category_id": 3,
                        "bbox": [1, 2, 10, 10],
                        "area": 90.5,
                        "iscrowd": 0,
                    }
                )
            self.save(content)
            return content

        def save(self, content):
            self.annotations.write_text(json.dumps(content))

        @property
        def arguments(self):
            return (self.images, self.annotations, self.output)

    return Small()


@pytest.fixture
def command():
    """`command(*arguments)` runs python -m data_prep in a process of its own."""

    def run(*arguments, cwd=ROOT):
        return subprocess.run(
            [sys.executable, "-m", "data_prep", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=600,
        )

    return run


@pytest.fixture
def terminal():
    """`terminal(*arguments)` runs python -m data_prep before a terminal: what stderr showed there.

    The command must end well.
    """

    def run(*arguments):
        ours, theirs = os.openpty()
        termios.tcsetwinsize(ours, (24, 120))
        words = [sys.executable, "-m", "data_prep", *map(str, arguments)]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # EIO is how Linux ends a terminal that nobody writes to
            while part := os.read(ours, 2**16):
                shown += part
        os.close(ours)
        assert process.wait(timeout=600) == 0, shown
        return shown.decode()

    return run
