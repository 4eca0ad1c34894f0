"""The mini family: SDXL's and Florence-2's own classes at about 1/200 of the size, pretrained on rendered packshots.

``python -m tools.mini --out data/models`` trains every part on the rendered sets and writes two folders that
stock diffusers and transformers load without code of ours: ``sdxl/`` and ``florence2/``.
"""
