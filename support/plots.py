"""Image files that show a run: grids of images, plots of the log, and an animation of the grids."""

import re

import numpy as np
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from support.files import write_atomically

GAP = 2  # pixels between the images of a grid
MAX_FRAMES = 60  # of the animation
CURVES = (  # subplot, column of the log, colour, legend
    (0, "loss_D", "tab:orange", "loss of D"),
    (0, "loss_D_real", "tab:olive", "loss of D on real images"),
    (0, "loss_D_fake", "tab:pink", "loss of D on generated images"),
    (0, "loss_G", "tab:blue", "loss of G"),
    (1, "D_x", "tab:green", "D(x)"),
    (1, "D_G_z1", "tab:red", "D(G(z)) before D's update"),
    (1, "D_G_z2", "tab:purple", "D(G(z)) after D's update"),
)
MEASURED_CURVES = (  # of what is measured at saves: column of the log, colour, label
    ("fid", "tab:brown", "FID"),
    ("contrast", "tab:gray", "contrast of G as trained\n/ of training images"),
)


def to_pil(image):
    """Return a PIL image of an image, uint8 (nc, s, s) with nc 1 or 3, on any device."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).cpu().numpy())


def write_png(path, image, weights_hash=None):
    """Write an image, uint8 (nc, s, s), as a PNG file; weights_hash: see samples.py, stored in the file as a text."""
    info = PngInfo()
    if weights_hash:
        info.add_text("weights", weights_hash)
    # Compression level 4 makes files as small as the usual 6, in two thirds of the time.
    options = {"compress_level": 4, "pnginfo": info}
    write_atomically(path, lambda file: to_pil(image).save(file, "png", **options), sync=False)


def make_grid(images, columns, gap=0):
    """Return images, (N, nc, s, s), in rows of `columns` as one (nc, height, width), `gap` black pixels around each.

    torchvision has such a function, but importing it takes nearly as long as importing torch.
    """
    rows = -(-len(images) // columns)
    cells = F.pad(images, (gap, 0, gap, 0, 0, 0, 0, rows * columns - len(images)))
    _, nc, height, width = cells.shape
    lines = cells.view(rows, columns, nc, height, width).permute(2, 0, 3, 1, 4)
    return F.pad(lines.reshape(nc, rows * height, columns * width), (0, gap, 0, gap))


def save_grid(path, images, columns=None, weights_hash=None):
    """Write images, uint8 (N, nc, s, s), as one PNG file; columns: images in a row (default: as many as rows)."""
    write_png(path, make_grid(images, columns or max(1, int(len(images) ** 0.5)), GAP), weights_hash)


def grid_name(epoch):
    return f"fake_samples_epoch_{epoch:03d}.png"


def saved_grids(folder):
    """Return the epochs whose grids of samples are in the folder, in order."""
    pattern = r"fake_samples_epoch_(\d{3}|[1-9]\d{3,})\.png"
    return sorted(int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name)))


def images_per_grid(image_size):
    """Return how many images a grid shows: 64, or fewer of large ones (at least 4) to stay about 1,000 pixels wide."""
    return max(4, min(64, (1024 // image_size) ** 2))


def plot_losses(path, rows, steps_per_epoch):
    """Plot the losses, D(x), D(G(z)) and what was measured at saves, from a log's `rows`, as a PNG file."""
    # Not pyplot: it would load the backend that the environment names, which may be missing.
    from matplotlib.figure import Figure

    measured = [entry for entry in MEASURED_CURVES if any(entry[0] in row for row in rows)]
    figure = Figure(figsize=(12, 7 + 2.5 * len(measured)), layout="constrained")
    axes = figure.subplots(2 + len(measured), sharex=True)
    for axis, (column, colour, label) in zip(axes[2:], measured, strict=True):
        epochs, values = zip(
            *((row["step"] / steps_per_epoch, row[column]) for row in rows if column in row), strict=True
        )
        axis.plot(epochs, values, color=colour, marker=".", label=label.replace("\n", " "))
        axis.set(ylabel=label, ylim=(0, 1.25 * max(1, *values)))
    for i, column, colour, label in CURVES:
        draw_curve(axes[i], [row for row in rows if column in row], column, steps_per_epoch, color=colour, label=label)
    axes[0].set(ylabel="binary cross-entropy (nats)", ylim=(0, None))
    axes[1].set(ylabel="mean probability of being real", ylim=(0, 1))
    axes[-1].set(xlabel="epochs")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    write_atomically(path, lambda file: figure.savefig(file, format="png"), sync=False)


def draw_curve(axis, rows, column, steps_per_epoch, **style):
    """Draw a column of the log, pale, and its mean over a fiftieth of the rows, strong."""
    if not rows:  # old logs have fewer columns
        return
    epochs, values = (np.array([row[name] for row in rows]) for name in ("step", column))
    window = max(1, len(rows) // 50)
    axis.plot(epochs / steps_per_epoch, values, color=style["color"], alpha=0.25, linewidth=0.8)
    smooth = np.convolve(values, np.ones(window) / window, "valid")
    axis.plot(epochs[window - 1 :] / steps_per_epoch, smooth, marker="o" if len(rows) == 1 else None, **style)


def animate(path, image_size):
    """Write a GIF of the grids of samples in the same folder: at most MAX_FRAMES, the last for two seconds.

    Of images larger than 32 x 32, it shows only the top left of the grids, at least 2 x 2 images: at most 270 pixels
    a side, or more above 128 x 128.
    """
    paths = [path.with_name(grid_name(epoch)) for epoch in saved_grids(path.parent)]
    if not paths:
        return
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, MAX_FRAMES).round().astype(int))]
    side = GAP + max(2, 272 // (image_size + GAP)) * (image_size + GAP)  # whole images
    frames = []
    for chosen_path in chosen:
        with Image.open(chosen_path, formats=["PNG"]) as grid:
            frames.append(grid.crop((0, 0, min(side, grid.width), min(side, grid.height))).quantize(128))
    durations = [150] * (len(frames) - 1) + [2000]
    options = {"format": "gif", "save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    write_atomically(path, lambda file: frames[0].save(file, **options), sync=False)
