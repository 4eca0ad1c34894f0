"""The HTTP service, with the real mini model: auth, limits, errors, metrics, and pictures that keep the product."""

import base64
import contextlib
import hashlib
import io
import json
import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import cv2
import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving_fixtures import (
    BEARER,
    KEY,
    STEPS,
    FakePackshot,
    config,
    create_app,
    eventually,
    file,
    product_pair,
    upload,
)

from packshot.config.compose import compose
from packshot.errors import ConfigError
from packshot.generate import Packshot
from packshot.generate.references import open_references
from packshot.generate.verify import verify
from packshot.runs.folder import Run, log
from packshot.scene import SLOTS, Scene
from packshot.serve.app import create_app as create_app_unstarted
from packshot.serve.logs import Quota, QuotaFilter
from packshot.serve.queueing import Turn
from packshot.serve.requests import read_settings
from packshot.serve.routes import certificate_sha256, wants_png
from packshot.serve.schemas import ApiError, SceneForm
from packshot.serve.server import listen

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """caplog hears ours, also after a run in this process has taken the log for itself."""
    monkeypatch.setattr(log, "propagate", True)


@pytest.fixture(scope="module")
def packshot():
    return Packshot.load(model=config().model)


@pytest.fixture(scope="module")
def app(packshot):
    return create_app(config("serve.max_upload_mib=0.25", "serve.max_pixels=40000"), packshot)


@pytest.fixture
def client(app):
    return TestClient(app, raise_server_exceptions=False)


def refused(response, status, code):
    """The error body, after checking that it has the documented form."""
    body = response.json()
    assert (response.status_code, body["success"], body["error_code"]) == (status, False, code), body
    assert set(body) == {"success", "error", "error_code", "request_id", "hint"}
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def core_is_kept(png):
    product, mask = product_pair()
    result = Image.open(io.BytesIO(png))
    assert (result.size, result.mode) == (product.size, "RGB")
    inside = np.zeros((mask.height, mask.width), bool)
    inside[41:99, 31:65] = True  # the mask's rectangle less one pixel
    same = np.asarray(result) == np.asarray(product)
    return same[inside].all() and not same[~inside].all()


# --- pictures


def test_json_holds_pictures_that_keep_the_product(client):
    response = client.post("/generate", **upload(num_images=2, seed=5, surroundings=["palm leaves", "stones"]))
    body = response.json()
    assert response.status_code == 200, body
    assert body["success"] is True
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["model_version"].endswith("sdxl")
    assert body["processing_time_ms"] > 0
    assert body["prediction"]["prompt"] == (
        "Professional photo of an object on a white podium, surrounded by palm leaves and stones"
    )
    images = body["prediction"]["images"]
    assert [(image["media_type"], image["seed"]) for image in images] == [("image/png", 5), ("image/png", 6)]
    pngs = [base64.b64decode(image["image"], validate=True) for image in images]
    assert all(map(core_is_kept, pngs))
    assert pngs[0] != pngs[1]
    for image, png in zip(images, pngs, strict=True):
        certificate = image["certificate"]
        assert certificate["core"]["max_abs_diff"] == 0
        assert certificate["output_sha256"] == hashlib.sha256(png).hexdigest()
        assert certificate["request"]["seed"] == image["seed"]


def test_png_answer_is_the_picture_of_the_json_answer(client):
    order = upload(seed=3)
    image = client.post("/generate", **order).json()["prediction"]["images"][0]
    response = client.post("/generate", **{**order, "headers": {**BEARER, "Accept": "image/png"}})
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert response.content == base64.b64decode(image["image"])
    assert response.headers["x-certificate-sha256"] == certificate_sha256(image["certificate"])


def test_the_service_gives_what_the_python_interface_gives(client, packshot):
    png = client.post("/generate", **{**upload(seed=7), "headers": {**BEARER, "Accept": "image/png"}}).content
    scene = Scene(surface="a white podium")
    direct = packshot.set_product(*product_pair()).generate(scene, num_images=1, seed=7, settings=config().generate)
    assert (np.asarray(Image.open(io.BytesIO(png))) == np.asarray(direct[0].image)).all()


