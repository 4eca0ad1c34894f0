"""Randomness that depends on what is drawn, not on the process or the moment that draws it.

Every draw of the training takes its generator from (seed, epoch, sample id, use). So noise, timesteps and dropped
conditions do not depend on the number of processes, the batch size or how often a run was killed. The masks of a
dropout inside the network do (see docs/checkpoints.md).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the hash of ``key``; equal keys give equal streams."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class SampleKey:
    """One access to one sample: what its random draws are keyed by."""

    seed: int
    epoch: int
    sample_id: str

    def generator(self, use: str) -> torch.Generator:
        """The generator of one use ("noise", "timestep", "caption_dropout", …) of this access."""
        return generator(self.seed, self.epoch, self.sample_id, use)

    def uniform(self, use: str) -> float:
        """One draw from [0, 1)."""
        return torch.rand((), generator=self.generator(use)).item()


def permutation(seed: int, of: object, size: int) -> torch.Tensor:
    """A shuffle, shape (size,), int64, keyed by ``of``, what is shuffled (an epoch).

    It is stateless, so a checkpoint only needs the step.
    """
    return torch.randperm(size, generator=generator(seed, "order", of))
