"""What other tools read in the head of a LoRA file: sd-scripts' ``ss_*`` keys and Stability's model specification."""

from __future__ import annotations

import json
import time

from packshot.config.schema import LoraMethod
from packshot.methods.base import Exported
from packshot.runs.files import resolve


def lora_head(exported: Exported, method: LoraMethod) -> dict[str, str]:
    """The entries of a LoRA file's head.

    Keys and values as sd-scripts writes them (its train_network.py and sai_model_spec.py), so that web interfaces list
    the LoRA under SDXL with its trigger words.
    """
    head = training_head(exported) | specification(exported)
    trigger = method.trigger_words
    if trigger:
        head["modelspec.trigger_phrase"] = ", ".join(trigger)
        # web interfaces take the most frequent tags for the trigger words
        head["ss_tag_frequency"] = json.dumps({"captions": dict.fromkeys(trigger, exported.samples)})
    return head


def title_of(exported: Exported) -> str:
    """The name under which tools list the LoRA."""
    return exported.config.tracking.name or "packshot LoRA"


def training_head(exported: Exported) -> dict[str, str]:
    """sd-scripts' entries about the training."""
    config = exported.config
    train = config.train
    side = config.model.resolution
    local = resolve(config.model.base)
    head = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": local.name if local.exists() else config.model.base,
        "ss_network_module": "networks.lora",
        "ss_output_name": title_of(exported),
        "ss_resolution": str((side, side)),
        "ss_learning_rate": str(train.learning_rate),
        "ss_lr_scheduler": train.lr_schedule.name,
        "ss_lr_warmup_steps": str(train.warmup_steps),
        "ss_optimizer": config.optim.kind.name,
        "ss_steps": str(exported.step),
        "ss_max_train_steps": str(train.max_steps),
        "ss_batch_size_per_device": str(train.batch_size),
        "ss_gradient_accumulation_steps": str(train.gradient_accumulation_steps),
        "ss_mixed_precision": train.mixed_precision.name,
        "ss_num_train_images": str(exported.samples),
        "ss_seed": str(config.run.seed),
        "ss_noise_offset": str(config.objective.noise_offset),
    }
    if exported.prediction_type == "v_prediction":
        head["ss_v_parameterization"] = "True"
    return head


def specification(exported: Exported) -> dict[str, str]:
    """The entries of Stability's model specification."""
    side = exported.config.model.resolution
    predicts = exported.prediction_type
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",  # whose names it has
        "modelspec.title": title_of(exported),
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if predicts == "v_prediction" else predicts,
    }
