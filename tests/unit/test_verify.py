"""``packshot verify``: what a certificate states is checked again, and one changed pixel fails it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from serving_fixtures import product_pair

from packshot import verify
from packshot.cli import run_command
from packshot.config.compose import compose
from packshot.errors import ConfigError, PackshotError
from packshot.generate.certificate_schema import Certificate, json_schema, read_certificate
from packshot.generate.run import generate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a photograph, its mask, and a run of each: a mask file, an alpha channel, a canvas."""
    folder = tmp_path_factory.mktemp("made")
    photo, mask = product_pair()
    photo.save(folder / "photo.png")
    mask.save(folder / "mask.png")
    cutout = photo.copy()
    cutout.putalpha(mask)
    cutout.save(folder / "cutout.png")
    runs = {
        "file": ["product=photo.png", "mask=mask.png"],
        "alpha": ["product=cutout.png"],
        "canvas": ["product=cutout.png", "placement=left", "size=[200,160]"],
    }
    for name, keys in runs.items():
        paths = [key.replace("=", f"={folder}/", 1) if key.endswith(".png") else key for key in keys]
        steps = ["num_images=1", "num_inference_steps=1", "guidance_scale=1"]
        generate(compose("generate", [*paths, *steps, f"run.dir={folder / name}"]))
    return folder


def files(folder, run):
    """Picture and certificate of a run."""
    [certificate] = (folder / run).glob("*-0.json")
    return certificate.with_suffix(".png"), certificate


def passed(findings):
    return [finding.passed for finding in findings]


def with_changed_pixel(image, folder, x, y):
    """A copy of a picture in which one channel of one pixel has another value."""
    pixels = np.array(Image.open(image))
    pixels[y, x, 0] ^= 1
    changed = folder / "changed.png"
    Image.fromarray(pixels).save(changed)
    return changed


@pytest.mark.parametrize("run", ["alpha", "canvas"])
def test_a_picture_holds_with_its_photograph(made, run):
    findings = verify(*files(made, run), made / "cutout.png")
    assert passed(findings) == [True] * 5, findings


def test_a_mask_file_has_to_be_named(made):
    arguments = [*files(made, "file"), made / "photo.png"]
    assert all(passed(verify(*arguments, mask=made / "mask.png")))
    unnamed = verify(*arguments)
    assert passed(unnamed) == [True, True, True, False]
    assert "--mask" in unnamed[-1].text


def test_one_changed_pixel_fails(made, tmp_path):
    """In the background the file differs; in the product the comparison with the photograph finds it, too."""
    image, certificate = files(made, "alpha")
    background = with_changed_pixel(image, tmp_path, 2, 2)
    assert passed(verify(background, certificate)) == [False, True]
    assert passed(verify(background, certificate, made / "cutout.png")) == [False, True, True, True, True]
    product = with_changed_pixel(image, tmp_path, 50, 70)
    findings = verify(product, certificate, made / "cutout.png")
    assert passed(findings) == [False, True, True, False, False]
    assert "by up to 1 of 255" in findings[3].text


def test_another_photograph_fails(made, tmp_path):
    other = with_changed_pixel(made / "cutout.png", tmp_path, 50, 70)
    findings = verify(*files(made, "alpha"), other)
    assert passed(findings) == [True, True, False, False, False]


def test_a_certificate_that_contradicts_itself_fails(made, tmp_path):
    image, certificate = files(made, "alpha")
    text = json.loads(certificate.read_text())
    text["core"]["sha256_output"] = "0" * 64
    (tmp_path / "c.json").write_text(json.dumps(text))
    assert passed(verify(image, tmp_path / "c.json")) == [True, False]


@pytest.mark.parametrize(
    "changed",
    [
        {"offset": [-5, 0]},
        {"offset": [190, 0]},
        {"size": [200_000, 200_000]},
        {"placed_size": [0, 0]},
        {"placed_size": [200_000, 200_000]},
        {"placed_size": None},
        {"source_box": [5, 5, 5, 5]},
        {"source_box": [0, 0, 5000, 5000]},
    ],
)
def test_a_transform_that_cannot_be_fails(made, tmp_path, changed):
    """Certificates come from strangers: these ended with a traceback, or took all memory."""
    image, certificate = files(made, "canvas")
    text = json.loads(certificate.read_text())
    text["transform"].update(changed)
    (tmp_path / "c.json").write_text(json.dumps(text))
    *_, last = verify(image, tmp_path / "c.json", made / "cutout.png")
    assert not last.passed
    assert "the certificate's transform cannot be that of a picture" in last.text


def test_the_command_ends_with_1_where_a_check_fails(made, tmp_path, capsys):
    image, certificate = files(made, "alpha")
    with pytest.raises(SystemExit) as ended:
        run_command("verify", [str(image), str(certificate), str(made / "cutout.png")])
    assert (ended.value.code, capsys.readouterr().out.count("ok ")) == (0, 5)
    changed = with_changed_pixel(image, tmp_path, 2, 2)
    with pytest.raises(SystemExit) as ended:
        run_command("verify", [str(changed), str(certificate)])
    assert ended.value.code == 1
    assert "FAILED" in capsys.readouterr().out


def test_real_certificates_follow_the_schema(made):
    """The schema names every key of the parts that it describes as its own."""
    for run in ("file", "alpha", "canvas"):
        _, certificate = files(made, run)
        read_certificate(certificate)
    required = json_schema()["required"]
    assert {"status", "reasons", "core", "mask", "output_sha256"} <= set(required)


@pytest.mark.parametrize("key", sorted(Certificate.model_json_schema()["required"]))
def test_a_missing_key_is_named(made, tmp_path, key):
    _, certificate = files(made, "alpha")
    text = json.loads(certificate.read_text())
    del text[key]
    (tmp_path / "c.json").write_text(json.dumps(text))
    with pytest.raises(PackshotError, match=rf"c\.json is not a certificate: {key}: "):
        read_certificate(tmp_path / "c.json")


def test_what_is_no_certificate_is_refused(made, tmp_path):
    image, _ = files(made, "alpha")
    shutil.copy(image, tmp_path / "c.json")
    with pytest.raises(PackshotError, match="is not a certificate"):
        read_certificate(tmp_path / "c.json")


def test_a_missing_file_is_a_wrong_argument(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"nowhere\.json: there is no such file.\n  packshot verify IMAGE"):
        verify(*[str(picture), str(tmp_path / "nowhere.json")])
    with pytest.raises(PackshotError, match=r"it is not JSON.\n  Name the \.json"):
        verify(*[str(picture), str(picture)])
