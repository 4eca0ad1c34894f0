"""Memory against time: what a network keeps for its backward pass."""

from __future__ import annotations

import torch


def enable_checkpointing(method: torch.nn.Module) -> None:
    """Recompute activations in the backward pass of every network that can (non-reentrant, as accelerate needs)."""
    for module in method.children():
        enable = getattr(module, "enable_gradient_checkpointing", None)
        if enable is not None:
            enable()
            # diffusers checkpoints only modules in training mode; SDXL's UNet has no dropout to wake up by that
            module.train()
