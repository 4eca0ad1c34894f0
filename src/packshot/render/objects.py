"""Modelled products: CC0 meshes of `data/objects`, brought to one form once and placed like every other product.

    python -m packshot.render.objects --source furniture/blendswap-cc-0 --catalog PluginFurnitureCatalog.properties

collects them (in Blender's environment) from the CC0 part of Sweet Home 3D's furniture library: upright, centred on the
origin, standing on z = 0, 1 high, facing the camera, with textures of at most 512 px.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix, Vector
from PIL import Image

from packshot.render.materials import find_node
from packshot.runs.files import resolve

FOLDER = "data/objects"
TEXTURE_SIZE = 512
# Library name: (our name, degrees to turn it so that its front faces the camera).
CHOSEN = {
    "caffe_final": ("coffee-cup", 0), "cosmeticsPot": ("cosmetics-pot", 0), "mamadeira": ("baby-bottle", 0),
    "plasticCup": ("plastic-cup", 0), "speaker2": ("speaker-small", 0), "speaker3": ("speaker-tall", 0),
    "teddyBear": ("teddy-bear", 0), "tetrapak": ("milk-carton", 0), "yogurtBottle": ("yogurt-bottle", 0),
    "flacon": ("flacon", 0), "headphones": ("headphones", 60), "ammoBox": ("wooden-chest", 0),
    "barrel": ("barrel", 0), "littlePlant": ("potted-plant", 0), "basketball": ("ball", 0),
    "slippers": ("slippers", 0), "cactus": ("cactus", 0), "coffeeBrewer": ("coffee-brewer", 0),
    "handbag": ("handbag", 0), "orchids": ("orchid", 0), "cupcake": ("cupcake", 0), "bootie": ("boots", 0),
    "bread": ("bread", 0), "briefcase": ("briefcase", 0), "JapaneseLantern": ("lantern", 0),
    "woodToy": ("wooden-figure", 0), "electricGuitar": ("guitar", 0),
    "caballito": ("rocking-horse", 0),
}  # fmt: skip


@cache
def _unpacked() -> Path:
    """The meshes, unpacked once per process into a temporary folder that goes with it."""
    folder = tempfile.TemporaryDirectory(prefix="packshot-objects-")
    _unpacked.keep = folder  # type: ignore[attr-defined]
    with zipfile.ZipFile(resolve(f"{FOLDER}/objects.zip")) as archive:
        archive.extractall(folder.name)
    return Path(folder.name)


def _imported(path: Path, **axes: str) -> list[bpy.types.Object]:
    before = set(bpy.data.objects)
    bpy.ops.wm.obj_import(filepath=str(path), **axes)
    bpy.context.view_layer.update()
    return [obj for obj in bpy.data.objects if obj not in before]


def _shader(material: bpy.types.Material):
    return find_node(material.node_tree, "BSDF_PRINCIPLED")


def _area(parts: list[bpy.types.Object], material: bpy.types.Material) -> float:
    area = 0.0
    for part in parts:
        for polygon in part.data.polygons:
            if part.data.materials and part.data.materials[polygon.material_index] == material:
                area += polygon.area
    return area


def _tint(parts: list[bpy.types.Object], color: list[float]) -> None:
    """Give the largest plain (untextured) material of the object another colour."""
    plain = set()
    for part in parts:
        for material in filter(None, part.data.materials):
            shader = _shader(material)
            if shader is not None and not shader.inputs["Base Color"].is_linked:
                plain.add(material)
    if plain:
        largest = max(plain, key=lambda material: (_area(parts, material), material.name))
        _shader(largest).inputs["Base Color"].default_value = (*color, 1)


def add_object(name: str, tint: list[float] | None) -> None:
    """Build a collected object, 1 high on z = 0; `tint` recolours its largest plain material."""
    parts = _imported(_unpacked() / f"{name}.obj", forward_axis="Y", up_axis="Z")
    for part in parts:
        for material in part.data.materials:
            if material is not None and (shader := _shader(material)) is not None:
                # The library's shininess was made for another renderer: everything came out as chalk.
                shader.inputs["Roughness"].default_value = 0.38
    if tint is not None:
        _tint(parts, tint)


def _extent(parts: list[bpy.types.Object]) -> tuple[np.ndarray, np.ndarray, float]:
    """Lowest and highest corner, and the diameter around the z axis through the middle."""
    points = np.array([list(part.matrix_world @ vertex.co) for part in parts for vertex in part.data.vertices])
    low, high = points.min(0), points.max(0)
    radius = float(np.hypot(*(points[:, :2] - (low + high)[:2] / 2).T).max())
    return low, high, 2 * radius


def _collect(source: Path, name: str, turn: float, out: Path) -> dict[str, float]:
    """Write one object in our form; returns width / height and footprint (diameter / height)."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    parts = _imported(source)
    for part in parts:
        part.matrix_world = Matrix.Rotation(np.radians(turn), 4, "Z") @ part.matrix_world
    bpy.context.view_layer.update()
    low, high, diameter = _extent(parts)
    middle = (low + high) / 2
    place = Matrix.Scale(1 / (high[2] - low[2]), 4) @ Matrix.Translation(Vector((-middle[0], -middle[1], -low[2])))
    for part in parts:
        part.matrix_world = place @ part.matrix_world
    for image in bpy.data.images:
        if image.size[0] > TEXTURE_SIZE or image.size[1] > TEXTURE_SIZE:
            share = TEXTURE_SIZE / max(image.size)
            image.scale(max(1, int(image.size[0] * share)), max(1, int(image.size[1] * share)))
    bpy.ops.wm.obj_export(
        filepath=str(out / f"{name}.obj"), forward_axis="Y", up_axis="Z", path_mode="STRIP", export_materials=True
    )
    _round_numbers(out / f"{name}.obj")
    _save_textures(source.parent, out / f"{name}.mtl", out)
    height = high[2] - low[2]
    return {"aspect": round(float((high[0] - low[0]) / height), 3), "footprint": round(diameter / float(height), 3)}


