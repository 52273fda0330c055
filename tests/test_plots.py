"""What shows a run: grids of images, the curves of the log, and the animation."""

import sys

import matplotlib.figure
import numpy as np
import pytest
import torch
from helpers import SIZE, random_batches, tile
from PIL import Image, ImageSequence

from support.plots import CURVES, MAX_FRAMES, animate, images_per_grid, plot_losses, save_grid

PARTS = ("loss_D_real", "loss_D_fake")  # columns that logs of earlier versions do not have


# Grids


@pytest.mark.parametrize(
    ("count", "columns", "rows_and_columns"),
    [(64, None, (8, 8)), (16, None, (4, 4)), (5, None, (3, 2)), (1, None, (1, 1)), (6, 3, (2, 3)), (7, 3, (3, 3))],
)
def test_a_grid_holds_every_image_in_order(tmp_path, count, columns, rows_and_columns):
    (images,) = random_batches(1, count)
    save_grid(tmp_path / "grid.png", images, columns)
    grid, (rows, across) = Image.open(tmp_path / "grid.png"), rows_and_columns
    assert grid.size == (2 + across * (SIZE + 2), 2 + rows * (SIZE + 2))
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        assert np.array_equal(tile(grid, *divmod(i, across)), image)


def test_a_grid_of_grey_images(tmp_path):
    (images,) = random_batches(1, 4)
    save_grid(tmp_path / "grid.png", images[:, :1])
    shown = tile(Image.open(tmp_path / "grid.png").convert("L"), 1, 0)
    assert np.array_equal(shown, images[2, 0].numpy())


def test_a_grid_stays_about_a_thousand_pixels_wide():
    counts = {size: images_per_grid(size) for size in (16, 64, 128, 160, 256, 512, 1024)}
    assert counts == {16: 64, 64: 64, 128: 64, 160: 36, 256: 16, 512: 4, 1024: 4}


# Curves


def row_of(step, columns, fid=None):
    """Return a row of a log in which every column has other values."""
    values = {column: 0.01 * (i + 1) + step / 10_000 for i, column in enumerate(columns)}
    return {"step": step} | values | ({} if fid is None else {"fid": fid})


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in a list."""
    drawn = []

    class Figure(matplotlib.figure.Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            drawn.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Figure)
    return drawn


def curves_of(figure):
    """Return {label: (subplot, x, y)} of the curves in the legends, and a list of the others, which are pale."""
    labelled, pale = {}, []
    for i, axis in enumerate(figure.axes):
        for line in axis.lines:
            curve = (i, *map(np.asarray, line.get_data()))
            if line.get_label().startswith("_"):
                pale.append(curve)
            else:
                labelled[line.get_label()] = curve
        shown = [text.get_text() for text in axis.get_legend().get_texts()]
        assert shown == [label for label, (place, *_) in labelled.items() if place == i]
    return labelled, pale


def columns_without(*left_out):
    return [column for _, column, *_ in CURVES if column not in left_out]


def test_curves_show_every_column_of_the_log_over_the_epochs(tmp_path, figures):
    assert {"loss_D", "loss_G", "D_x", "D_G_z1", "D_G_z2", *PARTS} == set(columns_without())
    rows = [row_of(step, columns_without()) for step in range(10, 1001, 10)]
    plot_losses(tmp_path / "losses.png", rows, 200)
    labelled, pale = curves_of(figures[0])
    assert (len(figures[0].axes), len(labelled), len(pale)) == (2, len(CURVES), len(CURVES))
    epochs = np.arange(10, 1001, 10) / 200
    for (subplot, column, _, label), (pale_subplot, x, y) in zip(CURVES, pale, strict=True):
        values = np.array([row[column] for row in rows])
        assert pale_subplot == labelled[label][0] == subplot
        assert np.array_equal(x, epochs)
        assert np.array_equal(y, values)
        _, x, y = labelled[label]  # a mean over two rows, a fiftieth of them
        assert np.array_equal(x, epochs[1:])
        np.testing.assert_allclose(y, (values[1:] + values[:-1]) / 2)
    assert {column[:4] == "loss" for subplot, column, *_ in CURVES if subplot == 0} == {True}
    assert [axis.get_ylim()[0] for axis in figures[0].axes] == [0, 0]
    Image.open(tmp_path / "losses.png").load()


def test_fids_get_a_subplot_of_their_own(tmp_path, figures):
    distances = {200: 90.0, 400: 40.0, 600: 50.0}
    rows = [row_of(step, columns_without(), distances.get(step)) for step in range(50, 601, 50)]
    plot_losses(tmp_path / "losses.png", rows, 200)
    labelled, _ = curves_of(figures[0])
    assert len(figures[0].axes) == 3
    ((subplot, x, y),) = [curve for label, curve in labelled.items() if "FID" in label]
    assert (subplot, x.tolist(), y.tolist()) == (2, [1.0, 2.0, 3.0], [90.0, 40.0, 50.0])
    assert figures[0].axes[2].get_ylim()[0] == 0


def test_contrasts_get_a_subplot_of_their_own(tmp_path, figures):
    rows = [row_of(step, columns_without(), 90.0 if step == 200 else None) for step in (100, 200, 300)]
    rows[1]["contrast"], rows[2]["contrast"] = 1.5, 0.75
    plot_losses(tmp_path / "losses.png", rows, 200)
    labelled, _ = curves_of(figures[0])
    assert len(figures[0].axes) == 4
    ((subplot, x, y),) = [curve for label, curve in labelled.items() if "contrast" in label]
    assert (subplot, x.tolist(), y.tolist()) == (3, [1.0, 1.5], [1.5, 0.75])
    assert figures[0].axes[3].get_ylim()[0] == 0


@pytest.mark.parametrize("new_rows", [0, 4])
def test_logs_of_earlier_versions_are_drawn_without_the_columns_they_lack(tmp_path, figures, new_rows):
    """The same for a run that an earlier version began: the curve begins where the column does."""
    rows = [row_of(step, columns_without(*PARTS)) for step in range(10, 101, 10)]
    rows += [row_of(step, columns_without()) for step in range(110, 110 + 10 * new_rows, 10)]
    plot_losses(tmp_path / "losses.png", rows, 100)
    labelled, _ = curves_of(figures[0])
    labels = {column: label for _, column, _, label in CURVES}
    for column in columns_without(*PARTS):
        assert len(labelled[labels[column]][1]) == 10 + new_rows
    for column in PARTS:
        if new_rows:
            assert labelled[labels[column]][1].tolist() == [1.1, 1.2, 1.3, 1.4]
        else:
            assert labels[column] not in labelled
    Image.open(tmp_path / "losses.png").load()


def test_a_single_row_is_drawn_as_points(tmp_path, figures):
    plot_losses(tmp_path / "losses.png", [row_of(10, columns_without())], 100)
    lines = [line for axis in figures[0].axes for line in axis.lines if not line.get_label().startswith("_")]
    assert [line.get_marker() for line in lines] == ["o"] * len(CURVES)


def test_curves_are_drawn_without_pyplot(tmp_path, monkeypatch):
    """It would load the backend that the environment names, which may be missing."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    plot_losses(tmp_path / "losses.png", [row_of(10, columns_without())], 100)
    assert (tmp_path / "losses.png").exists()


