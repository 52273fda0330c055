"""Latent vectors added and subtracted, as in figure 7 of the DCGAN paper."""

import argparse
import re

import torch

from support.files import write_atomically
from support.latents import SEED_COUNT, latents
from support.plots import to_pil


def seed_groups(text):
    """Return [(sign, seeds), ...] of an --arithmetic: "1,5-2" is [(1, [1, 5]), (-1, [2])]."""
    if not re.fullmatch(r"\d+(,\d+)*([+-]\d+(,\d+)*)*", text):
        raise argparse.ArgumentTypeError(
            f"must be groups of seeds with + and - between, such as 1,5,9-2,4+7,8, not {text}"
        )
    found = re.findall(r"([+-]?)([\d,]+)", text)
    if any(int(seed) >= SEED_COUNT for seed in re.findall(r"\d+", text)):
        raise argparse.ArgumentTypeError(f"must be of seeds below {SEED_COUNT}, not {text}")
    return [(-1 if sign == "-" else 1, [int(seed) for seed in seeds.split(",")]) for sign, seeds in found]


def write_arithmetic(netG, generate, groups, outf):
    """Draw arithmetic.png: each group of seeds above the image of its mean latent vector, and the sum of the means.

    The paper found that the mean of three is stable where single latent vectors are not. generate: a function of
    (netG, z) that returns uint8 images. Returns a list with the name of the file.
    """
    members = [latents(seeds, netG.nz) for _, seeds in groups]
    means = torch.stack([group.mean(0) for group in members])
    signs = torch.tensor([1.0, *(float(sign) for sign, _ in groups[1:])])
    result = (signs[:, None] * means).sum(0)
    images = list(generate(netG, torch.cat([*members, means, result[None]])))
    columns = [[(images.pop(0), f"seed {seed}") for seed in seeds] for _, seeds in groups]
    labels = ["mean", *("+ mean" if sign > 0 else "− mean" for sign, _ in groups[1:]), "= result"]
    figure = draw_groups(columns, list(zip(images, labels, strict=True)))
    write_atomically(outf / "arithmetic.png", lambda file: figure.savefig(file, format="png"), sync=False)
    return ["arithmetic.png"]


def draw_groups(columns, results):
    """Return a figure of (image, label) pairs: `columns` of them, and the row `results` at the bottom."""
    from matplotlib.figure import Figure

    rows, side = max(map(len, columns)), max(1.5, results[0][0].shape[-1] / 90)  # inches, of 100 pixels each
    figure = Figure(figsize=(side * len(results), (side + 0.3) * (rows + 1)), layout="constrained")
    axes = figure.subplots(rows + 1, len(results), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for column, pairs in enumerate([*columns, []]):
        bottom_up = [results[column], *reversed(pairs)]
        for axis, (image, label) in zip(reversed(axes[:, column]), bottom_up, strict=False):
            axis.imshow(to_pil(image), cmap="gray", vmin=0, vmax=255)
            axis.set_title(label, y=0, pad=-14)
    return figure
