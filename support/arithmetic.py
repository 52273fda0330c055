"""Latents added and subtracted, as in figure 7 of the DCGAN paper."""

import argparse
import re

import torch
from PIL import Image, ImageDraw, ImageFont

from models import pictures
from support.files import write_whole
from support.latents import SEEDS, latents
from support.png import picture_of


def groups(text):
    """Return [(sign, seeds), ...] of an --arithmetic: "1,5-2" is [(1, [1, 5]), (-1, [2])]."""
    if not re.fullmatch(r"\d+(,\d+)*([+-]\d+(,\d+)*)*", text):
        raise argparse.ArgumentTypeError(f"must be groups of seeds with + and - between, as 1,5,9-2,4+7,8, not {text}")
    found = re.findall(r"([+-]?)([\d,]+)", text)
    if any(int(seed) >= SEEDS for seed in re.findall(r"\d+", text)):
        raise argparse.ArgumentTypeError(f"must be of seeds below {SEEDS}, not {text}")
    return [(-1 if sign == "-" else 1, [int(seed) for seed in seeds.split(",")]) for sign, seeds in found]


def arithmetic(netG, terms, outf):
    """Draw the members of each group, above the picture of their mean latent, and the sum of the means at the end.

    As in figure 7 of the DCGAN paper, which found the mean of three to be steady where single ones are not.
    """
    members = [latents(seeds, netG.nz) for _, seeds in terms]
    means = [group.mean(0) for group in members]
    result = means[0]
    for (sign, _), mean in zip(terms[1:], means[1:], strict=True):
        result = result + sign * mean
    made = iter(pictures(netG, torch.cat([*members, torch.stack([*means, result])])))

    side = max(96, netG.image_size)
    gap, line = side * 11 // 24, side * 11 // 48  # pixels: between columns, of a line of text
    font, tallest = ImageFont.load_default(side // 6), max(len(seeds) for _, seeds in terms)
    size = (gap + (len(terms) + 1) * (side + gap), (tallest + 1) * (side + line) + 3 * line)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)

    def put(column, top, picture, text, symbol=""):
        left = gap + column * (side + gap)
        canvas.paste(picture_of(picture).convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (left, top))
        draw.text((left + side / 2, top + side + line / 2), text, "black", font, "mm")
        x, y, reach = left - gap / 2, top + side / 2, side // 14
        for height in {"-": [0], "+": [0], "=": [-0.5, 0.5]}.get(symbol, []):
            draw.line((x - reach, y + height * reach, x + reach, y + height * reach), "black", side // 40)
        if symbol == "+":
            draw.line((x, y - reach, x, y + reach), "black", side // 40)

    for column, (_, seeds) in enumerate(terms):
        for i, seed in enumerate(seeds):  # the last stands just above the mean
            put(column, line // 2 + (tallest - len(seeds) + i) * (side + line), next(made), f"seed {seed}")
    bottom = tallest * (side + line) + 2 * line
    draw.line((gap / 2, bottom - line, size[0] - gap / 2, bottom - line), "gray")
    for column, (sign, _) in enumerate(terms):
        put(column, bottom, next(made), "mean", "" if column == 0 else "+" if sign > 0 else "-")
    put(len(terms), bottom, next(made), "result", "=")
    write_whole(outf / "arithmetic.png", lambda file: canvas.save(file, "png"))
    return "arithmetic.png"
