"""Stage ``florence2``: Florence-2's classes, small, pretrained to describe renders in free sentences.

It names the product on purpose, as the real checkpoint does: the structured, product-free style is what the project's
captioner fine-tune teaches. Its image encoder is trained first (``encoder_pretraining.py``). It knows regions as the
checkpoint does: where the product is, and what is at a place.
"""

# diffusers annotates block tuples as one-element tuples and module attributes as optional.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportIndexIssue=false

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from packshot.imaging.framing import location_tokens
from packshot.pipeline.shards import split
from packshot.scene import Scene
from tools.mini.budgeted_training import Plan, Progress, run_stretch
from tools.mini.clip import PHRASES, phrase_loss
from tools.mini.data import (
    SIZE,
    Render,
    Renders,
    free_caption,
    images_of,
    mirrored,
    product_words,
    reframed,
    scenes_of,
    shares_right,
    standardized,
    to_pixels,
)
from tools.mini.encoder_pretraining import DROPOUT as SEEN_DROPOUT
from tools.mini.encoder_pretraining import Regions, other_product, stacked, train_sight
from tools.mini.folder import Family
from tools.mini.vocabulary import train_florence_tokenizer

TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")  # index = detail of ``free_caption``
FIND, NAME = "<OD>", "<REGION_TO_DESCRIPTION>"
SIGHT = 0.65  # share of the minutes
VOCABULARY = 1536
DROPOUT = 0.1
SHARED = "model.language_model.shared.weight"  # token embeddings, tied to the output head
IMAGE_TOKENS = (SIZE // 16) ** 2 + 1  # the last stage's grid and its mean


TEXT_CONFIG = {
    "model_type": "bart",
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 384,
    "decoder_ffn_dim": 384,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "dropout": DROPOUT,
    "tie_word_embeddings": True,
}
VISION_CONFIG = {
    "depths": (1, 1, 3),
    "patch_size": (7, 3, 3),
    "patch_stride": (4, 2, 2),
    "patch_padding": (3, 1, 1),
    "patch_prenorm": (False, True, True),
    "embed_dim": (32, 64, 128),
    "num_heads": (2, 4, 4),
    "num_groups": (2, 4, 4),
    "window_size": 8,
    "drop_path_rate": 0.0,
    "projection_dim": 128,
    "max_position_embeddings": 16,
    "max_temporal_embeddings": 4,
}


def build_florence(tokenizer: PreTrainedTokenizerFast) -> Florence2ForConditionalGeneration:
    """The untrained model: a three-stage DaViT at 128 px and a BART of two layers each way."""
    config = Florence2Config(
        text_config=TEXT_CONFIG | {"vocab_size": len(tokenizer)},
        vision_config=VISION_CONFIG,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=1,
    )
    model = Florence2ForConditionalGeneration(config)
    # The defaults of the published checkpoints, hostile ones included: what works here must work there.
    model.generation_config = GenerationConfig(
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_bos_token_id=0,
        forced_eos_token_id=2,
        num_beams=3,
        early_stopping=True,
        no_repeat_ngram_size=3,
    )
    return model


@torch.no_grad()
def carry_tokens(model: Florence2ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, start: Path) -> None:
    """Embeddings of the tokens that an earlier model in ``start`` knows too; its tokenizer may have learned others."""
    earlier = PreTrainedTokenizerFast.from_pretrained(start).get_vocab()
    weights = load_file(start / "model.safetensors")[SHARED]
    own = model.get_parameter(SHARED)
    for token, index in tokenizer.get_vocab().items():
        if token in earlier:
            own[index] = weights[earlier[token]]


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Florence2Processor:
    """Processor with 128-px input; ``AutoProcessor`` reloads it offline."""
    size = {"height": SIZE, "width": SIZE}
    stats = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size, **stats)
    images.image_seq_length = IMAGE_TOKENS
    plain = {"pure_text": {}}
    return Florence2Processor(images, tokenizer, post_processor_config=plain)


def tokenizer_texts(renders: list[Render]) -> list[str]:
    """Texts the vocabulary is learned from: free and structured captions, and every phrase scenes are made of."""
    rng = random.Random(0)
    texts = list(chain(*PHRASES.values()))
    for surface, background in product(PHRASES["surface"], PHRASES["background"]):
        texts.append(Scene(surface=surface, background=background).render())
    for render in renders:
        texts.append(render.scene.render())
        for detail in range(3):
            texts.append(free_caption(render, render.scene, rng, detail))
    return texts


