"""``merge.py``: a base with LoRAs merged into it, as a pipeline folder."""

from __future__ import annotations

import json

import torch

from packshot.base.load import load_parts
from packshot.config.merge import Merge
from packshot.errors import ConfigError
from packshot.runs.files import replacing_folder, writing
from packshot.runs.folder import answer, open_run
from packshot.runs.licenses import licenses_of_weights, refuse_weights


def refuse_overflow(network: torch.nn.Module, config: Merge) -> None:
    """Raises ConfigError where a merged weight is larger than the export's dtype holds."""
    for name, weight in network.named_parameters():
        if not torch.isfinite(weight).all():
            raise ConfigError(
                f"{name} of the merged {type(network).__name__} is too large for export.dtype={config.export.dtype}.",
                "Choose smaller model.lora_scales, or export.dtype=bfloat16 or float32.",
            )


def merge(config: Merge) -> None:
    """Write ``<run.dir>/model``, which ``model.base`` and ``StableDiffusionXLPipeline.from_pretrained`` take.

    ``data.json`` in it names what it was made from and under which licences.

    Raises:
        ConfigError: no LoRA is named, or one cannot be read or does not fit the base.
    """
    from diffusers import StableDiffusionXLPipeline

    refuse_weights(config)
    if not config.model.loras:
        raise ConfigError(
            "model.loras is empty: there is nothing to merge.",
            "Name the LoRAs, model.loras=[first.safetensors,owner/name], and if wanted model.lora_scales=[0.8,1].",
        )
    parts = load_parts(config.model)
    run = open_run("merge", config)
    target = run.path / "model"
    pipe = StableDiffusionXLPipeline(**parts.pipeline_components(references=False))
    dtype: torch.dtype = getattr(torch, config.export.dtype.name)
    for network in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        network.to(dtype)  # the VAE stays in fp32: SDXL's overflows in half precision
        refuse_overflow(network, config)
    made_from = {
        "base": config.model.base,
        "loras": dict(zip(config.model.loras, config.model.merged_loras(), strict=True)),
        "licenses": [],
        "weights_licenses": licenses_of_weights(config),
    }
    with writing(str(target), "Name a run.dir on a disk with more room."), replacing_folder(target) as folder:
        pipe.save_pretrained(folder)
        (folder / "data.json").write_text(json.dumps(made_from, indent=2) + "\n")
    answer.info("merged %d LoRAs into %s", len(config.model.loras), target)
