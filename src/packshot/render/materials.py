"""Procedural Cycles materials. Colours are linear RGB in [0, 1]; texture sizes are in scene units (frame = 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import bpy

Color = Sequence[float]


def add_node(tree, kind: str, values: dict | None = None, **attributes):
    """Add a shader node; `values` sets inputs by name or index, `attributes` the node's properties."""
    node = tree.nodes.new(kind)
    for key, value in attributes.items():
        setattr(node, key, value)
    for key, value in (values or {}).items():
        node.inputs[key].default_value = value
    return node


def find_node(tree, kind: str):
    """The first node of a type, or None."""
    for node in tree.nodes:
        if node.type == kind:
            return node
    return None


def _principled_node(material):
    return find_node(material.node_tree, "BSDF_PRINCIPLED")


def tinted(color: Color, factor: float, lift: float = 0.0) -> list[float]:
    """``lift + factor * color``, at most 1: a darker, lighter or paler tone."""
    return [min(1.0, lift + factor * channel) for channel in color]


def plain(name: str, color: Color, roughness=0.5, **inputs) -> bpy.types.Material:
    """Principled material; further inputs by name with underscores, e.g. `Metallic=1`, `Coat_Weight=0.5`."""
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    shader = _principled_node(material)
    shader.inputs["Base Color"].default_value = (*color, 1)
    shader.inputs["Roughness"].default_value = roughness
    for key, value in inputs.items():
        shader.inputs[key.replace("_", " ")].default_value = value
    return material


def glow(name: str, color: Color, strength=1.0) -> bpy.types.Material:
    """Emission that the camera sees but that is not sampled as a lamp (backdrops, discs of bokeh)."""
    material = plain(name, (0, 0, 0), 1.0, Emission_Color=(*color, 1), Emission_Strength=strength)
    material.cycles.emission_sampling = "NONE"
    return material


def glass(name: str, color: Color, roughness=0.03) -> bpy.types.Material:
    """Coloured glass whose shadow is tinted: without caustics a plain glass casts the shadow of a stone."""
    material = plain(name, color, roughness, Transmission_Weight=1.0, IOR=1.45)
    tree = material.node_tree
    output = find_node(tree, "OUTPUT_MATERIAL")
    clear = add_node(tree, "ShaderNodeBsdfTransparent", {0: (*tinted(color, 0.6, 0.35), 1)})
    path = add_node(tree, "ShaderNodeLightPath")
    mix = add_node(tree, "ShaderNodeMixShader")
    tree.links.new(path.outputs["Is Shadow Ray"], mix.inputs[0])
    tree.links.new(_principled_node(material).outputs[0], mix.inputs[1])
    tree.links.new(clear.outputs[0], mix.inputs[2])
    tree.links.new(mix.outputs[0], output.inputs["Surface"])
    return material


def _coordinates(tree, scale=(1, 1, 1), rotation=0.0):
    coordinates = add_node(tree, "ShaderNodeTexCoord")
    mapping = add_node(tree, "ShaderNodeMapping", {"Scale": scale, "Rotation": (0, 0, rotation)})
    tree.links.new(coordinates.outputs["Object"], mapping.inputs["Vector"])
    return mapping.outputs[0]


def _noise(tree, vector, scale, detail=6.0, distortion=0.0):
    noise = add_node(tree, "ShaderNodeTexNoise", {"Scale": scale, "Detail": detail, "Distortion": distortion})
    tree.links.new(vector, noise.inputs["Vector"])
    return noise.outputs[0]


def _ramp(tree, factor, stops):
    ramp = add_node(tree, "ShaderNodeValToRGB")
    elements = ramp.color_ramp.elements
    while len(elements) < len(stops):
        elements.new(0.5)
    for element, (position, color) in zip(elements, stops, strict=True):
        element.position = position
        element.color = (*color, 1)
    tree.links.new(factor, ramp.inputs[0])
    return ramp.outputs[0]


def _bump(material, height, strength, distance=0.05):
    tree = material.node_tree
    bump = add_node(tree, "ShaderNodeBump", {"Strength": strength, "Distance": distance})
    tree.links.new(height, bump.inputs["Height"])
    tree.links.new(bump.outputs[0], _principled_node(material).inputs["Normal"])


