"""IP-Adapter: a reference image enters through its own keys and values in every cross-attention."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from packshot.base.adapter_metadata import NO_METADATA, write_metadata
from packshot.base.ip_adapters import EXPORT, read_original
from packshot.base.load import Parts, weights_hash
from packshot.config.schema import IPAdapterMethod, IPAdapterVariant, ReferenceSource
from packshot.engine.checkpoints import on_cpu
from packshot.engine.keyed_random import SampleKey
from packshot.methods.base import (
    FramedSample,
    Method,
    PeerKey,
    Row,
    Tensors,
    trainable_fp32,
    unet_conditioning,
)
from packshot.methods.ip_adapter_file import check_fit, from_original, resampler_dim, to_original

if TYPE_CHECKING:  # imported where one is built
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPVisionConfig

# diffusers derives the number of heads of a "plus" resampler from this head width when it loads one.
RESAMPLER_DIM_HEAD = 64
RESAMPLER_DEPTH = 4


class IPAdapter(Method):
    """Decoupled cross-attention for image tokens (Ye et al. 2023, arXiv 2308.06721).

    The modules are those that diffusers itself builds when it loads an IP-Adapter, so that what is trained is what
    runs. ``base`` projects CLIP's pooled embedding to ``num_tokens`` tokens, ``plus`` resamples its patch tokens. It
    starts without any effect, or with the weights of ``method.init``.

    Raises:
        ConfigError: ``method.init`` cannot be read or does not fit.
    """

    config: IPAdapterMethod
    used_as = "adapters.ip_adapter=FOLDER"
    encoders = ("image_encoder",)
    copies_base = True

    def __init__(self, parts: Parts, config: IPAdapterMethod) -> None:
        super().__init__(parts, config)
        self.peer_key = PEER_KEYS[config.reference]
        self.image_encoder = parts.image_encoder
        without_values = self.unet.device.type == "meta"
        given = read_original("method.init", config.init, without_values) if config.init else {}
        self.projection = image_projection(self.unet, self.image_encoder.config, config, resampler_dim(given))
        self.processors = nn.ModuleList(add_image_attention(self.unet, config))
        self.unet.encoder_hid_proj = MultiIPAdapterImageProjection([self.projection])
        self.unet.config.encoder_hid_dim_type = "ip_image_proj"
        if given:
            check_fit(given, to_original(self.projection, self.processors), config)
            from_original(given, self.projection, self.processors)
        self.null_reference = self._null_reference()
        for module in (self.projection, self.processors):
            module.requires_grad_(True).train()
            trainable_fp32(module)

    @torch.no_grad()
    def encode(self, samples: Sequence[FramedSample]) -> list[Tensors]:
        """``reference``: the CLIP encoding of the picture without its product; (D,) for base, (tokens, D) for plus."""
        pictures = list(map(without_product, samples))
        pixels_BCHW = self.parts.feature_extractor(images=pictures, return_tensors="pt").pixel_values
        return [{"reference": states} for states in self._states(pixels_BCHW)]

    def _states(self, pixels_BCHW: Tensor) -> Tensor:
        encoder = self.image_encoder
        pixels_BCHW = pixels_BCHW.to(encoder.device, encoder.dtype)
        if self.config.variant is IPAdapterVariant.base:
            states = encoder(pixels_BCHW).image_embeds
        else:
            states = encoder(pixels_BCHW, output_hidden_states=True).hidden_states[-2]
        return states if states.is_meta else states.cpu()  # a plan has no values to move

    @torch.no_grad()
    def _null_reference(self) -> Tensor:
        """What "no reference" is at inference: zeros (base), the encoding of a zero image (plus)."""
        size = self.image_encoder.config.image_size
        states = self._states(torch.zeros(1, 3, size, size))[0].float()  # type: ignore[arg-type]
        return torch.zeros_like(states) if self.config.variant is IPAdapterVariant.base else states

    def cache_key(self) -> str:
        """Variant, encoder weights, and how pictures are brought to the encoder."""
        prepared = self.parts.identity("feature_extractor")
        return f"reference-{self.config.variant.name}-{weights_hash(self.image_encoder)}-{prepared}"

    def condition(self, sample: FramedSample | None, encoded: Sequence[Tensors], key: SampleKey) -> Tensors:
        """``reference``: that of a peer with probability ``peer_reference_prob`` if there is one, else the
        sample's own; the null reference with probability ``image_dropout``."""
        if key.uniform("image_dropout") < self.config.image_dropout:
            return {"reference": self.null_reference}
        peers = len(encoded) - 1
        if peers and key.uniform("lent") < self.config.peer_reference_prob:
            return {"reference": encoded[1 + int(key.uniform("reference") * peers)]["reference"]}
        return {"reference": encoded[0]["reference"]}

    def condition_shapes(self, resolution: int) -> dict[str, tuple[int, ...]]:
        """The encoding of a reference."""
        return {"reference": tuple(self.null_reference.shape)}

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, batch: Tensors) -> Tensor:
        """The UNet's output with image tokens attended to."""
        conditioning = unet_conditioning(batch)
        conditioning["added_cond_kwargs"]["image_embeds"] = [batch["reference"].unsqueeze(1)]
        return self.unet(noisy_BCHW, timesteps_B, **conditioning).sample

    def pipeline(self) -> DiffusionPipeline:
        """Text and reference to image."""
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(**self.parts.pipeline_components())

    def pipeline_inputs(self, sample: FramedSample, encoded: Sequence[Tensors]) -> dict[str, list[Tensor]]:
        """The reference, that of another sample of the same look if there is one; unconditional half first, as the
        pipeline expects."""
        pair = torch.stack([self.null_reference, encoded[-1]["reference"]])
        return {"ip_adapter_image_embeds": [pair.unsqueeze(1).to(self.unet.device, self.unet.dtype)]}

    def export(self, folder: Path, metadata: Mapping[str, object] = NO_METADATA) -> None:
        """``ip_adapter.safetensors`` in the layout of the original IP-Adapter, and ``packshot.json``."""
        tensors = to_original(self.projection, self.processors)
        save_file(on_cpu(tensors, self.export_dtype), folder / EXPORT)
        described = {"variant": self.config.variant.name, "num_tokens": self.config.num_tokens}
        write_metadata(folder, {**described, **metadata})


