"""Samples on their way to the loop: large JPEGs are decoded smaller, and framed pictures are kept without loss."""

from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from packshot.base.load import load_parts
from packshot.config.compose import compose
from packshot.config.schema import Condition, ControlNetMethod, DataConfig, LoraMethod, ModelConfig
from packshot.dataset.buckets import sort_into
from packshot.dataset.rows import load_rows, select
from packshot.engine.keyed_random import SampleKey
from packshot.methods import METHODS
from packshot.runs.folder import log
from packshot.train import examples as packshot_examples
from packshot.train.encode import Encoder
from packshot.train.examples import Examples, framed
from packshot.train.run import build_task


def cell(picture, kind, **options):
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def slopes(height, width):
    """A picture whose red tells the column and whose green tells the row."""
    down, across = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([255 * across / width, 255 * down / height, 0 * down], -1).astype(np.uint8))


def written(folder, picture, kind, **options):
    """A set of one picture, with a product in its middle."""
    turned = options.pop("orientation", None)
    if turned:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = turned
    size = picture.size[::-1] if turned in (5, 6, 7, 8) else picture.size
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 3, size[1] // 3, size[0] // 2, size[1] // 2))
    row = {"id": "a", "text": "on a table", "image": cell(picture, kind, **options), "mask": cell(mask, "PNG")}
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([row]), folder / "part-00000.parquet")
    return load_rows("data.train", str(folder))


def make(rows, folder, config, flip=False):
    parts = load_parts(ModelConfig())
    method = METHODS[type(config)](parts, config)
    return Examples(rows, Encoder(parts, method, 128, DataConfig()), folder, flip=flip)


@pytest.mark.parametrize("orientation", [None, 3, 6])
@pytest.mark.parametrize(("height", "width"), [(772, 1032), (1024, 516)])
def test_a_large_jpeg_is_decoded_smaller_at_the_same_place(tmp_path, height, width, orientation):
    """Lying and standing, turned by EXIF: every pixel shows the same spot as after decoding the whole."""
    rows = written(tmp_path / "set", slopes(height, width), "JPEG", quality=95, orientation=orientation)
    small = rows.read(0, ("image", "mask"), covering=(128, 128))
    whole = rows.read(0, ("image", "mask"))
    assert small["image"].width * 4 <= whole["image"].width + 4
    assert small["full_size"] == whole["image"].size[::-1]
    seen, full = framed(small, (128, 128)), framed(whole, (128, 128))
    assert seen["geometry"] == full["geometry"]
    difference = np.asarray(seen["image"], float) - np.asarray(full["image"], float)
    # 255 steps over some 128 px: two steps are a pixel, and all of them together lie where they lay
    assert np.abs(difference).max() <= 3
    assert np.abs(difference.mean((0, 1))).max() < 0.5


@pytest.mark.parametrize(("side", "kind"), [(128, "JPEG"), (250, "JPEG"), (601, "JPEG"), (600, "PNG"), (600, "WEBP")])
def test_what_has_no_smaller_decoding_stays_as_it_is(tmp_path, side, kind):
    rows = written(tmp_path / "set", slopes(side, side), kind)
    small, whole = rows.read(0, ("image",), covering=(128, 128)), rows.read(0, ("image",))
    assert small["image"].tobytes() == whole["image"].tobytes()


@pytest.mark.parametrize("changes", [{}, {"mask_jitter": 5.0}, {"mask_grow": 4.0, "mask_feather": 7.0}], ids=str)
@pytest.mark.parametrize("condition", list(Condition), ids=str)
def test_maps_of_kept_pictures_are_those_of_the_whole(rows, tmp_path, condition, changes):
    """To the bit, for the sample and its mirror image; what is far from the product is not kept."""
    flip = condition is not Condition.light
    config = ControlNetMethod(condition=condition, **changes)
    examples = make(select(rows, [3, 4]), tmp_path, config, flip)
    examples.fill(Accelerator(cpu=True))
    method = examples.encoder.method
    for index in (0, 1, *((2,) if flip else ())):
        whole, kept = examples.seen(index), examples.cached(index)["seen"]
        assert {name for name in whole if name != "image"} == {name for name in kept if name != "image"}
        assert kept["geometry"] == whole["geometry"]
        assert (np.asarray(kept["image"]) == 0).all(-1).mean() > 0.3
        for epoch in range(3):
            key = SampleKey(0, epoch, "a")
            maps = [method.condition(seen, [{}], key)["control_0"] for seen in (whole, kept)]
            assert maps[0].numpy().tobytes() == maps[1].numpy().tobytes()


