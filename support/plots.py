"""Grids of pictures."""

from PIL import Image
from torchvision.utils import make_grid

from support.files import write_whole

MOST_FRAMES = 60  # of the animation


def save_grid(path, pictures, across=None):
    """Write pictures, uint8 (N, nc, s, s), as one PNG, `across` in a row [about as many across as down: 8 for 64]."""
    grid = make_grid(pictures, nrow=across or max(1, int(len(pictures) ** 0.5)))
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    write_whole(path, lambda file: image.save(file, "png"))


def grid_size(image_size):
    """Return how many pictures a grid shows: 64, or fewer of large ones, so that it stays about 1,000 pixels wide."""
    return max(4, min(64, (1024 // image_size) ** 2))
