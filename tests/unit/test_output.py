"""The file that is handed over: format, profile, largest size, marketplaces, and backgrounds of one colour."""

import hashlib
import io
import json
import logging

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from packshot import verify
from packshot.config.compose import compose, with_values
from packshot.config.schema import GenerateSettings
from packshot.errors import ConfigError, PackshotError
from packshot.generate.canvas import Canvas, place
from packshot.generate.certificate_schema import read_certificate
from packshot.generate.output import best_quality, deliver, srgb_profile
from packshot.generate.product import prepare
from packshot.generate.run import generate
from packshot.generate.standards import check_standard

WHITE = "background.color=[255,255,255]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A photograph of a speckled bottle, and its mask."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 200, (300, 240, 3), np.uint8)
    Image.fromarray(cv2.GaussianBlur(noise, (0, 0), 2)).save(folder / "a.png")
    mask = Image.new("L", (240, 300))
    ImageDraw.Draw(mask).rounded_rectangle((80, 40, 160, 260), 20, fill=255)
    mask.save(folder / "mask.png")
    return folder


def made(folder, target, *keys):
    """Folder and certificate of one picture."""
    config = [f"product={folder}/a.png", f"mask={folder}/mask.png", f"run.dir={target}", "num_images=1", *keys]
    generate(compose("generate", config))
    return json.loads((target / "a-0.json").read_text())


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_files_are_srgb_and_certified(folder, tmp_path, name):
    certificate = made(folder, tmp_path / "run", WHITE, f"output.format={name}")
    delivery = certificate["delivery"]
    data = (tmp_path / "run" / delivery["file"]).read_bytes()
    picture = Image.open(io.BytesIO(data))
    assert delivery["file"] == f"a-0.{name}"
    assert picture.format == {"jpg": "JPEG"}.get(name, name.upper())
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"])))
    assert hashlib.sha256(data).hexdigest() == delivery["sha256"]
    master = np.asarray(Image.open(tmp_path / "run" / "a-0.png"))
    difference = np.abs(master.astype(int) - np.asarray(picture.convert("RGB")))
    assert delivery["difference"]["overall"] == {"max": difference.max(), "mean": round(difference.mean(), 4)}
    assert bool(difference.any()) is (name != "png")
    assert certificate["core"]["max_abs_diff"] == 0
    assert read_certificate(tmp_path / "run" / "a-0.json").delivery.file == delivery["file"]


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_verify_takes_master_and_delivery(folder, tmp_path, name):
    made(folder, tmp_path / "run", WHITE, f"output.format={name}")
    certificate = tmp_path / "run" / "a-0.json"
    for file in {f"a-0.{name}", "a-0.png"}:
        findings = verify(tmp_path / "run" / file, certificate, folder / "a.png", folder / "mask.png")
        assert all(finding.passed for finding in findings), findings
    changed = tmp_path / "changed.jpg"
    Image.open(tmp_path / "run" / f"a-0.{name}").convert("RGB").save(changed, quality=20)
    assert not verify(changed, certificate)[0].passed


@pytest.mark.parametrize("name", ["jpg", "webp"])
def test_the_best_quality_that_fits_is_taken(folder, tmp_path, name):
    free = made(folder, tmp_path / "free", WHITE, f"output.format={name}")["delivery"]
    limit = free["bytes"] // 2
    fitted = made(folder, tmp_path / "fitted", WHITE, f"output.format={name}", f"output.max_bytes={limit}")["delivery"]
    assert fitted["bytes"] <= limit
    assert fitted["quality"] < free["quality"] == 95
    assert (tmp_path / "fitted" / f"a-0.{name}").stat().st_size == fitted["bytes"]


def test_bisection_finds_the_highest_fitting_quality():
    for limit in range(30, 96):
        assert best_quality(bytes, 95, limit) == (limit, bytes(limit))
    assert best_quality(bytes, 95, 29) is None
    assert best_quality(bytes, 40, None) == (40, bytes(40))


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_a_size_that_cannot_be_kept_is_refused(folder, tmp_path, name):
    """Nothing of the picture is written."""
    with pytest.raises(PackshotError, match=r"output.max_bytes=700 cannot be kept: a \w+ of 240x300 px has \d+ bytes"):
        made(folder, tmp_path / "run", WHITE, f"output.format={name}", "output.max_bytes=700")
    assert not list((tmp_path / "run").glob("a-0.*"))


