"""Sets that are not as even as the shipped ones."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from packshot.config.schema import DataConfig, LoraMethod, TrainLora
from packshot.dataset.rows import load_rows
from packshot.engine.keyed_random import SampleKey
from packshot.errors import ConfigError, PackshotError
from packshot.methods.lora import Lora
from packshot.train.encode import Encoder
from packshot.train.examples import Examples
from packshot.train.task import DiffusionTask


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def sample(name, height, width, box, mask_size=None):
    """A picture of noise with a product in (top, left, bottom, right)."""
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    mask = np.zeros(mask_size or (height, width), np.uint8)
    mask[box[0] : box[2], box[1] : box[3]] = 255
    return {"id": name, "image": png(image), "mask": png(mask), "text": f"caption of {name}"}


def examples(folder, parts, samples, *, buckets):
    pq.write_table(pa.Table.from_pylist(samples), folder / "part-00000.parquet")
    method = Lora(parts, LoraMethod(rank=1, target_modules=r"mid_block.*attn2\.to_q"))
    rows = load_rows("data.train", str(folder))
    return Examples(rows, Encoder(parts, method, 128, DataConfig(buckets=buckets)), None)


@pytest.mark.parametrize("buckets", [True, False])
def test_no_size_cuts_a_product_in_training(tmp_path, parts, buckets):
    samples = [
        sample("square", 128, 128, (30, 30, 90, 90)),
        sample("wide", 90, 200, (20, 5, 70, 195)),  # too wide for its bucket at full height: bars above and below
        sample("small", 40, 30, (10, 10, 30, 20)),
        sample("panorama", 50, 400, (10, 30, 40, 90)),
    ]
    some = examples(tmp_path, parts, samples, buckets=buckets)
    for index, given in enumerate(samples):
        seen, encoded = some.seen(index), some.fresh(index)
        height, width = seen["geometry"].target
        assert encoded["mean"].shape[-2:] == encoded["alpha"].shape[-2:] == (height // 8, width // 8)
        assert torch.isfinite(encoded["mean"]).all()
        assert (height == width == 128) or buckets
        product = np.asarray(Image.open(io.BytesIO(given["mask"]["bytes"]))) > 0
        scale = seen["geometry"].resized[0] / product.shape[0]
        assert (np.asarray(seen["mask"]) >= 128).sum() == pytest.approx(product.sum() * scale**2, rel=0.1)
    assert min(some.seen(1)["geometry"].crop) < 0


def test_letterbox_bars_have_no_part_in_the_loss(tmp_path, parts):
    samples = [sample("square", 128, 128, (30, 30, 90, 90)), sample("wide", 90, 200, (20, 5, 70, 195))]
    some = examples(tmp_path, parts, samples, buckets=False)
    config = TrainLora(method=LoraMethod(rank=1))
    task = DiffusionTask(some.encoder.method, parts, config, some)
    for index, bar in ((0, 0), (1, 35)):  # 90 of 200 px wide at 128 px: 58 high, 35 px of bar above and below
        one = some[index]
        weight_HW = task.collate([one], [SampleKey(0, 0, one["id"])])["weight"][0, 0]
        rows = weight_HW.any(dim=1)
        assert bool(weight_HW[rows].all())
        inside = [8 * row >= bar and 8 * row + 8 <= 128 - bar for row in range(16)]
        assert rows.tolist() == inside


def test_a_mask_of_another_size_is_refused_by_its_sample(tmp_path, parts):
    some = examples(tmp_path, parts, [sample("bottle", 96, 96, (20, 20, 60, 60), (64, 64))], buckets=True)
    with pytest.raises(PackshotError, match=r"sample bottle: the picture has 96x96 px, its mask 64x64"):
        some.fresh(0)


@pytest.mark.parametrize("some_buckets", [True, False])
def test_an_impossible_resolution_is_refused(parts, some_buckets):
    """The message names the nearest possible one."""
    method = Lora(parts, LoraMethod(rank=1, target_modules=r"mid_block.*attn2\.to_q"))
    with pytest.raises(ConfigError, match=r"model\.resolution=144 .* multiples of 32 px"):
        Encoder(parts, method, 144, DataConfig(buckets=some_buckets))
