"""Finished renders into Parquet shards: the train and held-out sets of rendered packshots.

python -m packshot.render.pack --renders outputs/renders --out data/rendered
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from packshot.core.errors import PackshotError
from packshot.core.storage import replacing_folder, sha256
from packshot.render.sample import is_held_out, product_pool
from packshot.scene import Scene

HELDOUT_PRODUCTS = tuple(product for product in product_pool() if is_held_out(product))
LICENSE = "CC0-1.0"
ROWS_PER_SHARD = 300
LAYERS = ("image", "plate", "cutout", "depth")


def _encode(image: Image.Image, quality: int | None) -> dict[str, Any]:
    """The struct that `datasets` decodes to this image: PNG for one channel, which WebP lacks, else WebP.

    quality: None for lossless, or WebP's 0 to 100.
    """
    buffer = io.BytesIO()
    if image.mode == "L":
        image.save(buffer, "PNG", optimize=True)
    elif quality is None:
        image.save(buffer, "WEBP", lossless=True, method=6)
    else:
        image.save(buffer, "WEBP", quality=quality, method=6)
    return {"bytes": buffer.getvalue(), "path": None}


def row(folder: Path, plate_quality: int | None = None) -> dict[str, Any]:
    """One dataset row from a finished render folder."""
    job = json.loads((folder / "job.json").read_text())
    try:
        layers = {name: Image.open(folder / f"{name}.png") for name in LAYERS}
        for layer in layers.values():
            layer.load()
    except OSError as error:
        raise PackshotError(
            f"{folder} has no readable layer ({error}).", "Delete the folder and render it again."
        ) from error
    scene = Scene.from_dict(job["scene"])
    image = _encode(layers["image"].convert("RGB"), None)
    return {
        "image": image,
        "mask": _encode(layers["cutout"].getchannel("A"), None),
        "text": scene.render(),
        "id": sha256(image["bytes"]),
        "scene": scene.to_dict(),
        "source": f"rendered, seed {job['seed']}",
        "license": LICENSE,
        "width": layers["image"].width,
        "height": layers["image"].height,
        "plate": _encode(layers["plate"].convert("RGB"), plate_quality),
        "cutout": _encode(layers["cutout"], None),
        "depth": _encode(layers["depth"], None),
        "product_id": job["product_id"],
    }


def _finished(renders: Path) -> Iterator[tuple[Path, str]]:
    """Folders of finished renders with their product ids, by seed."""
    for folder in sorted((path for path in renders.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)):
        yield folder, json.loads((folder / "job.json").read_text())["product_id"]


def split_by_product(renders: Path, heldout_products: Collection[str]) -> tuple[list[Path], list[Path]]:
    """Folders for (train, held-out); no product is in both.

    Raises:
        PackshotError: nothing is rendered, or a split would be empty.
    """
    pairs = list(_finished(renders)) if renders.is_dir() else []
    train = [folder for folder, product in pairs if product not in heldout_products]
    heldout = [folder for folder, product in pairs if product in heldout_products]
    if not train or not heldout:
        raise PackshotError(
            f"{renders} has {len(train)} renders for training and {len(heldout)} held out; both are needed.",
            "python -m packshot.render.blender renders more.",
        )
    return train, heldout


def features():
    """The `datasets` features of a rendered set; the hub viewer and `load_dataset` read them from the shards."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    scene = dict.fromkeys(("surface", "background", "lighting", "mood"), text)
    return Features(
        {
            "image": ImageFeature(),
            "mask": ImageFeature(),
            "text": text,
            "id": text,
            "scene": {**scene, "surroundings": List(text), "style": List(text)},
            "source": text,
            "license": text,
            "width": Value("int32"),
            "height": Value("int32"),
            "plate": ImageFeature(),
            "cutout": ImageFeature(),
            "depth": ImageFeature(),
            "product_id": text,
        }
    )


def _card(splits: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    lines = [
        "# Rendered packshots\n",
        "Product photographs rendered with Blender Cycles by `packshot.render`. Each row has the photograph, the same",
        "scene without the product (`plate`), the product alone (`cutout`, `mask`), inverse depth (near is bright) and",
        "the scene in words (`text`, `scene`). The splits share no product design (`product_id`).\n",
        f"Licence: {LICENSE}. Procedural geometry and materials; world light is from Blender's CC0 studio images.\n",
        "| split | rows | sizes | product designs |",
        "|---|---|---|---|",
    ]
    for name, rows in splits.items():
        sizes = Counter(f"{row['width']} x {row['height']}" for row in rows)
        products = sorted({row["product_id"] for row in rows})
        lines.append(f"| {name} | {len(rows)} | {', '.join(sizes)} | {len(products)}: {', '.join(products)} |")
    return "\n".join(lines) + "\n"


def write_shards(rows: Sequence[dict[str, Any]], out: Path) -> int:
    """Write rows to `<out>/part-*.parquet`, replacing the folder; returns the bytes written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features().arrow_schema
    with replacing_folder(out) as draft:
        for start in range(0, len(rows), ROWS_PER_SHARD):
            table = pa.Table.from_pylist(rows[start : start + ROWS_PER_SHARD], schema=schema)
            shard = draft / f"part-{start // ROWS_PER_SHARD:05d}.parquet"
            # Images are compressed already; small groups let a viewer fetch a few rows.
            pq.write_table(table, shard, compression="none", row_group_size=50)
    return sum(file.stat().st_size for file in out.iterdir())


def pack(
    renders: Path,
    out: Path,
    heldout_products: Collection[str] = HELDOUT_PRODUCTS,
    *,
    train_limit: int | None = None,
    heldout_limit: int | None = None,
    plate_quality: int | None = None,
) -> dict[str, tuple[int, int]]:
    """Write `<out>/train`, `<out>/heldout` and a dataset card; returns (rows, bytes) of each split.

    Images, masks and cut-outs are lossless, and so are the held-out plates. `plate_quality` (WebP, 0 to 100) makes
    the plates for training lossy, which saves a third of the space.

    Raises:
        PackshotError: nothing is rendered, a split would be empty, or a render lacks a layer.
    """
    train, heldout = split_by_product(renders, heldout_products)
    splits = {
        "train": [row(folder, plate_quality) for folder in train[:train_limit]],
        "heldout": [row(folder, None) for folder in heldout[:heldout_limit]],
    }
    sizes = {name: (len(rows), write_shards(rows, out / name)) for name, rows in splits.items()}
    (out / "README.md").write_text(_card(splits))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", type=Path, default=Path("outputs/renders"))
    parser.add_argument("--out", type=Path, default=Path("data/rendered"))
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--heldout-limit", type=int)
    parser.add_argument("--plate-quality", type=int, help="WebP quality of the plates for training; lossless if absent")
    args = parser.parse_args()
    try:
        sizes = pack(
            args.renders,
            args.out,
            train_limit=args.train_limit,
            heldout_limit=args.heldout_limit,
            plate_quality=args.plate_quality,
        )
    except PackshotError as error:
        raise SystemExit(str(error)) from error
    for name, (rows, size) in sizes.items():
        print(f"{args.out / name}: {rows} rows, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