def mottled(name, stops, scale, roughness=0.6, bump=0.0, detail=8.0, distortion=0.0, stretch=(1, 1, 1), **inputs):
    """Noise through a colour ramp, with an optional bump from the same noise: stone, concrete, plaster, fur, bark."""
    material = plain(name, (0.5, 0.5, 0.5), roughness, **inputs)
    tree = material.node_tree
    noise = _noise(tree, _coordinates(tree, stretch), scale, detail, distortion)
    tree.links.new(_ramp(tree, noise, stops), _principled_node(material).inputs["Base Color"])
    if bump:
        _bump(material, noise, bump)
    return material


def painted(name, color: Color, variation=0.05, roughness=0.8, scale=4.0, bump=0.15):
    """A painted or plastered body of one colour with a slight unevenness."""
    stops = [(0.3, tinted(color, 1 - variation)), (0.7, tinted(color, 1 + variation))]
    return mottled(name, stops, scale, roughness, bump)


def marble(body: Color = (0.86, 0.85, 0.84), vein: Color = (0.2, 0.21, 0.23), shade: Color = (0.7, 0.7, 0.7)):
    stops = [(0.3, shade), (0.455, body), (0.5, vein), (0.53, body), (0.8, tinted(body, 1.05))]
    return mottled("marble", stops, 0.75, 0.18, distortion=1.6, detail=9, Coat_Weight=0.3)


def concrete():
    return mottled(
        "concrete",
        [(0.3, (0.2, 0.2, 0.2)), (0.5, (0.3, 0.3, 0.295)), (0.7, (0.4, 0.4, 0.39))],
        1.6,
        0.75,
        bump=0.35,
        detail=12,
    )


def stone(color: Color):
    stops = [(0.35, tinted(color, 0.72)), (0.5, color), (0.65, tinted(color, 1.12))]
    return mottled("stone", stops, 9, 0.8, bump=0.25, detail=8)


def moss():
    stops = [
        (0.3, (0.02, 0.045, 0.01)),
        (0.5, (0.07, 0.15, 0.015)),
        (0.62, (0.16, 0.24, 0.03)),
        (0.72, (0.22, 0.2, 0.16)),
    ]
    return mottled("moss", stops, 5, 0.95, bump=1.0, detail=12, Sheen_Weight=0.3)


def sand():
    stops = [(0.3, (0.5, 0.33, 0.17)), (0.5, (0.68, 0.49, 0.29)), (0.7, (0.8, 0.62, 0.42))]
    return mottled("sand", stops, 26, 0.95, bump=0.5, detail=10)


def snow():
    stops = [(0.3, (0.8, 0.85, 0.92)), (0.6, (0.94, 0.95, 0.96))]
    return mottled("snow", stops, 46, 0.5, bump=0.7, detail=10, Sheen_Weight=0.4)


def water():
    """Deep still water: what is above it mirrors in a dark blue-green body."""
    return plain("water", (0.012, 0.075, 0.095), 0.03, IOR=1.33, Specular_IOR_Level=0.8)


def silk(color: Color):
    return plain("silk", color, 0.34, Sheen_Weight=0.35, Anisotropic=0.5, Specular_IOR_Level=0.7)


def gradient(bottom: Color, top: Color, low: float, high: float):
    """A paper backdrop that runs from one colour to another between two heights of the object's own y axis."""
    material = plain("gradient", bottom, 0.9)
    tree = material.node_tree
    split = add_node(tree, "ShaderNodeSeparateXYZ")
    tree.links.new(_coordinates(tree), split.inputs[0])
    share = add_node(tree, "ShaderNodeMapRange", {"From Min": low, "From Max": high})
    tree.links.new(split.outputs[1], share.inputs[0])
    tree.links.new(
        _ramp(tree, share.outputs[0], [(0.0, bottom), (1.0, top)]), _principled_node(material).inputs["Base Color"]
    )
    return material


def linen():
    material = mottled(
        "linen", [(0.3, (0.6, 0.52, 0.4)), (0.7, (0.8, 0.73, 0.62))], 14, 0.95, detail=4, stretch=(1, 0.16, 1)
    )
    tree = material.node_tree
    weave = _noise(tree, _coordinates(tree, (0.16, 1, 1)), 22, 4)
    _bump(material, weave, 0.5)
    return material