def test_the_certificate_has_the_hashes_of_the_uploads(client):
    order = upload()
    order["files"]["product_file"] += b"after the picture"  # decoding loses it
    certificate = client.post("/generate", **order).json()["prediction"]["images"][0]["certificate"]
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in order["files"].items()}
    assert certificate["input"]["sha256"] == digests["product_file"]
    assert certificate["mask"]["file_sha256"] == digests["mask_file"]


def group_upload(count, masks=0, **fields):
    """A request for several products in one picture: noise, each with alpha of its own."""
    files = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (60, 50, 4), np.uint8)
        noise[..., 3] = 0
        noise[10 + 5 * number : 50, 12:38, 3] = 255
        files.append(("product_file", file(Image.fromarray(noise))))
    files += [("mask_file", file(Image.new("L", (50, 60), 255)))] * masks
    return {"files": files, "data": {"surface": "a podium", "together": "true", **fields}, "headers": BEARER}


def test_several_products_stand_in_one_picture(client, tmp_path):
    """Each with its own pixels, and certified by the cut-out that comes with the picture."""
    answer = client.post("/generate", **group_upload(3))
    assert answer.status_code == 200, answer.text
    prediction = answer.json()["prediction"]
    picture, cut_out = (base64.b64decode(data) for data in (prediction["images"][0]["image"], prediction["cut_out"]))
    certificate = prediction["images"][0]["certificate"]
    assert certificate["input"]["sha256"] == hashlib.sha256(cut_out).hexdigest()
    sent = [hashlib.sha256(data).hexdigest() for _, data in group_upload(3)["files"]]
    assert [part.split("SHA-256 ")[1][:64] for part in certificate["transform"]["decoding"]] == sent
    files = {"picture.png": picture, "photo.png": cut_out, "picture.json": json.dumps(certificate).encode()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [tmp_path / name for name in ("picture.png", "picture.json", "photo.png")]
    assert all(finding.passed for finding in verify(*paths))
    shown = np.asarray(Image.open(io.BytesIO(picture)))
    whole = np.asarray(Image.open(io.BytesIO(cut_out)))
    core = cv2.erode((whole[..., 3] == 255).astype(np.uint8), np.ones((3, 3))) > 0
    assert core.sum() > 3 * 24 * 20
    assert (shown[core] == whole[core][:, :3]).all()


def test_a_job_of_several_products_has_their_cut_out(client):
    job = client.post("/jobs", **group_upload(2)).json()
    assert eventually(lambda: client.get(f"/jobs/{job['id']}", headers=BEARER).json()["state"] == "done")
    [image] = client.get(f"/jobs/{job['id']}", headers=BEARER).json()["images"]
    certificate = client.get(image["certificate"], headers=BEARER).json()
    kept = client.get(image["layers"]["input"], headers=BEARER).content
    assert certificate["input"]["sha256"] == hashlib.sha256(kept).hexdigest()


@pytest.mark.parametrize(
    ("order", "named"),
    [
        (group_upload(1), "together=true needs several products"),
        (group_upload(2, masks=1), "mask_file is given 1 times for 2 products"),
        (group_upload(2, together="false"), "'product_file' is given 2 times"),
        (group_upload(9), "product_file"),
        (group_upload(2, together="many"), "together"),
    ],
)
def test_files_that_make_no_group_are_refused(client, order, named):
    for path in ("/generate", "/jobs"):
        assert named in refused(client.post(path, **order), 422, "invalid_field")["error"]


def test_a_group_is_held_to_the_limit_of_pixels(packshot):
    """Of its photographs together, and of the picture that they make."""
    client = TestClient(create_app(config("serve.max_pixels=5000"), packshot))
    assert "6000 pixels" in refused(client.post("/generate", **group_upload(2)), 413, "too_large")["error"]
    files = []
    for width, height in ((400, 40), (40, 400)):
        flat = np.full((height, width, 4), 90, np.uint8)
        flat[..., 3] = 0
        flat[4:-4, 4:-4, 3] = 255
        files.append(("product_file", file(Image.fromarray(flat))))
    client = TestClient(create_app(config("serve.max_pixels=40000"), packshot))
    order = {**group_upload(2), "files": files}
    assert "at most 40000 pixels" in refused(client.post("/generate", **order), 422, "unusable_product")["error"]


def test_a_lone_reference_is_answered_with_an_empty_prompt():
    """A lone reference is drawn without words: an answer with the empty scene's sentence would be wrong."""
    fake = FakePackshot()
    app = create_app(config(), fake)
    app.state.service.config.adapters.ip_adapter = "an adapter"
    order = upload(surface="")
    order["files"]["reference_file"] = file(Image.new("RGB", (40, 40), "red"), "JPEG")
    answer = TestClient(app).post("/generate", **order)
    assert answer.json()["prediction"]["prompt"] == ""
    [(scene, reference, _)] = fake.calls
    [opened] = open_references(reference)
    assert (scene, opened.sha256) == (Scene(), hashlib.sha256(order["files"]["reference_file"]).hexdigest())


def test_every_slot_of_a_form_reaches_the_scene():
    """Also "background", which is a group of keys in the settings of generate.py."""
    words = {name: f"{name} of the form" for name in SLOTS}
    fake = FakePackshot()
    answer = TestClient(create_app(config(), fake)).post("/generate", **upload(**words))
    assert answer.status_code == 200
    [(scene, _, _)] = fake.calls
    assert scene == Scene(**{name: (text,) if SLOTS[name].many else text for name, text in words.items()})


CANVAS = ["generate.size=[512,512]", "generate.product_scale=0.8", "generate.margin=0.1"]
CENTER = ["generate.placement=center", *CANVAS]
SHAPE = ["generate.placement=center", "generate.aspect_ratio=4:5"]
POINT = ["generate.placement=coordinates", "generate.position=[0.5,0.5]", "generate.size=[512,512]"]
STRONGER = ["generate.verify.retries=1", "generate.verify.control=0.5", "adapters.controlnets=[an export]"]


@pytest.mark.parametrize(
    ("defaults", "fields", "expected"),
    [
        (CENTER, {"placement": "original"}, {"size": [], "product_scale": 0.6, "margin": 0.0}),
        (SHAPE, {"placement": "original"}, {"aspect_ratio": None}),
        (SHAPE, {"size": "256x128"}, {"aspect_ratio": None, "size": [256, 128]}),
        (POINT, {"placement": "left"}, {"position": [], "size": [512, 512]}),
        (POINT, {"placement": "original"}, {"position": [], "size": []}),
        (CANVAS, {}, {"size": [], "product_scale": 0.6, "margin": 0.0}),
        (CANVAS, {"placement": "left"}, {"size": [512, 512], "product_scale": 0.8, "margin": 0.1}),
    ],
)
def test_a_form_replaces_what_contradicts_it(defaults, fields, expected):
    """A form cannot take a server's setting back, so each of these was answered with 422 for ever."""
    settings = read_settings(SceneForm(**fields), config(*defaults), False).settings
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(("retries", "control"), [(None, 0.5), (0, 0.0), (2, 0.5)])
def test_a_server_may_strengthen_controlnets(retries, control):
    """The check of requests did not know the server's ControlNets, and refused each request."""
    asked = read_settings(SceneForm(retries=retries), config(*STRONGER), False)
    assert asked.settings.verify.control == control


def test_a_server_without_controlnets_has_none_to_strengthen():
    with pytest.raises(ConfigError, match=r"generate\.verify\.control=0\.5 has no effect with adapters.controlnets"):
        config(*STRONGER[:2])


WHITE = ["generate.background.color=[255,255,255]"]


@pytest.mark.parametrize(
    ("defaults", "fields", "named", "way"),
    [
        ([], {"light_angle": 90}, "light_angle=90", "generate.shadow=contact"),
        (WHITE, {"light_angle": 90}, "light_angle=90", "generate.shadow=contact"),
        (WHITE, {"background": "a brick wall"}, "background", "generate.background.color"),
        (WHITE, {"prompt": "a beach"}, "prompt", "generate.background.color"),
        (WHITE, {"num_inference_steps": 9}, "num_inference_steps", "generate.background.color"),
        (WHITE, {"guidance_scale": 2.0}, "guidance_scale", "generate.background.color"),
        ([], {"placement": "left"}, "placement=left", "size=1024x1024"),
    ],
)
def test_fields_without_effect_are_refused(defaults, fields, named, way):
    """In the words of a form; a job with such a field is not accepted to fail later."""
    with pytest.raises(ApiError) as error:
        read_settings(SceneForm(**fields), config(*defaults), False)
    assert error.value.status_code == 422
    assert error.value.detail.startswith(named)
    assert way in error.value.hint


def test_light_is_offered_where_a_shadow_reads_it():
    app = create_app(config("generate.shadow=contact"), FakePackshot())
    assert TestClient(app).get("/options").json()["light"]
    order = upload(light_angle=90)
    assert TestClient(app).post("/generate", **order).status_code == 200


def test_png_holds_one_picture_only(client):
    order = {**upload(num_images=2), "headers": {**BEARER, "Accept": "image/png"}}
    refused(client.post("/generate", **order), 422, "invalid_field")


@pytest.mark.parametrize(
    ("accept", "png"),
    [("*/*", False), ("image/png", True), ("image/png;q=1, */*;q=0.1", True), ("application/json, image/png", False)],
)
def test_json_unless_a_picture_is_asked_for(accept, png):
    assert wants_png(accept) is png


# --- who may


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}]
    + [{"Authorization": "Bearer "}, {"Authorization": f"Bearer {KEY}x".encode()}, {"Authorization": b"Bearer \xff"}],
)
def test_generation_needs_the_key(client, headers):
    response = client.post("/generate", **{**upload(), "headers": headers})
    refused(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


def test_without_the_key_no_body_is_read(client):
    read, sent = [], []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b""}
    anyio.run(client.app, scope, receive, send)
    assert sent[0]["status"] == 401
    assert not read


