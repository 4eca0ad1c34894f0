"""What differs between LoRA, IP-Adapter and ControlNet: trainable part, condition, prediction, export.

``base`` states the contract. To add a method: a config class with its script in ``config``, a module here, and a line
below.
"""

from packshot.base.load import Parts
from packshot.config.schema import ControlNetMethod, IPAdapterMethod, LoraMethod, TrainScript
from packshot.methods.base import Method
from packshot.methods.controlnet import ControlNet
from packshot.methods.ip_adapter import IPAdapter
from packshot.methods.lora import Lora

METHODS: dict[type, type[Method]] = {LoraMethod: Lora, IPAdapterMethod: IPAdapter, ControlNetMethod: ControlNet}


def method_class(config: TrainScript) -> type[Method]:
    """The method that a script trains."""
    return METHODS[type(config.method)]


def build_method(parts: Parts, config: TrainScript) -> Method:
    """The method that a script trains, over a base.

    Raises:
        ConfigError: ``method`` names weights that cannot be loaded, or layers that the base does not have.
    """
    return method_class(config)(parts, config.method)


__all__ = ["METHODS", "Method", "build_method", "method_class"]