def _round_numbers(path: Path) -> None:
    """Four decimals of an object 1 high are a tenth of a pixel at 1024 px, and half the file; normals need three."""

    def shorter(line: str) -> str:
        if line[:2] not in ("v ", "vn", "vt"):
            return line
        digits = 3 if line.startswith("vn") else 4
        return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m.group()):.{digits}f}".rstrip("0").rstrip("."), line)

    path.write_text("\n".join(map(shorter, path.read_text().splitlines())) + "\n")


def _save_textures(source: Path, materials: Path, out: Path) -> None:
    """Textures under lower-case names of their own; maps whose file the library lacks are dropped."""
    known = {file.name.lower(): file for file in source.iterdir()}
    lines = []
    for line in materials.read_text().splitlines():
        if line.startswith("map_"):
            wanted = line.split()[-1].lower()
            if not line.startswith("map_Kd") or wanted not in known:
                continue
            texture = f"{materials.stem}-{Path(wanted).stem}.jpg"
            with Image.open(known[wanted]) as image:
                image.thumbnail((TEXTURE_SIZE, TEXTURE_SIZE))
                image.convert("RGB").save(out / texture, quality=88)
            line = f"map_Kd {texture}"
        lines.append(line)
    materials.write_text("\n".join(lines) + "\n")


def _authors(catalog: Path) -> dict[str, str]:
    text = catalog.read_text(encoding="latin-1")
    models = dict(re.findall(r"^model#(\d+)=.*/([^/]+)\.obj\s*$", text, re.MULTILINE))
    creators = dict(re.findall(r"^creator#(\d+)=(.*?)\s*$", text, re.MULTILINE))
    return {model: creators.get(number, "unknown") for number, model in models.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with a folder per model")
    parser.add_argument("--catalog", type=Path, required=True, help="the library's list, for the authors' names")
    args = parser.parse_args()
    authors, index, folder = _authors(args.catalog), {}, resolve(FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as draft:
        for library_name, (name, turn) in sorted(CHOSEN.items(), key=lambda pair: pair[1]):
            sizes = _collect(args.source / library_name / f"{library_name}.obj", name, turn, Path(draft))
            index[name] = {**sizes, "author": authors[library_name], "license": "CC0-1.0"}
        with zipfile.ZipFile(folder / "objects.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for file in sorted(Path(draft).iterdir()):
                archive.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
