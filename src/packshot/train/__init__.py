"""Training an adapter: the diffusion task, encoding, validation, plan, check mode and model card."""
