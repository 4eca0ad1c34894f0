"""Stage ``mllama``: Llama 3.2 Vision's classes, small, pretrained to describe renders in free sentences.

Like the Florence-2 of the family it names the product on purpose, and its image encoder is trained first
(``encoder_pretraining.py``). A picture is one tile: the four of the real checkpoint would cost four times as much and
show 128 px no better.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.modeling_mllama import MllamaModel

from packshot.caption.decoding import write
from packshot.caption.models.adapter import loss_per_sample
from packshot.caption.models.mllama import Mllama
from packshot.caption.models.weights import Asked
from packshot.config.schema import ProductTarget
from packshot.lists import map_values
from packshot.pipeline.shards import split
from packshot.scene import Scene
from tools.mini.budgeted_training import Loss, Plan, Progress, run_stretch
from tools.mini.clip import phrase_loss
from tools.mini.data import SIZE, Render, Renders, free_caption, images_of, mirrored, reframed, standardized, to_pixels
from tools.mini.encoder_pretraining import DROPOUT, Regions, other_product, stacked, train_sight
from tools.mini.florence2 import VOCABULARY, kept_tokenizer, print_captions, slots_in, tokenizer_texts
from tools.mini.folder import Family
from tools.mini.vocabulary import LLAMA_TEMPLATE, train_llama_tokenizer

WIDTH = 128
SIGHT = 0.6  # share of the minutes
# What a user may ask, and how much detail is answered (see ``free_caption``).
QUESTIONS = ("What is this?", "Describe the image in one sentence.", "Describe the image in detail.")
_ONE_TILE = {"aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long), "aspect_ratio_mask": torch.ones(1, 1, 1).long()}


def build_mllama(tokenizer: PreTrainedTokenizerFast) -> MllamaForConditionalGeneration:
    """The untrained model: five vision layers at 128 px, five of text of which two look at the picture.

    Its gates are half open; at zero, where the class puts them, no gradient reaches the picture.
    """
    rows = len(tokenizer) - 1  # the image token has none
    text = {
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "cross_attention_layers": [1, 3],
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 4,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_size": 384,
        "image_size": SIZE,
        "patch_size": 16,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [1],
        "vision_output_dim": 2 * WIDTH,
    }
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=rows))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_gate", "gate", "gate_attn", "gate_ffn")) and parameter.numel() == 1:
                parameter.fill_(0.5)
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast) -> MllamaProcessor:
    """Processor with one tile of 128 px and Llama's conversations."""
    # mean and deviation as the published checkpoints have them; the class's own are others
    size = {"height": SIZE, "width": SIZE}
    images = MllamaImageProcessorPil(
        size=size,  # pyright: ignore[reportArgumentType]  (the class reads dicts)
        max_image_tiles=1,
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
    )
    return MllamaProcessor(images, tokenizer, chat_template=LLAMA_TEMPLATE)