def test_reading_is_open(client):
    for path in ("/", "/health", "/metrics", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200, path
    assert client.get("/", headers={"Accept": "application/json"}).json()["docs"] == "/docs"


def test_a_key_is_made_up_and_printed_once_when_none_is_given(packshot, capsys, monkeypatch):
    monkeypatch.delenv("PACKSHOT_API_KEY", raising=False)
    settings = compose("serve", STEPS)
    keys = []
    for _ in range(2):
        create_app(settings, packshot)
        (line,) = capsys.readouterr().out.splitlines()
        keys.append(line.split()[-1])
    assert len(set(keys)) == 2
    assert all(len(key) >= 32 for key in keys)
    monkeypatch.setenv("PACKSHOT_API_KEY", "from the environment")
    app = create_app(settings, packshot)
    assert not capsys.readouterr().out
    order = {**upload(), "headers": {"Authorization": "Bearer from the environment"}}
    assert TestClient(app).post("/generate", **order).status_code == 200


# --- what is written down


def ours(caplog):
    return [entry.getMessage() for entry in caplog.records if entry.name == log.name]


def test_a_request_cannot_write_a_log_entry_of_its_own(client, caplog):
    with caplog.at_level(logging.INFO):
        client.get("/x%0A2026-01-01 00:00:00,000 INFO%20POST%20/generate%20200%1B[2J", headers=BEARER)
        client.get("/" + "y" * 5000, headers=BEARER)
    forged, long = ours(caplog)
    assert forged.startswith(r"GET /x\n2026-01-01 00:00:00,000 INFO POST /generate 200\x1b[2J 404")
    assert len(long) < 300


def test_strangers_write_few_log_lines_and_no_metrics(packshot, tmp_path, caplog):
    run = Run(tmp_path, resumed=False)
    app = create_app(config(), packshot, run)
    client = TestClient(app)
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            client.get("/nothing")
            client.post("/generate")
    assert len(ours(caplog)) == 60
    assert not (tmp_path / "metrics.jsonl").exists()
    client.get("/nothing", headers=BEARER)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_quota_starts_anew_and_says_what_it_left_out(caplog):
    now = [0.0]
    quota = Quota(2, 60, "requests", lambda: now[0])
    assert [quota.admit() for _ in range(5)] == [True, True, False, False, False]
    now[0] = 59
    assert not quota.admit()
    now[0] = 60
    assert quota.admit()
    assert ours(caplog) == ["4 requests were not logged"]


def test_every_logger_has_a_quota_of_its_own():
    """A flood in one library's logger, such as asyncio's about open files, neither fills the disk nor hides others."""
    quota = QuotaFilter()

    def admitted(name, number):
        records = [logging.makeLogRecord({"name": name}) for _ in range(number)]
        return sum(quota.filter(record) for record in records)

    assert admitted("asyncio", 1000) == 60
    assert admitted("uvicorn.error", 30) + admitted("uvicorn.asgi", 1000) == 60
    assert admitted(log.name, 1000) == 1000


# --- what may be sent


@pytest.mark.parametrize("field", ["product_file", "mask_file"])
@pytest.mark.parametrize("content", [b"text", b"", file(product_pair()[0])[:200], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_content_decides_whether_it_is_an_image(client, field, content):
    order = upload()
    order["files"] = {**order["files"], field: ("photo.png", content, "image/png")}
    assert field in refused(client.post("/generate", **order), 415, "not_an_image")["error"]


def test_too_many_bytes_in_one_file(client):
    order = upload()
    order["files"]["product_file"] = b"\0" * (2**18 + 1)
    assert "product_file" in refused(client.post("/generate", **order), 413, "too_large")["error"]


def test_a_declared_length_over_the_limit_is_refused_at_once(client):
    order = upload()
    order["files"]["product_file"] = b"\0" * 2**21
    refused(client.post("/generate", **order), 413, "too_large")


def test_an_endless_body_without_a_length_is_cut_off(client):
    sent = 0

    def body():
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="product_file"; filename="a.png"\r\n\r\n'
        while sent < 50 * 2**20:
            sent += 2**16
            yield b"\0" * 2**16

    headers = {**BEARER, "Content-Type": "multipart/form-data; boundary=b"}
    response = client.post("/generate", content=body(), headers=headers)
    assert "content-length" not in response.request.headers
    refused(response, 413, "too_large")


def test_too_many_pixels_are_refused_from_the_header(client):
    order = upload()
    order["files"]["product_file"] = file(Image.new("1", (4000, 4000)))[:60]  # the pixels never come
    refused(client.post("/generate", **order), 413, "too_large")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_images": 9}, "num_images"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": "many"}, "num_images"),
        ({"seed": -1}, "seed"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"guidance_scale": 51}, "guidance_scale"),
        ({"placement": "nowhere"}, "original or center"),
        ({"placement": "center"}, "size"),
        ({"placement": "center", "size": "big"}, "size"),
        ({"placement": "center", "size": "10x10"}, "size"),
        ({"placement": "center", "size": "1000x1000"}, "pixels"),
        ({"size": "64x64"}, "placement=original"),
        ({"placement": "original", "size": "64x64"}, "no effect"),
        ({"prompt": "a table"}, "both"),
        ({"prompt": "a" * 3000, "surface": ""}, "prompt"),
        ({"num_image": 2}, "num_images"),
        ({"reference_file": "text"}, "must be a file"),
    ],
)
def test_wrong_fields_are_named(client, fields, says):
    body = refused(client.post("/generate", **upload(**fields)), 422, "invalid_field")
    assert says in f"{body['error']} {body['hint']}"


