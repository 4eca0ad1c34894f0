"""build_data: what goes in, what comes out, what is left out and why (rules 27-31 of the data chapter)."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx_fixtures import dark_is_product
from PIL import Image, ImageDraw, ImageFilter

from packshot.config.compose import compose
from packshot.config.schema import ExecutorConfig, ExecutorKind
from packshot.dataset import corrections
from packshot.dataset.near_duplicates import find_duplicates, hamming, perceptual_hash
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError, PackshotError
from packshot.imaging.files import pair_masks
from packshot.make_dataset.quality import sharpness
from packshot.make_dataset.run import build
from packshot.pipeline.executor import open_executor
from packshot.scene import Scene

ROOT = Path(__file__).resolve().parents[2]
CAPTION = "Professional photo of an object on a marble table, a white wall in the background"


def photo(seed, size=(96, 80)):
    """An ellipse on a plain background, both of a colour, at a place, and of a shape that follow from the seed."""
    rng = np.random.default_rng(seed)
    light, dark = rng.integers(190, 256, 3), rng.integers(0, 90, 3)
    image = Image.new("RGB", size, tuple(map(int, light)))
    left, top = int(rng.integers(12, size[0] // 3)), int(rng.integers(10, size[1] // 3))
    box = (left, top, left + int(rng.integers(28, 50)), top + int(rng.integers(24, 44)))
    ImageDraw.Draw(image).ellipse(box, fill=tuple(map(int, dark)))
    pixels = np.asarray(image) + rng.normal(0, 3, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for seed in range(5):
        photo(seed).save(folder / f"{seed}.png")
    photo(5).save(folder / "more" / "5.png")
    return folder


def run(source, out, *overrides):
    # The path is quoted for Hydra: a glob has brackets.
    keys = [f"source.path='{source}'", f"run.dir={out}", "quality.duplicate_distance=0", *overrides]
    build(compose("build_data", keys))
    return out


def rows(out):
    return [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def rejected(out):
    return {row["source"].split("/", 1)[1]: row for row in pq.read_table(out / "rejected.parquet").to_pylist()}


def dataset_bytes(out):
    """Everything but what says when and where: the log, the metrics, the config."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("log.txt", "metrics.jsonl", "config.yaml")
    }


# --- what comes out


def test_a_product_set_opens_in_datasets_as_it_is(photos, tmp_path):
    import datasets

    (photos / "0.png.txt").write_text(CAPTION)
    out = run(photos, tmp_path / "out", "source.license=CC0-1.0", "shard_size=4")
    files = str(out / "part-*.parquet")
    table = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    usual = ["image", "mask", "text", "id", "scene", "source", "license", "width", "height"]
    assert table.column_names == [*usual, "caption_origin", "status", "reasons", "mask_confidence"]
    assert set(table["status"]) == {"accepted"}
    assert list(table["caption_origin"]) == ["source", "", "", "", "", ""]
    assert len(table) == 6
    assert isinstance(table.features["image"], datasets.Image)
    assert isinstance(table.features["mask"], datasets.Image)
    first = table[0]
    np.testing.assert_array_equal(np.asarray(first["image"]), np.asarray(photo(0)))
    assert first["mask"].size == first["image"].size == (first["width"], first["height"]) == (96, 80)
    assert first["mask"].getextrema() == (0, 255)
    assert (first["text"], first["license"], first["source"]) == (CAPTION, "CC0-1.0", "photos/0.png")
    assert Scene.from_dict(first["scene"]) == Scene.parse(CAPTION).scene
    assert (table[5]["source"], table[5]["text"]) == ("photos/more/5.png", "")
    assert Scene.from_dict(table[5]["scene"]) == Scene()


def test_the_trainers_read_a_background_set(photos, tmp_path):
    """It has no masks."""
    for seed in range(5):
        (photos / f"{seed}.txt").write_text(CAPTION)
    (photos / "more" / "5.txt").write_text(CAPTION)
    out = run(photos, tmp_path / "out", "dataset=background")
    assert "mask" not in rows(out)[0]
    loaded = load_rows("data.train", str(out))
    assert len(loaded) == 6
    assert loaded[0]["scene"] == Scene.parse(CAPTION).scene


