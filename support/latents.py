"""Latents, one per seed."""

import torch

SEEDS = 2**32  # torch's generator knows no more


def latents(seeds, nz):
    """Return one latent from N(0, 1) per seed, (len(seeds), nz) on the CPU, each with a random state of its own."""
    z, state = torch.empty(len(seeds), nz), torch.Generator()
    for row, seed in zip(z.unbind(), seeds, strict=True):
        row.normal_(generator=state.manual_seed(seed))
    return z