def test_a_missing_product_and_another_content_type_are_named(client):
    answer = client.post("/generate", data={"surface": "a podium"}, headers=BEARER)
    assert "product_file is missing" in refused(answer, 422, "invalid_field")["error"]
    answer = client.post("/generate", json={"surface": "a podium"}, headers=BEARER)
    assert "multipart" in refused(answer, 422, "invalid_field")["hint"]


def test_a_reference_needs_an_ip_adapter(client):
    order = upload()
    order["files"]["reference_file"] = order["files"]["product_file"]
    assert "adapters.ip_adapter" in refused(client.post("/generate", **order), 422, "no_ip_adapter")["hint"]


@pytest.mark.parametrize(
    "files",
    [
        {"product_file": file(Image.new("RGB", (96, 128), "white"))},
        {"product_file": file(product_pair()[0]), "mask_file": file(Image.new("L", (96, 128), 0))},
        {"product_file": file(product_pair()[0]), "mask_file": file(Image.new("L", (50, 50), 255))},
    ],
    ids=["nothing to find", "empty mask", "mask of another size"],
)
def test_no_product_is_the_clients_error(client, files):
    response = client.post("/generate", files=files, data={"surface": "a podium"}, headers=BEARER)
    refused(response, 422, "unusable_product")


def test_unknown_paths_and_methods(client):
    refused(client.get("/nothing"), 404, "not_found")
    refused(client.get("/generate"), 405, "method_not_allowed")


