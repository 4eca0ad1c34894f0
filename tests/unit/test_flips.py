"""data.flip: a mirror image at half of the accesses, keyed as every draw, and never against the words of a caption."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from packshot.base.load import load_parts
from packshot.config.compose import compose
from packshot.config.schema import ControlNetMethod, IPAdapterMethod, LoraMethod, ProductConditioning, TrainLora
from packshot.dataset.flips import flip_note, flippable, tells_sides
from packshot.engine.keyed_random import SampleKey
from packshot.errors import ConfigError
from packshot.imaging.framing import plan
from packshot.methods import METHODS
from packshot.train.encode import Encoder
from packshot.train.examples import Examples, framed, mirrored
from packshot.train.task import DiffusionTask


@pytest.mark.parametrize(
    ("text", "tells"),
    [
        ("harsh light from the left side", True),
        ("Light from the RIGHT", True),
        ("a shelf with lettering", True),
        ("a wall clock", True),
        ("leftovers on a bright table, an upright plant", False),
        ("an assigned swordfish", False),
        ("", False),
    ],
)
def test_words_for_sides_and_writing_are_known(text, tells):
    assert tells_sides(text) is tells


def test_any_caption_of_a_sample_keeps_it_as_it_is():
    flips = flippable(["a table", "a table", "on the left"], [None, ["a table", "the right one"], None])
    assert flips == [True, False, False]
    assert flip_note(flips).startswith("data.flip=true: 1 of 3 samples")


@pytest.mark.parametrize(
    ("size", "target", "box"),
    [((90, 133), (64, 64), None), ((90, 133), (64, 64), (10, 3, 60, 40)), ((64, 200), (64, 64), (0, 2, 64, 199))],
)
def test_a_mirrored_geometry_shows_the_mirrored_cut(size, target, box):
    """Letterboxed, cropped in the middle, or moved for a product: bars and crop corner change sides."""
    geometry = plan(size, target, box)
    turned = geometry.mirrored()
    assert turned.mirrored() == geometry
    np.testing.assert_array_equal(turned.inside(), geometry.inside()[:, ::-1])
    if geometry.crop[1] >= 0:
        assert turned.crop[1] + geometry.crop[1] + target[1] == geometry.resized[1]


def test_all_pictures_of_a_sample_are_mirrored_together():
    across_HW = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
    picture = Image.fromarray(np.stack([across_HW] * 3, -1))
    row = {
        "id": "a",
        "text": "",
        "image": picture,
        "mask": Image.fromarray(across_HW),
        "depth": Image.fromarray(across_HW),
    }
    seen = framed(row, (64, 64))
    turned = mirrored(seen)
    for before, after in zip(pictures(seen), pictures(turned), strict=True):
        np.testing.assert_array_equal(after, before[:, ::-1])
    assert turned["id"] == "a"


def pictures(sample):
    return [np.asarray(sample.get(name)) for name in ("image", "mask", "depth")]


class Few:
    """The first samples of a set, the second with a side in its caption."""

    def __init__(self, rows, count):
        self._rows, self.ids, self.sizes = rows, rows.ids[:count], rows.sizes[:count]
        self.texts = ["an object on a table", "light from the left", *["an object on sand"] * (count - 2)]
        self.read, self.digest, self.path = rows.read, rows.digest, rows.path

    def __len__(self):
        return len(self.ids)


def make(rows, folder, method, flip=True, **objective):
    config = TrainLora()
    config = replace(config, objective=replace(config.objective, **objective))
    parts = load_parts(config.model)
    made = METHODS[type(method)](parts, method)
    if objective:
        from packshot.base.inpainting import prepare_unet

        prepare_unet(parts.unet, config.objective.product_conditioning)
    examples = Examples(rows, Encoder(parts, made, 128, config.data), folder, flip=flip)
    examples.fill(Accelerator(cpu=True))
    return DiffusionTask(made, parts, config, examples), examples


def mirror_of(examples, index):
    return {**examples[index]}["mirror"][0]


def key_that(flips, sample_id):
    """A key of the sample under which it is flipped, or not."""
    keys = (SampleKey(0, epoch, sample_id) for epoch in range(100))
    return next(key for key in keys if (key.uniform("flip") < 0.5) is flips)


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        (LoraMethod(rank=4), {"product_conditioning": ProductConditioning.channels}),
        (ControlNetMethod(), {}),
        (IPAdapterMethod(), {}),
    ],
    ids=["lora", "controlnet", "ip_adapter"],
)
def test_a_flipped_access_reads_the_mirror_image_alone(rows, tmp_path, method, objective):
    """From the cache and encoded anew; the other draws of the access stay, and unflipped accesses are as without."""
    few = Few(rows, 3)
    task, cached = make(few, tmp_path, method, **objective)
    _, fresh = make(few, None, method, **objective)
    _, plain = make(few, tmp_path / "plain", method, flip=False, **objective)
    flipped, unflipped = key_that(True, few.ids[0]), key_that(False, few.ids[0])
    turned = task.collate([cached[0]], [flipped])
    alone = plain[0]
    straight = task.collate([alone], [flipped])
    torch.testing.assert_close(turned["weight"], straight["weight"].flip(-1))
    assert torch.equal(turned["noise"], straight["noise"])
    assert not torch.equal(turned["latents"], straight["latents"])
    again = task.collate([fresh[0]], [flipped])
    assert set(turned) == set(again) == set(straight)
    for name in turned:
        torch.testing.assert_close(turned[name], again[name], rtol=1e-5, atol=2e-5)
    expected = cached.encoder.latents([mirrored(cached.seen(0))])[0]
    torch.testing.assert_close(mirror_of(cached, 0)["mean"], expected["mean"], rtol=1e-5, atol=2e-5)
    for name, value in task.collate([cached[0]], [unflipped]).items():
        assert torch.equal(value, task.collate([alone], [unflipped])[name]), name
    assert "mirror" not in cached[1]


def test_a_cache_is_the_same_bits_with_and_without_flips(rows, tmp_path):
    few = Few(rows, 11)
    _, plain = make(few, tmp_path / "plain", LoraMethod(rank=4), flip=False)
    _, before = make(few, tmp_path / "both", LoraMethod(rank=4), flip=False)
    _, both = make(few, tmp_path / "both", LoraMethod(rank=4))
    _, alone = make(few, tmp_path / "alone", LoraMethod(rank=4))
    for index in (0, 1, 10):
        assert torch.equal(plain[index]["mean"], both[index]["mean"])
        assert torch.equal(plain[index]["mean"], alone[index]["mean"])
    assert torch.equal(mirror_of(both, 10)["mean"], mirror_of(alone, 10)["mean"])
    assert "mirror" not in before[10]


def test_half_of_the_accesses_are_flipped_whatever_asks():
    flips = [
        SampleKey(0, epoch, f"sample-{number}").uniform("flip") < 0.5 for epoch in range(8) for number in range(250)
    ]
    assert 0.46 < np.mean(flips) < 0.54


@pytest.mark.parametrize(
    ("script", "key"), [("train_controlnet", "method.condition=light"), ("caption_vlm", "task=train")]
)
def test_flips_are_refused_where_sides_are_learned(script, key):
    with pytest.raises(ConfigError, match=r"data\.flip=true"):
        compose(script, ["data.flip=true", key])
