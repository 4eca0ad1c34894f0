"""Packshot: put a product photo into a new scene; the product's own pixels stay."""

from typing import TYPE_CHECKING, Any

from packshot.scene import Scene

if TYPE_CHECKING:
    from packshot.generate import Packshot

__all__ = ["Packshot", "Scene"]


def __getattr__(name: str) -> Any:
    # Packshot pulls in torch and diffusers: seconds that `from packshot import Scene` should not cost.
    if name == "Packshot":
        from packshot.generate import Packshot

        return Packshot
    raise AttributeError(f"module 'packshot' has no attribute {name!r}")