def test_an_internal_failure_shows_only_its_request_id(packshot, caplog):
    app = create_app(config(), packshot)

    def broken(*arguments):
        raise RuntimeError("secret /path/to/weights")

    app.state.service.queue.devices[0].draw = broken
    response = TestClient(app, raise_server_exceptions=False).post("/generate", **upload())
    body = refused(response, 500, "internal_error")
    assert "secret" not in response.text
    assert "RuntimeError" not in response.text
    assert body["request_id"]


# --- one at a time


@contextlib.contextmanager
def busy(app):
    """The worker thread is taken by a job of ours until the block ends."""
    started = threading.Event()
    release = threading.Event()

    def read():
        started.set()
        release.wait(60)
        raise ApiError(499, "client_gone", "a test's own turn")

    app.state.service.queue.reserve().start(Turn(read, 1))
    assert started.wait(60)
    try:
        yield
    finally:
        release.set()


def waits(app, number):
    return eventually(lambda: app.state.service.queue.waiting == number)


def test_a_full_queue_is_429_and_health_still_answers(packshot):
    app = create_app_unstarted(config("serve.queue_size=1"), packshot)
    with TestClient(app) as client:
        assert eventually(lambda: app.state.service.loaded)
        answers = []
        with busy(app):
            thread = threading.Thread(target=lambda: answers.append(client.post("/generate", **upload())))
            thread.start()
            assert waits(app, 1)
            assert client.get("/health").json()["status"] == "ok"
            assert "packshot_queue_length 1.0" in client.get("/metrics").text
            response = client.post("/generate", **upload())
            refused(response, 429, "queue_full")
            assert int(response.headers["retry-after"]) >= 1
            assert not answers
        thread.join(60)
        assert answers[0].status_code == 200
        assert "packshot_queue_length 0.0" in client.get("/metrics").text


