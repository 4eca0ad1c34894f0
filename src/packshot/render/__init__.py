"""The Blender packshot factory: Scene in; photograph, plate, cut-out, shadow, depth and normals out.

It runs in its own environment (`bpy` pins numpy 1.26) and is spoken to by files: `sample` draws jobs, `blender` renders
them there (with `surfaces`, `backgrounds`, `props`, `products`, `objects`, `lights`, `camera`), `farm` keeps it busy
and reads the finished folders, `pack` makes rows of them. `sample`, `words`, `farm`, `pack` run in the main one.
"""
