"""How the mini captioners learn: what they are shown, what they are asked, and what they are made of."""

import random

import numpy as np
import pytest
import torch
from caption_fixtures import CAPTIONS
from PIL import Image
from transformers import AutoProcessor, MllamaForConditionalGeneration

from packshot.caption.decoding import write
from packshot.caption.models.mllama import Mllama
from packshot.caption.models.weights import Asked
from packshot.config.schema import ProductTarget
from packshot.scene import Scene
from tools.mini import florence2, mllama
from tools.mini.clip import PHRASES
from tools.mini.data import SIZE, Render, Renders
from tools.mini.encoder_pretraining import Regions, other_product, sight_accuracy, sight_batch, stacked
from tools.mini.folder import halve
from tools.mini.vocabulary import train_florence_tokenizer, train_llama_tokenizer

PRODUCT = {"kind": "pump", "palette": "amber", "finish": "glass"}
RED = Scene("a bed of sand", ("lemons",), "a pink wall", "soft light from the left side", "calm")
BLUE = Scene("rippled water", (), "a blue wall", "studio lighting")


def render(name, scene, colour):
    """A plain picture of one colour with a white product in its middle."""
    plate = np.full((SIZE, SIZE, 3), colour, np.uint8)
    alpha = np.zeros((SIZE, SIZE, 1), np.uint8)
    alpha[40:90, 50:80] = 255
    image = np.where(alpha > 0, np.uint8(255), plate)
    return Render(name, name, PRODUCT, scene, image, plate, np.dstack([np.full_like(plate, 255), alpha]))


A, B = render("a", RED, (200, 40, 40)), render("b", BLUE, (40, 40, 200))


def test_stacked_scenes_agree_with_their_pictures():
    """The surface is that of the lower scene, the background that of the upper one."""
    image, scene = stacked(A, B, random.Random(0))
    assert (image[:40] == (40, 40, 200)).all(), "the other's plate, without its product"
    assert (image[-30:] == (200, 40, 40)).all()
    assert scene == Scene(surface=RED.surface, background=BLUE.background)


def test_another_product_stands_before_the_same_plate():
    other = Render("c", "c", PRODUCT, BLUE, B.image, B.plate, np.roll(B.cutout, 20, axis=1))
    image = other_product(A, other)
    assert (image[60, 72:98] == 255).all()
    assert (image[60, 50:68] == (200, 40, 40)).all(), "the old product is gone"


def test_sight_batches_show_every_form():
    """The generator alone decides the draw."""
    renders = Renders([A, B], [])
    images, scenes = sight_batch(renders, torch.Generator().manual_seed(0), 64)
    again, same = sight_batch(renders, torch.Generator().manual_seed(0), 64)
    assert scenes == same
    assert all(np.array_equal(a, b) for a, b in zip(images, again, strict=True))
    assert {image.shape for image in images} == {(SIZE, SIZE, 3)}
    mixed = [scene for scene in scenes if not scene.lighting]
    assert 8 < len(mixed) < 32
    assert any(scene.lighting == "soft light from the right side" for scene in scenes), "mirrored"


def test_regions_see_where_a_thing_is():
    torch.manual_seed(0)
    regions = Regions(4)
    tokens = torch.randn(1, 64, 4)
    upside_down = tokens.unflatten(1, (8, 8)).flip(1).flatten(1, 2)
    assert regions(tokens).shape == (1, sum(map(len, PHRASES.values())))
    assert not torch.allclose(regions(tokens), regions(upside_down), atol=1e-3)


def test_sight_accuracy_is_the_share_of_right_phrases():
    width = sum(map(len, PHRASES.values()))
    row = torch.zeros(width)
    start = 0
    for slot, phrases in PHRASES.items():
        for value in RED.slots()[slot]:
            row[start + phrases.index(value)] = 1.0
        start += len(phrases)
    told = sight_accuracy(lambda images: row.expand(len(images), -1), [A, B])
    assert told == {"surface": 0.5, "surroundings": 1.0, "background": 0.5, "lighting": 0.5, "mood": 1.0}


