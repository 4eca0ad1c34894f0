"""The one training loop, its state, its order of samples, its cache and its validation."""
