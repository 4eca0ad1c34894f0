"""Render jobs are keyed by seed and speak the vocabulary; packed sets share no product."""

import ast
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from packshot.core.errors import PackshotError
from packshot.render import pack as packing
from packshot.render.sample import design, product_pool, sample_job
from packshot.scene import Scene, vocabulary

JOBS = [sample_job(seed) for seed in range(1500)]
SLOTS = {
    "surface": vocabulary.SURFACES,
    "surroundings": vocabulary.SURROUNDINGS,
    "background": vocabulary.BACKGROUNDS,
    "lighting": vocabulary.LIGHTING,
    "mood": vocabulary.MOODS,
}
RENDER = Path(packing.__file__).parent


def said(slot, jobs=JOBS):
    for job in jobs:
        value = job["scene"][slot]
        yield from value if isinstance(value, list) else [value] if value else []


def test_a_job_is_a_function_of_its_seed():
    assert [sample_job(seed) for seed in range(50)] == JOBS[:50]
    assert sample_job(1) != sample_job(2)


def test_jobs_survive_json():
    assert json.loads(json.dumps(JOBS)) == JOBS


@pytest.mark.parametrize("slot", SLOTS)
def test_slots_use_the_whole_vocabulary_and_nothing_else(slot):
    assert set(said(slot)) == set(SLOTS[slot])


@pytest.mark.parametrize("slot", ["surface", "surroundings", "background", "lighting", "mood"])
def test_every_phrase_has_a_builder(slot):
    # The builders import bpy, which this environment lacks: their tables are read, not run.
    trees = [ast.parse((RENDER / name).read_text()) for name in ("stage.py", "props.py")]
    keys = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    parts = {part for phrase in SLOTS[slot] for part in phrase.split(" which is on ")}
    assert parts <= keys


def test_scenes_are_scenes_and_their_captions_parse_back():
    for job in JOBS[:300]:
        scene = Scene.from_dict(job["scene"])
        assert scene.to_dict() == job["scene"]
        assert Scene.parse(scene.render()).scene == scene


def test_shadows_fall_only_on_walls():
    cast = [job["scene"]["background"] for job in JOBS if "shadows on the wall" in job["scene"]["lighting"]]
    assert cast
    assert all(background.endswith("wall") for background in cast)


def test_a_product_id_is_one_design():
    seen = {}
    for job in JOBS:
        assert seen.setdefault(job["product_id"], job["product"]) == job["product"] == design(job["product_id"])
    assert set(seen) == set(product_pool())
    assert len({json.dumps(product) for product in seen.values()}) == len(product_pool())


def test_held_out_products_are_of_several_kinds():
    kinds = {design(product)["kind"] for product in packing.HELDOUT_PRODUCTS}
    assert len(packing.HELDOUT_PRODUCTS) == len(kinds) == 5


@pytest.fixture
def renders(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(24):
        folder = tmp_path / "renders" / str(seed)
        folder.mkdir(parents=True)
        for name, channels in (("image", 3), ("plate", 3), ("cutout", 4)):
            Image.fromarray(rng.integers(0, 256, (16, 16, channels), dtype=np.uint8)).save(folder / f"{name}.png")
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / "depth.png")
        (folder / "job.json").write_text(json.dumps(sample_job(seed)))
    (tmp_path / "renders" / ".7.123").mkdir()  # a render that was killed
    return tmp_path / "renders"


def pixels(cell):
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])))


def test_packed_rows_hold_the_renders_losslessly(renders, tmp_path):
    counts = packing.pack(renders, tmp_path / "out")
    assert counts["train"][0] + counts["heldout"][0] == 24
    for name in ("train", "heldout"):
        for row in pq.read_table(tmp_path / "out" / name).to_pylist():
            folder = renders / row["source"].split()[-1]
            job = json.loads((folder / "job.json").read_text())
            assert row["text"] == Scene.from_dict(row["scene"]).render() == Scene.from_dict(job["scene"]).render()
            assert (row["width"], row["height"], row["product_id"]) == (16, 16, job["product_id"])
            for layer in ("image", "plate", "depth"):
                assert np.array_equal(pixels(row[layer]), np.asarray(Image.open(folder / f"{layer}.png"))), layer
            alpha = np.asarray(Image.open(folder / "cutout.png"))[..., 3]
            assert np.array_equal(pixels(row["cutout"])[..., 3], alpha)
            assert np.array_equal(pixels(row["mask"]), alpha)


def test_splits_share_no_product(renders, tmp_path):
    packing.pack(renders, tmp_path / "out")
    products = {
        name: set(pq.read_table(tmp_path / "out" / name).column("product_id").to_pylist())
        for name in ("train", "heldout")
    }
    assert products["train"].isdisjoint(products["heldout"])
    assert products["heldout"] <= set(packing.HELDOUT_PRODUCTS)


def test_datasets_decodes_the_shards_as_images(renders, tmp_path):
    from datasets import load_dataset

    packing.pack(renders, tmp_path / "out")
    files = str(tmp_path / "out" / "train" / "part-*.parquet")
    row = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))[0]
    assert isinstance(row["image"], Image.Image)
    assert row["cutout"].mode == "RGBA"
    assert row["scene"]["surface"] in vocabulary.SURFACES


def test_a_damaged_render_and_an_empty_split_are_refused(renders, tmp_path):
    with pytest.raises(PackshotError, match="0 held out"):
        packing.pack(renders, tmp_path / "out", heldout_products=())
    (renders / "3" / "plate.png").write_bytes(b"\x89PNG")
    with pytest.raises(PackshotError, match="3 has no readable layer"):
        packing.pack(renders, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