@pytest.fixture(scope="module")
def tokenizer():
    return train_llama_tokenizer([*CAPTIONS, *mllama.QUESTIONS] * 4, 420)


def test_a_new_llama_looks_at_its_picture(tokenizer):
    torch.manual_seed(0)
    model = mllama.build_mllama(tokenizer).eval()
    adapter = Mllama(model, mllama.build_processor(tokenizer), Asked("What is this?", ProductTarget.none), 20)
    images = [Image.fromarray(A.image), Image.fromarray(B.image)]
    batch = adapter.train_batch(images, [None, None], [CAPTIONS[0]] * 2)
    logits = adapter.logits(batch)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    logits.sum().backward()
    assert model.model.vision_model.patch_embedding.weight.grad.any()


def test_the_short_cut_equals_the_models_own_way(tokenizer):
    """Training computes the picture's states once, for captions and phrases alike."""
    torch.manual_seed(0)
    model = mllama.build_mllama(tokenizer).eval()
    adapter = Mllama(model, mllama.build_processor(tokenizer), Asked("What is this?", ProductTarget.none), 20)
    batch = adapter.train_batch([Image.fromarray(A.image)], [None], CAPTIONS[:1])
    with torch.no_grad():
        whole = adapter.logits(batch)
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            del batch[name]
        short = adapter.logits({**batch, "cross_attention_states": mllama._seen(model.model, [A.image])})
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-4)


def test_halved_weights_are_as_near_as_those_of_bfloat16():
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 300)
    before = layer.weight.detach().clone()
    halve(layer)
    assert layer.weight.dtype == torch.float16
    assert not (layer.weight.data.view(torch.int16) & 7).any()
    normal = before.abs() > 2**-14
    error = ((layer.weight.float() - before).abs() / before.abs())[normal].max()
    assert error <= 2**-8 + 2**-11  # rounded twice


def test_places_are_tokens_of_the_florence_tokenizer():
    tokenizer = train_florence_tokenizer(CAPTIONS * 4, 420, places=True)
    assert tokenizer("a bottle<loc_0><loc_999>", add_special_tokens=False).input_ids[-2:] == [
        tokenizer.convert_tokens_to_ids("<loc_0>"),
        tokenizer.convert_tokens_to_ids("<loc_999>"),
    ]
    assert "<loc_0>" not in train_florence_tokenizer(CAPTIONS * 4, 420).get_vocab()


def test_florence_learns_captions_and_places():
    """It is asked for captions, for the product and for what is at a place."""
    rng, told = random.Random(0), []
    for _ in range(300):
        told.append(florence2.tell(A, B, rng))
    tasks = {task.partition("<loc")[0] for _, task, _, _ in told}
    assert tasks == {*florence2.TASKS, florence2.FIND, florence2.NAME}
    found = next(answer for _, task, answer, _ in told if task == florence2.FIND)
    assert found.startswith("an amber glass pump bottle<loc_")
    named = next(answer for _, task, answer, _ in told if task.startswith(florence2.NAME))
    assert named == "an amber glass pump bottle"
    for _, task, answer, scene in told:
        if scene == Scene(surface=RED.surface, background=BLUE.background):
            assert task == florence2.TASKS[1]
            assert RED.surface in answer
            assert BLUE.background in answer


def test_the_shipped_llama_loads_offline_and_describes_a_render(root, rows):
    folder = root / "data" / "models" / "mllama"
    model = MllamaForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    adapter = Mllama(model.eval(), processor, Asked(mllama.QUESTIONS[1], ProductTarget.none), 60)
    model.generation_config.update(max_new_tokens=60, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id)
    images = [rows[index]["image"] for index in range(16)]
    texts = [caption.text for caption in write(adapter, images, [None] * 16)]
    told = [rows[index]["scene"].background in text for index, text in enumerate(texts)]
    assert sum(told) >= 8, texts
