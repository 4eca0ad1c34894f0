"""The training engine: loop, optimizers, batches, checkpoints, processes, memory and the tensor cache.

It knows neither diffusion nor scenes.
"""
