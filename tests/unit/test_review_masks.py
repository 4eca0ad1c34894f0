"""task=review_masks: doubtful masks go out as a page and files, and come back edited or approved."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from packshot.config.compose import compose
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError
from packshot.make_dataset import steps
from packshot.make_dataset.run import build


@pytest.fixture
def photos(tmp_path):
    """Three products before stripes, where colours alone are never trusted, and one before a plain ground."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    tones = {"a.png": 20, "b.jpg": 60, "more/c.png": 100, "whole.png": 40}
    for number, (name, tone) in enumerate(tones.items()):
        image = Image.new("RGB", (120, 96), (240, 240 - 9 * number, 235))
        draw = ImageDraw.Draw(image)
        for left in range(0, 0 if name == "whole.png" else 120, 12):
            draw.rectangle((left, 0, left + 5, 95), fill=(200, 225, 195))
        draw.ellipse((35 + 4 * number, 20, 80 + 4 * number, 70), fill=(tone, 30, 160 - tone))
        pixels = np.asarray(image) + rng.normal(0, 2, (96, 120, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
    return folder


def build_data(folder, *overrides):
    build(compose("build_data", [f"run.dir={folder}", "tracking=none", "matte.model=grabcut", *overrides]))


def read(folder):
    rows = load_rows("data", str(folder), captions=False)
    found = {}
    for index in range(len(rows)):
        row = rows.read(index, ("mask",))
        found[row["source"].partition("/")[2]] = row
    return found


def test_edited_and_approved_masks_come_back(photos, tmp_path, monkeypatch):
    """And only their rows are made anew."""
    data, review = tmp_path / "data", tmp_path / "review"
    build_data(data, f"source.path={photos}", "quality.duplicate_distance=-1")
    before = read(data)
    assert {name: row["status"] for name, row in before.items()} == {
        "a.png": "needs_review",
        "b.jpg": "needs_review",
        "more/c.png": "needs_review",
        "whole.png": "accepted",
    }
    build_data(review, "task=review_masks", f"source.path={data}")
    masks = review / "masks"
    written = sorted(path.relative_to(masks).as_posix() for path in masks.rglob("*.png"))
    assert written == ["a.png", "b.png", "more/c.png"]
    page = (review / "review.html").read_text()
    assert "mask_ways_disagree" in page
    assert "source.without_mask=find" in page
    edited = Image.open(masks / "more/c.png").convert("L")
    ImageDraw.Draw(edited).rectangle((0, 60, 119, 95), fill=0)
    edited.save(masks / "more/c.png")
    (masks / "approved.txt").write_text("b.png\n")

    asked = []
    find_mask = steps.find_mask

    def noted(image, matte, mask=None, name=""):
        asked.append(name.partition("/")[2])
        return find_mask(image, matte, mask, name)

    monkeypatch.setattr(steps, "find_mask", noted)
    back = [f"source.masks={masks}", "source.without_mask=find", "run.resume=true"]
    build_data(data, f"source.path={photos}", "quality.duplicate_distance=-1", *back)
    assert sorted(asked) == ["b.jpg", "more/c.png"]
    after = read(data)
    assert {name: row["status"] for name, row in after.items()} == {
        "a.png": "needs_review",
        "b.jpg": "accepted",
        "more/c.png": "accepted",
        "whole.png": "accepted",
    }
    assert np.asarray(after["more/c.png"]["mask"])[62:].max() == 0
    np.testing.assert_array_equal(after["a.png"]["mask"], before["a.png"]["mask"])


def test_a_second_review_keeps_edited_masks(photos, tmp_path):
    data, review = tmp_path / "data", tmp_path / "review"
    build_data(data, f"source.path={photos}", "quality.duplicate_distance=-1")
    build_data(review, "task=review_masks", f"source.path={data}")
    path = review / "masks" / "a.png"
    Image.new("L", (120, 96), 9).save(path)
    edited = path.read_bytes()
    build_data(review, "task=review_masks", f"source.path={data}", "run.resume=true")
    assert path.read_bytes() == edited
    assert set(json.loads((review / "masks" / "review.json").read_text())) == {"a.png", "b.png", "more/c.png"}


def test_masks_that_nobody_looked_at_are_refused(photos, tmp_path):
    data, review = tmp_path / "data", tmp_path / "review"
    build_data(data, f"source.path={photos}", "quality.duplicate_distance=-1")
    build_data(review, "task=review_masks", f"source.path={data}", "review.count=2")
    with pytest.raises(ConfigError, match="none of its 2 masks was edited"):
        build_data(tmp_path / "b", f"source.path={photos}", f"source.masks={review / 'masks'}")


def test_a_dataset_without_doubts_has_nothing_to_review(photos, tmp_path):
    build_data(tmp_path / "data", f"source.path={photos / 'whole.png'}")
    with pytest.raises(ConfigError, match="none of its 1 masks is in doubt"):
        build_data(tmp_path / "review", "task=review_masks", f"source.path={tmp_path / 'data'}")