def look(row: Row) -> Hashable | None:
    """What samples of one look have in common: surface and mood of their scenes; None if neither is known.

    Props, background and light may differ: what is the same in every pair is all that a reference can be used for.
    """
    scene = row["scene"]
    known = (scene.surface.casefold(), (scene.mood or "").casefold())
    return known if any(known) else None


def place(row: Row) -> Hashable | None:
    """Surface and background of a sample's scene; None if neither is known. Props and light may differ."""
    scene = row["scene"]
    known = (scene.surface.casefold(), (scene.background or "").casefold())
    return known if any(known) else None


PEER_KEYS: dict[ReferenceSource, PeerKey | None] = {
    ReferenceSource.self: None,
    ReferenceSource.look: look,
    ReferenceSource.place: place,
}


def without_product(sample: FramedSample) -> Image.Image:
    """The picture with its product painted over in mid-grey: a reference lends its scene, not its object."""
    image = sample["image"]
    if sample["mask"] is None:
        return image
    grey = Image.new("RGB", image.size, (127, 127, 127))
    return Image.composite(grey, image, sample["mask"])


def image_projection(
    unet: UNet2DConditionModel, vision: CLIPVisionConfig, config: IPAdapterMethod, given_dim: int | None
) -> nn.Module:
    """From the image encoder's states to image tokens. given_dim: width of the resampler in ``method.init``."""
    width = unet.config.cross_attention_dim
    if config.variant is IPAdapterVariant.base:
        return ImageProjection(vision.projection_dim, width, config.num_tokens)
    # As wide as what it reads, by default: of CLIP-ViT-H that is 1280, the width of the published resampler for SDXL.
    hidden = config.resampler_dim or given_dim or max(RESAMPLER_DIM_HEAD, vision.hidden_size)
    return IPAdapterPlusImageProjection(
        embed_dims=vision.hidden_size,
        output_dims=width,
        hidden_dims=hidden,
        depth=RESAMPLER_DEPTH,
        dim_head=RESAMPLER_DIM_HEAD,
        heads=max(1, hidden // RESAMPLER_DIM_HEAD),
        num_queries=config.num_tokens,
    )


def add_image_attention(unet: UNet2DConditionModel, config: IPAdapterMethod) -> list[IPAdapterAttnProcessor2_0]:
    """Give every cross-attention image keys and values, copied from its text ones; returns them in order."""
    processors = {}
    added = []
    modules = dict(unet.named_modules())
    for name, processor in unet.attn_processors.items():
        attention = modules[name.removesuffix(".processor")]
        if name.endswith("attn1.processor"):
            processors[name] = processor
            continue
        new: Any = IPAdapterAttnProcessor2_0(
            hidden_size=attention.to_k.out_features,
            cross_attention_dim=attention.to_k.in_features,
            num_tokens=(config.num_tokens,),
        )
        new.to_k_ip[0].weight.data.copy_(attention.to_k.weight.data)
        # Values start at zero, so that at step 0 the adapter changes nothing and training is not spent on undoing it.
        nn.init.zeros_(new.to_v_ip[0].weight)
        processors[name] = new
        added.append(new)
    unet.set_attn_processor(processors)
    return added
