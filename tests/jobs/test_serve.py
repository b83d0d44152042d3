"""The service's HTTP side, over real sockets, with a detector of the test's own."""

import asyncio
import base64
import http.client
import io
import json
import socket
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import serve_door
from jobs.__main__ import COMMANDS
from jobs.serve_app import Unavailable
from jobs.serve_requests import Limits, Refused, from_json
from pipeline.cli import main
from tests.jobs.services import running

BOUNDARY = "frontier"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
OWN = {"error", "images", "seconds"}


async def by_size(data, threshold, most):
    """Tells an image by its bytes, so that answers can be held against what was sent."""
    if data.startswith(b"bad"):
        return {"error": "not an image"}
    if data == b"boom":
        raise RuntimeError("/secret/path exploded")
    if data == b"gone":
        raise Unavailable
    box = {"label": "circle", "score": threshold, "box": [0, 0, most, 1], "category_id": 1}
    return {"width": len(data), "height": 1, "detections": [box], "batch": 1}


@pytest.fixture(scope="module")
def service():
    limits = Limits(megabytes=0.1, images=4, queue=8, seconds=60)
    with running(by_size, limits, names={"detector.example"}) as one:
        yield one


def form(*files: bytes, boundary=BOUNDARY) -> bytes:
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{i}.png"\r\n'
        f"Content-Type: image/png\r\n\r\n".encode()
        + data
        + b"\r\n"
        for i, data in enumerate(files)
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def widths(answer) -> list:
    assert answer.status == 200, answer.body
    return [image.get("width", image.get("error")) for image in answer.json["images"]]


def test_an_image_is_taken_as_bytes_as_a_form_and_as_json(service):
    assert widths(service.post(b"12345")) == [5]
    assert widths(service.post(form(b"12345", b"1"), FORM)) == [5, 1]
    one = {"image": in_base64(b"123")}
    assert widths(service.post(json.dumps(one), "application/json")) == [3]
    url = {"image": "data:image/png;base64," + in_base64(b"12")}
    assert widths(service.post(json.dumps([one, url]), "application/json; charset=utf-8")) == [3, 2]


def test_the_query_reaches_the_detector_and_the_answer_is_that_of_the_detector(service):
    answer = service.post(b"1234", path="/detect?threshold=0.25&most=7").json
    assert answer["images"] == [
        {
            "width": 4, "height": 1,
            "detections": [
                {"label": "circle", "score": 0.25, "box": [0, 0, 7, 1], "category_id": 1}
            ],
        }
    ]  # fmt: skip
    assert answer["seconds"] >= 0
    default = service.post(b"1234").json["images"][0]["detections"][0]
    assert (default["score"], default["box"][2]) == (0.3, 100)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("threshold=nan", "threshold: got 'nan'"),
        ("threshold=-0.1", "expected a number from 0 to 1"),
        ("threshold=1e999", "expected a number from 0 to 1"),
        ("threshold=", "threshold: got ''"),
        ("most=0", "most: got '0', expected 1 to 100"),
        ("most=101", "most: got '101'"),
        ("most=1.5", "most: got '1.5'"),
        ("most=%D9%A3", "most: got"),
        ("most=" + "9" * 5000, "most: got"),
        ("treshold=0.5", "unknown parameter 'treshold': expected threshold or most"),
    ],
)
def test_a_wrong_query_is_422(service, query, said):
    answer = service.post(b"1", path=f"/detect?{query}")
    assert answer.status == 422
    assert said in answer.json["error"]
    assert len(answer.json["error"]) < 150


