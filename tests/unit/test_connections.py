"""Connections and signals: nobody makes the server deaf, and it always ends in time."""

import os
import resource
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from serving_fixtures import BEARER, KEY, FakePackshot, config, eventually, fake_server, served, upload

from packshot.config.compose import compose
from packshot.errors import ConfigError
from packshot.serve.connections import connection_limit
from packshot.serve.requests import without_paths
from packshot.serve.server import check_work


def connect(url):
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def closed_by_server(connection):
    """Whether the server has closed a connection, waiting for that."""
    connection.settimeout(30)
    try:
        return connection.recv(4096) == b""
    except ConnectionResetError:
        return True


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with short deadlines and few connections."""
    keys = ["serve.header_seconds=1", "serve.max_connections=8", "serve.timeout_seconds=5"]
    with served(fake_server(tmp_path_factory.mktemp("run"), *keys)) as started:
        yield started


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\nX-Drip: "])
def test_a_connection_without_whole_headers_is_closed(server, sent):
    _, url = server
    with connect(url) as connection:
        connection.sendall(sent)
        assert closed_by_server(connection)


def test_a_second_request_has_the_same_deadline(server):
    """After an answer, uvicorn's own timer ends with the first byte of the next request."""
    _, url = server
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /health HTTP/1.1\r\nHost: ")
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        assert eventually(lambda: closed_by_server(connection))


def test_idle_connections_make_room_for_a_request(server):
    """Three times as many silent connections as there may be, and one that asks."""
    _, url = server
    with ExitStack() as stack:
        for _ in range(24):
            stack.enter_context(connect(url)).sendall(b"GET /health HTTP/1.1\r\n")
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200


def test_a_client_that_leaves_frees_the_device(server):
    """The rest of its 8 x 40 steps would hold the device for the whole test."""
    _, url = server
    order = upload(num_images=8, num_inference_steps=40)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/generate", **order, timeout=0.01)
    assert httpx.post(f"{url}/generate", **upload(), timeout=30).status_code == 200