def _masonry(material, vector, tones, width, height, mortar_size, offset=0.5):
    tree = material.node_tree
    values = {"Color1": (*tones[0], 1), "Color2": (*tones[1], 1), "Mortar": (*tones[2], 1), "Scale": 1.0}
    values |= {"Mortar Size": mortar_size, "Brick Width": width, "Row Height": height, "Mortar Smooth": 0.3}
    tiles = add_node(tree, "ShaderNodeTexBrick", values, offset=offset)
    tree.links.new(vector, tiles.inputs["Vector"])
    return tiles


def _multiply(tree, first, second):
    mix = add_node(tree, "ShaderNodeMix", data_type="RGBA", blend_type="MULTIPLY")
    mix.inputs[0].default_value = 1.0
    tree.links.new(first, mix.inputs[6])
    tree.links.new(second, mix.inputs[7])
    return mix.outputs[2]


def wood(light: Color, dark: Color, vertical=False, roughness=0.45, plank=0.62):
    """Planks along x (or y when vertical) with a streaky grain."""
    material = plain("wood", light, roughness)
    tree = material.node_tree
    turn = math.pi / 2 if vertical else 0.0
    grain = _noise(tree, _coordinates(tree, (0.35, 5, 1) if not vertical else (5, 0.35, 1)), 3.2, 10, 0.6)
    tint = _ramp(tree, grain, [(0.32, (0.4, 0.36, 0.33)), (0.5, (0.85, 0.82, 0.8)), (0.68, (1, 1, 1))])
    tones = (light, dark, tinted(dark, 0.25))
    planks = _masonry(material, _coordinates(tree, rotation=turn), tones, 7.0, plank, 0.012, 0.37)
    tree.links.new(_multiply(tree, planks.outputs[0], tint), _principled_node(material).inputs["Base Color"])
    _bump(material, planks.outputs[1], 0.4, -0.03)
    return material


def bricks():
    material = plain("bricks", (0.4, 0.15, 0.1), 0.85)
    tree = material.node_tree
    tiles = _masonry(
        material, _coordinates(tree), ((0.36, 0.1, 0.055), (0.2, 0.06, 0.04), (0.5, 0.46, 0.41)), 0.62, 0.23, 0.018
    )
    stain = _ramp(tree, _noise(tree, _coordinates(tree), 5, 8), [(0.3, (0.6, 0.6, 0.6)), (0.65, (1, 1, 1))])
    tree.links.new(_multiply(tree, tiles.outputs[0], stain), _principled_node(material).inputs["Base Color"])
    _bump(material, tiles.outputs[1], 0.8, -0.05)
    return material


def tiles(color: Color, grout: Color, size: float):
    """Square glazed tiles with sunk grout."""
    material = plain("tiles", color, 0.12, Coat_Weight=0.3)
    tree = material.node_tree
    tones = (color, tinted(color, 0.94), grout)
    squares = _masonry(material, _coordinates(tree), tones, size, size, 0.012, offset=0.0)
    tree.links.new(squares.outputs[0], _principled_node(material).inputs["Base Color"])
    _bump(material, squares.outputs[1], 0.6, -0.03)
    return material


def citrus(color: Color):
    return mottled("citrus", [(0.4, tinted(color, 0.85)), (0.6, color)], 40, 0.38, bump=0.35, detail=2)


def foliage(color: Color):
    """Leaf green with some light passing through."""
    return mottled("foliage", [(0.3, tinted(color, 0.55)), (0.7, color)], 3, 0.42, detail=3, Specular_IOR_Level=0.4)


METALS: dict[str, Color] = {"gold": (0.9, 0.62, 0.24), "silver": (0.8, 0.8, 0.82)}


def metal(name: str, color: Color | None = None, roughness=0.2):
    return plain(name, color or METALS[name], roughness, Metallic=1.0)


def sky(horizon: Color, zenith: Color, cloud: Color | None, strength=1.0):
    """Emissive backdrop in its own plane: a vertical gradient, with clouds from noise if a cloud colour is given."""
    material = glow("sky", (1, 1, 1), strength)
    tree = material.node_tree
    split = add_node(tree, "ShaderNodeSeparateXYZ")
    tree.links.new(_coordinates(tree, (1, 0.14, 1)), split.inputs[0])
    color = _ramp(tree, split.outputs[1], [(0.0, horizon), (0.75, zenith)])
    if cloud is not None:
        cover = _ramp(
            tree, _noise(tree, _coordinates(tree, (0.16, 0.34, 1)), 1.9, 7, 0.3), [(0.5, (0, 0, 0)), (0.66, (1, 1, 1))]
        )
        mix = add_node(tree, "ShaderNodeMix", data_type="RGBA")
        mix.inputs[7].default_value = (*cloud, 1)
        tree.links.new(cover, mix.inputs[0])
        tree.links.new(color, mix.inputs[6])
        color = mix.outputs[2]
    tree.links.new(color, _principled_node(material).inputs["Emission Color"])
    return material