def test_card_and_contact_sheet(photos, tmp_path):
    """They show counts, licences and pictures."""
    (photos / "empty.png").write_bytes(b"")
    out = run(photos, tmp_path / "out", "source.license=CC-BY-4.0")
    card = (out / "README.md").read_text()
    assert "| CC-BY-4.0 | 6 |" in card
    assert "| empty_file | 1 |" in card
    assert "data_files: part-*.parquet" in card
    assert Image.open(out / "contact_sheet.png").size == (4 * 384, 2 * 192)
    counts = json.loads((out / "metrics.jsonl").read_text())
    assert (counts["images"], counts["accepted"], counts["rejected"]) == (7, 6, 1)


def test_transparent_cut_outs_are_stored_over_white(tmp_path):
    """Their alpha becomes the mask."""
    pixels = np.random.default_rng(0).integers(0, 200, (80, 80, 4), np.uint8)
    pixels[..., 3] = 0
    pixels[20:60, 20:60, 3] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "cut.png")
    (row,) = rows(run(tmp_path / "in", tmp_path / "out"))
    image = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    assert (image[:20] == 255).all()
    np.testing.assert_array_equal(image[20:60, 20:60], pixels[20:60, 20:60, :3])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"]))), pixels[..., 3])


# --- what is left out


def test_rejected_samples_keep_reason_and_measure(photos, tmp_path):
    Image.new("RGB", (90, 90), "white").save(photos / "blank.png")
    photo(6, (40, 300)).save(photos / "narrow.png")
    photo(7).filter(ImageFilter.GaussianBlur(12)).save(photos / "soft.png")
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    Image.fromarray(noise).save(photos / "noise.png")
    (photos / "list.png").write_text("milk, bread")
    shutil.copy(photos / "0.png", photos / "copy.png")
    photo(8).convert("RGB").save(photos / "wrong.png", "JPEG", quality=95)  # decoded by content, kept
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    out = run(photos, tmp_path / "out")
    found = rejected(out)
    assert {name: row["reason"] for name, row in found.items()} == {
        "blank.png": "empty",
        "copy.png": "duplicate",
        "list.png": "not_an_image",
        "narrow.png": "too_small",
        "noise.png": "no_product",
        "soft.png": "blurred",
    }
    assert found["narrow.png"]["measure"] == "40x300"
    assert "for a set of styles or scenes set dataset=background" in (out / "log.txt").read_text()
    assert found["noise.png"]["measure"].startswith("confidence 0.")
    assert found["copy.png"]["measure"] == rows(out)[0]["id"]
    assert all(len(row["id"]) == 64 for row in found.values())
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before
    assert len(rows(out)) == 7


def test_a_raised_pixel_limit_holds_for_every_step(photos, tmp_path, monkeypatch):
    """It holds for masks too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr("packshot.make_dataset.steps.MAX_PIXELS", 1000)
    (tmp_path / "masks").mkdir()
    given = Image.new("L", (96, 80))
    given.paste(255, (10, 10, 50, 50))
    given.save(tmp_path / "masks" / "0.png")
    out = run(photos / "0.png", tmp_path / "out", f"source.masks={tmp_path}/masks", "quality.max_pixels=7680")
    assert [row["source"] for row in rows(out)] == ["photos/0.png"]


def test_near_duplicates_across_shards_are_rejected(photos, tmp_path):
    """The earlier sample stays."""
    photo(1).resize((192, 160)).save(photos / "z.jpg", quality=80)
    for name, extra in (("one", ["shard_size=2"]), ("two", ["shard_size=2", "executor.workers=2"])):
        run(photos, tmp_path / name, "quality.duplicate_distance=4", *extra)
    row = rejected(tmp_path / "one")["z.jpg"]
    original = next(r for r in rows(tmp_path / "one") if r["source"] == "photos/1.png")
    assert (row["reason"], row["measure"]) == ("near_duplicate", original["id"])
    assert dataset_bytes(tmp_path / "one") == dataset_bytes(tmp_path / "two")


NAMED = "Professional photo of a perfume bottle on a marble table"


@pytest.mark.parametrize(("policy", "texts", "kept"), [("keep", 6, None), ("report", 6, True), ("reject", 5, False)])
def test_a_persons_caption_is_kept_reported_or_rejected(photos, tmp_path, capsys, policy, texts, kept):
    """A caption that names a product is its writer's; captions.product decides, and the screen has the count."""
    for seed in range(5):
        (photos / f"{seed}.txt").write_text(f"{CAPTION}, the scene can be seen in cream tones and ring light")
    (photos / "1.txt").write_text(NAMED)
    out = run(photos, tmp_path / policy, "dataset=background", f"captions.product={policy}")
    assert f"1 of 5 captions name a product (captions.product={policy}" in capsys.readouterr().out
    assert len(rows(out)) == texts
    assert [row["text"] for row in rows(out) if row["source"] == "photos/1.png"] == [NAMED] * (texts - 5)
    found = rejected(out).get("1.png")
    assert (found and found["kept"]) is kept
    assert found is None or (found["reason"], found["measure"]) == ("caption_names_product", "perfume, bottle")