def test_the_connection_limit_leaves_descriptors_free(monkeypatch):
    """The soft limit is raised to what is needed, and no further than the hard one."""
    limits = [(256, 300)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.append(values))
    assert connection_limit(100) == 100
    assert len(limits) == 1
    assert connection_limit(1000) == 300 - 64
    assert limits[-1] == (300, 300)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_finishes_what_is_in_work(tmp_path, number):
    with served(fake_server(tmp_path, step_seconds=0.2)) as (process, url):
        answers = []
        order = upload(num_inference_steps=10)
        thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/generate", **order, timeout=60)))
        thread.start()
        assert eventually(lambda: "packshot_queue_length" in httpx.get(f"{url}/metrics").text)
        assert eventually(lambda: "http_requests_active 2.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(number)
        assert process.wait(60) == 0
        thread.join(60)
        assert answers[0].status_code == 200


def test_sigterm_ends_within_the_timeout_whatever_runs(tmp_path):
    """A request of 320 s, a stored job, a stream of events and a silent connection."""
    command = fake_server(tmp_path, "serve.timeout_seconds=8", step_seconds=1.0)
    with served(command) as (process, url), httpx.Client(base_url=url, timeout=60) as client, connect(url):
        order = upload(num_images=8, num_inference_steps=40)
        job_id = client.post("/jobs", **order).json()["id"]
        with client.stream("GET", f"/jobs/{job_id}/events", headers=BEARER) as events:
            lines = events.iter_lines()  # the stream ends with this generator
            next(lines)
            waiting = threading.Thread(target=post_and_lose, args=(f"{url}/generate", order))
            waiting.start()
            assert eventually(lambda: "http_requests_active 3.0" in client.get("/metrics").text)
            process.send_signal(signal.SIGTERM)
            process.wait(8)  # raises TimeoutExpired
        waiting.join(60)
    second = fake_server(tmp_path)
    with served(second) as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        address = f"/jobs/{job_id}"
        assert eventually(lambda: client.get(address, headers=BEARER).json()["state"] == "done")


def test_a_second_signal_ends_at_once(tmp_path):
    with served(fake_server(tmp_path, step_seconds=1.0)) as (process, url):
        order = upload(num_images=8, num_inference_steps=40)
        thread = threading.Thread(target=post_and_lose, args=(f"{url}/generate", order))
        thread.start()
        assert eventually(lambda: "http_requests_active 2.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 1
        thread.join(60)


def post_and_lose(url, order):
    """A client whose request ends without pictures: by an error, or with the connection."""
    with suppress(httpx.HTTPError):
        assert httpx.post(url, **order, timeout=60).status_code >= 400


def test_defaults_that_would_be_refused_are_a_config_error():
    settings = compose("serve", ["generate.num_inference_steps=1000"])
    with pytest.raises(ConfigError, match=r"serve\.max_work"):
        check_work(settings)
    check_work(config())


def test_error_messages_show_no_paths():
    text = "adapters.lora=/srv/secret/run-1/export: no /srv/secret/a.json, see https://x.example/a/b and 1/2"
    assert without_paths(text) == "adapters.lora=export: no a.json, see https://x.example/a/b and 1/2"


def test_origins_that_are_named_may_use_the_api():
    from fastapi.testclient import TestClient

    from packshot.serve.app import create_app

    def answer(settings):
        asking = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
        asking["Access-Control-Request-Headers"] = "authorization"
        return TestClient(create_app(settings, FakePackshot())).options("/jobs", headers=asking)

    allowed = answer(config("serve.cors_origins=[https://shop.example]"))
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    assert "access-control-allow-origin" not in answer(config()).headers


@pytest.mark.slow
def test_a_worker_process_stops_and_comes_back(tmp_path):
    """With the real model: a deleted job ends within its step, and a killed worker is started again."""
    keys = [f"run.dir={tmp_path}/run", "serve.port=0", f"serve.api_key={KEY}", "generate.num_inference_steps=1"]
    with served(["serve.py", *keys]) as (process, url), httpx.Client(base_url=url, timeout=600) as client:
        job_id = client.post("/jobs", **upload(num_images=2, num_inference_steps=200)).json()["id"]
        assert eventually(lambda: client.get(f"/jobs/{job_id}", headers=BEARER).json()["share_done"] > 0)
        assert client.delete(f"/jobs/{job_id}", headers=BEARER).status_code == 204
        assert client.post("/generate", **upload()).status_code == 200
        [worker] = workers_of(process.pid)
        os.kill(worker, signal.SIGKILL)
        assert client.post("/generate", **upload()).status_code == 200
        [again] = workers_of(process.pid)
        assert again != worker
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert eventually(lambda: not Path(f"/proc/{again}").exists())


def workers_of(pid):
    """The worker processes of a server; Python's own resource tracker is not one."""
    children = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        children += (thread / "children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def health_seconds(url):
    """How long /health takes, on a new connection."""
    started = time.monotonic()
    assert httpx.get(f"{url}/health", timeout=30).status_code == 200
    return time.monotonic() - started


@pytest.mark.slow
def test_1100_dripping_sockets_leave_health_answering(tmp_path):
    """With 1,024 open files for the server; H2 of an earlier version: it was deaf, and wrote 83 MB of log a minute."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))

    def limit_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    with served(fake_server(tmp_path), prepare=limit_files) as (_, url), ExitStack() as stack:
        alone = [health_seconds(url) for _ in range(20)]
        sockets = [stack.enter_context(connect(url)) for _ in range(1100)]
        dripped = []
        for _ in range(20):
            for connection in sockets:
                with suppress(OSError):  # closed by the server
                    connection.send(b"G")
            dripped.append(health_seconds(url))
            time.sleep(0.5)
        print(f"slowest /health: {max(alone):.3f} s alone, {max(dripped):.3f} s with 1,100 dripping sockets")
    text = (tmp_path / "log.txt").read_text()
    assert len(text) < 100_000
    assert KEY not in text
    # asyncio's words when files run out; it then accepts nobody for a second
    assert "out of system resource" not in text
