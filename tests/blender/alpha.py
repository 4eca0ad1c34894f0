"""The product's alpha by another road than `packshot.render.blender` takes: runs in Blender's environment.

usage: python alpha.py OUT.png < job.json   (everything but the product becomes a hole, the film is transparent)
"""

import json
import os
import sys
from pathlib import Path

import bpy

from packshot.render import blender

SIZE = 96

job = json.loads(sys.stdin.read())
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
blender.start_blender(SIZE, 64, 1)
product = blender.build(job)
scene = bpy.context.scene
scene.render.film_transparent = True
scene.cycles.use_denoising = False
scene.render.image_settings.color_mode = "RGBA"
for obj in scene.objects:
    obj.is_holdout = obj not in product
    if obj not in product and obj.type == "LIGHT":
        obj.is_holdout = False
scene.render.filepath = str(Path(sys.argv[1]))
bpy.ops.render.render(write_still=True)
