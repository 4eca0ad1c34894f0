"""Captions from an OpenAI-compatible server: a small one, in a thread, that answers like the real ones."""

import base64
import io
import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_fixtures import CAPTIONS, SCENES, caption_vlm, picture, write_dataset
from PIL import Image

from packshot.caption.models.load import load_captioner
from packshot.config.compose import compose
from packshot.config.schema import CaptionerConfig, CaptionerKind, Constraint, ModelConfig, ProductTarget
from packshot.errors import ConfigError, PackshotError
from packshot.runs.folder import log
from packshot.scene import SLOTS


class Server(ThreadingHTTPServer):
    """Describes red and blue pictures; ``script`` decides what else happens, by the number of the request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = lambda number, red: (200, CAPTIONS[0 if red else 1])
        self.requests, self.waiting, self.lock = [], threading.Barrier(1), threading.Lock()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][0]["content"]
        url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        with self.server.lock:
            self.server.requests.append((body, image, self.headers))
            number = len(self.server.requests)
        red, _, blue = image.convert("RGB").getpixel((0, 0))
        if self.server.waiting.parties > 1:
            self.server.waiting.wait(timeout=20)
        status, text = self.server.script(number, red > blue)
        answer = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        } if status == 200 else {"error": {"message": text}}  # fmt: skip
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def connect(server, **settings):
    config = CaptionerConfig(
        kind=CaptionerKind.endpoint, endpoint=server.address, endpoint_model="small-vl", **settings
    )
    return load_captioner(ModelConfig(), config)


IMAGES = [picture(i) for i in range(4)]
NO_MASKS = [None] * 4


def test_captions_come_back_in_the_order_of_the_pictures(server):
    assert connect(server).caption(IMAGES, NO_MASKS) == CAPTIONS * 2
    body, image, _ = server.requests[0]
    assert body["model"] == "small-vl"
    assert body["max_tokens"] == 96 + 64  # the names of the fields
    assert body["temperature"] == 0
    assert "Describe the scene around the object." in body["messages"][0]["content"][0]["text"]
    assert image.size == (32, 32)


def test_requests_are_under_way_together(server):
    server.waiting = threading.Barrier(4)  # no answer before four have come
    assert connect(server, endpoint_requests=4).caption(IMAGES, NO_MASKS) == CAPTIONS * 2


def test_a_server_always_has_all_requests_it_may_have(server, tmp_path):
    """Over the ends of shards, and whichever request is answered first: the server answers none before it has four."""
    write_dataset(tmp_path / "data", shards=(3, 2, 5, 1, 3), captions=False)
    full, early = threading.Condition(), []
    state = {"here": 0, "left": 14}

    def answer(number, red):
        with full:
            state["here"] += 1
            full.notify_all()
            if not full.wait_for(lambda: state["here"] >= min(4, state["left"]), timeout=30):
                early.append(number)
            state["here"] -= 1
            state["left"] -= 1
            full.notify_all()
        return 200, CAPTIONS[0 if red else 1]

    server.script = answer
    run = caption_vlm(
        tmp_path, "run", "captioner=endpoint", f"captioner.endpoint={server.address}", "captioner.endpoint_requests=4",
        "captioner.endpoint_model=small-vl", f"data.input={tmp_path / 'data'}", task="caption",
    )  # fmt: skip
    assert early == []
    shards = list(map(pq.read_table, sorted(run.glob("part-*.parquet"))))
    assert [shard.num_rows for shard in shards] == [3, 2, 5, 1, 3]
    assert pa.concat_tables(shards).column("text").to_pylist() == CAPTIONS * 7


def fields_of(scene):
    return json.dumps({**scene.to_dict(), "lighting": None, "style": []})


def test_the_scenes_fields_go_along_as_a_schema(server):
    server.script = lambda number, red: (200, fields_of(SCENES[0 if red else 1]))
    expected = [replace(scene, lighting=None).render() for scene in SCENES]
    assert connect(server).caption(IMAGES[:2], NO_MASKS[:2]) == expected
    asked = server.requests[0][0]["response_format"]
    assert asked["type"] == "json_schema"
    schema = asked["json_schema"]["schema"]
    assert set(schema["required"]) == set(schema["properties"]) == set(SLOTS)
    assert re.fullmatch(schema["properties"]["surface"]["pattern"], "a child's blue-grey table")
    assert "a white marble table" in server.requests[0][0]["messages"][0]["content"][0]["text"]


def test_a_schema_is_only_sent_where_it_is_wanted(server):
    connect(server, endpoint_guided=False).caption(IMAGES[:1], [None])
    connect(server).unconstrained().caption(IMAGES[:1], [None])
    for body, _, _ in server.requests:
        assert "response_format" not in body
        assert "Answer with one line" in body["messages"][0]["content"][0]["text"]


def test_a_server_without_schemas_is_asked_without(server, monkeypatch):
    told = []
    monkeypatch.setattr(log, "warning", lambda *words: told.append(words))

    def refuse(number, red):
        if "response_format" in server.requests[number - 1][0]:
            return 400, "unknown field response_format"
        return 200, CAPTIONS[0 if red else 1]

    server.script = refuse
    captioner = connect(server, endpoint_requests=1)
    assert captioner.caption(IMAGES, NO_MASKS) == CAPTIONS * 2
    assert len(told) == 1
    assert "takes no JSON schema" in told[0][0]
    assert "unknown field response_format" in told[0][2]
    asked = ["response_format" in body for body, _, _ in server.requests]
    assert sum(asked) <= captioner.at_once
    assert not any(asked[-2:])


def test_what_the_server_says_is_written_in_the_grammar(server):
    server.script = lambda number, red: (200, "The object is on a red table. In the background is a wall, warm light.")
    (text,) = connect(server).caption(IMAGES[:1], [None])
    assert text.startswith("Professional photo of an object")
    (text,) = connect(server, constraint=Constraint.none).caption(IMAGES[:1], [None])
    assert text.startswith("The object is on")


def test_a_busy_server_is_retried_an_error_costs_one_row(server):
    server.script = lambda number, red: (429, "slow down") if number == 1 else (200, CAPTIONS[0 if red else 1])
    assert connect(server).caption(IMAGES[:2], NO_MASKS[:2]) == CAPTIONS
    server.script = lambda number, red: (400, "this picture is odd") if red else (200, CAPTIONS[1])
    first, second = connect(server).write(IMAGES[:2], NO_MASKS[:2])
    assert "this picture is odd" in first.error
    assert (second.text, second.error) == (CAPTIONS[1], None)


def test_a_refused_key_or_unknown_model_ends_the_run(server):
    for status in (401, 404):
        server.script = lambda number, red, status=status: (status, "no such thing")
        with pytest.raises(ConfigError, match=r"captioner.endpoint=http.* refuses: .*no such thing"):
            connect(server).caption(IMAGES[:1], [None])


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-123")
    connect(server).caption(IMAGES[:1], [None])
    assert server.requests[0][2]["Authorization"] == "Bearer secret-123"


def test_the_product_is_covered_before_the_picture_leaves(server):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    connect(server, product=ProductTarget.mask).caption(IMAGES[:1], [mask])
    centre = server.requests[0][1].convert("RGB").getpixel((16, 16))
    assert all(abs(value - 127) < 8 for value in centre)


def test_a_dataset_is_captioned_by_a_server_like_by_any_model(server, tmp_path):
    write_dataset(tmp_path / "data", captions=False)
    run = caption_vlm(
        tmp_path, "run", "captioner=endpoint", f"captioner.endpoint={server.address}",
        "captioner.endpoint_model=small-vl", f"data.input={tmp_path / 'data'}", task="caption",
    )  # fmt: skip
    table = pq.read_table(run / "part-00000.parquet")
    assert table.column("text").to_pylist() == CAPTIONS
    assert table.column("scene")[1].as_py()["background"] == SCENES[1].background
    assert table.column("caption_confidence")[0].as_py()["surface"] is None


def test_half_a_config_is_refused():
    with pytest.raises(ConfigError, match=r"needs captioner.endpoint and captioner.endpoint_model"):
        compose("caption_vlm", ["captioner=endpoint", "captioner.endpoint=http://127.0.0.1:1/v1"])


def test_a_refused_key_writes_no_shard_of_errors(server, tmp_path):
    server.script = lambda number, red: (401, "no such key")
    write_dataset(tmp_path / "data", captions=False)
    keys = (f"captioner.endpoint={server.address}", "captioner.endpoint_model=small-vl", f"data.input={tmp_path}/data")
    with pytest.raises(ConfigError, match=r"captioner.endpoint=http.* refuses: .*no such key"):
        caption_vlm(tmp_path, "run", "captioner=endpoint", *keys, task="caption")
    assert not list((tmp_path / "run").glob("*.parquet"))


def test_a_picture_that_the_server_refuses_is_not_scored(server, tmp_path):
    server.script = lambda number, red: (400, "too odd") if number == 1 else (200, CAPTIONS[0 if red else 1])
    write_dataset(tmp_path / "data")
    keys = (f"captioner.endpoint={server.address}", "captioner.endpoint_model=small-vl")
    keys += ("captioner.endpoint_guided=false",)  # otherwise the refusal may be meant for the schema
    run = caption_vlm(tmp_path, "run", "captioner=endpoint", *keys, task="evaluate")
    scores = json.loads((run / "scores.json").read_text())
    assert (scores["samples"], scores["captioner"]["captions"], scores["unconstrained"]["captions"]) == (4, 3, 4)
    assert scores["errors"] == {"captioner": {"BadRequestError": 1}, "unconstrained": {}}
    assert scores["captioner"]["mean"]["exact"] == scores["captioner"]["parse_rate"] == 1.0
    assert scores["baselines"]["constant_caption"]["captions"] == 3, "on the same pictures"
    assert "1 pictures have no caption and are not scored (BadRequestError)" in (run / "log.txt").read_text()
    server.script = lambda number, red: (400, "too odd")
    with pytest.raises(PackshotError, match="0 of 4 pictures have a caption"):
        caption_vlm(tmp_path, "none", "captioner=endpoint", *keys, task="evaluate")


def test_a_server_cannot_be_trained(tmp_path):
    write_dataset(tmp_path / "data")
    keys = ("captioner.endpoint=http://127.0.0.1:1/v1", "captioner.endpoint_model=small-vl")
    with pytest.raises(ConfigError, match=r"captioner=endpoint has no weights here"):
        caption_vlm(tmp_path, "run", "captioner=endpoint", *keys)
    assert not (tmp_path / "run").exists()