@pytest.mark.parametrize(
    ("kind", "body", "status", "said"),
    [
        ("text/plain", b"x", 415, "Content-Type: got 'text/plain', expected application/json"),
        ("", b"x", 415, "Content-Type: got ''"),
        ("application/x-www-form-urlencoded", b"x", 415, "multipart/form-data"),
        ("image/png", b"", 422, "the body is empty"),
        ("image/png", b"bad", 400, "not an image"),
        ("application/json", b"", 400, "not JSON"),
        ("application/json", b"{", 400, "not JSON"),
        ("application/json", b"\xff\xfe", 400, "not JSON"),
        ("application/json", b"[" * 50_000, 400, "not JSON"),
        ("application/json", b"9" * 50_000, 400, "not JSON"),
        ("application/json", b"null", 422, 'expected {"image"'),
        ("application/json", b"{}", 422, 'expected {"image"'),
        ("application/json", b'{"image": 3}', 422, 'expected {"image"'),
        ("application/json", b"[]", 422, "no image"),
        ("application/json", b'[{"image": ""}, 3]', 422, 'expected {"image"'),
        ("application/json", b'{"image": "@@@@"}', 400, "not base64"),
        ("application/json", b'{"image": "AAA"}', 400, "not base64"),
        ("application/json", '{"image": "é"}'.encode(), 400, "not base64"),
        ("application/json", b'{"image": ""}', 400, "empty"),
        ("application/json", json.dumps([{"image": "AAAA"}] * 5).encode(), 422, "at most 4"),
        ("multipart/form-data", b"x", 400, "not a form"),
        (FORM, b"", 422, "no image"),
        (FORM, b"rubbish", 400, "not a form"),
        (FORM, form(), 422, "no image"),
        (FORM, form(b""), 400, "empty"),
        (FORM, form(b"1")[:-20], 400, "not a form"),
        (FORM, form(*[b"1"] * 5), 422, "at most 4"),
        (FORM, form(*[b"1"] * 50), 422, "at most 4"),
        (FORM, form(b"bad", b"bad"), 400, "image 1 of 2: not an image"),
        (FORM, form(b"1", boundary="another"), 400, "not a form"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_told_in_one_line(service, kind, body, status, said):
    answer = service.post(body, kind)
    assert (answer.status, answer.json.keys()) == (status, {"error"}), answer.body
    assert said in answer.json["error"]
    assert "\n" not in answer.json["error"]


def test_a_field_without_a_file_is_no_image(service):
    body = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--{BOUNDARY}--'
    )
    assert service.post(body.encode() + b"\r\n", FORM).status == 422


def test_a_compressed_body_is_415(service):
    answer = service.post(b"1", Content_Encoding="gzip")
    assert answer.status == 415
    assert "Content-Encoding: got 'gzip'" in answer.json["error"]


def test_a_bad_image_leaves_the_others(service):
    assert widths(service.post(form(b"1", b"bad", b"123"), FORM)) == [1, "not an image", 3]
    mixed = [{"image": "@"}, {"image": in_base64(b"12")}]
    answer = service.post(json.dumps(mixed), "application/json")
    assert widths(answer) == ["the image is not base64", 2]


def test_the_inside_stays_inside(service, monkeypatch):
    log = io.StringIO()  # not capfd: what is written while it is read may be lost
    monkeypatch.setattr(sys, "stderr", log)
    answer = service.post(b"boom")
    assert answer.status == 500
    assert answer.json == {"error": "the service failed; its log says why"}
    until(lambda: "/secret/path" in log.getvalue())  # after the answer
    assert service.post(form(b"1", b"boom"), FORM).status == 500
    assert widths(service.post(b"1")) == [1]


def test_a_detector_that_starts_again_is_503(service):
    answer = service.post(form(b"1", b"gone"), FORM)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


def test_a_large_body_is_refused_and_not_kept(service):
    body = b"1" * 200_000
    answer = service.post(body)
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert "larger than 0.1 MB" in answer.json["error"]
    assert service.post(iter([body[:70_000]] * 3)).status == 413
    assert widths(service.post(b"1" * 100_000)) == [100_000]


@pytest.mark.parametrize("length", ["1000000", "9" * 19])
def test_who_asks_first_need_not_send_a_large_body(service, length):
    with service.connect() as client:
        client.sendall(
            b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
            b"Expect: 100-continue\r\nContent-Length: " + length.encode() + b"\r\n\r\n"
        )
        assert client.recv(64).startswith(b"HTTP/1.1 413")


def test_a_client_that_goes_away_leaves_nothing_behind(service):
    for _ in range(20):  # more than there is room for
        with service.connect() as client:
            client.sendall(
                b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
                b"Content-Length: 1000\r\n\r\nhalf"
            )
    gone = 'detector_requests_total{path="/detect",status="499"}'
    until(lambda: samples(service).get(gone, 0) > 0 and service.service.held == 0)
    until(lambda: service.post(b"1").status == 200)


def until(true, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1", True), ("localhost:8000", True), ("[::1]:8000", True), ("10.1.2.3:80", True),
        ("detector.example", True), ("DETECTOR.example:1", True), ("evil.example", False),
        ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("", False),
        ("[::1", False), ("localhost@evil.example", False),
    ],
)  # fmt: skip
def test_only_known_host_names_are_answered(service, host, known):
    """Against DNS rebinding: a page of evil.example whose name leads to this machine."""
    for path in ("/", "/model", "/health"):
        answer = service.ask("GET", path, headers={"Host": host})
        assert answer.status == (200 if known else 421)
    assert service.post(b"1", Host=host).status == (200 if known else 421)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://localhost:9"}, 403),
        ({"Origin": "http://localhost", "Host": "localhost"}, 200),
        ({"Origin": "https://detector.example", "Host": "detector.example"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_pages_of_other_sites_may_not_post(service, headers, status):
    answer = service.ask("POST", "/detect", b"1", {"Content-Type": "image/png", **headers})
    assert answer.status == status
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_preflight_is_not_granted(service):
    answer = service.ask("OPTIONS", "/detect", headers={"Origin": "http://evil.example"})
    assert answer.status in (403, 405)
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("path", "kind"), [("/", "text/html"), ("/page.js", "javascript"), ("/page.css", "text/css")]
)
def test_the_page_may_load_nothing_from_elsewhere(service, path, kind):
    answer = service.ask("GET", path)
    assert answer.status == 200
    assert kind in answer.headers["content-type"]
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert b"://" not in answer.body  # nothing to be fetched from another place


@pytest.mark.parametrize(
    "path", ["/../serve.py", "/page/index.html", "/%2e%2e/serve.py", "//etc/passwd", "/detect/"]
)
def test_other_paths_are_not_found(service, path):
    answer = service.ask("GET", path)
    assert answer.status == 404
    assert "POST /detect" in answer.json["error"]


def test_a_wrong_method_is_405(service):
    assert service.ask("GET", "/detect").status == 405
    assert service.ask("POST", "/health", b"").status == 405


def test_health_says_when_the_detector_is_there():
    for ready, status in ((True, 200), (False, 503)):
        with running(by_size, ready=ready) as one:
            assert one.ask("GET", "/health").status == status


def samples(service) -> dict[str, float]:
    lines = service.ask("GET", "/metrics").body.decode().splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_metrics_count_requests_images_and_batches():
    with running(by_size) as one:
        one.post(form(b"1", b"bad", b"2"), FORM)
        one.post(b"bad")
        one.ask("GET", "/nowhere")
        found = samples(one)
    assert found['detector_requests_total{path="/detect",status="200"}'] == 1
    assert found['detector_requests_total{path="/detect",status="400"}'] == 1
    assert found['detector_requests_total{path="other",status="404"}'] == 1
    assert found['detector_images_total{outcome="detected"}'] == 2
    assert found['detector_images_total{outcome="refused"}'] == 2
    assert found["detector_batch_images_count"] == 2
    assert found["detector_request_seconds_count"] == 2
    assert found["detector_queue_images"] == 0


class Gate:
    """A detector that answers when it is told to."""

    def __init__(self):
        self.open = threading.Event()
        self.inside = 0

    async def detect(self, data, threshold, most):
        self.inside += 1
        while not self.open.is_set():
            await asyncio.sleep(0.01)
        return {"width": len(data), "height": 1, "detections": [], "batch": 0}


def in_threads(count, work):
    results = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def test_a_full_queue_refuses_at_once_and_answers_those_that_it_took():
    gate = Gate()
    with running(gate.detect, Limits(images=2, queue=3)) as one:
        threads, results = in_threads(3, lambda: one.post(b"1"))
        until(lambda: gate.inside == 3)
        for refused in (one.post(b"1"), one.post(form(b"1", b"2"), FORM)):
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert "3 images wait already, of at most 3" in refused.json["error"]
        assert one.ask("GET", "/health").status == 200  # full is not ill
        assert samples(one)["detector_queue_images"] == 3
        gate.open.set()
        for thread in threads:
            thread.join(120)
        assert [answer.status for answer in results] == [200] * 3
        assert one.post(b"1").status == 200


def test_the_images_of_one_request_count_each():
    gate = Gate()
    with running(gate.detect, Limits(images=3, queue=3)) as one:
        threads, results = in_threads(1, lambda: one.post(b"1"))
        until(lambda: gate.inside == 1)
        assert one.post(form(b"1", b"2", b"3"), FORM).status == 503
        assert one.service.held == 1
        gate.open.set()
        threads[0].join(120)
        assert results[0].status == 200


def test_requests_in_hand_are_answered_when_the_service_ends():
    gate = Gate()
    with running(gate.detect) as one:
        threads, results = in_threads(2, lambda: one.post(b"1"))
        until(lambda: gate.inside == 2)
        one.door.should_exit = True
        until(lambda: refuses(one.port))
        assert not results
        gate.open.set()
        for thread in threads:
            thread.join(120)
    assert [answer.status for answer in results] == [200, 200]


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_detector_that_takes_too_long_is_504_and_told_so():
    cancelled = threading.Event()

    async def never(data, threshold, most):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with running(never, Limits(seconds=0.5)) as one:
        answer = one.post(b"1")
        assert (answer.status, cancelled.wait(60)) == (504, True)
        assert answer.json["error"] == "no detections within 0.5 s"
        assert one.service.held == 0


def test_a_body_that_does_not_come_is_408():
    with running(by_size, Limits(seconds=0.5)) as one, one.connect() as client:
        client.sendall(
            b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
            b"Content-Length: 9\r\n\r\n123"
        )
        assert closed(client).startswith(b"HTTP/1.1 408")
        assert one.service.held == 0


def closed(client) -> bytes:
    """What comes until the other side closes the connection."""
    answer = b""
    while part := client.recv(4096):
        answer += part
    return answer


@pytest.mark.parametrize("sent", [b"", b"POST /detect HTTP/1.1\r\nHost: loc"])
def test_a_client_that_asks_nothing_is_let_go(monkeypatch, sent):
    monkeypatch.setattr(serve_door, "HEAD_SECONDS", 0.3)
    with running(by_size) as one, one.connect() as client:
        client.sendall(sent)
        assert closed(client) == b""
        monkeypatch.undo()
        assert one.post(b"1").status == 200


def test_a_head_without_end_is_refused(service):
    with service.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 50_000)
        assert client.recv(64).startswith(b"HTTP/1.1 4")


def test_more_clients_than_there_is_room_for_are_let_go(monkeypatch):
    monkeypatch.setattr(serve_door, "CONNECTIONS", 2)
    with running(by_size) as one, one.connect() as first, one.connect() as second:
        with one.connect() as third:
            assert closed(third) == b""
        first.close()
        second.close()
        until(lambda: accepted(one))


def accepted(one) -> bool:
    try:
        return one.post(b"1").status == 200
    except (ConnectionError, http.client.HTTPException):
        return False


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.one_of(
        st.binary(max_size=300),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=9),
            lambda inner: st.lists(inner) | st.dictionaries(st.just("image") | st.text(), inner),
            max_leaves=12,
        ).map(lambda content: json.dumps(content).encode()),
    )
)
def test_json_of_any_kind_is_images_or_refused(body):
    try:
        found = from_json(body, Limits(images=4))
    except Refused as refused:
        found = [refused]
    assert 1 <= len(found) <= 4
    assert all(isinstance(one, bytes) or one.status in (400, 422) for one in found)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from([FORM, "multipart/form-data; boundary=", "application/json", "image/x"]),
    before=st.binary(max_size=60),
    cut=st.integers(0, 300),
    after=st.binary(max_size=60),
)
def test_damaged_bodies_are_answered(service, kind, before, cut, after):
    answer = service.post(before + form(b"12", b"bad")[:cut] + after, kind)
    assert answer.status in (200, 400, 422)
    assert answer.json.keys() <= OWN


