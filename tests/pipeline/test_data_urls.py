"""Passwords and signatures in URLs of data: refused, and in no message."""

import base64
import contextlib
import http.server
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

import data_prep.storage
import data_prep.urls as of_data_prep
import pipeline.data.urls as of_pipeline
from data_prep.cli import main as data_prep_main
from data_prep.storage import folder_at
from jobs.__main__ import COMMANDS as JOBS
from pipeline.__main__ import COMMANDS
from pipeline.cli import Command, main
from pipeline.data import cache
from pipeline.data.labels import Labels
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from tests.pipeline.made_up_detector import save_checkpoint
from tests.pipeline.training_runs import ENVIRONMENT, ROOT

SECRET, USER = "S3CRET", "AKIAUSER"
BAD = [
    f"https://{USER}:{SECRET}@127.0.0.1:9/x",
    f"https://{SECRET}@127.0.0.1:9/x",
    f"https://{USER}:{SECRET}@[::1]:9/x",
    f"s3://{USER}:{SECRET}@bucket/x",
    f"s3://{USER}:{SECRET}/half@bucket/x",
    f"simplecache::https://{USER}:{SECRET}@127.0.0.1:9/x",
    f"https://127.0.0.1:9/x?sv=1&sig={SECRET}",
    f"https://127.0.0.1:9/x.json?X-Amz-Signature={SECRET}/y",
    f"https://127.0.0.1:9/file:///x?sig={SECRET}",
    f"profile://bucket/x?sig={SECRET}",
]
GOOD = [
    "https://127.0.0.1:9/x", "https://[::1]:9/x", "s3://bucket/data@v2/train", "gs://b/a:b",
    "https://host:8080/data@v2", "file:///data/x", "memory://train", "/data/me@work?/x", "me@host",
    "file:///data/x?y#z", "local:///data/x?y", "file://localhost/data/x?y",
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "kind"), [(of_pipeline.check_url, UserError), (of_data_prep.check_url, ValueError)]
)
def test_a_secret_is_refused_and_all_else_is_taken(check, kind):
    for url in GOOD:
        check(url)
    for url in BAD:
        with pytest.raises(kind, match=r"\*\*\*.*AWS_ACCESS_KEY_ID") as raised:
            check(url)
        assert SECRET not in str(raised.value)
        assert USER not in str(raised.value)
        assert "\n" not in str(raised.value)


TRAIN = ["--output", "run", "--data.train", "URL", "--data.val", "URL"]
OTHERS = ["--images", "URL", "--annotations", "a.json", "--output", "new"]
PIPELINE = partial(main, "python -m pipeline", "", COMMANDS)
SUBMIT = partial(main, "python -m jobs", "", JOBS)


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        (PIPELINE, ["train", "demo", *TRAIN]),
        (PIPELINE, ["evaluate", "model.pt", "--data", "URL"]),
        (SUBMIT, ["submit", "demo", *TRAIN]),
        (SUBMIT, ["submit", "demo", *TRAIN, "--address", "http://127.0.0.1:9"]),
        (SUBMIT, ["grid", "table2", "--dry-run", *TRAIN]),
        (SUBMIT, ["grid", "table2", *TRAIN, "--address", "http://127.0.0.1:9"]),
        (data_prep_main, ["verify", "URL"]),
        (data_prep_main, ["stats", "URL"]),
        (data_prep_main, ["export", "URL", "--output", "new.json"]),
        (data_prep_main, ["convert", *OTHERS]),
        (data_prep_main, ["convert", *OTHERS, "--annotations", "URL", "--images", "coco"]),
        (data_prep_main, ["convert", *OTHERS, "--output", "URL", "--images", "coco"]),
    ],
)
def test_no_command_takes_or_tells_one(door, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    if "model.pt" in arguments:
        save_checkpoint(tmp_path / "model.pt", Labels((1, 2), ("cat", "dog")))
    before = set(tmp_path.rglob("*"))
    for url in (BAD[0], BAD[3], BAD[6]):
        assert door([url if word == "URL" else word for word in arguments]) == 2
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err
        (line,) = said.err.splitlines()
        assert line.startswith("error: ")
        assert "in the URL of data, which run folders" in line
    assert set(tmp_path.rglob("*")) == before


class Signing(http.server.SimpleHTTPRequestHandler):
    """As stores do: a redirection to a signed address, which refuses."""

    def do_GET(self) -> None:
        if "?" in self.path:
            self.send_error(500)
            return
        self.send_response(302)
        self.send_header("Location", f"{self.path}?X-Amz-Signature={SECRET}")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.end_headers()


class Guarded(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        given = "Basic " + base64.b64encode(f"{USER}:{SECRET}".encode()).decode()
        if self.headers.get("Authorization") == given:
            super().do_GET()
        else:
            self.send_error(401)


@contextlib.contextmanager
def served(handler: type, folder: Path):
    quiet = type("Quiet", (handler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_drivers_signed_address_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(data_prep.storage, "PAUSES", (0.001,))
    with served(Signing, tmp_path) as url:
        with pytest.raises(UserError, match=r"500.*\?\*\*\*") as raised:
            ShardSet(f"{url}/train", str(tmp_path))
        assert SECRET not in str(raised.value)
        with pytest.raises(ConnectionError, match=r"500.*\?\*\*\*") as failed:
            folder_at(f"{url}/train").read("manifest.json")
        assert SECRET not in str(failed.value)


class Broken(Signing):
    """The signed address is none."""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"http://[/x?X-Amz-Signature={SECRET}")
        self.end_headers()


@pytest.mark.parametrize("debug", [["--debug"], []])
def test_neither_a_drivers_own_error_nor_its_traceback_tells_one(
    tmp_path, monkeypatch, capsys, debug
):
    monkeypatch.delenv("DETR_DEBUG", raising=False)
    with served(Broken, tmp_path) as url:
        assert data_prep_main(["verify", f"{url}/train", *debug]) == 2
    err = capsys.readouterr().err
    assert ("Traceback" in err) == bool(debug)
    assert "http://[/x?***" in err
    assert SECRET not in err


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_traceback_of_the_pipeline_tells_one(monkeypatch, capsys, error):
    monkeypatch.setenv("DETR_DEBUG", "1")

    def fail(args: list[str]) -> None:
        raise error(f"500, url='{BAD[6]}'")

    main("python -m pipeline", "", {"fail": Command(fail, "")}, ["fail"])
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert f"500, url='{BAD[6].partition('?')[0]}?***'" in err
    assert SECRET not in err


def test_an_http_server_gets_its_password_from_netrc(drawn, tmp_path):
    """As docs/data.md says."""
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {USER} password {SECRET}\n")
    netrc.chmod(0o600)
    script = (
        "import sys; from pipeline.data.shards import ShardSet; "
        "print(len(ShardSet(*sys.argv[1:]).read(0).image_bytes))"
    )
    asked = '{"client_kwargs": {"trust_env": true}}'
    environment = {**ENVIRONMENT, "NETRC": str(netrc), "FSSPEC_HTTP": asked}
    first = ShardSet(drawn.shards / "val").read(0).image_bytes
    with served(Guarded, drawn.shards) as url:
        read = [sys.executable, "-c", script, f"{url}/val", str(tmp_path / "cache")]
        done = subprocess.run(read, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{len(first)}\n", done.stderr
