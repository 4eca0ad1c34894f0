"""Curation: backgrounds that are not empty, text, near-duplicates by embedding; each leaves out that and no more."""

import importlib.util
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from onnx_fixtures import coarse_colours, colour_detector
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from packshot.config.compose import compose
from packshot.dataset.near_duplicates import hamming, perceptual_hash
from packshot.dataset.similar import find_similar, to_levels
from packshot.errors import ConfigError
from packshot.imaging.emptiness import product_confidence
from packshot.imaging.text_share import text_share
from packshot.make_dataset.curation import MEASURES
from packshot.make_dataset.run import build

RENDERS = "data/rendered/heldout/part-00000.parquet"


def renders(name, count):
    cells = pq.read_table(RENDERS, columns=[name]).column(0)[:count].to_pylist()
    return [Image.open(io.BytesIO(cell["bytes"])).convert("RGB") for cell in cells]


def run(source, out, *overrides):
    keys = [f"source.path={source}", f"run.dir={out}", "dataset=background", "quality.duplicate_distance=-1"]
    build(compose("build_data", [*keys, *overrides]))
    rows = [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    left = pq.read_table(out / "rejected.parquet").to_pylist()
    return {row["source"][4:]: row for row in rows}, {row["source"][4:]: row for row in left if not row["kept"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def wall(seed, size=(320, 240)):
    """A plain wall with a soft light and grain."""
    rng = np.random.default_rng(seed)
    light_HW = np.linspace(0, 60, size[0])[None] + np.linspace(0, 30, size[1])[:, None]
    pixels = rng.integers(90, 150, 3) + light_HW[..., None] + rng.normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def written(image, text, height, tone):
    image = image.copy()
    font = ImageFont.load_default(height)
    ImageDraw.Draw(image).text((20, 60), text, font=font, fill=(tone, tone, tone))
    return image


@pytest.mark.parametrize(
    ("text", "height", "tone"), [("preview", 24, 255), ("SALE 49.99", 40, 10), ("www.shop.eu", 16, 0)]
)
def test_text_is_found_and_a_wall_has_none(text, height, tone):
    plain = wall(3)
    assert text_share(plain) == 0
    found = text_share(written(plain, text, height, tone))
    left, top, right, bottom = ImageDraw.Draw(plain).textbbox((20, 60), text, font=ImageFont.load_default(height))
    assert 0.4 < found / ((right - left) * (bottom - top) / (320 * 240)) < 1.5


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (64, 64)])
def test_pictures_of_any_shape_are_measured(size):
    assert text_share(Image.new("RGB", size, "white")) == 0


def test_text_and_products_are_left_out_of_backgrounds(folder, tmp_path):
    """Each measure is a column, and the reason names it with its value."""
    for number in range(2):
        wall(number).save(folder / f"empty{number}.png")
    written(wall(5), "copyright", 40, 255).save(folder / "text.png")
    for number, image in enumerate(renders("image", 3)):
        image.save(folder / f"product{number}.png")
    keys = ["curation.max_foreground=0.04", "curation.max_text=0", "quality.min_sharpness=0", "shard_size=4"]
    rows, left = run(folder, tmp_path / "out", *keys)
    assert set(rows) == {"empty0.png", "empty1.png"}
    assert {row["text_share"] for row in rows.values()} == {0}
    assert all(0 <= row["foreground_share"] <= 0.04 for row in rows.values())
    assert left["text.png"]["reason"] == "text"
    assert left["text.png"]["measure"].startswith("text_share 0.")
    assert [left[f"product{n}.png"]["reason"] for n in range(3)] == ["not_empty"] * 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| text_share | " in card
    assert MEASURES["foreground"].about in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("key", ["max_foreground", "max_product"])
def test_products_are_not_asked_to_be_empty(key):
    with pytest.raises(ConfigError, match=rf"curation\.{key}=0\.1 would reject the products of dataset=product"):
        compose("build_data", [f"curation.{key}=0.1"])


def test_products_are_told_from_plants_and_stones(folder, tmp_path):
    """Scenes with and without their product: what lies around it stays."""
    for number, (scene, plate) in enumerate(zip(renders("image", 24), renders("plate", 24), strict=True)):
        scene.save(folder / f"scene{number:02d}.png")
        plate.save(folder / f"plate{number:02d}.png")
    rows, left = run(folder, tmp_path / "out", "curation.max_product=0.27", "quality.min_sharpness=0")
    assert {row["reason"] for row in left.values()} == {"shows_product"}
    assert sum(name.startswith("scene") for name in left) >= 22
    assert sum(name.startswith("plate") for name in rows) >= 22


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (128, 128)])
def test_an_even_picture_shows_no_product(size):
    assert product_confidence(Image.new("RGB", size, "grey")) < 0.1