async def ask(app, receive, method="POST", path="/generate", headers=(), send=None):
    """Status and headers of a request made without a client between, so that its body arrives as ``receive`` likes."""
    sent = []

    async def keep(message):
        sent.append(message)
        if send:
            await send()

    fields = [(b"authorization", BEARER["Authorization"].encode()), *headers]
    scope = {"type": "http", "method": method, "path": path, "headers": fields, "query_string": b""}
    await app({**scope, "http_version": "1.1", "scheme": "http", "root_path": ""}, receive, keep)
    return sent[0]["status"], dict(sent[0]["headers"])


def test_a_full_queue_refuses_before_it_reads_the_upload(packshot):
    app = create_app(config("serve.queue_size=0"), packshot)
    read = []

    async def receive():
        read.append(1)
        return {"type": "http.disconnect"}

    with busy(app):
        status, headers = anyio.run(ask, app, receive)
    assert (status, read) == (429, [])
    assert int(headers[b"retry-after"]) >= 1


FORM = ((b"content-type", b"multipart/form-data; boundary=b"),)


def test_an_upload_on_its_way_has_its_place_and_gives_it_back(packshot):
    app = create_app(config("serve.queue_size=0"), packshot)

    async def two():
        begun, end = anyio.Event(), anyio.Event()

        async def slow():
            begun.set()
            await end.wait()
            return {"type": "http.disconnect"}

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, app, slow, "POST", "/generate", FORM)
            await begun.wait()
            status, _ = await ask(app, slow)
            end.set()
        return status

    assert anyio.run(two) == 429
    assert TestClient(app).post("/generate", **upload()).status_code == 200


def test_an_endless_upload_is_408_and_frees_its_place(packshot):
    app = create_app(config("serve.queue_size=0", "serve.timeout_seconds=0.1"), packshot)
    status, _ = anyio.run(ask, app, anyio.sleep_forever, "POST", "/generate", FORM)
    assert status == 408
    app.state.service.queue.reserve()


