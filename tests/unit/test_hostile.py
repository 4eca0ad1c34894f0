"""Requests that mean harm or make no sense: none of them is a server error, and the server still answers after them."""

import random

import httpx
import pytest
from fastapi.testclient import TestClient
from hostile import attack, cases, png
from serving_fixtures import BEARER, KEY, FakePackshot, config, eventually, fake_server, served, upload

from packshot.serve.app import create_app
from packshot.serve.schemas import GenerateForm


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    keys = ["serve.max_upload_mib=1", "serve.max_pixels=1000000", "serve.requests_per_minute=100000"]
    with served(fake_server(tmp_path_factory.mktemp("run"), *keys, "serve.header_seconds=2")) as (_, url):
        yield url


def test_hostile_requests_are_no_server_errors(server):
    found = attack(server, KEY)
    assert len(found) == len(dict(cases(KEY))) >= 150
    assert {name: status for name, status in found.items() if status >= 500 or status < 0} == {}
    assert httpx.post(f"{server}/generate", **upload(), timeout=30).status_code == 200


def app_client(*keys):
    return TestClient(create_app(config("serve.requests_per_minute=1000000", *keys), FakePackshot()))


def values_of(field, chooser):
    """A value for a form field, by its published schema: from inside of its limits, from their edges, or wrong."""
    kind = field.get("type")
    if kind == "boolean":
        return chooser.choice(["true", "false", "1", "maybe", ""])
    if "enum" in field:
        return chooser.choice([*field["enum"], "other", ""])
    if kind in ("integer", "number"):
        low = field.get("minimum", 0)
        high = field.get("maximum", field.get("exclusiveMaximum", 100))
        inside = chooser.uniform(low, min(high, low + 50))
        numbers = [low, high, low - 1, high + 1, inside, -inside]
        value = chooser.choice([*numbers, "nan", "inf", "", "x", "1e999", None])
        return int(value) if kind == "integer" and isinstance(value, float) else value
    if "pattern" in field:
        return chooser.choice(["64x64", "128x96", "99999x99999", "x", "1x1", "640x480", ""])
    longest = field.get("maxLength", 2000)
    length = chooser.choice([0, 1, 20, longest, longest + 1])
    return "".join(chooser.choice("abc ,.<&'\"\\\0\n\u00e9\u202e\U0001f4a5") for _ in range(length))


def random_form(schema, chooser):
    """Fields and files of a request; half of them hold few fields, so that many pass whatever the form's length."""
    fields = {}
    files = []
    share = chooser.choice([0.03, 0.03, 0.1, 0.4])
    for name, field in schema["properties"].items():
        if name.endswith("_file"):
            wanted = 0.95 if name in schema["required"] else 0.15
            count = chooser.choice([*[1] * 12, 2, 9]) if field.get("type") == "array" else 1
            for _ in range(count if chooser.random() < wanted else 0):
                files.append((name, chooser.choice([png(), png(), png(), png(32, 32), b"", b"text", png()[:60]])))
        elif chooser.random() < share:
            if field.get("type") == "array":
                fields[name] = [values_of(field["items"], chooser) for _ in range(chooser.choice([0, 1, 3, 17]))]
            else:
                fields[name] = values_of(field, chooser)
    if fields.get("together") in ("true", "1") and chooser.random() < 0.7:
        files += [("product_file", png()), ("product_file", png())]
    if chooser.random() < 0.05:
        fields[chooser.choice(["sed", "__class__", "file", ""])] = "1"
    return {name: value for name, value in fields.items() if value is not None}, files


@pytest.mark.slow
def test_3000_forms_by_the_schema_are_no_server_errors():
    """Forms drawn from the published schema, to every endpoint that takes one; answers have the documented form."""
    chooser = random.Random(0)
    statuses = []
    with app_client("serve.max_pixels=1000000") as client:
        assert eventually(lambda: client.app.state.service.loaded)
        document = client.get("/openapi.json").json()
        schema = document["components"]["schemas"]["GenerateForm"]
        assert set(schema["properties"]) == set(GenerateForm.model_fields)
        while len(statuses) < 3000:
            path = chooser.choice(["/generate", "/generate", "/jobs", "/mask"])
            fields, files = random_form(schema, chooser)
            accept = chooser.choice(["*/*", "application/json", "image/png", "image/jpeg"])
            sent = files or [("product_file", b"")]
            answer = client.post(path, data=fields, files=sent, headers={**BEARER, "Accept": accept})
            assert answer.status_code < 500, (answer.status_code, path, fields, answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()) == {"success", "error", "error_code", "request_id", "hint"}
            statuses.append(answer.status_code)
    assert statuses.count(200) + statuses.count(202) > 300


def test_the_published_form_has_no_null():
    """A form cannot send null, so the schema must not offer it."""
    schemas = app_client().get("/openapi.json").json()["components"]["schemas"]
    for name in ("GenerateForm", "MaskForm"):
        assert '"null"' not in str(schemas[name]).replace("'", '"')


@pytest.mark.parametrize("path", ["/", "/health", "/docs"])
def test_head_answers_like_get_without_a_body(path):
    with app_client() as client:
        assert eventually(lambda: client.app.state.service.loaded)
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_a_field_that_is_given_twice_is_refused():
    with app_client() as client:
        assert eventually(lambda: client.app.state.service.loaded)
        files = [("product_file", png()), ("product_file", png())]
        for fields, sent in (({}, files), ({"seed": ["1", "2"]}, files[:1])):
            answer = client.post("/generate", data=fields, files=sent, headers=BEARER)
            assert (answer.status_code, answer.json()["error_code"]) == (422, "invalid_field")
            assert "2 times" in answer.json()["error"]
        again = {"surroundings": ["a", "b"]}
        assert client.post("/generate", data=again, files=files[:1], headers=BEARER).status_code == 200


def test_what_cannot_be_sent_is_not_acceptable():
    with app_client() as client:
        assert eventually(lambda: client.app.state.service.loaded)
        order = upload()
        answer = client.post("/generate", **{**order, "headers": {**BEARER, "Accept": "image/jpeg"}})
        assert (answer.status_code, answer.json()["error_code"]) == (406, "not_acceptable")


def test_too_much_work_is_refused():
    with app_client() as client:
        assert eventually(lambda: client.app.state.service.loaded)
        answer = client.post("/generate", **upload(num_inference_steps=1000, num_images=8))
        assert (answer.status_code, answer.json()["error_code"]) == (422, "too_much_work")
        assert "400" in answer.json()["error"]


def test_the_docs_page_loads_nothing_and_runs_nothing():
    answer = app_client().get("/docs")
    assert "script-src 'none'" in answer.headers["content-security-policy"]
    for word in ("<script", "http:", "https:", "<link", "<img"):
        assert word not in answer.text
    for path in ("/generate", "/jobs/{job_id}/events", "/mask"):
        assert path in answer.text


def test_the_mask_is_the_one_that_generation_finds():
    with app_client() as client:
        assert eventually(lambda: client.app.state.service.loaded)
        answer = client.post("/mask", files={"product_file": png()}, headers=BEARER).json()
        assert (answer["width"], answer["height"], answer["method"]) == (64, 64, "alpha")
        assert client.post("/mask", files={"product_file": b"text"}, headers=BEARER).status_code == 415
        assert client.post("/mask", files={"product_file": png()}).status_code == 401
