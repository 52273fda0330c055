"""Latent vectors, one per seed."""

import torch

SEED_COUNT = 2**32  # torch.Generator distinguishes no more


def latents(seeds, nz):
    """Return a latent vector from N(0, 1) for each seed, (len(seeds), nz), on the CPU; it depends on the seed alone."""
    z, generator = torch.empty(len(seeds), nz), torch.Generator()
    for row, seed in zip(z.unbind(), seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return z
