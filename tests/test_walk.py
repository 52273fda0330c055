"""Walks through latent space: their end points are the images of their seeds, bit for bit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SIZE, assert_refused, image_of, randomised, run_generate, tile
from PIL import Image, ImageSequence

from models import Generator
from support.latents import latents
from support.walk import STEPS, slerp, write_walk


def test_a_walk_passes_through_the_images_of_its_seeds(weights_file):
    folder = run_generate(weights_file, "--interpolate", 3, "--manualSeed", 5)
    assert sorted(path.name for path in folder.iterdir()) == ["walk.gif", "walk.png"]
    grid = Image.open(folder / "walk.png")
    assert grid.size == (2 + STEPS // 2 * (SIZE + 2), 2 + 3 * (SIZE + 2))
    for row in range(3):
        assert np.array_equal(tile(grid, row, 0), image_of(weights_file, 5 + row))
    steps = [np.abs(tile(grid, 0, i).astype(int) - tile(grid, 0, i + 1)).mean() for i in range(STEPS // 2 - 1)]
    assert 0 < max(steps) < 3 * min(steps)  # all steps are about as long
    with Image.open(folder / "walk.gif") as animation:
        assert animation.info["loop"] == 0
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == 3 * STEPS
    starts = [tile(grid, row, 0).astype(int) for row in range(3)]
    for row in range(3):
        distances = [np.abs(tile(grid, row, STEPS // 2 - 1) - start).mean() for start in starts]
        assert np.argmin(distances) == (row + 1) % 3  # each row leads to the next, the last to the first
        for i in range(STEPS // 2):
            assert np.abs(frames[row * STEPS + 2 * i] - tile(grid, row, i)).mean() < 2  # a palette of 256 colours


def test_great_circles_against_their_closed_form():
    a, b = torch.zeros(5), torch.zeros(5)
    a[0], b[1] = 2.0, 2.0
    points = slerp(a, b, [0.0, 0.25, 0.5, 1.0])
    angles = torch.tensor([0.0, 0.25, 0.5, 1.0]) * torch.pi / 2
    torch.testing.assert_close(points[:, 0], 2 * angles.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(points[:, 1], 2 * angles.sin(), atol=1e-6, rtol=0)


def test_every_row_of_a_walk_starts_at_the_latent_vector_of_its_seed(tmp_path):
    """Bit for bit, which the point of the great circle at 0 need not be."""
    walks = []

    def generate(netG, z):
        walks.append(z)
        return torch.zeros(len(z), 3, SIZE, SIZE, dtype=torch.uint8)

    assert write_walk(SimpleNamespace(nz=100, nc=3), generate, 20, 7, tmp_path) == ["walk.png", "walk.gif"]
    ends = latents(range(7, 27), 100)
    assert torch.equal(walks[0][::STEPS], ends)
    torch.testing.assert_close(slerp(ends[0], ends[1], [0.0, 1.0]), ends[:2])


@pytest.mark.parametrize(("nc", "size"), [(1, 16), (3, 20), (1, 128)])
def test_walks_of_grey_images_and_other_sizes(tmp_path, nc, size):
    torch.save(randomised(Generator(4, 4, nc, size)).state_dict(), tmp_path / "netG.pth")
    folder = run_generate(tmp_path / "netG.pth", "--interpolate", 2)
    for name in ("walk.png", "walk.gif"):
        Image.open(folder / name).load()
    with Image.open(folder / "walk.gif") as animation:
        assert (animation.size, animation.n_frames) == ((size, size), 2 * STEPS)


def test_a_latent_space_without_room_for_a_walk_is_refused(tmp_path, capsys):
    torch.save(randomised(Generator(1, 4, 3, 16)).state_dict(), tmp_path / "netG.pth")
    words = "--interpolate needs a generator with latent vectors of length 2 or more"
    assert_refused(lambda: run_generate(tmp_path / "netG.pth", "--interpolate", 2), capsys, words)
    assert not (tmp_path / "generated").exists()
