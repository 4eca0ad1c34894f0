"""The page in a real browser, with the real mini model: from the photograph to the downloads."""

import base64
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from serving_fixtures import KEY, ROOT, served
from webdriver import MISSING, Browser, is_installed

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason=MISSING)]
PHOTO = ROOT / "data" / "products" / "coffee.png"
# Where screenshots go, if they are wanted: SCREENSHOTS=docs/figures pytest -m slow tests/unit/test_browser.py
LEFT = "\ue012"  # the arrow key
SCREENSHOTS = os.environ.get("SCREENSHOTS")
# axe-core's file, if its checks are wanted: AXE=node_modules/axe-core/axe.min.js
AXE = os.environ.get("AXE")

FINDINGS = """
return axe.run().then((result) => result.violations.map((one) => [one.id, one.nodes.map((node) => node.html)]));
"""
# How many pixels of the mask are product.
MASKED = """
const { data } = mask.getContext("2d").getImageData(0, 0, mask.width, mask.height);
let count = 0;
for (let k = 3; k < data.length; k += 4) count += data[k] > 127;
return count;
"""
CHOOSE_PRESET = """
const preset = document.querySelector("#preset");
preset.selectedIndex = 1;
preset.dispatchEvent(new Event("change"));
"""
# Whether the first and the third result are the same file.
SAME_PICTURE = """
return Promise.all([0, 2].map((k) => shown[k].blobs["coffee-5.png"].arrayBuffer())).then((files) => {
  const [first, second] = files.map((file) => new Uint8Array(file));
  return first.length === second.length && first.every((byte, k) => byte === second[k]);
});
"""
# The zip file of all results, as base64.
PACKED = """
return zip(shown.flatMap((one) => Object.entries(one.blobs))).then((blob) => blob.arrayBuffer()).then((data) => {
  let text = "";
  for (const byte of new Uint8Array(data)) text += String.fromCharCode(byte);
  return btoa(text);
});
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    keys = [f"run.dir={folder}/run", "serve.port=0", f"serve.api_key={KEY}", "generate.num_inference_steps=8"]
    with served(["serve.py", *keys]) as (_, url):
        yield url


@pytest.fixture(scope="module")
def browser(url):
    with Browser() as browser:
        browser.size(1280, 1000)
        browser.open(url)
        yield browser


def picture(browser, name):
    if SCREENSHOTS:
        browser.screenshot(Path(SCREENSHOTS) / f"{name}.png")


def check_access(browser):
    """No findings of axe, where it is at hand."""
    if not AXE:
        return
    browser.run(Path(AXE).read_text())
    found = browser.run(FINDINGS)
    assert found == [], json.dumps(found, indent=1)


def drawn(browser, number):
    browser.wait_for("return document.querySelectorAll('#results figure').length === arguments[0] && !running", number)


def test_the_whole_journey(browser):
    check_access(browser)
    browser.type("#key", KEY)
    browser.type("#product_file", str(PHOTO))
    browser.wait_for("return document.querySelector('#mask-status').textContent.startsWith('Found by')")
    assert browser.run("return document.querySelector('[data-needs=references]').hidden")

    found = browser.run(MASKED)
    browser.type("#overlay", LEFT * 24)  # to where the photograph shows no product
    browser.type("#overlay", " ")
    painted = browser.run(MASKED)
    assert painted > found
    browser.click("#undo")
    assert browser.run(MASKED) == found
    browser.type("#overlay", " ")
    assert browser.run("return edited")

    browser.run(CHOOSE_PRESET)
    assert browser.run("return document.querySelector('#surface').value")
    browser.run("document.querySelector('#num_images').value = 2; document.querySelector('#seed').value = 5")
    browser.click("[type=submit]")
    browser.wait_for("return /Waiting|Drawing|Done/.test(document.querySelector('#status').textContent)")
    picture(browser, "page-drawing")
    drawn(browser, 2)
    assert browser.text("#status") == "Done: 2 pictures."
    check_access(browser)
    picture(browser, "page")
    proof = browser.run("return shown[0].blobs['coffee-5.json'].text().then(JSON.parse)")
    assert proof["mask"]["method"] == "file"  # the mended one
    assert proof["core"]["max_abs_diff"] == 0

    browser.click("figure details summary")
    browser.wait_for("return document.querySelectorAll('.layers img').length === 4")

    browser.click("figure .bar button")  # the same seed again
    drawn(browser, 3)  # the first run is still there
    assert browser.run(SAME_PICTURE)

    browser.run("for (const k of [0, 1]) shown[k].figure.querySelectorAll('input')[1].click()")
    browser.click("#compare")
    assert browser.run("return document.querySelectorAll('#compared img').length") == 2
    check_access(browser)
    browser.click("#close")

    with zipfile.ZipFile(io.BytesIO(base64.b64decode(browser.run(PACKED)))) as archive:
        assert archive.testzip() is None
        assert archive.read("coffee-6.png").startswith(b"\x89PNG")

    browser.run("shown[1].figure.querySelector('input').click()")
    browser.click("#clear")
    assert browser.run("return shown.map((one) => one.seed)") == [6]


def test_a_reload_keeps_the_history(browser):
    """What was kept is kept, what was removed stays removed, and the key is still there."""
    browser.open(browser.run("return location.href"))
    browser.wait_for("return document.querySelectorAll('#results figure').length === 1")
    assert browser.run("return shown.map((one) => [one.stem, one.seed])") == [["coffee", 6]]
    assert browser.run("return shown[0].figure.classList.contains('kept')")
    assert browser.run("return shown[0].figure.querySelector('input').checked")


def test_a_reload_follows_the_job_that_is_drawn(browser):
    browser.type("#product_file", str(PHOTO))
    browser.run("document.querySelector('#seed').value = 9")
    browser.run("document.querySelector('#num_inference_steps').value = 40")
    browser.click("[type=submit]")
    browser.wait_for("return running && running.address")
    browser.open(browser.run("return location.href"))
    browser.wait_for("return /Waiting|Drawing/.test(document.querySelector('#status').textContent)")
    drawn(browser, 2)
    assert browser.run("return document.querySelector('#results figure img').alt") == "coffee in its new scene, seed 9"


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(browser, width):
    browser.run("document.documentElement.style.width = arguments[0] ? `${arguments[0]}px` : ''", width)
    browser.size(max(width, 500), 844)
    assert browser.run("return document.documentElement.scrollWidth") <= max(width, 500)
    browser.run("document.documentElement.style.width = ''")


def test_an_error_names_its_field_and_keeps_the_results(browser):
    browser.size(1280, 1000)
    kept = browser.run("return shown.length")
    browser.type("#product_file", str(PHOTO))
    browser.run("document.querySelector('#key').value = 'wrong'")
    browser.click("[type=submit]")
    browser.wait_for("return !document.querySelector('#error').hidden")
    assert browser.run("return document.activeElement.id") == "key"
    assert "API key" in browser.text("#error")
    assert browser.run("return shown.length") == kept


def test_cancelling_deletes_the_job(browser):
    browser.run("document.querySelector('#key').value = arguments[0]", KEY)
    browser.run("document.querySelector('#num_inference_steps').value = 200")
    browser.click("[type=submit]")
    browser.wait_for("return running && running.address")
    address = browser.run("return running.address")
    browser.click("#cancel")
    browser.wait_for("return !running")
    assert browser.text("#status") == "Cancelled."
    browser.wait_for("return ask(arguments[0]).then((answer) => answer.status === 404)", address)


def test_several_products_stand_in_one_picture(browser):
    """Chosen at once; the page's one mask makes way, and comes back for a single product."""
    kept = browser.run("return shown.length")
    browser.run("document.querySelector('#num_inference_steps').value = 2")
    browser.run("document.querySelector('#num_images').value = 1")
    browser.click("#together")
    browser.run("document.querySelector('#product_file').value = ''")
    browser.type("#product_file", f"{PHOTO}\n{PHOTO.with_name('serum.png')}")
    assert browser.run("return document.querySelector('#masking').hidden")
    browser.click("[type=submit]")
    drawn(browser, kept + 1)
    proof = browser.run("return Object.values(shown.at(-1).blobs)[1].text().then(JSON.parse)")
    assert [part.split(" (")[0] for part in proof["transform"]["decoding"]] == ["product_file 1", "product_file 2"]
    browser.click("#together")
    assert not browser.run("return document.querySelector('#product_file').multiple")
    assert browser.run("return document.querySelector('#product_file').files.length") == 0
