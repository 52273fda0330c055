"""Images in NumPy arrays: the same as in files of the same pixels; and arrays that are refused."""

import pickle
import shutil

import numpy as np
import pytest
from helpers import (
    FOLDER,
    assert_cannot_load,
    assert_refused,
    assert_same,
    assert_same_run,
    epoch_of,
    run_dcgan,
)
from PIL import Image

from data import ReadSettings, load_images
from support import numpy_arrays
from support.numpy_arrays import ArraySource

pytestmark = pytest.mark.usefixtures("isolated")
OPTIONS = [*FOLDER, "--workers", 0, "--batchSize", 4, "--manualSeed", 3]


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, array):
    np.save(path, array, allow_pickle=True)
    return path


def rows_of(path, nc=3):
    """Return the prepared images, decoded anew."""
    images = load_images("folder", path, 16, "none", settings=ReadSettings(nc))
    assert len(images) == len(images.array.source)
    return np.stack([images.array[i][0] for i in range(len(images))])


@pytest.fixture
def rows_of_files(tmp_path):
    """A function that returns what the images (N, H, W) or (N, H, W, C) become as PNG files in a folder."""

    def rows(array, nc=3):
        folder = tmp_path / f"files-{array.ndim}"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(array):
            Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(folder / f"{i:03d}.png")
        return rows_of(folder, nc)

    return rows


# The same images as in files


@pytest.mark.parametrize("nc", [1, 3])
@pytest.mark.parametrize("shape", [(9, 20, 24), (9, 20, 24, 1), (9, 24, 20, 3), (9, 20, 20, 4)])
def test_an_array_gives_what_files_of_its_pixels_give(shape, nc, tmp_path, rows_of_files):
    array = pixels(*shape)
    expected = rows_of_files(array, nc)
    assert np.array_equal(rows_of(save(tmp_path / "a.npy", array), nc), expected)
    assert np.array_equal(rows_of(save(tmp_path / "f.npy", np.asfortranarray(array)), nc), expected)
    if len(shape) == 4:
        assert np.array_equal(rows_of(save(tmp_path / "c.npy", array.transpose(0, 3, 1, 2)), nc), expected)


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", "<f8"])
def test_floats_give_what_their_bytes_give(kind, tmp_path):
    array = np.arange(9 * 16 * 16).reshape(9, 16, 16).astype(np.uint8)  # every value
    for i, floats in enumerate((array / 255, array / 127.5 - 1, (array / 127.5 - 1) * (1 + 1e-7))):
        path = save(tmp_path / f"{i}.npy", floats.astype(kind))
        assert np.array_equal(rows_of(path, nc=1), array[:, None])


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_the_only_array_of_images_in_a_file_is_taken(write, tmp_path):
    array = pixels(9, 16, 16, 3)
    write(tmp_path / "a.npz", labels=np.arange(9), x=array, names=np.array(["a", None], dtype=object))
    assert np.array_equal(rows_of(tmp_path / "a.npz"), array.transpose(0, 3, 1, 2))
    write(tmp_path / "b.NPZ.npz", array)
    assert np.array_equal(rows_of(tmp_path / "b.NPZ.npz"), array.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_streamed_and_cached_batches_are_equal_bit_for_bit(kind, workers, tmp_path):
    path = save(tmp_path / "a.npy", pixels(40, 20, 20, 3) / np.float32(255))
    if kind == "npz":
        np.savez(path := tmp_path / "a.npz", np.load(tmp_path / "a.npy"))
    cached, streamed = (load_images("folder", path, 16, cache=cache, workers=workers) for cache in (None, "none"))
    assert_same(epoch_of(streamed, 16), epoch_of(cached, 16))
    assert np.array_equal(cached.array, rows_of(path))


def test_a_file_is_mapped_and_not_read_whole(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2_000_000, 64, 64, 3)}  # 98 GB, nothing but a hole
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 4 * 2_000_000 * 64 * 64 * 3)
    source = ArraySource(tmp_path / "a.npy")
    assert len(source) == 2_000_000
    assert source[1_999_999].getextrema() == ((0, 0),) * 3
    there = pickle.dumps(source)  # for another process
    assert len(there) < 2000
    assert pickle.loads(there)[7].size == (64, 64)


def test_images_with_values_that_are_no_numbers_or_out_of_range_are_skipped(tmp_path):
    array = pixels(300, 16, 16).astype(np.float32) / 255
    array[3, 5, 5], array[7, 0, 0], array[8, 1, 1] = np.nan, np.inf, 1.5  # 8 is not looked at to choose the range
    assert len(array) // numpy_arrays.SAMPLE == 3
    images = load_images("folder", save(tmp_path / "a.npy", array), 16)
    assert len(images) == 297
    assert images.skipped[:2] == [f"image {i} (it holds NaN or infinite values)" for i in (3, 7)]
    assert images.skipped[2].startswith("image 8 (values of 0")
    assert images.skipped[2].endswith(" to 1.5 are not in [0, 1])")


# Arrays that are refused


class Trap:
    def __reduce__(self):
        return (open, ("code-ran", "w"))


def without(values):
    return np.full((9, 16, 16), values, np.float32)