# The animation


def write_grids(folder, epochs, image_size=SIZE, count=64):
    """Write a grid of one colour for each epoch, of an index that grows with the epoch; return the colours."""
    colors = []
    for i, epoch in enumerate(epochs):
        colors.append((3 * i, 255 - 3 * i, 7 * i % 256))
        images = torch.tensor(colors[-1], dtype=torch.uint8).reshape(1, 3, 1, 1)
        images = images.expand(count, 3, image_size, image_size)
        save_grid(folder / f"fake_samples_epoch_{epoch:03d}.png", images)
    return colors


def frames_of(path):
    """Return [(colour of an image, duration in ms)] of the frames of an animation of `write_grids`, and its size."""
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0
        frames = [
            (frame.convert("RGB").getpixel((9, 9)), frame.info["duration"])
            for frame in ImageSequence.Iterator(animation)
        ]
        return frames, animation.size


def test_the_animation_shows_every_epoch_in_order(tmp_path):
    colors = write_grids(tmp_path, [0, 1, 9, 10, 99, 100, 999, 1000])
    animate(tmp_path / "progress.gif", SIZE)
    frames, size = frames_of(tmp_path / "progress.gif")
    assert size == (146, 146)  # whole grids, 8 x 8 images with borders of 2 pixels
    assert frames == [*((color, 150) for color in colors[:-1]), (colors[-1], 2000)]


def test_a_long_run_has_frames_of_some_epochs_with_the_first_and_the_last(tmp_path):
    colors = write_grids(tmp_path, range(80), count=4)
    animate(tmp_path / "progress.gif", SIZE)
    frames, _ = frames_of(tmp_path / "progress.gif")
    places = [colors.index(color) for color, _ in frames]
    assert len(places) == MAX_FRAMES
    assert (places[0], places[-1]) == (0, 79)
    assert set(np.diff(places)) <= {1, 2}


@pytest.mark.parametrize(
    ("image_size", "count", "side"), [(64, 64, 4 * 66 + 2), (128, 64, 2 * 130 + 2), (256, 16, 2 * 258 + 2)]
)
def test_the_animation_of_large_images_shows_some_of_them_whole(tmp_path, image_size, count, side):
    write_grids(tmp_path, [0, 1], image_size, count)
    animate(tmp_path / "progress.gif", image_size)
    frames, size = frames_of(tmp_path / "progress.gif")
    assert (len(frames), size) == (2, (side, side))


def test_the_animation_passes_over_files_of_other_names(tmp_path):
    write_grids(tmp_path, [0])
    for name in ("x", "01", "0001", "000 copy"):
        (tmp_path / f"fake_samples_epoch_{name}.png").write_bytes(b"no image")
    animate(tmp_path / "progress.gif", SIZE)
    assert len(frames_of(tmp_path / "progress.gif")[0]) == 1


def test_without_samples_there_is_no_animation(tmp_path):
    animate(tmp_path / "progress.gif", SIZE)
    assert list(tmp_path.iterdir()) == []
