"""What differs between LoRA, IP-Adapter and ControlNet: trainable part, condition, prediction, export.

A method is one module here with one ``nn.Module`` class; ``METHODS`` finds it by its config class. Nothing else in
the project asks which method it trains. To add one: a config class in ``config/schema.py``, a module here, a line
below.
"""

from packshot.config.schema import ControlNetMethod, IPAdapterMethod, LoraMethod
from packshot.methods.base import Method
from packshot.methods.controlnet import ControlNet
from packshot.methods.ip_adapter import IPAdapter
from packshot.methods.lora import Lora

METHODS = {LoraMethod: Lora, IPAdapterMethod: IPAdapter, ControlNetMethod: ControlNet}

__all__ = ["METHODS", "Method"]
