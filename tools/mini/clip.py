"""Stage ``clip``: SDXL's two text encoders and the image encoder, trained together by contrast.

A text names some slots of its scene; it matches every image in the batch whose scene agrees in those slots, so one
embedding learns to hold surface, surroundings, background, light and mood. A classifier of the vocabulary's phrases,
the same for images and texts and thrown away afterwards, brings both there much sooner.
"""

# diffusers annotates block tuples as one-element tuples and module attributes as optional.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportIndexIssue=false

from __future__ import annotations

import random
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from packshot.lists import map_values, pick, select
from packshot.pipeline.shards import split
from packshot.scene import SLOTS, Scene
from packshot.scene.scene import COUNTED
from tools.mini.budgeted_training import Plan, Progress, run_stretch
from tools.mini.data import (
    Render,
    Renders,
    bare_phrases,
    coarser,
    filled_slots,
    images_and_plates,
    loose_caption,
    mirrored,
    reframed,
    scenes_of,
    shares_right,
    standardized,
    sub_scene,
    to_pixels,
    without_product,
)
from tools.mini.folder import Family, set_loading_dtype
from tools.mini.vocabulary import VOCABULARY_SIZE

PARTS = ("text_encoder", "text_encoder_2", "image_encoder")
IMAGE_SIZE = 96
EMBEDDING = 80  # of the space that images and texts share, and of SDXL's pooled text embedding
PHRASES = map_values(attrgetter("vocabulary"), select(SLOTS, COUNTED))


def _text_config(hidden: int, heads: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=77,
        projection_dim=EMBEDDING,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )


