"""The page at ``/``: its form is the API's, it may load nothing, and it ships."""

import base64
import hashlib
import io
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw
from serving_fixtures import eventually

from packshot.config.compose import compose
from packshot.generate import Packshot
from packshot.generate.reasons import REASONS
from packshot.scene import SLOTS
from packshot.serve.app import create_app
from packshot.serve.routes import wants_json
from packshot.serve.schemas import GenerateForm

ROOT = Path(__file__).resolve().parents[2]
CONTROLS = ("input", "select", "textarea")


class Page(HTMLParser):
    """Every element as (tag, attributes); options, too, as values of the select before them."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)
        self.controls = {}
        self.options = {}  # values by the select's id
        for tag, a in self.elements:
            if tag in CONTROLS and "name" in a and "form" not in a:
                self.controls[a["name"]] = (tag, a)
            if tag == "select":
                select = self.options.setdefault(a.get("id"), [])
            if tag == "option" and "value" in a:
                select.append(a["value"])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def app():
    return create_app(compose("serve", ["serve.api_key=key"]), Packshot.load)


@pytest.fixture(scope="module")
def answer(app):
    return TestClient(app).get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})


@pytest.fixture(scope="module")
def page(answer):
    return Page(answer.text)


@pytest.fixture(scope="module")
def schema(app):
    """The properties of the form in the published API."""
    document = TestClient(app).get("/openapi.json").json()
    content = document["paths"]["/generate"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    return document["components"]["schemas"][content["$ref"].rsplit("/", 1)[1]]


def test_the_forms_fields_are_the_apis(page, schema):
    assert set(page.controls) == set(schema["properties"]) == set(GenerateForm.model_fields)
    required = {name for name, (_, a) in page.controls.items() if "required" in a}
    assert required - {"num_images"} == set(schema["required"])


def limits(property):
    """minimum, maximum, maxLength and pattern of a property, those inside of ``anyOf`` included."""
    parts = [property, *property.get("anyOf", [])]
    return {key: value for part in parts for key, value in part.items()}


def test_ranges_lengths_and_choices_are_the_apis(page, schema):
    for name, (tag, attributes) in page.controls.items():
        wanted = limits(schema["properties"][name])
        if attributes.get("type") == "number":
            top = wanted.get("maximum", wanted.get("exclusiveMaximum", 0) - 1)
            assert (float(attributes["min"]), float(attributes["max"])) == (wanted["minimum"], top), name
        elif wanted.get("type") == "array":
            assert "data-lines" in attributes or attributes["type"] == "file", name
        elif wanted.get("type") == "boolean":
            assert (attributes["type"], attributes["value"]) == ("checkbox", "true"), name
        elif "maxLength" in wanted:
            assert attributes["maxlength"] == str(wanted["maxLength"]), name
        elif "pattern" in wanted:
            assert f"^{attributes['pattern']}$" == wanted["pattern"], name
        elif tag == "select":
            assert page.options[name] == wanted["enum"]
        else:
            assert attributes["type"] == "file", name


def test_every_field_has_a_label(page):
    labelled = {a.get("for") for tag, a in page.elements if tag == "label"}
    fields = []
    for tag, a in page.elements:
        wrapped = a.get("type") in ("checkbox", "radio")  # by their labels
        if tag in CONTROLS and not wrapped and "aria-label" not in a:
            fields.append(a["id"])
    assert len(fields) > 15
    assert set(fields) <= labelled


def test_every_reason_of_a_certificate_has_its_words(page):
    assert {a["data-code"] for _, a in page.elements if "data-code" in a} == set(REASONS)


def test_the_page_runs_its_own_script_and_nothing_else(answer, page):
    assert answer.headers["content-type"].startswith("text/html")
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    for tag in ("script", "style"):
        [block] = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not [a for _, a in page.elements for key in a if key.startswith("on") or key in ("style", "src", "action")]
    assert {a["href"] for _, a in page.elements if "href" in a} == {"docs"}
    assert "http:" not in answer.text
    assert "https:" not in answer.text


def test_the_page_puts_no_markup_together(answer):
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)


def test_the_vocabulary_is_offered_for_every_slot(answer):
    for row in SLOTS.values():
        for phrase in row.vocabulary:
            assert f"<option>{phrase}</option>" in answer.text


def test_programs_get_json_at_the_same_address(app):
    assert TestClient(app).get("/").headers["content-type"].startswith("text/html")
    answer = TestClient(app).get("/", headers={"Accept": "application/json"})
    assert answer.json()["name"] == "packshot"


@pytest.mark.parametrize(
    ("accept", "json"),
    [("*/*", False), ("text/html, application/json", False), ("application/json;q=1", True), ("", False)],
)
def test_a_page_unless_json_is_asked_for(accept, json):
    assert wants_json(accept) is json


def test_the_untouched_form_with_a_product_is_accepted(page):
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    mask = Image.new("L", (96, 96))
    ImageDraw.Draw(mask).rectangle((30, 30, 65, 65), fill=255)
    files = {}
    for name, image in (("product_file", Image.fromarray(noise)), ("mask_file", mask)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files[name] = buffer.getvalue()
    controls = [(name, a) for name, (_, a) in page.controls.items() if a.get("type") != "checkbox"]
    fields = {name: a["value"] for name, a in controls if a.get("value")}
    fields["placement"] = next(a["value"] for tag, a in page.elements if tag == "option" and "selected" in a)
    settings = compose("serve", ["serve.api_key=key", "generate.num_inference_steps=1", "generate.guidance_scale=1"])
    app = create_app(settings, Packshot.load(model=settings.model))
    with TestClient(app) as client:
        assert eventually(lambda: app.state.service.loaded)
        response = client.post("/generate", files=files, data=fields, headers={"Authorization": "Bearer key"})
    assert response.status_code == 200, response.text
    certificate = response.json()["prediction"]["images"][0]["certificate"]
    assert certificate["core"]["max_abs_diff"] == 0
    assert {"status", "reasons", "lost_words"} <= set(certificate)  # what the page shows


def test_the_page_is_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "src" / "packshot" / "serve"
    shipped = {file for pattern in patterns["packshot.serve"] for file in folder.glob(pattern)}
    assert shipped == {file for file in folder.iterdir() if file.is_file() and file.suffix != ".py"}
    assert shipped
