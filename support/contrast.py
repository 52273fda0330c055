"""The contrast of images, which D cannot see: measured, and given to the generator that is sampled from.

When the values of all generated images are multiplied by one factor, D's logits hardly change: its convolutions have no
bias, LeakyReLU is homogeneous, and batch norm, which sees real and generated images apart, takes the factor out. So
nothing holds G's contrast, and in long runs it drifts. docs/contrast.md shows it.
"""

import copy
import itertools

import torch
from tqdm import tqdm

REAL_IMAGES = 1024  # whose contrast is measured, in batches of BATCH
BATCH = 128
LARGEST_FACTOR = 4.0
BISECTIONS = 12  # which find the factor to 0.03%


def contrast(images):
    """Return the root mean square of the values of images, (N, nc, s, s) in [-1, 1]: how far they are from grey."""
    return torch.linalg.vector_norm(images) / images.numel() ** 0.5


def subsample(images):
    """Return every n-th row and column of images: 32 to 63 of each, or all of fewer; enough to measure contrast."""
    n = max(1, images.shape[-1] // 32)
    return images[..., ::n, ::n]


def contrast_of_data_set(images):
    """Return the contrast of the first 1,024 of a PreparedImages, in a fixed random order."""
    batches = itertools.islice(images.batches(BATCH, seed=0, epoch=0), REAL_IMAGES // BATCH)
    bar = tqdm(batches, desc="contrast of training images", leave=False, disable=None)
    return contrast(torch.cat([subsample(batch) for batch in bar]).float() / 127.5 - 1).item()


@torch.no_grad()
def find_contrast_factor(netG, z, wanted):
    """Return (the factor with which `with_contrast_factor` gives G(z) the contrast `wanted`, the contrast of G(z) now).

    z: (N, nz). The factor is at least 1 and at most LARGEST_FACTOR: contrast is raised, never lowered.
    """
    netG = copy.deepcopy(netG).eval()
    batches = z[:, :, None, None].split(max(1, (512 // netG.image_size) ** 2))  # 64 at 64 x 64, fewer of larger images
    before_tanh = torch.cat([subsample(netG.main[:-1](batch)) for batch in batches])
    now = contrast(before_tanh.tanh()).item()
    low, high = 1.0, LARGEST_FACTOR if now < wanted else 1.0
    for _ in range(BISECTIONS if high > low else 0):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if contrast((before_tanh * middle).tanh()) < wanted else (low, middle)
    return (low * high) ** 0.5, now


@torch.no_grad()
def with_contrast_factor(netG, factor):
    """Return a copy of a generator with its values before the last tanh multiplied by `factor`."""
    netG = copy.deepcopy(netG)
    netG.main[-2].weight.mul_(factor)
    return netG