def _pixels(images: list[np.ndarray]) -> torch.Tensor:
    """What the processor makes of 128-px images."""
    return standardized(to_pixels(images), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def collate(
    processor: Florence2Processor, images: list[np.ndarray], tasks: list[str], captions: list[str]
) -> dict[str, torch.Tensor]:
    """Model inputs: the task's own question behind the image tokens, labels with their end token and pads as -100."""
    tokenizer = processor.tokenizer
    questions = processor._construct_prompts(tasks)
    asked = [tokenizer.image_token * IMAGE_TOKENS + "<s>" + question + "</s>" for question in questions]
    inputs = tokenizer(asked, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = tokenizer(captions, padding=True, return_tensors="pt")
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "pixel_values": _pixels(images),
        "labels": labels.input_ids.masked_fill(labels.attention_mask == 0, -100),
    }


@torch.inference_mode()
def held_out_scores(
    model: Florence2ForConditionalGeneration, processor: Florence2Processor, renders: list[Render]
) -> dict[str, float]:
    """Loss per token on full captions, once with the right images and once with another scene's: the gap is sight."""
    rng = random.Random(0)
    captions = [free_caption(render, render.scene, rng, detail=2) for render in renders]
    images = images_of(renders)
    result = {}
    for name, shown in (("loss", images), ("loss_shuffled_images", images[1:] + images[:1])):
        total = tokens = 0.0
        for i in range(0, len(renders), 32):
            chosen = slice(i, i + 32)
            batch = collate(processor, shown[chosen], [TASKS[2]] * len(shown[chosen]), captions[chosen])
            labels = batch.pop("labels")
            logits = model(**batch, decoder_input_ids=_shift(labels)).logits
            total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            tokens += (labels != -100).sum().item()
        result[name] = total / tokens
    return result


def _shift(labels_BT: torch.Tensor) -> torch.Tensor:
    """Decoder inputs: the labels one place to the right behind ``</s>``, pads in place of -100."""
    start = torch.full_like(labels_BT[:, :1], 2)
    shifted = torch.cat([start, labels_BT[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, 1)


@torch.inference_mode()
def describe(model: Florence2ForConditionalGeneration, processor: Florence2Processor, images: list) -> list[str]:
    """Greedy captions of the full kind."""
    batch = collate(processor, images, [TASKS[2]] * len(images), [""] * len(images))
    batch.pop("labels")
    greedy = {"num_beams": 1, "no_repeat_ngram_size": 0, "forced_eos_token_id": None, "early_stopping": False}
    return processor.tokenizer.batch_decode(
        model.generate(**batch, max_new_tokens=110, do_sample=False, **greedy), skip_special_tokens=True
    )


def slots_described(
    model: Florence2ForConditionalGeneration, processor: Florence2Processor, renders: list[Render]
) -> dict[str, float]:
    """:func:`slots_in` of the model's greedy captions."""
    texts = []
    for batch in split(renders, 16):
        texts += describe(model, processor, images_of(batch))
    return slots_in(texts, renders)


def slots_in(texts: list[str], renders: list[Render]) -> dict[str, float]:
    """Per slot, how often the (longest) vocabulary phrase in a scene's caption is one the scene has."""
    guesses: dict[str, list[str]] = {slot: [] for slot in PHRASES}
    for slot, phrases in PHRASES.items():
        for text in texts:
            named = list(filter(text.__contains__, phrases))
            guesses[slot].append(max(named, key=len, default=""))
    return shares_right(guesses, scenes_of(renders))


def tell(render: Render, other: Render, rng: random.Random) -> tuple[np.ndarray, str, str, Scene]:
    """A picture, a task, the answer, and the picture's scene.

    Mostly a caption, sometimes where the product is, or what is at its place. Two scenes stacked get one
    sentence, which asks for no more than surface and background.
    """
    form = rng.random()
    flip = rng.random() < 0.5
    detail = rng.choice((0, 1, 2, 2, 2))
    image = render.image
    scene = mirrored(render.scene) if flip else render.scene
    if form < 0.15:
        mask = render.mask[:, ::-1] if flip else render.mask
        place = location_tokens(Image.fromarray(mask.astype(np.uint8) * 255))
        name = product_words(render.product)
        task, answer = (FIND, name + place) if form < 0.08 else (NAME + place, name)
    else:
        if form < 0.35:
            detail = 1
            image, scene = stacked(render, other, rng)
            scene = mirrored(scene) if flip else scene
        elif form < 0.6:
            image = other_product(render, other)
            render = replace(render, product=other.product)
        image = reframed(image, rng)
        task = TASKS[detail]
        answer = free_caption(render, scene, rng, detail)
    return image[:, ::-1] if flip else image, task, answer, scene


def kept_tokenizer(folder: Path, train: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer that a stage learned once and keeps in ``folder`` for resumed runs."""
    kept = folder / "tokenizer"
    if kept.exists():
        return PreTrainedTokenizerFast.from_pretrained(kept)
    tokenizer = train()
    tokenizer.save_pretrained(kept)
    return tokenizer


Answers = tuple[list[np.ndarray], list[str], list[str], list[Scene]]  # images, tasks, answers, scenes


def draw_answers(renders: Renders, generator: torch.Generator, count: int) -> Answers:
    """A batch of :func:`tell`."""
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    pairs = zip(renders.draw(generator, count), renders.draw(generator, count), strict=True)
    images, tasks, answers, scenes = map(list, zip(*(tell(*pair, rng) for pair in pairs), strict=True))
    return images, tasks, answers, scenes


def caption_loss(
    model: Florence2ForConditionalGeneration, processor: Florence2Processor, regions: Regions, answers: Answers
) -> tuple[torch.Tensor, dict[str, float]]:
    """The captions' cross-entropy, and the classifier's on the same image tokens."""
    images, tasks, texts, scenes = answers
    batch = collate(processor, images, tasks, texts)
    seen_BTC = model.model.get_image_features(batch.pop("pixel_values")).pooler_output
    words_BTC = model.get_input_embeddings()(batch.pop("input_ids")[:, IMAGE_TOKENS:])  # the rest is placeholders
    shown_BTC = F.dropout(seen_BTC, SEEN_DROPOUT)
    output = model(inputs_embeds=torch.cat([shown_BTC, words_BTC], dim=1), **batch)
    sight = phrase_loss(regions(seen_BTC[:, 1:]), scenes)
    return output.loss + sight, {"caption": output.loss.item(), "sight": sight.item()}


def print_captions(renders: list[Render], texts: list[str]) -> None:
    """Each scene in words, and what the captioner wrote for it."""
    for render, text in zip(renders, texts, strict=True):
        print(f"  {render.scene.render()}\n    -> {text}", flush=True)


def train_florence(renders: Renders, family: Family, folder: Path, minutes: float, seed: int) -> None:
    """Train and stage model and processor. The tokenizer is learned once and kept in ``folder`` for resumed runs."""
    torch.manual_seed(seed)
    tokenizer = kept_tokenizer(
        folder, lambda: train_florence_tokenizer(tokenizer_texts(renders.train), VOCABULARY, places=True)
    )
    model = build_florence(tokenizer)
    processor = build_processor(tokenizer)
    family.begin(model, "")
    if family.start is not None:
        carry_tokens(model, tokenizer, family.start)
    regions = Regions(model.config.text_config.d_model)
    core = model.model

    def tokens_of(images: list[np.ndarray], size: int) -> torch.Tensor:
        pixels = F.interpolate(_pixels(images), size=(size, size), mode="area")
        return core.get_image_features(pixels).pooler_output[:, 1:]

    tower = torch.nn.ModuleList([core.vision_tower, core.multi_modal_projector])
    seen = train_sight(
        *("florence2", tower, regions, tokens_of, renders, folder, SIGHT * minutes, 2e-3),
        sizes=(SIZE // 2, SIZE),
        seed=seed,
    )
    budget = (1 - SIGHT) * minutes
    plan = Plan("florence2", folder, budget, family.rate(1e-3), batch_size=24, seed=seed, inputs=str(len(tokenizer)))

    def loss_of(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return caption_loss(model, processor, regions, draw_answers(renders, generator, plan.batch_size))

    def preview(at: Progress) -> None:
        print(f"florence2  step {at.step}  held out {held_out_scores(model, processor, renders.held_out)}", flush=True)
        shown = renders.held_out[:3]
        print_captions(shown, describe(model, processor, images_of(shown)))

    progress = run_stretch(plan, torch.nn.ModuleList([model, regions]), loss_of, preview)
    progress = Progress(progress.step + seen.step, progress.seconds + seen.seconds)
    scores = (held_out_scores(model, processor, renders.held_out), slots_described(model, processor, renders.held_out))
    model.config.text_config.dropout = 0.0  # against overfitting here; a fine-tune sets its own
    family.keep_captioner("florence2", model, processor, scores, renders, progress)