def test_near_duplicates_are_found_by_embedding(folder, tmp_path):
    """A brightened crop of a scene, turned by two degrees, has another hash and nearly the same vector."""
    scenes = renders("image", 3)
    for number, image in enumerate(scenes):
        image.save(folder / f"{number}.png")
    changed = scenes[1].rotate(2).crop((5, 5, 123, 123)).resize((160, 160))
    changed = ImageEnhance.Brightness(changed).enhance(1.1)
    changed.save(folder / "9.jpg")
    assert hamming(perceptual_hash(changed), perceptual_hash(scenes[1])) > 4
    rows, left = run(folder, tmp_path / "out", "curation.max_similarity=0.9", "shard_size=2")
    assert set(rows) == {"0.png", "1.png", "2.png"}
    assert left["9.jpg"]["reason"] == "similar"
    value, twin = left["9.jpg"]["measure"].split()
    assert float(value) >= 0.9
    assert twin == rows["1.png"]["id"]
    assert rows["0.png"]["nearest_similarity"] == 0
    assert 0 < rows["2.png"]["nearest_similarity"] < 0.9


def test_a_changed_limit_keeps_the_vectors(folder, tmp_path):
    for number, image in enumerate(renders("image", 3)):
        image.save(folder / f"{number}.png")
    out = tmp_path / "out"
    run(folder, out, "curation.max_similarity=0.99")
    before = (out / "steps" / "embedding" / "00000.parquet").stat().st_mtime_ns
    rows, _ = run(folder, out, "curation.max_similarity=0.01", "run.resume=true")
    assert list(rows) == ["0.png"]
    assert (out / "steps" / "embedding" / "00000.parquet").stat().st_mtime_ns == before


def test_an_encoder_that_is_none_is_refused(folder, tmp_path):
    wall(0).save(folder / "0.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"curation\.encoder"):
        run(folder, tmp_path / "out", "curation.max_similarity=0.9", f"curation.encoder={tmp_path / 'empty'}")
    assert not (tmp_path / "out").exists()


def by_hand(vectors, limit):
    """The same pass, pair by pair."""
    kept, found = [], []
    for vector in vectors:
        best, place = 0.0, None
        for other in kept:
            cosine = int(vector @ vectors[other]) / np.linalg.norm(vector) / np.linalg.norm(vectors[other])
            if place is None or cosine > best:
                best, place = cosine, other
        found.append((place, best))
        if place is None or best < limit:
            kept.append(len(found) - 1)
    return found


@pytest.mark.parametrize("width", [8, 1500])
def test_similarity_is_that_of_all_pairs(monkeypatch, width):
    """In blocks smaller than the set, and for vectors too long for exact sums in 32 bits."""
    from packshot.dataset import similar

    monkeypatch.setattr(similar, "_BLOCK", 16)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(9, width))
    vectors = [centres[rng.integers(9)] + rng.normal(0, 0.15, width) for _ in range(70)]
    levels = [to_levels(vector) for vector in vectors]
    integers = [np.frombuffer(value, np.int8).astype(np.int64) for value in levels]
    expected = by_hand(integers, 0.9)
    found = find_similar(levels, 0.9)
    assert [place for place, _ in found] == [place for place, _ in expected]
    np.testing.assert_allclose([value for _, value in found], [value for _, value in expected], atol=1e-12)
    assert sum(value >= 0.9 for _, value in found) > 40
    assert find_similar([], 0.9) == []
    assert to_levels(np.zeros(3)) == b"\0\0\0"


CLASSES = ["FACE_FEMALE", "FEMALE_BREAST_EXPOSED", "CAT"]  # as sure as a picture is red, green and blue


def of_colour(folder, name, colour, share):
    """A wall with a patch of a colour over a share of its height."""
    image = wall(sum(colour))
    image.paste(colour, (0, 0, image.width, round(share * image.height)))
    image.save(folder / f"{name}.png")


