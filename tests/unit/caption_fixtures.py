"""A Florence-2 and a Llama 3.2 Vision of 70k parameters and a two-caption world, built in the process."""

import functools
import io
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from packshot.caption.run import run
from packshot.config.compose import compose
from packshot.scene import Scene
from tools.mini.vocabulary import LLAMA_TEMPLATE, train_florence_tokenizer, train_llama_tokenizer

torch.set_num_threads(1)  # models this small lose more by sharing their work than they gain

SCENES = [
    Scene("a stone podium", ("palm leaves",), "a red wall", "harsh light from the left side", "minimalist"),
    Scene("a linen tablecloth", ("lemons", "books"), "a blue sky", "soft daylight", "calm"),
]
CAPTIONS = [scene.render() for scene in SCENES]
PROMPT = "Describe the scene around the object."


def picture(index, size=32):
    """Red noise for scene 0, blue for scene 1."""
    pixels = np.random.default_rng(index).integers(0, 60, (size, size, 3), dtype=np.uint8)
    pixels[..., 0 if index % 2 == 0 else 2] += 180
    return Image.fromarray(pixels)


def save_tiny_florence(folder, vocabulary=420):
    """Write model, processor and tokenizer as a checkpoint folder."""
    torch.manual_seed(0)
    tokenizer = train_florence_tokenizer([*CAPTIONS, PROMPT] * 4, vocabulary)
    text = {
        "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 256, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1,
    }  # fmt: skip
    vision = {
        "depths": [1], "embed_dim": [16], "num_heads": [2], "num_groups": [2], "patch_size": [7], "patch_stride": [4],
        "patch_padding": [3], "patch_prenorm": [False], "window_size": 4, "projection_dim": 32, "drop_path_rate": 0.1,
    }  # fmt: skip
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id)
    config.tie_word_embeddings = True
    model = Florence2ForConditionalGeneration(config)
    images = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    with torch.no_grad():
        images.image_seq_length = model.get_image_features(torch.zeros(1, 3, 32, 32)).pooler_output.shape[1]
    model.save_pretrained(folder)
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


TILES = 4


def save_tiny_mllama(folder, vocabulary=420, template=LLAMA_TEMPLATE, gate=0.5):
    """Write model, processor and tokenizer as a checkpoint folder: four tiles of 28 px, two cross-attention layers.

    gate: where the cross-attention's gates stand; new models have 0 and ignore the picture.
    """
    torch.manual_seed(0)
    tokenizer = train_llama_tokenizer([*CAPTIONS, PROMPT, "user", "assistant"] * 4, vocabulary)
    rows = len(tokenizer) - 1  # the image token has none
    text = {
        "vocab_size": rows, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "cross_attention_layers": [1, 3],
        "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2,
        "intermediate_size": 32, "image_size": 28, "patch_size": 14, "max_num_tiles": TILES,
        "intermediate_layers_indices": [0], "vision_output_dim": 32,
    }  # fmt: skip
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=rows)
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
                parameter.fill_(gate)
    images = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=TILES)
    model.save_pretrained(folder)
    MllamaProcessor(images, tokenizer, chat_template=template).save_pretrained(folder)
    return folder


def hand_written_cross_entropy(logits_TV, labels_T):
    """Mean of -log p over the labels that count, in double precision and without a library's loss."""
    total, count = 0.0, 0
    for logits_V, label in zip(logits_TV.double(), labels_T.tolist(), strict=True):
        if label != -100:
            total += torch.logsumexp(logits_V, 0) - logits_V[label]
            count += 1
    return float(total / count)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_dataset(folder, shards=(2, 2), captions=True):
    """A product dataset as build_data writes it: shards of alternating red and blue pictures."""
    import datasets

    image, text = datasets.Image(), datasets.Value("string")
    scene = {name: datasets.Value("string") for name in ("surface", "background", "lighting", "mood")}
    scene |= {name: datasets.List(datasets.Value("string")) for name in ("surroundings", "style")}
    features = datasets.Features(
        {"image": image, "mask": image, "text": text, "id": text, "scene": scene, "source": text, "license": text}
    )
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(shards):
        rows = []
        for _ in range(size):
            mask = Image.new("L", (32, 32))
            mask.paste(255, (8, 8, 24, 24))
            truth = SCENES[number % 2]
            rows.append(
                {
                    "image": {"bytes": png(picture(number)), "path": None},
                    "mask": {"bytes": png(mask), "path": None},
                    "text": truth.render() if captions else None,
                    "id": f"id{number}",
                    "scene": truth.to_dict() if captions else None,
                    "source": "fixture",
                    "license": "CC0-1.0",
                }
            )
            number += 1
        table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
        pq.write_table(table, folder / f"part-{shard:05d}.parquet")
    return folder


_TEMPORARY = []


SAVES = {"florence2": save_tiny_florence, "llama32_vision": save_tiny_mllama}


@functools.cache
def trained_run(kind="florence2"):
    """A finished run of task=train whose ``export/`` knows both captions; ``base`` and ``data`` lie beside it."""
    _TEMPORARY.append(tempfile.TemporaryDirectory())
    folder = Path(_TEMPORARY[-1].name)
    SAVES[kind](folder / "base")
    write_dataset(folder / "data")
    caption_vlm(
        folder,
        "run",
        f"captioner={kind}",
        "captioner.tuning=full",
        "train.max_steps=120",
        "train.batch_size=4",
        "train.learning_rate=4e-3",
        "train.validate_first=true",
    )
    return folder / "run"


def caption_vlm(folder, name, *overrides, task="train"):
    """Run caption_vlm.py's target in this process, on the tiny model and dataset under ``folder``."""
    common = [
        f"run.dir={folder / name}", f"task={task}", "tracking=none",
        f"model.florence2={folder / 'base'}", f"model.llama32_vision={folder / 'base'}",
        f"data.train={folder / 'data'}", f"data.validation={folder / 'data'}", "train.lr_schedule=constant",
        "train.checkpointing_steps=1000", "train.validation_steps=1000",
    ]  # fmt: skip
    keys = {override.split("=")[0] for override in overrides}
    run(compose("caption_vlm", [*(item for item in common if item.split("=")[0] not in keys), *overrides]))
    return folder / name
