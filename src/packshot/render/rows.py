"""A finished render as a row of a dataset."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from packshot.errors import PackshotError
from packshot.pipeline.step import Sample
from packshot.runs.files import sha256
from packshot.scene import Scene
from packshot.scene.scene import scene_features

LICENSE = "CC0-1.0"
LAYERS = ("image", "plate", "cutout", "shadow", "depth", "normals")


def encode(image: Image.Image, quality: int | None) -> Sample:
    """The struct that `datasets` decodes to this image.

    quality: None for lossless (WebP, or PNG for one channel, which WebP lacks), or 0 to 100 for AVIF with full colour
        resolution; WebP's 4:2:0 would smear the product's edge. Alpha stays lossless, so cut-outs are WebP.
    """
    buffer = io.BytesIO()
    if quality is None:
        options = {"optimize": True} if image.mode == "L" else {"lossless": True, "method": 6}
        image.save(buffer, "PNG" if image.mode == "L" else "WEBP", **options)
    elif image.mode == "RGBA":
        image.save(buffer, "WEBP", quality=quality, method=4)
    else:
        # One thread: the encoder's result depends on their number.
        image.save(buffer, "AVIF", quality=quality, subsampling="4:4:4", speed=6, max_threads=1)
    return {"bytes": buffer.getvalue(), "path": None}


def row(folder: Path, quality: int | None) -> Sample:
    """One dataset row from a finished render folder.

    Raises:
        PackshotError: a layer is missing or damaged.
    """
    try:
        job = json.loads((folder / "job.json").read_text())
        layers = {name: Image.open(folder / f"{name}.png") for name in LAYERS}
        for layer in layers.values():
            layer.load()
    except (OSError, ValueError) as error:
        raise PackshotError(
            f"{folder} has no readable layer ({error}).", "Delete the folder and render it again."
        ) from error
    scene = Scene.from_dict(job["scene"])
    image = encode(layers["image"].convert("RGB"), quality)
    return {
        "image": image,
        "mask": encode(layers["cutout"].getchannel("A"), None),
        "text": scene.render(),
        "id": sha256(image["bytes"]),
        "scene": scene.to_dict(),
        "source": f"rendered, seed {job['seed']}",
        "license": LICENSE,
        "width": layers["image"].width,
        "height": layers["image"].height,
        "plate": encode(layers["plate"].convert("RGB"), quality),
        "cutout": encode(layers["cutout"], quality),
        "shadow": encode(layers["shadow"], quality),
        "depth": encode(layers["depth"], quality),
        "normals": encode(layers["normals"].convert("RGB"), quality),
        "product_id": job["product_id"],
    }


def features():
    """The `datasets` features of a rendered set; the hub viewer and `load_dataset` read them from the shards."""
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    return Features(
        {
            "image": ImageFeature(),
            "mask": ImageFeature(),
            "text": text,
            "id": text,
            "scene": scene_features(),
            "source": text,
            "license": text,
            "width": Value("int32"),
            "height": Value("int32"),
            "plate": ImageFeature(),
            "cutout": ImageFeature(),
            "shadow": ImageFeature(),
            "depth": ImageFeature(),
            "normals": ImageFeature(),
            "product_id": text,
        }
    )