def test_faces_and_nudity_are_left_out_each_by_its_key(folder, tmp_path, capsys):
    """The letterbox of a wide picture is black, so a mean counts by the share of the square."""
    of_colour(folder, "red", (255, 0, 0), 0.9)
    of_colour(folder, "green", (0, 255, 0), 0.9)
    of_colour(folder, "blue", (0, 0, 255), 0.9)
    detector = colour_detector(tmp_path / "d.onnx", CLASSES)
    keys = ["quality.min_sharpness=0", f"curation.detector={detector}", "curation.max_face=0.5"]
    rows, left = run(folder, tmp_path / "faces", *keys)
    assert set(rows) == {"green.png", "blue.png"}
    assert left["red.png"]["reason"] == "face"
    assert float(left["red.png"]["measure"].split()[1]) == pytest.approx(0.75 * 0.95, abs=0.03)
    assert "curation.max_face=0.5" in capsys.readouterr().out
    rows, left = run(folder, tmp_path / "both", *keys, "curation.max_nudity=0.5")
    assert {name: row["reason"] for name, row in left.items()} == {"red.png": "face", "green.png": "nudity"}
    assert rows["blue.png"]["face_confidence"] < 0.1
    assert rows["blue.png"]["nudity_confidence"] < 0.1
    page = (tmp_path / "both" / "report.html").read_text()
    for reason in ("face", "nudity"):
        heading = page.index(f"<h2>Left out: {reason} (1)</h2>")
        assert page.index('<img alt="" src="data:image/', heading) < page.index("</figure>", heading)
    assert MEASURES["nudity"].about in page


@pytest.mark.parametrize(
    ("names", "key", "words"),
    [
        (["CAT", "DOG", "CUP"], "max_face", "needs a detector of face, and curation.detector=.* knows CAT, DOG, CUP"),
        (["FACE", "CAT", "DOG"], "max_nudity", "needs a detector of nudity, and .* knows FACE, CAT, DOG"),
        (["FACE", "CAT"], "max_face", r"names 2 classes and gives an output of shape \(1, 7, 1\)"),
        ([], "max_face", "names 0 classes"),
    ],
)
def test_a_detector_of_other_things_is_refused(folder, tmp_path, names, key, words):
    wall(0).save(folder / "0.png")
    detector = colour_detector(tmp_path / "d.onnx", names)
    with pytest.raises(ConfigError, match=words):
        run(folder, tmp_path / "out", f"curation.{key}=0.5", f"curation.detector={detector}")
    assert not (tmp_path / "out").exists()


def test_the_licence_in_a_detector_counts(folder, tmp_path):
    wall(0).save(folder / "0.png")
    keys = [f"curation.detector={colour_detector(tmp_path / 'd.onnx', CLASSES)}", "curation.max_face=0.9"]
    commercial = ["licenses.commercial=true", "source.license=CC0-1.0"]
    with pytest.raises(ConfigError, match=r"curation\.detector=.* is under 'GPL-9'"):
        run(folder, tmp_path / "out", *keys, *commercial)
    rows, _ = run(folder, tmp_path / "out", *keys, *commercial, 'licenses.allowed=["GPL-9"]')
    assert list(rows) == ["0.png"]


def test_a_missing_detector_names_the_extra(folder, tmp_path, monkeypatch):
    wall(0).save(folder / "0.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"packshot\[safety\]"):
        run(folder, tmp_path / "out", "curation.max_face=0.5")


def test_nudenet_sees_the_astronaut_and_no_cup(folder, tmp_path):
    if importlib.util.find_spec("nudenet") is None:
        pytest.skip("the extra safety is not installed: pip install 'packshot[safety]'")
    data = pytest.importorskip("skimage.data")
    for name in ("astronaut", "coffee", "rocket", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    rows, left = run(folder, tmp_path / "out", "curation.max_face=0.4", "curation.max_nudity=0.4")
    assert {name: row["reason"] for name, row in left.items()} == {"astronaut.png": "face"}
    assert set(rows) == {"coffee.png", "rocket.png", "chelsea.png"}


@pytest.mark.parametrize("tokens", [False, True])
def test_an_onnx_file_can_be_the_encoder(folder, tmp_path, tokens):
    """A turned crop of a scene has nearly its colours; of a sequence of tokens the first counts."""
    scenes = renders("image", 3)
    for number, image in enumerate(scenes):
        image.save(folder / f"{number}.png")
    scenes[1].rotate(2).crop((4, 4, 124, 124)).save(folder / "9.png")
    encoder = coarse_colours(tmp_path / "encoder.onnx", tokens=tokens)
    keys = ["curation.max_similarity=0.97", f"curation.encoder={encoder}"]
    rows, left = run(folder, tmp_path / "out", *keys)
    assert set(rows) == {"0.png", "1.png", "2.png"}
    assert left["9.png"]["measure"].split()[1] == rows["1.png"]["id"]
    before = (tmp_path / "out" / "steps" / "embedding" / "00000.parquet").stat().st_mtime_ns
    again = coarse_colours(tmp_path / "moved.onnx", tokens=tokens)
    run(folder, tmp_path / "out", keys[0], f"curation.encoder={again}", "run.resume=true")
    assert (tmp_path / "out" / "steps" / "embedding" / "00000.parquet").stat().st_mtime_ns == before
