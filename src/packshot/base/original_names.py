"""Names of SDXL's UNet in the code it was published with, from its config alone.

diffusers calls a layer ``down_blocks.1.attentions.0.proj_in``; the published code, and with it sd-scripts, ComfyUI and
checkpoints in one file, call it ``input_blocks.4.1.proj_in``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Modules that exist once.
SINGLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# The layers of a residual block.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def resnet(name: str, original: str) -> dict[str, str]:
    """The layers of a residual block."""
    return {f"{name}.{layer}": f"{original}.{published}" for layer, published in RESNET.items()}


def block_names(config: Mapping[str, object]) -> dict[str, str]:
    """The published name of each residual layer, attention and resampler of a UNet with this config.

    The published code numbers what diffusers nests: an input block for each residual block (its attention is the second
    member), and one for each downsampler. An upsampler is the last member of the output block before it.
    """
    down_types = sequence(config["down_block_types"])
    up_types = sequence(config["up_block_types"])
    layers = config["layers_per_block"]
    assert isinstance(layers, int)  # SDXL's has as many in each block
    names = dict(SINGLE)
    number = 1
    for block, kind in enumerate(down_types):
        for layer in range(layers):
            names |= resnet(f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{number}.0")
            if "Attn" in kind:
                names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block < len(down_types) - 1:
            names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    names |= resnet("mid_block.resnets.0", "middle_block.0")
    names["mid_block.attentions.0"] = "middle_block.1"
    names |= resnet("mid_block.resnets.1", "middle_block.2")
    number = 0
    for block, kind in enumerate(up_types):
        for layer in range(layers + 1):
            names |= resnet(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{number}.0")
            if "Attn" in kind:
                names[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            if layer == layers and block < len(up_types) - 1:
                member = 2 if "Attn" in kind else 1
                names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number}.{member}.conv"
            number += 1
    return names


def sequence(value: object) -> Sequence[str]:
    """An entry of a config that lists block types."""
    assert isinstance(value, list | tuple)
    return list(map(str, value))


def original_name(module: str, names: Mapping[str, str]) -> str:
    """The published name of a module. names: of :func:`block_names`; inside attentions both agree."""
    prefix = module
    while prefix and prefix not in names:
        prefix = prefix.rpartition(".")[0]
    return names[prefix] + module[len(prefix) :] if prefix else module