def test_too_many_requests_are_503_but_probes_pass(packshot):
    app = create_app(config(), packshot)

    async def receive():
        return {"type": "http.request"}

    async def many():
        waiting, end = [], anyio.Event()

        async def stuck():
            waiting.append(1)
            await end.wait()

        async with anyio.create_task_group() as tasks:
            for _ in range(64):
                tasks.start_soon(ask, app, receive, "GET", "/nothing", (), stuck)
            while len(waiting) < 64:
                await anyio.sleep(0)
            answers = [await ask(app, receive, "GET", path) for path in ("/nothing", "/health")]
            end.set()
        return [*answers, await ask(app, receive, "GET", "/nothing")]

    (refusal, headers), (probe, _), (later, _) = anyio.run(many)
    assert (refusal, probe, later) == (503, 200, 404)
    assert int(headers[b"retry-after"]) >= 1


def test_a_late_request_is_504_and_frees_its_place(packshot):
    app = create_app(config("serve.queue_size=1", "serve.timeout_seconds=0.1"), packshot)
    client = TestClient(app)
    with busy(app):
        for _ in range(2):
            refused(client.post("/generate", **upload()), 504, "timeout")
            assert waits(app, 0)


def test_loading_is_503_until_the_model_is_there(packshot):
    release = threading.Event()

    def load():
        release.wait(60)
        return packshot

    app = create_app_unstarted(config(), load)
    with TestClient(app) as client:
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["status"], answer.json()["model_loaded"]) == (503, "loading", False)
        assert "packshot_model_loaded 0.0" in client.get("/metrics").text
        refused(client.post("/generate", **upload()), 503, "model_loading")
        release.set()
        assert eventually(lambda: app.state.service.loaded)
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["status"], answer.json()["model_loaded"]) == (200, "ok", True)
        assert "packshot_model_loaded 1.0" in client.get("/metrics").text


def test_two_apps_in_one_process_count_for_themselves(packshot):
    first, second = (TestClient(create_app(config(), packshot)) for _ in range(2))
    first.get("/nothing")
    first.post("/generate", **upload())
    text = first.get("/metrics").text
    assert 'http_requests_total{endpoint="/generate",method="POST",status_code="200"} 1.0' in text
    assert 'http_requests_total{endpoint="other",method="GET",status_code="404"} 1.0' in text
    assert "packshot_inference_duration_seconds_count 1.0" in text
    assert "http_request_duration_seconds_bucket" in text
    assert "http_requests_active 1.0" in text  # this very request
    other = second.get("/metrics").text
    assert "/generate" not in other
    assert "packshot_inference_duration_seconds_count 0.0" in other


# --- the script


def test_a_port_in_use_is_a_config_error():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match=r"serve\.port=\d+ is in use"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_the_extra_is_named_when_it_is_missing():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from packshot.errors import PackshotError\n"
        "try: import packshot.serve\n"
        "except PackshotError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fastapi" in done.stdout
    assert "pip install packshot[serve]" in done.stdout


def start(tmp_path, *overrides):
    command = [sys.executable, "serve.py", f"run.dir={tmp_path}/run", f"serve.api_key={KEY}", *STEPS, *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_script_serves_and_never_writes_the_key(tmp_path):
    process = start(tmp_path, "serve.port=0")
    try:
        line = next(line for line in process.stderr if "listening on" in line)
        url = line.split("listening on ")[1].split(",")[0]
        while httpx.get(f"{url}/health").status_code == 503:
            assert process.poll() is None
            threading.Event().wait(0.2)
        answer = httpx.post(f"{url}/generate", **upload(seed=1), timeout=300)
        assert answer.status_code == 200, answer.text
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["status"], line["seed"]) for line in lines] == [(1, 200, 1)]
    assert lines[0]["request_id"] == answer.json()["request_id"]
    written = {path.name: path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert {"config.yaml", "log.txt", "metrics.jsonl"} <= set(written)
    assert answer.json()["request_id"] in written["log.txt"]
    assert not [name for name, text in written.items() if KEY in text]


def test_the_script_refuses_a_port_in_use_with_exit_code_2(tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        process = start(tmp_path, f"serve.port={port}")
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2, errors
    assert f"serve.port={port} is in use" in errors
    assert not (tmp_path / "run").exists()


def test_the_script_ends_when_the_model_cannot_be_loaded(tmp_path):
    process = start(tmp_path, "serve.port=0", "model.base=no/such/folder")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode in (1, 2), errors
    assert "no/such/folder" in errors
    assert "Traceback" not in errors