def test_what_is_kept_with_a_remark_is_not_counted_as_left_out(photos, tmp_path):
    (photos / "1.txt").write_text(NAMED)
    (photos / "empty.png").write_bytes(b"")
    out = run(photos, tmp_path / "out", "dataset=background", "captions.product=report")
    assert {name: row["kept"] for name, row in rejected(out).items()} == {"1.png": True, "empty.png": False}
    left_out, remarks = (out / "README.md").read_text().split("| kept with the remark | images |")
    assert "| empty_file | 1 |" in left_out
    assert "caption_names_product" not in left_out
    assert "| caption_names_product | 1 |" in remarks
    counts = json.loads((out / "metrics.jsonl").read_text())
    assert (counts["images"], counts["accepted"], counts["rejected"]) == (7, 6, 1)


def test_a_published_card_says_nothing_of_disks_and_networks(photos, tmp_path, captioner):
    network = dark_is_product(tmp_path / "isnet.onnx", 32)
    masks = tmp_path / "drawn"
    masks.mkdir()
    given = Image.new("L", (96, 80))
    given.paste(255, (10, 10, 50, 50))
    for seed in range(5):
        given.save(masks / f"{seed}.png")
    keys = [*captioner, f"source.masks={masks}", f"matte.model={network}"]
    local = run(photos, tmp_path / "local", *keys, f"captioner.adapter={tmp_path}/weights")
    server = ["captioner=endpoint", "captioner.endpoint='http://10.0.0.7:8001/v1?key=secret'"]
    asked = run(photos, tmp_path / "asked", *keys, *server, "captioner.endpoint_model=any")
    card = (local / "README.md").read_text() + (asked / "README.md").read_text()
    for private in (str(tmp_path), "10.0.0.7", "secret"):
        assert private not in card
    for said in ('"path": "photos"', '"masks": "drawn"', '"model": "isnet.onnx"', '"adapter": "weights"'):
        assert said in card