def test_another_depth_makes_another_entry(rows, tmp_path):
    few = select(rows, [3])
    config = ControlNetMethod(condition=Condition.depth)
    before = make(few, tmp_path, config)
    before.fill(Accelerator(cpu=True))
    mean = before.cached(0)["mean"]
    depths = [cell(Image.new("L", picture.size, 77), "PNG") for picture in [few.read(0, ("depth",))["depth"]]]
    pictures = few.pictures.take(few.places)
    place = pictures.column_names.index("depth")
    few.pictures = pictures.set_column(place, "depth", pa.array(depths, pictures.schema.field("depth").type))
    few.places = [0]
    few._column_digests.clear()
    after = make(few, tmp_path, config)
    after.fill(Accelerator(cpu=True))
    assert set(np.unique(after.cached(0)["seen"]["depth"])) == {77}
    assert torch.equal(after.cached(0)["mean"], mean)


def test_small_buckets_are_closed():
    """60 photographs of five shapes, at least 16 in each bucket: two are left, and each sample is in the nearer."""
    shapes = [(64, 64), (48, 80), (80, 48), (56, 72), (72, 56)]
    sizes = [(100, 100)] * 30 + [(60, 100)] * 20 + [(100, 60)] * 4 + [(78, 100)] * 5 + [(100, 78)]
    assert sorted(Counter(sort_into(sizes, shapes)).values()) == [1, 4, 5, 20, 30]
    merged = sort_into(sizes, shapes, 16)
    assert Counter(merged) == {0: 30 + 4 + 5 + 1, 1: 20}
    assert sort_into(sizes, shapes, 1000) == [0] * 60
    assert sort_into([], shapes, 4) == []


def test_training_closes_small_buckets_and_validation_does_not(rows, parts):
    config = compose("train_lora", ["data.smallest_bucket=1000"])
    few = select(rows, range(8))
    few.sizes = [(100, 100)] * 6 + [(60, 100)] * 2
    task, examples = build_task(config, parts, few, few, Accelerator(cpu=True))
    assert set(examples.groups) == {0}
    assert (examples.moved, task.validator.examples.moved) == (2, 0)
    assert len(set(task.validator.examples.groups)) == 2


def test_methods_without_pictures_keep_none(rows, tmp_path):
    examples = make(select(rows, [3]), tmp_path, replace(LoraMethod(), rank=2))
    examples.fill(Accelerator(cpu=True))
    assert examples.cached(0)["seen"] is None
    assert not list(tmp_path.glob("seen-*"))


def test_a_cache_of_another_version_is_named_and_not_read(rows, tmp_path, monkeypatch, caplog):
    """Pictures and captions alike."""
    monkeypatch.setattr(log, "propagate", True)
    log.setLevel("INFO")
    few = select(rows, [3])
    config = replace(LoraMethod(), rank=2)
    monkeypatch.setattr(packshot_examples, "VERSION", 8)
    make(few, tmp_path, config).fill(Accelerator(cpu=True))
    caplog.clear()
    monkeypatch.setattr(packshot_examples, "VERSION", 9)
    make(few, tmp_path, config).fill(Accelerator(cpu=True))
    assert "holds 2 files" in caplog.text
    assert "of another version of Packshot, which this one does not read" in caplog.text
    assert "encoding pictures: 1 entries, 0.0 MiB, 0 % were cached" in caplog.text
    assert "encoding captions: 2 entries, 0.1 MiB, 0 % were cached" in caplog.text
