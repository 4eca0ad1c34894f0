"""Reading datasets: what comes out, and what is said when something is missing."""

import hashlib
import io
import logging
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from packshot.caption.data import shard_files
from packshot.dataset import arrow_copy
from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError, PackshotError
from packshot.scene import Scene


def png(mode="RGB", color=(10, 20, 30), size=(8, 6)):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
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


def test_rows_without_a_licence_are_counted_as_unknown(tmp_path):
    rows = load_rows("data.train", write(tmp_path, license=pa.array([None, "MIT"], pa.string())))
    assert rows.licenses == ["MIT", "unknown"]
    assert rows[0]["license"] is None


def test_pictures_lie_upright_whatever_their_camera_wrote(tmp_path):
    sideways = Image.new("RGB", (8, 6), "white")
    sideways.paste("red", (0, 0, 1, 6))  # the first column, which is the top row after a turn by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    sideways.save(buffer, "PNG", exif=exif)
    turned = {"bytes": buffer.getvalue(), "path": None}
    rows = load_rows("data.train", write(tmp_path, image=[turned, png()], mask=[turned, png("L", 255)]))
    assert rows[0]["image"].size == rows[0]["mask"].size == (6, 8)
    assert rows[0]["image"].getpixel((5, 0)) == (255, 0, 0)
    assert rows[0]["image"].getpixel((5, 1)) == (255, 255, 255)
    assert rows.sizes == [(8, 6), (6, 8)]


def test_depth_of_16_bits_is_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    path = write(tmp_path, depth=[{"bytes": buffer.getvalue(), "path": None}, png("L", 7)])
    rows = load_rows("data.train", path)
    np.testing.assert_array_equal(np.asarray(rows[0]["depth"]), np.round(deep / 257))
    assert rows[1]["depth"].getpixel((0, 0)) == 7


def test_depth_without_a_white_level_names_its_sample(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8), 0.5, np.float32)).save(buffer, "TIFF")
    rows = load_rows("data.train", write(tmp_path, depth=[png("L", 7), {"bytes": buffer.getvalue(), "path": None}]))
    with pytest.raises(PackshotError, match=r"sample b has a broken depth .*no rule maps to black and white"):
        rows[1]


def test_transparent_pixels_come_out_white(tmp_path):
    path = write(tmp_path, image=[png("RGBA", (200, 0, 0, 0)), png()])
    assert load_rows("data.train", path)[0]["image"].getpixel((0, 0)) == (255, 255, 255)


def test_the_fingerprint_follows_all_that_a_run_is_trained_on(tmp_path):
    def fingerprint(**columns):
        return load_rows("data.train", write(tmp_path, **columns)).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(text=["a table", "a door"]) != first
    assert fingerprint(mask=[png("L", 255), None]) != first
    assert fingerprint(mask=[png("L", 255), None]) != fingerprint(mask=[png("L", 200), None])


def test_the_digest_follows_mask_and_picture_whatever_the_ids(tmp_path):
    def digest(**columns):
        return load_rows("data.train", write(tmp_path, **columns)).digest(0)

    masks = [png("L", 255), None]
    known = digest(mask=masks)
    assert digest(mask=masks, text=["a door", "a wall"]) == known
    assert digest(mask=[png("L", 200), None]) != known
    assert digest() != known
    assert digest(mask=masks, image=[png(color=(200, 0, 0)), png()]) != known  # under the same id, "a"
    assert digest(mask=masks, id=["f" * 64, "b"]) != digest(mask=masks, id=["e" * 64, "b"])


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
    with pytest.raises(ConfigError, match="is not a whole Parquet file"):
        load_rows("data.train", str(tmp_path))


def test_a_broken_image_names_its_sample(tmp_path):
    path = write(tmp_path, image=[png(), {"bytes": b"junk", "path": None}])
    with pytest.raises(PackshotError, match="sample b has a broken image"):
        load_rows("data.train", path)[1]


# --- pictures on disk


