"""Reading datasets: what comes out, and what is said when something is missing."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from packshot.core.errors import ConfigError, PackshotError
from packshot.data.dataset import load_rows
from packshot.scene import Scene


def png(mode="RGB", color=(10, 20, 30)):
    buffer = io.BytesIO()
    Image.new(mode, (8, 6), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(folder, **columns):
    table = {"id": ["a", "b"], "image": [png(), png()], "text": ["a table", "a wall"], **columns}
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), folder / "part-00000.parquet")
    return str(folder)


def test_rows_decode_images_masks_and_scenes(tmp_path):
    scene = Scene(surface="a table", surroundings=("leaves",))
    path = write(tmp_path, mask=[png("L", 255), None], scene=[scene.to_dict(), None], license=["CC0-1.0", "MIT"])
    rows = load_rows("data.train", path)
    assert (len(rows), rows.licenses) == (2, ["CC0-1.0", "MIT"])
    assert rows[0]["image"].mode == "RGB"
    assert rows[0]["image"].size == (8, 6)
    assert rows[0]["mask"].mode == "L"
    assert rows[1]["mask"] is None
    assert rows[0]["scene"] == scene
    assert rows[1]["scene"] == Scene.parse("a wall").scene
    assert [row["id"] for row in rows[:2]] == ["a", "b"]


def test_transparent_pixels_come_out_white(tmp_path):
    path = write(tmp_path, image=[png("RGBA", (200, 0, 0, 0)), png()])
    assert load_rows("data.train", path)[0]["image"].getpixel((0, 0)) == (255, 255, 255)


def test_the_fingerprint_follows_ids_and_texts(tmp_path):
    first = load_rows("data.train", write(tmp_path)).fingerprint()
    assert load_rows("data.train", write(tmp_path)).fingerprint() == first
    assert load_rows("data.train", write(tmp_path, text=["a table", "a door"])).fingerprint() != first


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"text": ["a table", ""]}, "1 of 2 samples have no caption"),
        ({"text": None}, "lacks the column text"),
        ({"id": [], "image": [], "text": pa.array([], pa.string())}, "has no rows"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused_by_its_key(tmp_path, columns, says):
    with pytest.raises(ConfigError, match=says) as caught:
        load_rows("data.train", write(tmp_path, **columns))
    assert "data.train" in str(caught.value)


def test_captions_that_failed_are_left_out_and_said(tmp_path, caplog):
    import logging

    logging.getLogger("packshot").propagate = True
    path = write(tmp_path, text=["a table", None], caption_error=[None, "names the product: bottle"])
    assert load_rows("data.train", path).ids == ["a"]
    assert "1 samples without a usable caption" in caplog.text
    assert len(load_rows("data.input", path, captions=False)) == 2


def test_missing_folder_empty_folder_and_damaged_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_rows("data.train", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"no part-\*\.parquet"):
        load_rows("data.train", str(tmp_path))
    (tmp_path / "part-00000.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        load_rows("data.train", str(tmp_path))


def test_a_broken_image_names_its_sample(tmp_path):
    path = write(tmp_path, image=[png(), {"bytes": b"junk", "path": None}])
    with pytest.raises(PackshotError, match="sample b has a broken image"):
        load_rows("data.train", path)[1]