def test_a_build_that_accepts_nothing_fails(tmp_path):
    """The message names the file with the reasons."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(PackshotError, match="None of the 1 images") as caught:
        run(tmp_path / "in", tmp_path / "out")
    assert "rejected.parquet" in caught.value.hint
    assert rejected(tmp_path / "out")["a.png"]["reason"] == "empty_file"


# --- sources


def test_mask_files_are_used_and_bad_ones_rejected(photos, tmp_path):
    masks = tmp_path / "masks"
    (masks / "more").mkdir(parents=True)
    given = Image.new("L", (96, 80))
    given.paste(255, (10, 10, 50, 50))
    given.save(masks / "0.png")
    given.save(masks / "more" / "5.png")
    given.resize((48, 40)).save(masks / "1.png")
    for name in ("2.jpg", "3.tif"):
        given.save(masks / name)
    (masks / "3.txt").write_text("drawn on Monday")
    out = run(photos, tmp_path / "out", f"source.masks={masks}")
    stored = {row["source"]: Image.open(io.BytesIO(row["mask"]["bytes"])) for row in rows(out)}
    assert set(stored) == {"photos/0.png", "photos/2.png", "photos/3.png", "photos/more/5.png"}
    for name in ("photos/0.png", "photos/3.png", "photos/more/5.png"):
        np.testing.assert_array_equal(np.asarray(stored[name]), np.asarray(given))
    assert rejected(out)["1.png"]["reason"] == "bad_mask"
    assert "48x40" in rejected(out)["1.png"]["measure"]
    assert rejected(out)["4.png"]["reason"] == "no_mask", "a mask is not guessed where others are given"
    assert rejected(out)["4.png"]["measure"] == "source.masks has no 4.*"


def test_masks_without_or_twice_for_an_image_are_refused(photos, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (96, 80), 255).save(masks / "zero_mask.png")
    with pytest.raises(ConfigError, match=r"source.masks=.*masks has a mask for none of the 6 images") as caught:
        run(photos, tmp_path / "out", f"source.masks={masks}")
    assert "Looked for 0.* and the like; it holds zero_mask.png" in caught.value.hint
    for name in ("0.png", "0.tif"):
        Image.new("L", (96, 80), 255).save(masks / name)
    with pytest.raises(ConfigError, match=r"source.masks=.*has several masks for 0.png: 0.png, 0.tif"):
        run(photos, tmp_path / "out", f"source.masks={masks}")
    assert not (tmp_path / "out").exists()


def test_masks_beside_a_parquet_that_has_its_own_are_refused(photos, tmp_path):
    first = run(photos / "0.png", tmp_path / "first")
    with pytest.raises(ConfigError, match=r"source.masks=.* would not be read: source.path=.*first holds shards"):
        run(first, tmp_path / "out", f"source.masks={photos}")


def test_pictures_of_one_stem_have_masks_of_their_own():
    """The mask is found by the whole file name."""
    names = ["a.jpg", "a.png", "b.jpg"]
    assert pair_masks("mask", names, ["a.jpg", "a.png", "b.png"]) == {
        "a.jpg": "a.jpg",
        "a.png": "a.png",
        "b.jpg": "b.png",
    }
    with pytest.raises(ConfigError, match=r"mask has several masks for a.jpg: a.jpg, a.png"):
        pair_masks("mask", ["a.jpg"], ["a.jpg", "a.png"])


@pytest.mark.parametrize("name", ["lot [2024]", "50% off*", "what?"])
def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(photos, tmp_path, name):
    odd = photos.rename(tmp_path / name)
    (odd / "1.txt").write_text(CAPTION)
    out = run(odd, tmp_path / "out", "dataset=background")
    assert [row["source"] for row in rows(out)] == [f"{name}/{n}.png" for n in (0, 1, 2, 3, 4, "more/5")]
    assert rows(out)[1]["text"] == CAPTION
    (single,) = rows(run(odd / "1.png", tmp_path / "single", "dataset=background"))
    assert (single["source"], single["text"]) == (f"{name}/1.png", CAPTION)


def test_a_depth_network_adds_a_column_that_the_trainers_read(photos, tmp_path):
    network = dark_is_product(tmp_path / "near.onnx", 32)
    plain = run(photos, tmp_path / "plain")
    out = run(photos, tmp_path / "out", f"depth.onnx={network}")
    assert "depth" not in rows(plain)[0]
    assert {"image", "mask", "depth"} <= set(rows(out)[0])
    row = load_rows("data.train", str(out), captions=False).read(0, ("image", "mask", "depth"))
    near, mask = np.asarray(row["depth"]), np.asarray(row["mask"]) >= 128
    assert near.shape == mask.shape
    assert near[mask].mean() > 150 > 60 > near[~mask].mean()  # the products of these photos are dark
    assert "inverse depth, near is bright" in (out / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"depth\.onnx=.*no such file"):
        run(photos, tmp_path / "third", "depth.onnx=gone.onnx")
    assert not (tmp_path / "third").exists()


def test_globs_parquet_and_remote_stores_are_sources(photos, tmp_path):
    (photos / "1.txt").write_text(CAPTION)
    first = run(photos / "[01].png", tmp_path / "glob", "source.license=MIT")
    assert [row["source"] for row in rows(first)] == ["photos/0.png", "photos/1.png"]
    again = rows(run(first, tmp_path / "parquet", "dataset=background"))
    assert [(row["license"], row["text"]) for row in again] == [("MIT", ""), ("MIT", CAPTION)]
    assert again[0]["image"] == rows(first)[0]["image"]
    store = fsspec.filesystem("memory")
    store.pipe("/shop/0.png", (photos / "0.png").read_bytes())
    assert rows(run("memory://shop", tmp_path / "remote"))[0]["id"] == rows(first)[0]["id"]


def shard(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_tar_shards_lose_nothing(photos, tmp_path):
    """Captions, masks and licences arrive with the pictures."""
    mask = io.BytesIO()
    Image.open(photos / "1.png").convert("L").point(lambda value: 255 * (value < 140)).save(mask, "PNG")
    pictures = [(photos / f"{number}.png").read_bytes() for number in range(3)]
    described = json.dumps({"caption": CAPTION, "license": "CC-BY-4.0", "url": "x"}).encode()
    (tmp_path / "tars").mkdir()
    shard(tmp_path / "tars" / "a.tar", {"0.png": pictures[0], "0.json": described, "0.cls": b"3", "._0.png": b"x"})
    files = {"b/1.txt": CAPTION.encode(), "b/1.mask.png": mask.getvalue(), "b/1.PNG": pictures[1]}
    shard(tmp_path / "tars" / "b.tar", {**files, "b/2.png": pictures[2], "b/2.json": b"{", "b/3.txt": b"no picture"})
    out = run(tmp_path / "tars", tmp_path / "out", "source.license=MIT")
    kept = {row["source"]: row for row in rows(out)}
    assert list(kept) == ["tars/a.tar#0", "tars/b.tar#b/1"]
    first, second = kept.values()
    assert [(row["license"], row["text"]) for row in (first, second)] == [("CC-BY-4.0", CAPTION), ("MIT", CAPTION)]
    assert [row["id"] for row in (first, second)] == [hashlib.sha256(picture).hexdigest() for picture in pictures[:2]]
    given, found = (np.asarray(Image.open(io.BytesIO(png))) for png in (mask.getvalue(), second["mask"]["bytes"]))
    np.testing.assert_array_equal(given, found)
    reasons = {name: row["measure"] for name, row in rejected(out).items() if not row["kept"]}
    assert "json is damaged" in reasons["b.tar#b/2"]
    assert "no image named b/3" in reasons["b.tar#b/3"]


@pytest.mark.parametrize(
    ("files", "mode", "says"),
    [
        ({"0.png": b"", "0.jpg": b""}, "w", "several images named 0"),
        ({"0.txt": b"x" * 999}, "w:gz", "holds no image, only txt"),
        ({}, None, "not a whole tar"),
    ],
)
def test_tar_shards_that_cannot_be_read_are_config_errors(tmp_path, files, mode, says):
    path = tmp_path / "a.tar"
    if mode:
        shard(path, files, mode)
    else:
        path.write_bytes(shard(tmp_path / "whole.tar", {"0.png": b"x" * 99999}).read_bytes()[:5000])
        (tmp_path / "whole.tar").unlink()
    with pytest.raises(ConfigError, match=says):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "says"), [("gone", "no such file"), ("texts", "holds no image"), ("texts/a.parquet", "Parquet")]
)
def test_sources_without_images_are_config_errors(tmp_path, name, says):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text("x")
    if name.endswith("parquet"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=says):
        run(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def odd_table(path, **columns):
    """A Parquet file of three pictures, with these columns in place of the usual ones."""

    def picture(seed):
        buffer = io.BytesIO()
        photo(seed).save(buffer, "PNG")
        return buffer.getvalue()

    usual = {
        "image": [picture(seed) for seed in range(3)],
        "text": [CAPTION, None, ""],
        "license": ["MIT", None, "CC0"],
    }
    pq.write_table(pa.table({**usual, **columns}), path)
    return path


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("image", ["a.png", "b.png", "c.png"], "string, not the bytes"),
        ("image", [{"path": "a.png"}] * 3, "struct<path: string>, not the bytes"),
        ("mask", [[0, 1]] * 3, "list<.*int64>, not the bytes"),
        ("license", [1, 2, 3], "int64, not the name of a licence"),
        ("license", [{"name": "MIT"}] * 3, "struct<name: string>, not the name of a licence"),
    ],
)
def test_columns_of_the_wrong_type_are_config_errors(tmp_path, name, values, says):
    table = odd_table(tmp_path / "t.parquet", **{name: values})
    with pytest.raises(ConfigError, match=rf"source.path: .*t.parquet: column '{name}' holds {says}"):
        run(table, tmp_path / "out", "dataset=background")
    assert not (tmp_path / "out").exists()


def test_a_row_without_a_picture_is_rejected(tmp_path):
    """The message names the column and the row."""
    pictures = pq.read_table(odd_table(tmp_path / "t.parquet")).column("image").to_pylist()
    names = pa.array(["MIT", None, "MIT"]).dictionary_encode()
    table = odd_table(tmp_path / "t.parquet", image=[pictures[0], None, pictures[2]], license=names)
    out = run(table, tmp_path / "out", "dataset=background", "source.license=CC0-1.0")
    assert [(row["text"], row["license"]) for row in rows(out)] == [(CAPTION, "MIT"), ("", "MIT")]
    row = rejected(out)["t.parquet#1"]
    assert (row["reason"], row["measure"]) == ("unreadable", "row 1 has no bytes in its column 'image'")


def test_a_set_built_from_a_corrected_one_has_a_persons_words(photos, tmp_path):
    (photos / "1.txt").write_text(CAPTION)
    first = run(photos / "[012].png", tmp_path / "first", "dataset=background")
    better = "Professional photo of an object on a stone shelf"
    corrections.add(first, {rows(first)[1]["id"]: better, rows(first)[2]["id"]: CAPTION})
    again = run(first, tmp_path / "again", "dataset=background")
    assert [row["text"] for row in rows(again)] == ["", better, CAPTION]
    corrections.add(first, {rows(first)[1]["id"]: CAPTION})
    run(first, again, "dataset=background", "run.resume=true")
    assert [row["text"] for row in rows(again)] == ["", CAPTION, CAPTION]


# --- going on


def test_a_rerun_on_finished_work_does_nothing(photos, tmp_path):
    out = run(photos, tmp_path / "out")
    quiet = ("config.yaml", "log.txt")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name not in quiet}
    run(photos, out, "run.resume=true")
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name not in quiet}
    assert after == before


def test_killed_and_resumed_equals_unbroken(photos, tmp_path):
    settings = ["shard_size=2", "executor.workers=2", "quality.duplicate_distance=0"]
    command = [sys.executable, str(ROOT / "build_data.py"), f"source.path={photos}", *settings]
    broken = tmp_path / "broken"
    process = subprocess.Popen([*command, f"run.dir={broken}"], stderr=subprocess.DEVNULL, start_new_session=True)
    ledger = broken / "ledger.jsonl"
    while process.poll() is None and not (ledger.exists() and ledger.read_text().count("\n") >= 2):
        time.sleep(0.005)
    assert process.poll() is None, "finished before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(broken.glob("part-00002.parquet"))
    subprocess.run([*command, f"run.dir={broken}", "run.resume=true"], check=True, stderr=subprocess.DEVNULL)
    assert dataset_bytes(broken) == dataset_bytes(run(photos, tmp_path / "whole", "shard_size=2"))


def square(number):
    if number == 3:
        raise ValueError("three")
    return number**2


def die(number):
    os._exit(9)


@pytest.mark.slow
def test_ray_builds_the_same_bytes(photos, tmp_path, monkeypatch):
    """An error in a task is raised by the build."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no module that a worker could import
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = ["shard_size=2", "executor=ray", "executor.workers=2"]
    assert dataset_bytes(run(photos, tmp_path / "ray", *settings)) == dataset_bytes(
        run(photos, tmp_path / "local", "shard_size=2")
    )
    config = ExecutorConfig(kind=ExecutorKind.ray, workers=2)
    with open_executor(config) as execute:
        assert sorted(execute(square, (0, 1, 2, 4))) == [0, 1, 4, 16]
        with pytest.raises(ValueError, match="three"):
            list(execute(square, range(9)))
    with pytest.raises(PackshotError, match="worker process died"), open_executor(config) as execute:
        list(execute(die, range(3)))


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="package ray"), open_executor(ExecutorConfig(kind=ExecutorKind.ray)):
        pass


