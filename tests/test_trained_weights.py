"""The trained weights that come with the program generate the images that they should."""

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from models import generate_images, latents, load_generator

SIZES = {"faces": 64, "faces128": 128, "cartoon": 64}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_weights_generate_the_stored_images(name, size):
    """Seeds 0 and 1, beside each other; at most 2 of 255 levels apart, because processors differ in the last bits."""
    netG = load_generator(ROOT / "media" / f"{name}.pth")
    assert netG.image_size == size
    assert all(weight.dtype == torch.float32 for weight in netG.parameters())
    ours = generate_images(netG, latents([0, 1], netG.nz)).permute(2, 0, 3, 1).flatten(1, 2)  # (N, 3, s, s) to a row
    with Image.open(ROOT / "tests" / "expected" / f"{name}.png") as image:
        expected = np.asarray(image)
    assert expected.std() > 40  # not an empty image
    assert np.abs(ours.numpy().astype(int) - expected).max() <= 2


def test_weights_are_small_half_precision_and_nothing_else():
    paths = list((ROOT / "media").glob("*.pth"))
    assert {path.stem for path in paths} == set(SIZES)
    for path in paths:
        assert path.stat().st_size <= 8_000_000
        state = torch.load(path, weights_only=True)
        assert {t.dtype for t in state.values()} == {torch.float16, torch.int64}