def _pixels(images: list[np.ndarray]) -> Tensor:
    """What the processor makes of 128-px images, pixels_BCHW."""
    return standardized(to_pixels(images), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def _seen(core: MllamaModel, images: list[np.ndarray]) -> Tensor:
    """What the text's cross-attention looks at, tokens_BTC: the class token, then a grid."""
    tile = map_values(lambda tensor: tensor.expand(len(images), *tensor.shape[1:]), _ONE_TILE)
    states = core.vision_model(pixel_values=_pixels(images)[:, None, None], **tile).last_hidden_state
    return core.multi_modal_projector(states)[:, 0, 0]


def _tell(render: Render, other: Render, rng: random.Random, detail: int) -> tuple[np.ndarray, str, Scene]:
    """Picture, caption and scene. A detail of 1 asks for surface and background alone: two scenes are stacked."""
    image = render.image
    scene = render.scene
    if detail == 1:
        image, scene = stacked(render, other, rng)
    elif rng.random() < 0.4:
        image = other_product(render, other)
        render = replace(render, product=other.product)
    flip = rng.random() < 0.5
    image = reframed(image, rng)
    scene = mirrored(scene) if flip else scene
    return image[:, ::-1] if flip else image, free_caption(render, scene, rng, detail), scene


def _describe(adapter: Mllama, renders: list[Render]) -> list[str]:
    asking = replace(adapter, asked=Asked(QUESTIONS[2], ProductTarget.none))
    texts = []
    for batch in split(images_of(renders), 32):
        texts += [caption.text for caption in write(asking, list(map(Image.fromarray, batch)), [None] * len(batch))]
    return texts


@torch.inference_mode()
def _losses(adapter: Mllama, renders: list[Render]) -> dict[str, float]:
    """Loss per token on full captions, once with the right images and once with another scene's: the gap is sight."""
    rng = random.Random(0)
    asking = replace(adapter, asked=Asked(QUESTIONS[2], ProductTarget.none))
    captions = [free_caption(render, render.scene, rng, detail=2) for render in renders]
    images = list(map(Image.fromarray, images_of(renders)))
    result = {}
    for name, shown in (("loss", images), ("loss_shuffled_images", images[1:] + images[:1])):
        losses = []
        for i in range(0, len(renders), 32):
            batch = asking.train_batch(shown[i : i + 32], [None] * len(shown[i : i + 32]), captions[i : i + 32])
            losses.append(loss_per_sample(asking.logits(batch), batch["labels"]))
        result[name] = torch.cat(losses).mean().item()
    return result


def _caption_loss(adapter: Mllama, regions: Regions, renders: Renders, count: int) -> Loss:
    """The captions' cross-entropy, and the classifier's on the same image tokens."""

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        detail = rng.choice((0, 1, 2, 2))
        pairs = zip(renders.draw(generator, count), renders.draw(generator, count), strict=True)
        images, captions, scenes = map(list, zip(*(_tell(*pair, rng, detail) for pair in pairs), strict=True))
        asking = replace(adapter, asked=Asked(QUESTIONS[detail], ProductTarget.none))
        pictures = list(map(Image.fromarray, map(np.ascontiguousarray, images)))
        batch = asking.train_batch(pictures, [None] * len(pictures), captions)
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            del batch[name]
        seen_BTC = _seen(adapter.model.model, images)
        batch["cross_attention_states"] = F.dropout(seen_BTC, DROPOUT)
        caption = loss_per_sample(asking.logits(batch), batch["labels"]).mean()
        sight = phrase_loss(regions(seen_BTC[:, 1:]), scenes)
        return caption + sight, {"caption": caption.item(), "sight": sight.item()}

    return loss_of


def train_mllama(renders: Renders, family: Family, folder: Path, minutes: float, seed: int) -> None:
    """Train and stage model and processor. The tokenizer is learned once and kept in ``folder`` for resumed runs."""
    torch.manual_seed(seed)
    conversation = [*QUESTIONS, "user", "assistant"] * 4
    tokenizer = kept_tokenizer(
        folder, lambda: train_llama_tokenizer([*tokenizer_texts(renders.train), *conversation], VOCABULARY)
    )
    model = build_mllama(tokenizer)
    regions = Regions(WIDTH)
    family.begin(model, "")
    model.generation_config.update(max_new_tokens=110, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    adapter = Mllama(model, build_processor(tokenizer), Asked(QUESTIONS[2], ProductTarget.none), 110)
    core = model.model

    def tokens_of(images: list[np.ndarray], size: int) -> Tensor:
        assert size == SIZE, "the vision encoder's positions are fixed"
        return _seen(core, images)[:, 1:]

    tower = torch.nn.ModuleList([core.vision_model, core.multi_modal_projector])
    looked = train_sight(
        *("mllama", tower, regions, tokens_of, renders, folder, SIGHT * minutes, family.rate(2e-3)),
        sizes=(SIZE,),
        seed=seed,
    )
    budget = (1 - SIGHT) * minutes
    plan = Plan("mllama", folder, budget, family.rate(1e-3), batch_size=24, seed=seed, inputs=str(len(tokenizer)))

    def preview(at: Progress) -> None:
        print(f"mllama  step {at.step}  held out {_losses(adapter, renders.held_out)}", flush=True)
        print_captions(renders.held_out[:3], _describe(adapter, renders.held_out[:3]))

    loss_of = _caption_loss(adapter, regions, renders, plan.batch_size)
    spoken = run_stretch(plan, torch.nn.ModuleList([model, regions]), loss_of, preview)
    progress = Progress(looked.step + spoken.step, looked.seconds + spoken.seconds)
    scores = (_losses(adapter, renders.held_out), slots_in(_describe(adapter, renders.held_out), renders.held_out))
    family.keep_captioner("mllama", model, adapter.processor, scores, renders, progress)