# The command.


def told(capsys, *args) -> str:
    """The one line of a command that fails."""
    assert main("python -m jobs", "", COMMANDS, ["serve", *map(str, args)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "65536"], "--port: got 65536, expected 0 to 65535"),
        (["--replicas", "0"], "--replicas: got 0, expected 1 or more"),
        (["--max-batch", "0"], "--max-batch: got 0"),
        (["--max-wait-ms", "-1"], "--max-wait-ms: got -1"),
        (["--max-megabytes", "0"], "--max-megabytes: got 0"),
        (["--max-megapixels", "nan"], "--max-megapixels: got nan"),
        (["--timeout", "-5"], "--timeout: got -5"),
        (["--threshold", "30"], "--threshold: got 30, expected 0 to 1"),
        (["--max-images", "9", "--max-queue", "8"], "--max-images: got 9, expected no more than"),
        (["--max-bacth", "2"], "did you mean --max-batch?"),
        (["--host", "nowhere.invalid"], "--host: got 'nowhere.invalid', expected an address"),
    ],
)
def test_wrong_options_are_told_before_anything_starts(tmp_path, capsys, options, said):
    assert said in told(capsys, tmp_path, *options)


def test_a_missing_checkpoint_is_told(tmp_path, capsys):
    assert "does not exist: expected a run folder" in told(capsys, tmp_path / "nothing")


def test_a_folder_without_a_checkpoint_is_told_before_ray_starts(tmp_path, capsys):
    said = told(capsys, tmp_path, "--port", 0)
    assert "is not a checkpoint" in said
    assert "starting" not in capsys.readouterr().out


def test_a_port_that_is_taken_is_told(tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        said = told(capsys, tmp_path, "--port", other.getsockname()[1])
    assert "address already in use; give another --port" in said


def test_an_address_of_the_network_is_warned_of(tmp_path, capsys):
    command = ["serve", str(tmp_path), "--host", "0.0.0.0", "--port", "0"]
    assert main("python -m jobs", "", COMMANDS, command) == 2
    assert "anybody on the network can use this service" in capsys.readouterr().err