def build_encoders() -> torch.nn.ModuleDict:
    """Untrained ``text_encoder`` (width 48), ``text_encoder_2`` (80), ``image_encoder``; parts only training needs.

    The widths differ as SDXL's do, so that a mixed-up order fails instead of passing unseen.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=16,
        projection_dim=EMBEDDING,
        hidden_act="gelu",
    )
    return torch.nn.ModuleDict(
        {
            "text_encoder": CLIPTextModel(_text_config(48, 4, "quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(80, 5, "gelu")),
            "image_encoder": CLIPVisionModelWithProjection(vision),
            "head": torch.nn.Linear(48, EMBEDDING, bias=False),
            "phrases": torch.nn.Linear(EMBEDDING, sum(map(len, PHRASES.values())), bias=False),
            "log_scale": torch.nn.ParameterDict({"value": torch.nn.Parameter(torch.tensor(2.5))}),
        }
    )


def feature_extractor() -> CLIPImageProcessorPil:
    """The image processor that belongs to ``image_encoder``."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def to_clip_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """What :func:`feature_extractor` makes of uint8 images, for whole batches of one shape."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    pixels = F.interpolate(to_pixels(images), size=size, mode="bicubic", antialias=True, align_corners=False)
    return standardized(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """input_ids_B77 as SDXL pipelines make them."""
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def _draw_slots(scene: Scene, rng: random.Random) -> set[str]:
    """One slot, some, or all of the filled ones, at equal odds."""
    filled = filled_slots(scene)
    return set(rng.sample(filled, rng.choice((1, 1, rng.randint(1, len(filled)), len(filled)))))


def _draw_batch(
    renders: Renders, generator: torch.Generator, count: int
) -> tuple[list[np.ndarray], list[str], list[Scene], list[Scene]]:
    """Images, texts, the scenes of the images, and what of them the texts say."""
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    images, scenes, texts, named = [], [], [], []
    for render in renders.draw(generator, count):
        flip = rng.random() < 0.5
        image = reframed(without_product(render, rng), rng)
        images.append(image[:, ::-1] if flip else image)
        scenes.append(mirrored(render.scene) if flip else render.scene)
        named.append(coarser(sub_scene(scenes[-1], _draw_slots(scenes[-1], rng)), rng, 0.6))
        texts.append(named[-1].render() if rng.random() < 0.5 else loose_caption(named[-1], rng))
    return images, texts, scenes, named


def match_matrix(named: list[Scene], scenes: list[Scene]) -> torch.Tensor:
    """matches_TI: row = text, column = image, 1 where the image shows all that the text names.

    A phrase stays true when its end is left out: "lemons" of "lemons behind it", a podium without its table.
    """

    matches = torch.zeros(len(named), len(scenes))
    for row, asked in enumerate(named):
        for column, scene in enumerate(scenes):
            matches[row, column] = shows(scene, asked)
    return matches


def shows(scene: Scene, asked: Scene) -> bool:
    """Whether the scene has every phrase that is asked for, or a longer one that begins with it."""
    for slot, values in asked.slots().items():
        phrases = scene.slots()[slot]
        for value in values:
            if not any(phrase == value or phrase.startswith(value + " ") for phrase in phrases):
                return False
    return True


def contrast(logits_TI: torch.Tensor, matches_TI: torch.Tensor) -> torch.Tensor:
    """Cross-entropy to all matches, from texts to images and back (Khosla et al. 2020, with soft targets)."""
    to_images = matches_TI / matches_TI.sum(1, keepdim=True)
    to_texts = (matches_TI / matches_TI.sum(0, keepdim=True)).T
    return 0.5 * (F.cross_entropy(logits_TI, to_images) + F.cross_entropy(logits_TI.T, to_texts))


def phrase_loss(logits_BP: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    """Cross-entropy per filled slot over the slot's phrases, evenly spread where a scene has several of them."""
    losses = []
    start = 0
    for slot, phrases in PHRASES.items():
        target = torch.zeros(len(scenes), len(phrases))
        for row, scene in enumerate(scenes):
            for phrase in set(bare_phrases(scene, slot)).intersection(phrases):
                target[row, phrases.index(phrase)] = 1.0
        known = target.sum(1) > 0
        if known.any():
            logits = logits_BP[known, start : start + len(phrases)]
            losses.append(F.cross_entropy(logits, target[known] / target[known].sum(1, keepdim=True)))
        start += len(phrases)
    return torch.stack(losses).mean()


@torch.inference_mode()
def text_embeddings(encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Unit vectors embeddings_BE."""
    return F.normalize(encoder(token_ids(tokenizer, texts)).text_embeds, dim=-1)


@torch.inference_mode()
def image_embeddings(encoder: CLIPVisionModelWithProjection, images: list[np.ndarray]) -> torch.Tensor:
    """Unit vectors embeddings_BE of uint8 images."""
    parts = []
    for batch in split(images, 64):
        parts.append(F.normalize(encoder(to_clip_pixels(list(batch))).image_embeds, dim=-1))
    return torch.cat(parts)


def slot_accuracy(parts: dict, images: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    """Per slot, how often the vocabulary phrase nearest to the image is one its scene has. Chance is 1 in 8 to 14."""
    seen = image_embeddings(parts["image_encoder"], images)
    guesses = {}
    for slot, phrases in PHRASES.items():
        texts = [Scene.from_slots({slot: [phrase]}).render() for phrase in phrases]
        embeddings = text_embeddings(parts["text_encoder_2"], parts["tokenizer_2"], texts)
        nearest = (seen @ embeddings.T).argmax(dim=1).tolist()
        guesses[slot] = pick(phrases, nearest)
    return shares_right(guesses, scenes)


def measure_clip(parts: dict, renders: list[Render]) -> dict[str, float]:
    """Slot accuracies on images with and without their product."""
    scenes: list[Scene] = []
    for scene in scenes_of(renders):
        scenes += [scene, scene]
    return slot_accuracy(parts, images_and_plates(renders), scenes)


def clip_loss(
    model: torch.nn.ModuleDict,
    tokenizers: dict[str, CLIPTokenizer],
    batch: tuple[list[np.ndarray], list[str], list[Scene], list[Scene]],
) -> tuple[torch.Tensor, dict[str, float]]:
    """Contrast of both text encoders with the image encoder, and the classifier's losses, of :func:`_draw_batch`."""
    images, texts, scenes, named = batch
    matches = match_matrix(named, scenes)
    scale = model["log_scale"]["value"].clamp(max=4.0).exp()
    anchors = F.normalize(model["phrases"].weight, dim=-1)
    seen = F.normalize(model["image_encoder"](to_clip_pixels(images)).image_embeds, dim=-1)
    first = model["head"](model["text_encoder"](token_ids(tokenizers["tokenizer"], texts)).pooler_output)
    second = model["text_encoder_2"](token_ids(tokenizers["tokenizer_2"], texts)).text_embeds
    contrasts = []
    phrases = []
    for embedding in (first, second):
        text = F.normalize(embedding, dim=-1)
        contrasts.append(contrast(scale * text @ seen.T, matches))
        phrases.append(phrase_loss(scale * text @ anchors.T, named))
    between = torch.stack(contrasts).mean()
    of_images = phrase_loss(scale * seen @ anchors.T, scenes)
    of_texts = torch.stack(phrases).mean()
    values = {"contrast": between.item(), "image_phrases": of_images.item(), "text_phrases": of_texts.item()}
    return between + of_images + of_texts, values


def train_clip(renders: Renders, family: Family, folder: Path, minutes: float, seed: int) -> None:
    """Train the three encoders and stage them with the feature extractor; the tokenizers must be staged."""
    torch.manual_seed(seed)
    model = build_encoders()
    for part in PARTS:
        family.begin(model[part], part)
    tokenizers = {name: CLIPTokenizer.from_pretrained(family.staging / name) for name in ("tokenizer", "tokenizer_2")}
    plan = Plan("clip", folder, minutes, learning_rate=1e-3, batch_size=64, seed=seed, weight_decay=0.05)

    def loss_of(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return clip_loss(model, tokenizers, _draw_batch(renders, generator, plan.batch_size))

    def preview(at: Progress) -> None:
        print(f"clip  step {at.step}  held out {measure_clip({**model, **tokenizers}, renders.held_out)}", flush=True)

    progress = run_stretch(plan, model, loss_of, preview)
    measures = measure_clip({**model, **tokenizers}, renders.held_out)

    def write(staging: Path) -> None:
        for name in PARTS:
            model[name].half().save_pretrained(staging / name)
            set_loading_dtype(staging / name)
        feature_extractor().save_pretrained(staging / "feature_extractor")

    score = sum(measures.values()) / len(measures)
    parameters = sum(model[name].num_parameters() for name in PARTS)
    record = family.record("clip", progress, renders, score, measures, parameters)
    family.keep_if_better("clip", record, write)
