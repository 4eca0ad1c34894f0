"""Model cards of the published folders, written from the records."""

from __future__ import annotations

from packshot.lists import in_words
from tools.mini.folder import Record

_HEAD = {
    "sdxl": (
        "text-to-image",
        "diffusers",
        "# Packshot mini, the SDXL half\n\n"
        "Stable Diffusion XL's own classes at about 1/200 of the size, trained from nothing on rendered packshots of "
        "128 px. It loads with `StableDiffusionXLPipeline.from_pretrained(folder)`, image encoder included, and "
        "exists to run every part of the tool on a laptop in minutes.",
    ),
    "florence2": (
        "image-to-text",
        "transformers",
        "# Packshot mini, the Florence-2 half\n\n"
        "`Florence2ForConditionalGeneration` at about 1/100 of the size, trained from nothing to describe rendered "
        "packshots of 128 px in free sentences, the product named. Start of the captioner fine-tune.",
    ),
    "mllama": (
        "image-text-to-text",
        "transformers",
        "# Packshot mini, the Llama 3.2 Vision half\n\n"
        "`MllamaForConditionalGeneration` at about 1/4900 of the size, one tile of 128 px, trained from nothing to "
        "describe rendered packshots in free sentences, the product named. Start of the captioner fine-tune. It has "
        "Llama's classes and wire format and none of its weights.",
    ),
    "matting": (
        "image-segmentation",
        "diffusers",
        "# Packshot mini, the segmentation network\n\n"
        "A `UNet2DModel` that gives every pixel's share of the product, from a picture squeezed to a square; "
        "`packshot.imaging.matting_network` runs it. Trained from nothing on rendered packshots and on their cut-outs "
        "before other scenes and plain grounds.",
    ),
}
_LIMITS = {
    "sdxl": (
        "It knows the phrases of `packshot.scene.vocabulary` and little else; words outside them are nearly ignored. "
        "Pictures are 128 px and soft; products in them are blobs, not designs. A guidance scale of 3 to 4 suits it, "
        "from 5 on colours saturate. Sample scores are its own image encoder's view, and that encoder is itself often "
        "wrong on renders (row clip): they compare versions of this family only."
    ),
    "florence2": (
        "It has seen rendered packshots only, at 128 px, and writes the sentence forms it was taught. It overfits: "
        "backgrounds are mostly right, small things around the product are mostly invented (see the scores). "
        "Of the Florence-2 tasks it knows the three captions, <OD> for the one product, and <REGION_TO_DESCRIPTION>."
    ),
    "mllama": (
        "It has seen rendered packshots only, at 128 px, and writes the sentence forms it was taught, in answer to "
        "three questions. Small things around the product are often invented (see the scores)."
    ),
    "matting": (
        "It has never seen a photograph. One product in the picture, whole; things around it may be taken for part of "
        "it, and glass for background. Its edges are coarser than the picture's: the caller refines them."
    ),
}
_UNITS = {
    "sdxl": (
        "PSNR in dB. Slots: share of renders (sample_: of samples) whose nearest phrase is right, chance 1 in 8 to 14. "
        "Loss: mean squared noise error."
    ),
    "florence2": (
        "Losses in nats per token, with the right images and with other scenes'. "
        "Slots: share of captions that name one of the scene's phrases."
    ),
    "mllama": (
        "Losses in nats per token, with the right images and with other scenes'. "
        "Slots: share of captions that name one of the scene's phrases."
    ),
    "matting": (
        "Held-out renders as they are (scenes_), and held-out cut-outs on plain grounds (studio_) and before other "
        "held-out plates (composites_). iou: mean overlap of alpha above one half; good: share of pictures above 0.9; "
        "error: mean absolute error of alpha."
    ),
}


# What a family was made from, in addition to rendered scenes.
_FURTHER = {
    "sdxl": " The vocabulary of the tokenizers is CLIP's (MIT).",
    "matting": " The present weights also saw cut-outs of the objects and foods of Fluent Emoji 3D (Microsoft, MIT).",
}


def model_card(family: str, records: dict[str, Record]) -> str:
    """README.md with front matter: what it is, data, effort and held-out scores by part, limits."""
    task, library, text = _HEAD[family]
    lines = ["---", "license: apache-2.0", f"library_name: {library}", f"pipeline_tag: {task}", "---", "", text, ""]
    lines += [
        "## Training",
        "",
        "Data: scenes rendered in Blender by this project's packshot factory (image and product-free plate of each); "
        "no photograph and no third party's weights." + _FURTHER.get(family, ""),
        "",
        "| part | parameters | scenes | steps | hours of CPU time per thread | held-out scores |",
        "|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        scores = in_words(record.measures, "{} {:.3f}")
        effort = f"{record.scenes} | {record.steps} | {record.minutes / 60:.2f}"
        lines.append(f"| {name} | {record.parameters / 1e6:.2f} M | {effort} | {scores} |")
    lines += ["", _UNITS[family], "", "## Limits", "", _LIMITS[family], ""]
    return "\n".join(lines)