REFUSED = [
    (pixels(16, 16, 3), "may be several grey images, or one image with channels; add an axis, as in (N, H, W, 1)"),
    (pixels(3, 16, 16), "may be several grey images, or one image"),
    (pixels(9, 3, 16, 3), "shape (9, 3, 16, 3) may be (N, H, W, C) or (N, C, H, W); reshape it to"),
    (pixels(9, 16, 16, 2), "shape (9, 16, 16, 2) is not one of images"),
    (pixels(9, 784), "shape (9, 784) is not one of images"),
    (pixels(2, 9, 16, 16, 3), "is not one of images"),
    (pixels(9, 0, 16, 3), "array"),
    (pixels(9, 16, 16).astype(np.int64), "an array of int64 is not read; save uint8 values of 0 to 255, or floats in"),
    (pixels(9, 16, 16) > 9, "an array of bool is not read"),
    (pixels(9, 16, 16).astype(complex), "an array of complex128 is not read"),
    (pixels(9, 16, 16).astype(np.float32), "an array of float32 with values of 0 to 255 is not read; save uint8"),
    (without(-1.01), "values of -1.01 to -1.01 is not read"),
    (without(np.nan), "with no finite values is not read"),
    (np.array([[[Trap()]]], dtype=object), "the array cannot be read (Array can't be memory-mapped: Python objects"),
]


@pytest.mark.parametrize(("array", "words"), REFUSED)
def test_arrays_that_are_not_of_images_are_refused(array, words, tmp_path):
    path = save(tmp_path / "a.npy", array)
    assert_cannot_load(f"--dataroot {path}: ", words, dataset="folder", dataroot=path)
    np.savez(tmp_path / "a.npz", array)
    words = [f"--dataroot {tmp_path / 'a.npz'}"] if array.dtype == object or not array.size else [words]
    assert_cannot_load(*words, dataset="folder", dataroot=tmp_path / "a.npz")
    assert list((tmp_path / "cwd").iterdir()) == []  # no code ran
    assert not (tmp_path / "cache").exists()


def test_several_arrays_of_images_are_refused_with_their_names_and_the_way_out(tmp_path, monkeypatch):
    train, test = pixels(9, 16, 16, seed=1), pixels(5, 16, 16, seed=2)
    np.savez(tmp_path / "digits.npz", x_train=train, x_test=test, y_train=np.arange(9))
    words = "arrays there: x_train (9, 16, 16), x_test (5, 16, 16); save the one to train on with "
    with pytest.raises(ValueError, match="must hold one array of images") as caught:
        load_images("folder", tmp_path / "digits.npz", 16)
    before, advice = str(caught.value).split(words)
    assert before.startswith(f"--dataroot {tmp_path / 'digits.npz'} ")
    monkeypatch.chdir(tmp_path)
    exec(advice, {"numpy": np})
    assert np.array_equal(rows_of(tmp_path / "images.npy", nc=1), train[:, None])
    np.savez(tmp_path / "b.npz", labels=np.arange(9), more=np.arange(9))
    assert_cannot_load("arrays there: labels (9,), more (9,)", dataset="folder", dataroot=tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz")
    assert_cannot_load("c.npz", "arrays there: none", dataset="folder", dataroot=tmp_path / "c.npz")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_damaged_files_are_refused(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    (np.save if kind == "npy" else np.savez_compressed)(path, pixels(9, 16, 16))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (content[:-50], content[:9], b"", b"<!DOCTYPE html>", *([flipped] if kind == "npz" else [])):
        path.write_bytes(damaged)
        words = [f"--dataroot {path}: the array cannot be read (", "; save it again with numpy.save"]
        assert_cannot_load(*words, dataset="folder", dataroot=path)


def test_a_compressed_array_that_takes_too_much_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", np.zeros((9, 300, 300), np.float64))
    monkeypatch.setattr(numpy_arrays, "MAX_NPZ", 2**20)
    assert_cannot_load(
        "a.npz: its array takes more than", "save it as .npy", dataset="folder", dataroot=tmp_path / "a.npz"
    )


# In a run


def test_a_run_resumes_with_the_array_moved_but_not_changed(tmp_path, capsys):
    path = save(tmp_path / "a.npy", pixels(8, 16, 16, 3))
    assert run_dcgan(tmp_path / "out", *OPTIONS, "--dataroot", path, "--niter", 1) == 0
    whole = shutil.copytree(tmp_path / "out", tmp_path / "whole")
    assert run_dcgan(whole, "--resume", "--niter", 2) == 0
    moved = path.rename(tmp_path / "moved.npy")
    run = shutil.copytree(tmp_path / "out", tmp_path / "run")
    capsys.readouterr()
    assert run_dcgan(run, "--resume", "--niter", 2, "--dataroot", moved) == 0
    assert "preparing" not in capsys.readouterr().out
    assert_same_run(run, whole)
    sizes, contents = "the number, names or sizes of the images have changed", "the contents of images have changed"
    for array, words in ((pixels(8, 16, 17, 3), sizes), (pixels(8, 16, 16, 3, seed=1), contents)):
        save(path, array)
        assert_refused(lambda: run_dcgan(tmp_path / "out", "--resume"), capsys, words)