class FakeCaptioner:
    """Writes one caption for all, and breaks on one picture size."""

    calls = 0

    def __init__(self, text):
        self.text = text

    def write(self, images, masks):
        from packshot.caption.models.adapter import Caption

        type(self).calls += len(images)
        if any(image.size == (100, 80) for image in images):
            raise RuntimeError("out of memory")
        return [Caption(self.text, truncated=False) for _ in images]


@pytest.fixture
def captioner(monkeypatch, tmp_path):
    """``load_captioner`` gives a fake whose caption ends with the prompt."""
    monkeypatch.setattr(FakeCaptioner, "calls", 0)
    load = lambda model, captioner: FakeCaptioner(f"{CAPTION}, {captioner.prompt} mood")  # noqa: E731
    monkeypatch.setattr("packshot.make_dataset.steps.load_captioner", load)
    (tmp_path / "weights").mkdir()
    return ["captioner=florence2", f"model.florence2={tmp_path / 'weights'}", "captioner.prompt=calm"]


def test_a_captioner_fills_empty_captions(photos, tmp_path, captioner):
    """One failed sample does not stop the build."""
    (photos / "0.txt").write_text("An object on a rock")
    photo(9, (100, 80)).save(photos / "9.png")
    out = run(photos, tmp_path / "out", *captioner)
    texts = {row["source"]: row["text"] for row in rows(out)}
    assert texts.pop("photos/0.png") == "An object on a rock"
    assert texts.pop("photos/9.png") == ""
    assert set(texts.values()) == {f"{CAPTION}, calm mood"}
    row = rejected(out)["9.png"]
    assert row["reason"] == "no_caption"
    assert "out of memory" in row["measure"]
    assert rows(out)[1]["scene"]["mood"] == "calm"


