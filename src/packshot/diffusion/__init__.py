"""The mathematics of diffusion training: pure functions of tensors, nothing of ours imported."""
