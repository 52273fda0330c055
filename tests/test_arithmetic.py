"""Latent vectors added and subtracted: the images drawn, each at its place under its label."""

import argparse

import numpy as np
import pytest
import torch
from helpers import assert_refused, image_of, randomised, run_generate
from PIL import Image

from models import Generator
from support import arithmetic
from support.arithmetic import seed_groups


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in a list."""
    drawn, draw_groups = [], arithmetic.draw_groups

    def draw(*arguments):
        drawn.append(draw_groups(*arguments))
        return drawn[-1]

    monkeypatch.setattr(arithmetic, "draw_groups", draw)
    return drawn


def cells_of(figure):
    """Return {(row, column): (image, an array; label)} of the subplots that show an image."""
    places = {axis.get_subplotspec(): axis for axis in figure.axes}
    cells = {}
    for spec, axis in places.items():
        if axis.images:
            cells[spec.rowspan.start, spec.colspan.start] = (axis.images[0].get_array().data, axis.get_title())
    return cells


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", [(1, [7])]), ("1,5,9-2,4+7,8", [(1, [1, 5, 9]), (-1, [2, 4]), (1, [7, 8])]), ("0+0", [(1, [0]), (1, [0])])],
)
def test_groups_of_seeds(text, expected):
    assert seed_groups(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "must be groups of seeds") for text in ("", "1,", "a", "1--2", "1-2-", "+1", "1.5", "1 - 2")),
        *((text, "must be of seeds below 4294967296") for text in ("4294967296", "1-99999999999999999999999")),
    ],
)
def test_other_groups_are_refused(text, words, weights_file, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        seed_groups(text)
    assert_refused(lambda: run_generate(weights_file, f"--arithmetic={text}"), capsys, words)


def test_a_group_minus_itself_plus_another_is_the_other(weights_file, figures):
    """For a - a + b, the result at the bottom right is the image of b's single seed, as drawn in b's own column."""
    folder = run_generate(weights_file, "--arithmetic", "3,4-3,4+9")
    assert [path.name for path in folder.iterdir()] == ["arithmetic.png"]
    cells = cells_of(figures[0])
    labels = {place: label for place, (_, label) in cells.items()}
    assert labels == {
        (0, 0): "seed 3",
        (0, 1): "seed 3",
        (1, 0): "seed 4",
        (1, 1): "seed 4",
        (1, 2): "seed 9",
        (2, 0): "mean",
        (2, 1): "− mean",
        (2, 2): "+ mean",
        (2, 3): "= result",
    }
    for place, seed in {(0, 0): 3, (0, 1): 3, (1, 0): 4, (1, 1): 4, (1, 2): 9, (2, 2): 9, (2, 3): 9}.items():
        assert np.array_equal(cells[place][0], image_of(weights_file, seed)), place
    assert np.array_equal(cells[2, 0][0], cells[2, 1][0])
    assert not np.array_equal(cells[2, 0][0], cells[2, 2][0])
    with Image.open(folder / "arithmetic.png") as image:
        image.load()
        assert image.size == tuple(round(side * 100) for side in figures[0].get_size_inches())


@pytest.mark.parametrize(("nc", "size"), [(1, 16), (3, 20), (1, 128)])
def test_arithmetic_of_grey_images_and_other_sizes(tmp_path, nc, size, figures):
    torch.save(randomised(Generator(4, 4, nc, size)).state_dict(), tmp_path / "netG.pth")
    folder = run_generate(tmp_path / "netG.pth", "--arithmetic", "1-2")
    Image.open(folder / "arithmetic.png").load()
    shape = (size, size) if nc == 1 else (size, size, 3)
    assert [image.shape for image, _ in cells_of(figures[0]).values()] == [shape] * 5