def test_a_captioner_replaces_captions_on_request(photos, tmp_path, captioner):
    """Where the captioner fails, the person's words stay."""
    (photos / "0.txt").write_text("An object on a rock")
    photo(9, (100, 80)).save(photos / "9.png")
    (photos / "9.txt").write_text("An object on my table")
    out = run(photos, tmp_path / "out", *captioner, "captioner.overwrite=true")
    texts = {row["source"]: row["text"] for row in rows(out)}
    origins = {row["source"]: row["caption_origin"] for row in rows(out)}
    assert (texts.pop("photos/9.png"), origins["photos/9.png"]) == ("An object on my table", "source")
    assert set(texts.values()) == {f"{CAPTION}, calm mood"}
    assert origins["photos/0.png"] == "florence2"
    assert "captions by origin: 6 florence2, 1 source (captioner.overwrite=true" in (out / "log.txt").read_text()


def test_a_changed_prompt_redoes_captions_not_masks(photos, tmp_path, captioner):
    out = run(photos, tmp_path / "out", *captioner)
    assert FakeCaptioner.calls == 6
    masks = {path: path.stat().st_mtime_ns for path in out.glob("steps/*/*") if path.parent.name != "caption"}
    assert {path.parent.name for path in masks} == {"ingest", "naming", "dedup", "mask"}
    run(photos, out, "run.resume=true", *captioner)
    assert FakeCaptioner.calls == 6
    run(photos, out, "run.resume=true", *captioner[:-1], "captioner.prompt=warm")
    assert FakeCaptioner.calls == 12
    assert {path: path.stat().st_mtime_ns for path in masks} == masks
    assert {row["scene"]["mood"] for row in rows(out)} == {"warm"}


