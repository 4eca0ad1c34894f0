"""Model cards of the two published folders, written from the records."""

from __future__ import annotations

from packshot.models.mini.folder import Record

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
}
_LIMITS = {
    "sdxl": (
        "It knows the phrases of `packshot.scene.vocabulary` and little else; words outside them are nearly ignored. "
        "Pictures are 128 px, soft in detail, and products in them are shapes rather than designs. Scores are its own "
        "encoders' view of its own world: they compare versions of this family, not this family with others."
    ),
    "florence2": (
        "It has seen rendered packshots only, at 128 px, and writes the sentence forms it was taught. "
        "Of the Florence-2 tasks it knows the three captions; it has no location tokens."
    ),
}
_UNITS = "PSNR in dB; slot accuracies are shares; losses are mean squared noise error (unet) and nats per token."


def model_card(family: str, records: dict[str, Record]) -> str:
    """README.md with front matter: what it is, data, effort and held-out scores by part, limits."""
    task, library, text = _HEAD[family]
    lines = ["---", "license: apache-2.0", f"library_name: {library}", f"pipeline_tag: {task}", "---", "", text, ""]
    lines += [
        "## Training",
        "",
        "Data: scenes rendered in Blender by this project's packshot factory (image and product-free plate of each); "
        "no photograph and no third party's weights. The vocabulary of the SDXL tokenizers is CLIP's (MIT).",
        "",
        "| part | parameters | scenes | steps | hours on 2 CPU cores | held-out scores |",
        "|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        scores = ", ".join(f"{key} {value:.3f}" for key, value in record.measures.items())
        effort = f"{record.scenes} | {record.steps} | {record.minutes / 60:.2f}"
        lines.append(f"| {name} | {record.parameters / 1e6:.2f} M | {effort} | {scores} |")
    lines += ["", _UNITS, "", "## Limits", "", _LIMITS[family], ""]
    return "\n".join(lines)