def test_a_png_is_packed_tighter_where_that_helps(folder, tmp_path):
    free = made(folder, tmp_path / "free", WHITE)["delivery"]["bytes"]
    certificate = made(folder, tmp_path / "small", WHITE, f"output.max_bytes={free - 1}")
    data = (tmp_path / "small" / "a-0.png").read_bytes()
    assert len(data) < free
    assert certificate["output_sha256"] == certificate["delivery"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert verify(tmp_path / "small" / "a-0.png", tmp_path / "small" / "a-0.json")[0].passed


def test_a_plain_background_is_that_colour(folder, tmp_path, caplog):
    logging.getLogger("packshot").propagate = True
    config = [f"product={folder}/a.png", f"mask={folder}/mask.png", "background.color=[10,200,30]"]
    generate(compose("generate", [*config, f"run.dir={tmp_path}/run"]))
    assert "3 of num_images are left out" in caplog.text
    picture = np.asarray(Image.open(tmp_path / "run" / "a-0.png"))
    mask = np.asarray(Image.open(folder / "mask.png"))
    outside = cv2.dilate(mask, np.ones((5, 5), np.uint8)) == 0
    assert (picture[outside] == (10, 200, 30)).all()
    certificate = json.loads((tmp_path / "run" / "a-0.json").read_text())
    assert certificate["status"] == "accepted", certificate["reasons"]
    assert certificate["model"] == {"adapters": []}
    assert certificate["request"]["background_color"] == [10, 200, 30]
    assert "a-0.png" in (tmp_path / "run" / "report.html").read_text()
    assert len(list((tmp_path / "run").glob("a-*.png"))) == 1


def test_a_main_picture_keeps_its_marketplaces_rules(folder, tmp_path):
    certificate = made(folder, tmp_path / "run", "preset=marketplace_main")
    standard = certificate["delivery"]["standard"]
    assert standard["passed"], standard
    assert certificate["status"] == "accepted", certificate["reasons"]
    picture = np.asarray(Image.open(tmp_path / "run" / "a-0.jpg"))
    assert max(picture.shape[:2]) >= 1600
    coloured = np.flatnonzero((picture.min(axis=2) < 200).any(axis=1))
    assert 0.84 < (coloured[-1] - coloured[0] + 1) / picture.shape[0] < 0.87
    assert (picture[:100, :100] == 255).all()


def test_missed_rules_send_a_picture_to_review(folder, tmp_path):
    keys = ["preset=marketplace_main", "size=[900,900]", "product_scale=0.5", "background.color=[254,255,255]"]
    certificate = made(folder, tmp_path / "run", *keys)
    checks = certificate["delivery"]["standard"]["checks"]
    missed = {rule for rule, check in checks.items() if not check["passed"]}
    assert missed == {"background_error", "product_share", "longer_side_px"}
    assert "standard_missed" in certificate["reasons"]


def test_halos_miss_the_standard(folder):
    canvas = place(prepare(folder / "a.png", folder / "mask.png"), compose("generate", []))
    picture = np.full_like(canvas.rgb_HW3, 255)
    assert check_standard("marketplace_main", picture, canvas)["checks"]["fringe_error"]["passed"]
    picture[cv2.dilate(canvas.matte_HW, np.ones((9, 9), np.uint8)) > 0] = 180
    assert not check_standard("marketplace_main", picture, canvas)["checks"]["fringe_error"]["passed"]


def test_another_format_in_the_same_folder_is_refused(folder, tmp_path):
    made(folder, tmp_path / "run", WHITE)
    with pytest.raises(ConfigError, match=r"delivery\.asked differ"):
        made(folder, tmp_path / "run", WHITE, "output.format=jpg", "run.resume=true")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["output.quality=80"], "output.quality=80 has no effect with output.format=png"),
        (["output.format=jpg", "output.quality=10"], "output.quality=10"),
        (["output.format=gif"], "Allowed are png, jpg, webp"),
        (["background.color=[1,2]"], r"background.color=\[1, 2\] is not a colour"),
        (["background.color=[1,2,300]"], "is not a colour"),
        ([WHITE, "prompt=a table"], "prompt=a table has no effect"),
        ([WHITE, "scene.surface=a table"], "scene.surface=a table has no effect"),
        (["preset=marketplace"], "Did you mean preset=marketplace_main"),
    ],
)
def test_keys_without_sense_are_refused(keys, message):
    with pytest.raises(ConfigError) as error:
        compose("generate", keys)
    assert error.match(message) or pytest.fail(str(error.value))


def test_the_profile_is_the_same_on_any_day():
    assert srgb_profile()[24:36] == bytes(12)
    assert ImageCms.ImageCmsProfile(io.BytesIO(srgb_profile())).profile.xcolor_space.strip() == "RGB"


def test_differences_count_the_core_alone():
    """A file whose background alone suffers keeps its core."""
    matte = np.zeros((64, 64), np.uint8)
    matte[:, :32] = 255
    picture = np.full((64, 64, 3), 128, np.uint8)
    picture[:, 40:] = np.random.default_rng(0).integers(0, 256, (64, 24, 3), np.uint8)
    canvas = Canvas(picture, matte, picture, matte > 0, {})
    config = compose("generate", ["output.format=jpg", "output.quality=30"]).output
    difference = deliver("a", Image.fromarray(picture), b"", canvas, config).report["difference"]
    assert difference["core"]["max"] <= 2
    assert difference["overall"]["max"] > 20


def test_groups_of_keys_are_set_from_python_by_a_dict():
    settings = with_values(GenerateSettings(), {"background": {"color": [1, 2, 3]}})
    assert settings.background.color == [1, 2, 3]
    with pytest.raises(ConfigError, match="is not a colour"):
        with_values(GenerateSettings(), {"background": {"color": [1]}})
    with pytest.raises(ConfigError, match="colour"):
        with_values(GenerateSettings(), {"background": {"colour": [1, 2, 3]}})