# --- measures


def test_perceptual_hash_survives_encoding(tmp_path):
    """It differs between different pictures."""
    coffee = Image.open(ROOT / "data/products/coffee.png").convert("RGB")
    coffee.resize((300, 200)).save(tmp_path / "c.jpg", quality=60)
    assert hamming(perceptual_hash(coffee), perceptual_hash(Image.open(tmp_path / "c.jpg"))) <= 4
    assert hamming(perceptual_hash(coffee), perceptual_hash(coffee.transpose(Image.Transpose.ROTATE_180))) > 12


@pytest.mark.parametrize("distance", [0, 1, 4, 9, 64])
def test_banded_search_finds_what_comparing_all_pairs_finds(distance):
    rng = np.random.default_rng(distance)
    hashes = [int.from_bytes(rng.bytes(8), "big") for _ in range(60)]
    for origin in hashes[:40]:  # copies with a few bits turned, up to beyond the limit
        turned = rng.choice(64, size=int(rng.integers(0, 13)), replace=False)
        hashes.append(origin ^ sum(1 << int(bit) for bit in turned))
    expected, kept = [], []
    for position, value in enumerate(hashes):
        match = next((other for other in kept if hamming(value, hashes[other]) <= distance), None)
        expected.append(match)
        if match is None:
            kept.append(position)
    assert find_duplicates(hashes, distance) == expected
    assert any(match is not None for match in expected)


