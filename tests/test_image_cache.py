"""The cache of prepared images: decoded once, made anew when something has changed, complete or absent."""

import multiprocessing
import os
import sys
import time

import numpy as np
import pytest
from helpers import (
    assert_cannot_load,
    assert_same,
    contents,
    epoch_of,
    expected_contents,
    fork,
    noise,
    torchvision_pixels,
    write_images,
)
from PIL import Image

import data
from data import ReadSettings, load_images

pytestmark = pytest.mark.usefixtures("isolated")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# What is in it


def test_the_cache_is_a_plain_array_mapped_from_disk(tmp_path):
    paths = write_images(tmp_path / "in", *(f"{i}.png" for i in "271936485"))
    images = load_images("folder", tmp_path / "in", 16, cache=tmp_path / "here")
    rows = np.load(next((tmp_path / "here").glob("*.npy")))
    # In the order of the names: that of a folder's listing differs from one machine to the next.
    assert np.array_equal(rows, np.stack([torchvision_pixels(Image.open(path), 16) for path in sorted(paths)]))
    assert isinstance(images.array, np.memmap)


def test_a_second_load_decodes_nothing(tmp_path):
    paths = write_images(tmp_path / "in", "a.png", "b.png", "c.png")
    first = epoch_of(load_images("folder", tmp_path / "in", 16))
    for path in paths:  # decoding one of them now would fail
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = load_images("folder", tmp_path / "in", 16)
    assert_same(epoch_of(again), first)
    assert again.skipped == []


# When it is made anew


def test_images_that_changed_are_prepared_anew(tmp_path, monkeypatch, capsys):
    root = tmp_path / "in"
    paths = write_images(root, "a.png", "b.png")
    load_images("folder", root, 16)
    status = paths[0].stat()
    noise(seed=99).save(paths[0])
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert contents(load_images("folder", root, 16)) == expected_contents(paths)
    paths += write_images(root, "c.png")
    assert contents(load_images("folder", root, 16)) == expected_contents(paths)
    paths.pop(1).unlink()
    assert contents(load_images("folder", root, 16)) == expected_contents(paths)
    assert contents(load_images("folder", root, 20)) == expected_contents(paths, 20)
    assert contents(load_images("folder", root, 16, settings=ReadSettings(nc=1))) == expected_contents(paths, 16, 1)
    capsys.readouterr()
    # As if the program prepared images in another way now.
    monkeypatch.setattr(data, "PREPARATION_VERSION", data.PREPARATION_VERSION + 1)
    load_images("folder", root, 16)
    assert "preparing 2 images, once" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [None, 0, 50, -1])
def test_a_damaged_cache_is_made_again(keep, tmp_path):
    write_images(tmp_path / "in", "a.png", "b.png", "c.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    first = load_images("folder", tmp_path / "in", 16)
    batches, files = epoch_of(first), files_in(tmp_path / "cache")
    assert len(first.skipped) == 1
    for path in files:
        content = path.read_bytes()
        path.unlink()  # truncated in place, it would take the first array's memory away
        path.write_bytes(content[:keep]) if keep is not None else None
        again = load_images("folder", tmp_path / "in", 16)
        assert_same(epoch_of(again), batches)
        assert again.skipped == first.skipped


# Several processes


@needs_linux
def test_images_are_prepared_once_by_processes_that_start_together(tmp_path, capfd):
    paths = write_images(tmp_path / "in", *(f"{i:03d}.png" for i in range(200)))
    together = multiprocessing.get_context("fork").Barrier(3)

    def load():
        together.wait()
        assert contents(load_images("folder", tmp_path / "in", 16)) == expected_contents(paths)

    processes = [fork(load) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert capfd.readouterr().out.count("preparing 200 images") == 1
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


@needs_linux
def test_a_killed_preparation_leaves_nothing_for_long(tmp_path):
    paths = write_images(tmp_path / "in", *(f"{i:03d}.png" for i in range(400)))
    process = fork(load_images, "folder", tmp_path / "in", 16)
    while not list((tmp_path / "cache").rglob(".*.part")):
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert 1 <= len(list((tmp_path / "cache").rglob(".*.part"))) <= 2
    assert list((tmp_path / "cache").rglob("*.npy")) == []
    assert contents(load_images("folder", tmp_path / "in", 16)) == expected_contents(paths)
    assert list((tmp_path / "cache").rglob(".*.part")) == []


# Where it cannot be written


def test_a_cache_that_cannot_be_written_names_the_option(tmp_path):
    (tmp_path / "file").touch()
    write_images(tmp_path, "in/a.png")
    options = {"dataset": "folder", "dataroot": tmp_path / "in", "cache": tmp_path / "file"}
    assert_cannot_load("--cache", tmp_path / "file", **options)