def garden(sky_color: Color, strength=1.0):
    """Emissive backdrop: bushes and trees far out of focus under a bright sky."""
    material = glow("garden", (1, 1, 1), strength)
    tree = material.node_tree
    split = add_node(tree, "ShaderNodeSeparateXYZ")
    tree.links.new(_coordinates(tree, (1, 0.16, 1)), split.inputs[0])
    blots = _noise(tree, _coordinates(tree), 0.85, 1.2, 0.4)
    lift = add_node(tree, "ShaderNodeMath", {1: 0.62}, operation="MULTIPLY")
    tree.links.new(blots, lift.inputs[0])
    both = add_node(tree, "ShaderNodeMath", operation="ADD")
    tree.links.new(lift.outputs[0], both.inputs[0])
    tree.links.new(split.outputs[1], both.inputs[1])
    tones = [(0.05, (0.02, 0.07, 0.015)), (0.3, (0.1, 0.24, 0.05)), (0.45, (0.3, 0.45, 0.12)), (0.62, sky_color)]
    tree.links.new(_ramp(tree, both.outputs[0], tones), _principled_node(material).inputs["Emission Color"])
    return material


def _measuring(name: str) -> tuple[bpy.types.Material, object]:
    """A material that emits what is put into the returned node's inputs: it replaces all others of the scene."""
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    material.cycles.emission_sampling = "NONE"
    tree = material.node_tree
    tree.nodes.clear()
    join = add_node(tree, "ShaderNodeCombineColor")
    emission = add_node(tree, "ShaderNodeEmission")
    tree.links.new(join.outputs[0], emission.inputs[0])
    output = add_node(tree, "ShaderNodeOutputMaterial")
    tree.links.new(emission.outputs[0], output.inputs["Surface"])
    return material, join


def normals() -> bpy.types.Material:
    """Override that paints the surface normal in camera space, each axis from [-1, 1] to [0, 1].

    x points right, y up, z to the camera, as normal maps have it.
    """
    material, join = _measuring("normals")
    tree = material.node_tree
    geometry = add_node(tree, "ShaderNodeNewGeometry")
    turn = add_node(tree, "ShaderNodeVectorTransform", vector_type="NORMAL", convert_from="WORLD", convert_to="CAMERA")
    tree.links.new(geometry.outputs["Normal"], turn.inputs[0])
    half = add_node(tree, "ShaderNodeVectorMath", {1: (0.5, 0.5, -0.5), 2: (0.5, 0.5, 0.5)}, operation="MULTIPLY_ADD")
    tree.links.new(turn.outputs[0], half.inputs[0])
    split = add_node(tree, "ShaderNodeSeparateXYZ")
    tree.links.new(half.outputs[0], split.inputs[0])
    for axis in range(3):
        tree.links.new(split.outputs[axis], join.inputs[axis])
    return material


def measure(scale: float) -> bpy.types.Material:
    """Override that paints (inverse depth, product coverage, 0): one cheap render gives the depth and the mask.

    Red is `scale` / z for the camera distance z, so near is bright as in MiDaS; green is 1 where the object's pass
    index is 1. Values are linear.
    """
    material, join = _measuring("measure")
    tree = material.node_tree
    camera = add_node(tree, "ShaderNodeCameraData")
    inverse = add_node(tree, "ShaderNodeMath", {0: scale}, operation="DIVIDE")
    tree.links.new(camera.outputs["View Z Depth"], inverse.inputs[1])
    info = add_node(tree, "ShaderNodeObjectInfo")
    is_product = add_node(tree, "ShaderNodeMath", {1: 1.0, 2: 0.1}, operation="COMPARE")
    tree.links.new(info.outputs["Object Index"], is_product.inputs[0])
    tree.links.new(inverse.outputs[0], join.inputs[0])
    tree.links.new(is_product.outputs[0], join.inputs[1])
    return material
