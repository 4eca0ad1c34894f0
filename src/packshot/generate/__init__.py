"""Putting a product into a scene: ``Packshot.load(...).set_product(photo).generate(scene)``."""

from packshot.generate.packshot import Packshot, Result

__all__ = ["Packshot", "Result"]
