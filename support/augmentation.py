"""Differentiable augmentation (Zhao et al. 2020, arXiv:2006.10738), which makes it harder for D to memorise few images.

D sees each image, real or generated, augmented at random. An augmentation is a function of images, (N, nc, s, s) in
[-1, 1], and of parameters, one row an image. Gradients flow through it to the images, and so to G.
"""

import argparse
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Augmentation:
    """Changes images at random. Each call draws new parameters from `rng`, a generator on the images' device."""

    names: str = "none"  # or names of CHANGES, separated by commas
    rng: torch.Generator | None = None

    def __call__(self, images):
        for name, (draw, change) in CHANGES.items():
            if name in self.names.split(","):
                images = change(images, draw(images, self.rng))
        return images


def draw_color(images, rng):
    u = torch.rand(len(images), 3, device=images.device, generator=rng)
    return torch.stack([u[:, 0] - 0.5, u[:, 1] * 2, u[:, 2] + 0.5], 1)


def change_color(images, amounts):
    """Change brightness, saturation and contrast. amounts: (N, 3), these three; for (0, 1, 1), nothing changes.

    Brightness is added. Saturation multiplies the difference from the pixel's mean, which is 0 with one channel;
    contrast multiplies the difference from the image's mean.
    """
    brightness, saturation, contrast = amounts[:, :, None, None, None].unbind(1)
    grey = images.mean(1, keepdim=True)
    mean = grey.mean((2, 3), keepdim=True)
    # The three, one after another, in a single sum: most of its terms have one channel or one pixel only.
    return contrast * saturation * images + (contrast * (1 - saturation) * grey + (1 - contrast) * mean + brightness)


def draw_translation(images, rng):
    most = images.shape[2] // 8
    return torch.randint(-most, most + 1, (len(images), 2), device=images.device, generator=rng)


def translate(images, shifts):
    """Shift images by whole pixels and fill what is left free with 0. shifts: (N, 2), pixels down and to the right."""
    size = images.shape[2]
    source = torch.arange(size, device=images.device) - shifts[:, :, None]  # (N, 2, s): of each row and column
    rows, columns = ((source >= 0) & (source < size)).unbind(1)
    # Rows and columns that leave come in again on the other side, where they are masked: so each pixel is taken once,
    # and its gradient is no sum, whose order could differ from run to run.
    down, right = source.remainder(size).unbind(1)
    pixels = (down[:, :, None] * size + right[:, None, :]).view(len(images), 1, -1)  # (N, 1, s * s)
    moved = images.flatten(2).gather(2, pixels.expand(-1, images.shape[1], -1)).view_as(images)
    return moved * (rows[:, None, :, None] & columns[:, None, None, :])


def draw_cutout(images, rng):
    size = images.shape[2]
    low, high = -(size // 4), size - size // 4  # its centre is anywhere in the image
    return torch.randint(low, high + 1, (len(images), 2), device=images.device, generator=rng)


def cut_out(images, corners):
    """Set a square of half the side to 0. corners: (N, 2), row and column of its first pixel, which may be outside."""
    size = images.shape[2]
    inside = torch.arange(size, device=images.device) - corners[:, :, None]  # (N, 2, s)
    rows, columns = ((inside >= 0) & (inside < size // 2)).unbind(1)
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


CHANGES = {  # in the order in which they are applied
    "color": (draw_color, change_color),
    "translation": (draw_translation, translate),
    "cutout": (draw_cutout, cut_out),
}


def ordered_names(text):
    """Return the names of an --augment in the order of CHANGES: "cutout,color" is "color,cutout"; "none" stays."""
    names = text.split(",")
    if text != "none" and not CHANGES.keys() >= set(names):
        known = ", ".join(CHANGES)
        raise argparse.ArgumentTypeError(f"must be one or more of {known}, separated by commas, not {text}")
    return ",".join(name for name in CHANGES if name in names) or "none"