def shards(folder, count=3, rows=20):
    """Files of noise, the last of which has no masks; and a caption that failed in each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(count):
        noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(rows)]
        table = {
            "id": [f"{shard}-{i}" for i in range(rows)],
            "text": [*(f"a table, {i}" for i in range(rows - 1)), None],
            "image": [{"bytes": stored(image), "path": None} for image in noise],
            "caption_error": [None] * (rows - 1) + ["no text"],
        }
        if shard < count - 1:
            table["mask"] = [None if i == 1 else png("L", i, (64, 64)) for i in range(rows)]
        pq.write_table(pa.table(table), folder / f"part-{shard:05}.parquet")
    return str(folder)


def stored(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_copied_pictures_equal_those_in_memory_and_take_none(tmp_path):
    path, cache = shards(tmp_path / "set"), str(tmp_path / "cache")
    load_rows("data.train", path, cache=cache)
    (file,) = (tmp_path / "cache").glob("[!.]*")  # a lock stays beside it
    written = file.stat().st_mtime_ns
    before = pa.total_allocated_bytes()
    mapped = load_rows("data.train", path, cache=cache)
    assert pa.total_allocated_bytes() - before < 100_000  # of 740 kB of pictures
    assert file.stat().st_mtime_ns == written
    held = load_rows("data.train", path)
    assert len(mapped) == len(held) == 57
    for index in range(len(held)):
        a, b = mapped[index], held[index]
        assert a.keys() == b.keys()
        assert a["image"].tobytes() == b["image"].tobytes()
        assert (a["mask"] is None) == (b["mask"] is None) == (index % 19 == 1 or index >= 38)
        assert a["mask"] is None or a["mask"].tobytes() == b["mask"].tobytes()
        assert mapped.digest(index) == held.digest(index)


def test_changed_files_are_copied_anew(tmp_path):
    path, cache = write(tmp_path), str(tmp_path / "cache")
    load_rows("data.train", path, cache=cache)
    write(tmp_path, image=[png(), png(color=(200, 0, 0))])
    assert load_rows("data.train", path, cache=cache)[1]["image"].getpixel((0, 0)) == (200, 0, 0)


def test_a_truncated_file_is_named(tmp_path):
    """No part of its copy is kept."""
    path = shards(tmp_path / "set", count=1)
    file = tmp_path / "set" / "part-00000.parquet"
    column = pq.ParquetFile(file).metadata.row_group(0).column(2)
    assert column.path_in_schema.startswith("image")
    data = bytearray(file.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 64] = bytes(64)
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        load_rows("data.train", path, cache=str(tmp_path / "cache"))
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} <= {".lock"}


def test_processes_that_want_one_set_copy_its_pictures_once(tmp_path, monkeypatch):
    """They do not know each other yet; threads lock each other out as processes do."""
    path, cache, copied = write(tmp_path), str(tmp_path / "cache"), []
    batches = arrow_copy.read_batches

    def slowly(*arguments):
        copied.append(1)
        time.sleep(0.2)
        return batches(*arguments)

    monkeypatch.setattr(arrow_copy, "read_batches", slowly)
    threads = [threading.Thread(target=load_rows, args=("data.train", path), kwargs={"cache": cache}) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(copied) == 1
    assert len(load_rows("data.train", path, cache=cache)) == 2


def test_a_killed_copy_of_the_pictures_is_removed(tmp_path):
    path, cache = write(tmp_path), tmp_path / "cache"
    load_rows("data.train", path, cache=str(cache))
    (copy,) = cache.glob("*.arrow")
    left = copy.rename(cache / f".{copy.name}.1234.tmp")
    assert len(load_rows("data.train", path, cache=str(cache))) == 2
    assert copy.exists()
    assert not left.exists()


def test_a_set_may_have_more_shards_than_open_files(tmp_path):
    path = shards(tmp_path / "set", count=40)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        rows = load_rows("data.train", path, cache=str(tmp_path / "cache"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(rows.files) == 40


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_copy_of_the_pictures_is_written_again(tmp_path, caplog, damage):
    """A damaged file of the cache costs a copy; the dataset is not blamed."""
    path, cache = write(tmp_path), str(tmp_path / "cache")
    load_rows("data.train", path, cache=cache)
    (copy,) = (tmp_path / "cache").glob("pictures-*.arrow")
    whole = copy.read_bytes()
    copy.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello" * 100}[damage])
    rows = load_rows("data.train", path, cache=cache)
    assert rows[1]["image"].getpixel((0, 0)) == load_rows("data.train", path)[1]["image"].getpixel((0, 0))
    assert copy.read_bytes() == whole
    assert "is damaged" in caplog.text


def test_a_cut_shard_is_named_with_the_way_out(tmp_path):
    path = Path(write(tmp_path))
    shard = path if path.is_file() else next(path.glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    reads = {"data.train": load_rows, "data.input": shard_files}
    for key, read in reads.items():
        with pytest.raises(ConfigError, match=f"{shard.name} is not a whole Parquet file") as caught:
            read(key, str(shard.parent))
        assert "Copy it again" in str(caught.value)


# --- what people bring


def test_the_picture_is_the_id_where_there_is_none(tmp_path):
    """A raw Parquet of the hub has image and text only; the ids are those that build_data.py would give."""
    rows = load_rows("data.train", write(tmp_path, id=None))
    assert rows.ids == [hashlib.sha256(png()["bytes"]).hexdigest()] * 2


@pytest.mark.parametrize("name", ["", "photo.png", "captions.csv"])
def test_pictures_that_are_no_dataset_are_told_the_command(tmp_path, name):
    (tmp_path / "photo.png").write_bytes(png()["bytes"])
    (tmp_path / "captions.csv").write_text("file_name,text")
    path = tmp_path / name
    with pytest.raises(ConfigError) as caught:
        load_rows("data.train", str(path))
    assert f"python build_data.py dataset=background source.path={path} run.dir=<new folder>" in str(caught.value)


@pytest.mark.parametrize("text", [["a table", ""], ["a table", None], None])
def test_empty_captions_are_let_in_on_request_and_counted(tmp_path, caplog, text):
    logging.getLogger("packshot").propagate = True
    rows = load_rows("data.train", write(tmp_path, text=text), empty_captions=True)
    bare = 2 if text is None else 1
    assert rows.texts == ["a table", ""] if text else ["", ""]
    assert rows[1]["text"] == ""
    assert f"{bare} of 2 samples have no caption and are trained as unconditional" in caplog.text
