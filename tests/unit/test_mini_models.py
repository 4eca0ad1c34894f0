"""The shipped mini family loads in stock tools and keeps the formats it claims; its training stretch resumes."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import AutoProcessor, CLIPTokenizer, Florence2ForConditionalGeneration

from packshot.core.errors import PackshotError
from packshot.models.mini.data import Render, free_caption, mirrored, prompt, to_images, to_pixels
from packshot.models.mini.folder import Family, Record
from packshot.models.mini.stretch import Plan, learning_rate_at, run_stretch
from packshot.scene import Scene

MODELS = Path(__file__).parents[2] / "data" / "models"


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
    from packshot.models.mini.stretch import Progress

    plan = _plan(tmp_path)
    rates = [learning_rate_at(plan, Progress(step, seconds)) for step, seconds in ((0, 0), (9, 1), (99, 30), (999, 60))]
    assert rates[0] == pytest.approx(plan.learning_rate / 2, rel=1e-3)
    assert rates[1] > rates[2] > rates[3] == pytest.approx(0.02 * plan.learning_rate)


def test_a_part_is_replaced_only_by_a_better_one_or_when_its_inputs_are_gone(tmp_path: Path) -> None:
    family = Family.open(tmp_path / "work", tmp_path / "out", "sdxl")

    def offer(name: str, score: float, inputs: str) -> bool:
        record = Record(score, {}, steps=1, minutes=1, scenes=1, parameters=1, inputs=inputs)
        return family.keep_if_better("unet", record, lambda staging: (staging / "weights").write_text(name) and None)

    kept = [offer("a", 1.0, "x"), offer("worse", 0.5, "x"), offer("b", 1.5, "x"), offer("c", 0.1, "y")]
    assert kept == [True, False, True, True]
    family.publish("card")
    assert (tmp_path / "out" / "sdxl" / "weights").read_text() == "c"


SCENE = Scene("a bed of sand", ("lemons",), "a pink wall", "soft light from the left side", "calm")


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
        picture[..., 0] > 0,
    )
    full = free_caption(render, SCENE, random.Random(0), detail=2)
    assert all(
        phrase in full for phrase in ("an amber glass pump bottle", "a bed of sand", "lemons", "a pink wall", "calm")
    )
    texts = [prompt(SCENE, random.Random(seed), empty=seed % 2 == 0) for seed in range(60)]
    assert any("an empty place on a bed of sand" in text for text in texts[::2])
    assert not any("empty" in text for text in texts[1::2])
    assert SCENE.render() in texts


def test_pixels_round_trip() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(to_images(to_pixels([image]))[0], image)
