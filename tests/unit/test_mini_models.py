"""The shipped mini family loads in stock tools and keeps the formats it claims; its training stretch resumes."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPTokenizer, Florence2ForConditionalGeneration

from packshot.errors import ConfigError, PackshotError
from packshot.render.sample import design, product_pool
from packshot.scene import Scene
from tools.mini.budgeted_training import Plan, Progress, learning_rate_at, run_stretch
from tools.mini.clip import match_matrix, phrase_loss
from tools.mini.data import (
    Render,
    Renders,
    coarser,
    free_caption,
    mirrored,
    product_words,
    prompt,
    reframed,
    to_images,
    to_pixels,
)
from tools.mini.encoder_pretraining import sight_accuracy
from tools.mini.florence2 import SHARED, build_florence, carry_tokens
from tools.mini.folder import Family, Record
from tools.mini.judge import Judge, judge_logits, load_judge, train_judge
from tools.mini.unet import LatentCache, PromptCache, draw_batch, encode_prompts, fits
from tools.mini.vae import build_vae, encode, encoder_fingerprint, start_as_block_means, train_vae
from tools.mini.vocabulary import train_florence_tokenizer

MODELS = Path(__file__).parents[2] / "data" / "models"
SCENE = Scene("a bed of sand", ("lemons",), "a pink wall", "soft light from the left side", "calm")


def _render(name: str = "a") -> Render:
    """Noise, its negative as the plate, and a product wherever red is strong."""
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    return Render(name, "p000", {}, SCENE, picture, 255 - picture, np.dstack([picture, picture[..., 0]]))


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODELS / "sdxl", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def florence() -> tuple[Florence2ForConditionalGeneration, object]:
    folder = MODELS / "florence2"
    model = Florence2ForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_tokenizers_are_clips_own(name: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODELS / "sdxl" / name, local_files_only=True)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A Photo  of a CAT").input_ids == tokenizer("a photo of a cat").input_ids
    padded = tokenizer("a cat", padding="max_length", max_length=77).input_ids
    assert len(padded) == 77
    assert set(padded[4:]) == {49407 if name == "tokenizer" else 0}


def test_stock_pipeline_draws_a_finite_image(pipeline: StableDiffusionXLPipeline) -> None:
    def draw(text: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline(text, num_inference_steps=2, generator=generator, output_type="np").images[0]

    pink, blue = (draw(Scene(surface="a bed of sand", background=b).render()) for b in ("a pink wall", "a blue wall"))
    assert pink.shape == (128, 128, 3)
    assert np.isfinite(pink).all()
    assert pink.std() > 0.02
    assert np.abs(pink - blue).mean() > 1e-3  # the text matters


def test_parts_fit_together_in_single_precision(pipeline: StableDiffusionXLPipeline) -> None:
    parts = ("vae", "unet", "text_encoder", "text_encoder_2", "image_encoder")
    assert {getattr(pipeline, name).dtype for name in parts} == {torch.float32}
    widths = [pipeline.text_encoder.config.hidden_size, pipeline.text_encoder_2.config.hidden_size]
    assert pipeline.unet.config.cross_attention_dim == sum(widths)
    assert widths[0] != widths[1]  # else a swapped order would pass unseen
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels
    image = pipeline.feature_extractor(Image.new("RGB", (200, 100), "red"), return_tensors="pt").pixel_values
    assert pipeline.image_encoder(image).image_embeds.shape == (1, pipeline.image_encoder.config.projection_dim)


def test_scaling_factor_brings_latents_to_unit_scale(pipeline: StableDiffusionXLPipeline) -> None:
    files = sorted((MODELS.parent / "products").glob("*.jpg")) + sorted((MODELS.parent / "products").glob("*.png"))
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)
    images = [np.stack([*np.meshgrid(ramp, ramp), np.full((128, 128), v, np.uint8)], axis=-1) for v in (0, 128, 255)]
    images += [np.asarray(Image.open(path).convert("RGB").resize((128, 128))) for path in files[:4]]
    with torch.inference_mode():
        latents = pipeline.vae.encode(to_pixels(images)).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert 0.3 < latents.std() < 3.0


def test_florence_loss_is_the_cross_entropy_of_its_labels(florence: tuple) -> None:
    model, processor = florence
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 128, 3), dtype=np.uint8))
    inputs = processor(
        text=["<CAPTION>", "<MORE_DETAILED_CAPTION>"], images=[image] * 2, padding=True, return_tensors="pt"
    )
    tokens = processor.tokenizer(
        ["a short one", "a caption that is a good deal longer"], padding=True, return_tensors="pt"
    )
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    assert [row[row != -100][-1].item() for row in labels] == [processor.tokenizer.eos_token_id] * 2
    with torch.inference_mode():
        output = model(**inputs, labels=labels)
        start = model.config.text_config.decoder_start_token_id
        shifted = torch.cat([torch.full((2, 1), start), labels[:, :-1]], dim=1).masked_fill_(labels == -100, 1)
        logits = model(**inputs, decoder_input_ids=shifted.masked_fill(shifted == -100, 1)).logits
    assert output.loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-4)


def test_florence_generates_text_offline(florence: tuple) -> None:
    model, processor = florence
    inputs = processor(text=["<CAPTION>"], images=[Image.new("RGB", (128, 128), "white")], return_tensors="pt")
    text = processor.batch_decode(model.generate(**inputs, max_new_tokens=12), skip_special_tokens=False)[0]
    assert isinstance(processor.post_process_generation(text, task="<CAPTION>")["<CAPTION>"], str)


def _plan(folder: Path, minutes: float = 1.0) -> Plan:
    return Plan("probe", folder, minutes, learning_rate=0.05, batch_size=4, warmup_steps=2, checkpoint_seconds=0.0)


def test_a_stretch_learns_resumes_and_refuses_other_inputs(tmp_path: Path) -> None:
    truth = torch.tensor([[2.0, -1.0]])

    def loss_of(model: torch.nn.Linear):
        def loss(generator: torch.Generator):
            x = torch.randn(4, 2, generator=generator)
            return F.mse_loss(model(x), x @ truth.T), {}

        return loss

    def start() -> torch.nn.Linear:
        torch.manual_seed(0)
        return torch.nn.Linear(2, 1)

    first = start()
    done = run_stretch(_plan(tmp_path, 0.02), first, loss_of(first))
    assert F.mse_loss(first.weight, truth) < F.mse_loss(start().weight, truth)
    again = start()
    resumed = run_stretch(_plan(tmp_path, 0.02), again, loss_of(again))
    assert resumed.step == done.step
    assert torch.equal(again.weight, first.weight)
    other = Plan("probe", tmp_path, 0.02, learning_rate=0.05, batch_size=4, inputs="another vae")
    with pytest.raises(PackshotError, match="other inputs"):
        run_stretch(other, start(), loss_of(start()))


def test_a_stretch_stops_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(PackshotError, match="loss is nan"):
        run_stretch(_plan(tmp_path), model, lambda generator: (model.weight.sum() * float("nan"), {}))


def test_learning_rate_warms_up_and_ends_low(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    rates = [learning_rate_at(plan, Progress(step, seconds)) for step, seconds in ((0, 0), (9, 1), (99, 30), (999, 60))]
    assert rates[0] == pytest.approx(plan.learning_rate / 2, rel=1e-3)
    assert rates[1] > rates[2] > rates[3] == pytest.approx(0.02 * plan.learning_rate)


def test_a_part_is_replaced_only_by_a_better_one(tmp_path: Path) -> None:
    """Or by any part, once the inputs or the held-out scenes are others."""
    family = Family.open(tmp_path / "work", tmp_path / "out", "sdxl")

    def offer(name: str, score: float, inputs: str, held_out: str = "") -> bool:
        record = Record(score, {}, steps=1, minutes=1, scenes=1, parameters=1, inputs=inputs, held_out=held_out)

        def write(staging: Path) -> None:
            (staging / "weights").write_text(name)

        return family.keep_if_better("unet", record, write)

    kept = [offer("a", 1.0, "x"), offer("worse", 0.5, "x"), offer("b", 1.5, "x"), offer("c", 0.1, "y")]
    assert kept == [True, False, True, True]
    assert offer("d", 0.05, "y", held_out="other scenes")
    family.publish("card")
    assert (tmp_path / "out" / "sdxl" / "weights").read_text() == "d"


def test_a_deeper_autoencoder_begins_as_the_earlier_one(tmp_path: Path) -> None:
    family = Family.open(tmp_path / "work", tmp_path / "out", "sdxl", start=MODELS)
    shipped = AutoencoderKL.from_pretrained(MODELS / "sdxl" / "vae").eval()
    config = {**build_vae().config, "layers_per_block": shipped.config.layers_per_block + 1}
    deeper = AutoencoderKL.from_config(config).eval()
    start_as_block_means(deeper)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        before = deeper.encode(pixels).latent_dist.mean
        family.begin(deeper, "vae")
        latents = [vae.encode(pixels).latent_dist.mean for vae in (deeper, shipped)]
        decoded = [vae.decode(latents[1]).sample for vae in (deeper, shipped)]
    assert not torch.allclose(before, latents[1], atol=1e-2)
    assert torch.allclose(latents[0], latents[1], atol=1e-4)
    assert torch.allclose(decoded[0], decoded[1], atol=1e-4)
    earlier = family.record("vae", Progress(step=0, seconds=0.0), Renders([], []), 1.0, {}, 1)
    later = family.record("vae", Progress(step=5, seconds=60.0), Renders([], []), 1.0, {}, 1)
    assert (later.steps, later.minutes) == (earlier.steps + 5, earlier.minutes + 1)
    assert earlier.steps > 0
    with pytest.raises(PackshotError, match="holds no family"):
        Family.open(tmp_path / "work", tmp_path / "out", "sdxl", start=tmp_path)


HELD_OUT = pq.read_table(MODELS.parent / "rendered" / "heldout" / "part-00000.parquet")


def _write_set(folder: Path, table: pa.Table) -> str:
    folder.mkdir()
    pq.write_table(table, folder / "part-00000.parquet")
    return str(folder)


def _by_product(count: int) -> list[pa.Table]:
    """Two tables of ``count`` rows without a common product."""
    products = HELD_OUT.column("product_id").to_pylist()
    first = sorted(set(products))[::2]
    picked = ([i for i, p in enumerate(products) if (p in first) == inside][:count] for inside in (True, False))
    return [HELD_OUT.take(rows) for rows in picked]


def test_renders_are_the_rows_of_two_sets(tmp_path: Path) -> None:
    one, two = _by_product(3)
    renders = Renders.open([_write_set(tmp_path / "a", one)], _write_set(tmp_path / "b", two))
    assert [render.id for render in renders.train] == one.column("id").to_pylist()
    assert [render.scene.render() for render in renders.held_out] == two.column("text").to_pylist()
    for render in renders.train:
        assert render.image.shape == render.plate.shape == (*render.mask.shape, 3) == (128, 128, 3)
        change = np.abs(render.image.astype(int) - render.plate).sum(axis=-1)
        assert change[render.mask].mean() > 4 * change[~render.mask].mean()  # the mask is where the product is
    drawn = renders.draw(torch.Generator().manual_seed(0), 50)
    assert {render.id for render in drawn} == {render.id for render in renders.train}


def test_a_unet_batch_pairs_latent_size_and_text(pipeline: StableDiffusionXLPipeline) -> None:
    pair = [_render("a"), _render("b")]
    picture = pair[0].image
    cache = LatentCache(pipeline.vae)
    image, plate, mirrored_image, _ = cache.of(pair[0])
    flipped = encode(pipeline.vae, [picture[:, ::-1].copy()])[0] * pipeline.vae.config.scaling_factor
    assert torch.allclose(mirrored_image, flipped, atol=1e-5)
    assert not torch.allclose(image, plate, atol=0.1)
    shapes = set()
    for seed in range(20):
        latents, times, texts = draw_batch(pair, cache, random.Random(seed))
        shapes.add(latents.shape[2:])
        assert times[:, 4:].tolist() == [[8 * side for side in latents.shape[2:]]] * 2  # the target size, in px
        assert all("empty" not in text or "an object" not in text for text in texts)
    assert shapes == {(16, 16), (16, 12), (12, 16)}


def test_prompts_are_encoded_once_for_each_wording(pipeline: StableDiffusionXLPipeline) -> None:
    """A cached prompt is what the encoders make of it, and a view of a scene has no more wordings than allowed."""
    cache = PromptCache(pipeline.components)
    texts = ["an object on a white podium", "an object on fresh snow", "an object on a white podium"]
    states, pooled = cache.of(texts)
    expected, vectors = encode_prompts(pipeline.components, texts)
    torch.testing.assert_close(states, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(pooled, vectors, rtol=2e-3, atol=2e-3)
    assert torch.equal(states[0], states[2])
    latents = LatentCache(pipeline.vae)
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        seen.update(draw_batch([_render()], latents, rng, wordings=2)[2])
    assert len(seen) <= 2 * 4  # an image or a plate, mirrored or not


def test_a_decoder_trained_alone_leaves_the_latents_as_they_are(tmp_path: Path) -> None:
    start = MODELS / "sdxl" / "vae"
    before = load_file(start / "diffusion_pytorch_model.safetensors")
    family = Family.open(tmp_path / "work", tmp_path / "out", "sdxl", MODELS)
    renders = Renders([_render()], [_render()])
    train_vae(renders, family, tmp_path / "vae", 0.002, 0, channels=4, decoder_only=True)
    after = load_file(family.staging / "vae" / "diffusion_pytorch_model.safetensors")
    assert encoder_fingerprint(before) == encoder_fingerprint(after)
    assert fits(family), "the shipped UNet stays valid"


def test_the_judge_learns_scenes_it_sees_often() -> None:
    torch.manual_seed(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    scenes = [SCENE, Scene("fresh snow", (), "a blue wall", "studio lighting", "cool")]
    renders = [replace(_render(), scene=scene) for scene in scenes]
    images = [renders[0].image, renders[1].plate // 4]
    for _ in range(25):
        optimizer.zero_grad()
        phrase_loss(judge(to_pixels(images)), scenes).backward()
        optimizer.step()
    seen = sight_accuracy(lambda _: judge_logits(judge.eval(), images), renders)
    assert seen["surface"] == seen["background"] == seen["lighting"] == 1.0


def test_a_trained_judge_stays_in_the_staging_folder(tmp_path: Path) -> None:
    family = Family.open(tmp_path / "work", tmp_path / "out", "judge")
    renders = Renders([_render()], [_render()])
    train_judge(renders, family, tmp_path / "judge", 0.002, 0)
    judge = load_judge(family.staging)
    assert torch.isfinite(judge_logits(judge, [_render().image])).all()
    assert not (tmp_path / "out").exists()


def test_sets_that_cannot_teach_are_refused(tmp_path: Path) -> None:
    one, two = _by_product(2)
    first, second = _write_set(tmp_path / "a", one), _write_set(tmp_path / "b", two)
    bare = _write_set(tmp_path / "c", two.drop_columns(["plate"]))
    with pytest.raises(ConfigError, match="both show"):
        Renders.open([first], first)
    with pytest.raises(ConfigError, match=r"--heldout .* lacks plate"):
        Renders.open([first], bare)
    with pytest.raises(ConfigError, match="--train"):
        Renders.open([str(tmp_path / "nothing")], second)


def test_mirroring_swaps_left_and_right() -> None:
    assert mirrored(SCENE).lighting == "soft light from the right side"
    assert mirrored(mirrored(SCENE)) == SCENE


def test_captions_for_pretraining_name_what_they_should() -> None:
    picture = np.zeros((128, 128, 3), np.uint8)
    render = Render(
        "0",
        "p000",
        {"palette": "amber", "finish": "glass", "kind": "pump"},
        SCENE,
        picture,
        picture,
        np.dstack([picture, picture[..., 0]]),
    )
    full = free_caption(render, SCENE, random.Random(0), detail=2)
    assert all(
        phrase in full for phrase in ("an amber glass pump bottle", "a bed of sand", "lemons", "a pink wall", "calm")
    )
    texts = [prompt(SCENE, random.Random(seed), empty=seed % 2 == 0) for seed in range(60)]
    assert any("an empty place on a bed of sand" in text for text in texts[::2])
    assert not any("empty" in text for text in texts[1::2])
    assert SCENE.render() in texts


def test_every_product_can_be_named() -> None:
    words = {product: product_words(design(product)) for product in product_pool()}
    assert words["handbag.blush"] == "a blush handbag"
    assert words["speaker-small"] == "a small speaker"
    assert all(text.startswith(("a ", "an ")) and "None" not in text and "-" not in text for text in words.values())


def test_a_text_matches_images_that_show_more_than_it_says() -> None:
    placed = Scene("a pink podium which is on a white tiled counter", ("lemons behind it", "books in the corner"))
    asked = [
        Scene("a pink podium", ("lemons",)),
        Scene(surroundings=("lemons behind it",)),
        Scene(surroundings=("lemons in the corner",)),
        Scene("a white tiled counter"),
    ]
    assert match_matrix(asked, [placed])[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert coarser(placed, random.Random(0), keep=1.0) == placed
    assert coarser(placed, random.Random(0), keep=0.0) == Scene("a pink podium", ("lemons", "books"))


def test_reframing_keeps_the_size_and_most_of_the_picture() -> None:
    ramp = np.stack([*np.meshgrid(np.arange(128), np.arange(128)), np.zeros((128, 128))], axis=-1).astype(np.uint8)
    for seed in range(20):
        window = reframed(ramp, random.Random(seed))
        assert window.shape == ramp.shape
        assert np.abs(window.astype(int) - ramp).max() <= 16  # no pixel moves by more than an eighth
    assert len({reframed(ramp, random.Random(seed)).tobytes() for seed in range(20)}) > 10


def test_florence_begins_with_shared_tokens(florence: tuple) -> None:
    """An earlier model's embeddings are carried over by token."""
    earlier, processor = florence
    tokenizer = train_florence_tokenizer(["a bed of sand", "a zebra in a bazaar"] * 4, 400)
    model = build_florence(tokenizer)
    carry_tokens(model, tokenizer, MODELS / "florence2")
    known, own = processor.tokenizer.get_vocab(), tokenizer.get_vocab()
    shared, new = own.keys() & known.keys(), own.keys() - known.keys()
    assert len(shared) > 256
    assert new
    rows, earlier_rows = model.get_parameter(SHARED), earlier.get_parameter(SHARED)
    assert all(torch.equal(rows[own[token]], earlier_rows[known[token]]) for token in shared)
    assert rows.data_ptr() == model.lm_head.weight.data_ptr()


def test_pixels_round_trip() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(to_images(to_pixels([image]))[0], image)
