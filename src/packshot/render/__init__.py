"""The Blender packshot factory: Scene in; photograph, plate, cut-out and depth out.

It runs in its own environment (`bpy` pins numpy 1.26) and is spoken to by files: `sample` writes jobs as JSON lines,
`blender` renders them, `pack` turns the finished folders into Parquet. Only `sample` and `pack` run in the main one.
"""