def test_sharpness_does_not_depend_on_contrast_or_resolution():
    coffee = Image.open(ROOT / "data/products/coffee.png").convert("RGB")
    sharp = sharpness(coffee)
    assert sharpness(coffee.filter(ImageFilter.GaussianBlur(4))) < sharp / 50
    faint = coffee.point(lambda value: 200 + value // 8)
    assert sharpness(faint) == pytest.approx(sharp, rel=0.5)
    assert sharpness(coffee.resize((1800, 1200))) == pytest.approx(sharp, rel=0.5)


# --- the page about a build


def test_the_report_shows_reasons_sizes_captions_and_licences(photos, tmp_path):
    """Pictures that were left out stand under their reason, though no step has kept them."""
    (photos / "0.txt").write_text("An object on a rock, " + "very " * 90 + "far away")
    photo(8).resize((40, 30)).save(photos / "small.png")
    (photos / "broken.png").write_bytes(b"no picture")
    out = run(photos, tmp_path / "out", "source.license=MIT", "dataset=background")
    page = (out / "report.html").read_text()
    reasons = re.findall(r"<h2>Left out: (\w+) \((\d+)\)</h2>(.*?)(?=<h2>|</html>)", page, re.DOTALL)
    found = {reason: (int(number), grid.count("<img")) for reason, number, grid in reasons}
    assert found["too_small"] == (1, 1)
    assert "photos/small.png: 40x30" in page
    assert sum(number for number, _ in found.values()) == sum(not row["kept"] for row in rejected(out).values())
    assert "1 captions are longer than 77 tokens" in page
    assert f"<td>MIT</td><td>{len(rows(out))}</td>" in page
    assert "bucket at 1024 px" in page


def test_the_report_of_finished_work_is_left_alone(photos, tmp_path):
    out = run(photos, tmp_path / "out", "dataset=background")
    before = (out / "report.html").stat()
    run(photos, out, "run.resume=true", "dataset=background")
    assert (out / "report.html").stat().st_mtime_ns == before.st_mtime_ns
    photo(8).resize((40, 30)).save(photos / "small.png")
    run(photos, out, "run.resume=true", "dataset=background")
    assert "photos/small.png: 40x30" in (out / "report.html").read_text()


# --- several captions of one picture

THREE = ["An object on oak", "Something on a table", "A still life"]


def test_several_captions_of_a_picture_arrive_in_the_set(photos, tmp_path):
    lines = [{"file_name": "0.png", "text": THREE}, {"file_name": "1.png", "text": "An object on a rock"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = run(photos, tmp_path / "out", "dataset=background")
    by_source = {row["source"]: row for row in rows(out)}
    assert by_source["photos/0.png"]["text"] == THREE[0]
    assert by_source["photos/0.png"]["captions"] == THREE
    assert not by_source["photos/1.png"]["captions"]
    again = run(out, tmp_path / "again", "dataset=background")  # a set built from the set
    assert {row["id"]: row["captions"] for row in rows(again)}[by_source["photos/0.png"]["id"]] == THREE


def test_a_parquet_with_lists_of_captions_is_read(tmp_path):
    buffer = io.BytesIO()
    photo(0).save(buffer, "PNG")
    pictures = [{"bytes": buffer.getvalue(), "path": None}]
    pq.write_table(pa.table({"image": pictures, "text": [["", *THREE]]}), tmp_path / "hub.parquet")
    (row,) = rows(run(tmp_path / "hub.parquet", tmp_path / "out", "dataset=background"))
    assert (row["text"], row["captions"], row["caption_origin"]) == (THREE[0], THREE, "source")


def test_sets_with_one_caption_a_picture_have_no_further_column(photos, tmp_path):
    (photos / "0.txt").write_text(THREE[0])
    assert "captions" not in rows(run(photos, tmp_path / "out", "dataset=background"))[0]


def test_replaced_captions_leave_none_of_the_others(photos, tmp_path, captioner):
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": THREE}))
    kept = {row["source"]: row for row in rows(run(photos, tmp_path / "kept", "dataset=background", *captioner))}
    assert kept["photos/0.png"]["captions"] == THREE
    keys = ["dataset=background", "captioner.overwrite=true", *captioner]
    for row in rows(run(photos, tmp_path / "replaced", *keys)):
        assert not row["captions"]
        assert row["caption_origin"] == "florence2"
