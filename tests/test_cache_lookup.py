"""support/cache_lookup.py: an array is used for the same contents, wherever and whenever the files were written."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers import (
    FOLDER,
    contents,
    expected_contents,
    noise,
    run_dcgan,
    torchvision_pixels,
    write_images,
    write_lmdb,
)
from PIL import Image
from torchvision import transforms

import data
from data import ReadSettings, load_images

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "in", *(f"{i}.bmp" for i in range(5)), "x/a.jpg")
    (tmp_path / "in" / "damaged.png").write_bytes(b"no image")
    return tmp_path / "in"


def arrays(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.npy"))


def touch(folder):
    for path in folder.rglob("*.*"):
        os.utime(path, (1, 1))


def copy_of(folder, name):
    return shutil.copytree(folder, folder.with_name(name), copy_function=shutil.copyfile)


def cannot_decode(*_):
    raise AssertionError("an image is decoded")


# The same contents


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_was_touched_or_moved_is_not_prepared_again(folder, workers, tmp_path, monkeypatch, capsys):
    first = load_images("folder", folder, 16)
    monkeypatch.setattr("support.decoding.prepare", cannot_decode)
    touch(folder)
    again = load_images("folder", folder, 16, workers=workers)
    assert (again.path, again.skipped) == (first.path, first.skipped)
    copy = copy_of(folder, "copy")
    assert load_images("folder", copy, 16, workers=workers).path == first.path
    moved = folder.rename(tmp_path / "moved")
    assert contents(load_images("folder", moved, 16)) == contents(first)
    assert capsys.readouterr().out.count("preparing") == 1
    assert len(arrays(tmp_path)) == 1


def test_files_are_compared_once(folder, tmp_path, monkeypatch, capsys):
    first = load_images("folder", folder, 16)
    touch(folder)
    load_images("folder", folder, 16)
    assert capsys.readouterr().out.count("comparing 7 images with those prepared before") == 1
    monkeypatch.setattr("support.decoding.load_batches", cannot_decode)
    assert load_images("folder", folder, 16).path == first.path
    assert capsys.readouterr().out == ""


def test_an_array_that_is_gone_is_made_again_where_a_copy_used_it(folder, tmp_path):
    first = load_images("folder", folder, 16)
    touch(folder)
    load_images("folder", folder, 16)
    first.path.unlink()
    again = load_images("folder", folder, 16)
    assert again.path != first.path
    assert contents(again) == contents(first)
    assert load_images("folder", folder, 16).path == again.path


def test_a_cache_that_cannot_be_written_is_read(folder, monkeypatch):
    first = load_images("folder", folder, 16)
    touch(folder)

    def fixed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("support.cache_lookup.write_atomically", fixed)
    assert load_images("folder", folder, 16).path == first.path


def test_lsun_that_was_copied_is_not_prepared_again(tmp_path):
    pytest.importorskip("lmdb")
    write_lmdb(tmp_path / "a" / "bedroom_train_lmdb", [noise(seed=i) for i in range(5)])
    first = load_images("lsun", tmp_path / "a", 16)
    copy_of(tmp_path / "a", "b")
    assert load_images("lsun", tmp_path / "b", 16).path == first.path


# Other contents


def test_other_contents_of_the_same_names_and_sizes_are_prepared(folder, capsys):
    first = load_images("folder", folder, 16)
    noise(seed=9).save(folder / "3.bmp")
    os.utime(folder / "3.bmp", (1, 1))
    second = load_images("folder", folder, 16)
    assert second.path != first.path
    paths = [path for path in folder.rglob("*.*") if path.name != "damaged.png"]
    assert contents(second) == expected_contents(paths)
    said = capsys.readouterr().out
    assert said.count("comparing") == 1
    assert said.count("preparing 7 images") == 2


def test_other_sizes_and_versions_have_their_own_arrays(folder, monkeypatch, tmp_path):
    load_images("folder", folder, 16)
    touch(folder)
    assert load_images("folder", folder, 20).array.shape[2] == 20
    assert load_images("folder", folder, 16, settings=ReadSettings(nc=1)).array.shape[1] == 1
    monkeypatch.setattr(data, "PREPARATION_VERSION", data.PREPARATION_VERSION + 1)
    load_images("folder", folder, 16)
    assert len(arrays(tmp_path)) == 4


def test_arrays_of_no_use_are_named_with_their_size_and_stay(folder, tmp_path, capsys):
    first, other = load_images("folder", folder, 16), load_images("folder", folder, 20)
    elsewhere = copy_of(folder, "elsewhere")
    write_images(elsewhere, "more.png")
    load_images("folder", elsewhere, 16)
    touch(folder)
    assert load_images("folder", folder, 16).path == first.path
    assert load_images("folder", folder, 24).array.shape[2] == 24  # of the same contents: nothing is of no use
    assert "note:" not in capsys.readouterr().out
    before = arrays(tmp_path)
    Image.new("RGB", (999, 999)).save(folder / "new.bmp")
    load_images("folder", folder, 16)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert f"images have changed since these arrays in {first.path.parent} were prepared" in note
    assert f"{first.path.name} (0.0 MB)" in note
    assert f"{other.path.name} (0.0 MB)" in note
    assert note.count("folder-") == 3
    assert set(before) < set(arrays(tmp_path))


# Earlier versions


def test_an_array_of_an_earlier_version_is_used_as_it_is(folder, monkeypatch, capsys):
    """Whose .json file is a list of the images left out, and whose name was found by the same rule."""
    first = load_images("folder", folder, 16)
    first.path.with_suffix(".json").write_text(json.dumps(first.skipped))
    monkeypatch.setattr("support.decoding.prepare", cannot_decode)
    capsys.readouterr()
    again = load_images("folder", folder, 16)
    assert (again.path, again.skipped) == (first.path, first.skipped)
    assert np.array_equal(again.array, first.array)
    assert capsys.readouterr().out == ""


def test_the_names_of_arrays_are_those_of_earlier_versions(tmp_path, monkeypatch):
    write_images(tmp_path / "in", "a.bmp")
    os.utime(tmp_path / "in" / "a.bmp", ns=(5, 5))
    monkeypatch.setattr("support.image_folder.Path.resolve", lambda _: "/in")
    assert load_images("folder", tmp_path / "in", 16).path.name == "folder-16x3-01f65d9e3cc2bb72.npy"


# Cropped images


def test_each_crop_has_its_own_array(folder, tmp_path, monkeypatch):
    whole = load_images("folder", folder, 16)
    assert load_images("folder", folder, 16, settings=ReadSettings(crop=0)).path == whole.path
    touch(folder)  # so that arrays of the same contents are looked for
    paths = [path for path in folder.rglob("*.*") if path.name != "damaged.png"]
    for crop in (9, 12):
        for _ in range(2):
            images = load_images("folder", folder, 16, settings=ReadSettings(crop=crop))
            squares = [transforms.CenterCrop(crop)(Image.open(path)) for path in paths]
            assert contents(images) == sorted(torchvision_pixels(square, 16).tobytes() for square in squares)
            assert images.path.name.startswith(f"folder-16x3-crop{crop}-")
            assert images.fingerprints == whole.fingerprints
        touch(folder)
    assert load_images("folder", folder, 16).path == whole.path
    assert len(arrays(tmp_path)) == 3


# In a run


def test_a_run_says_where_its_prepared_images_are(folder, tmp_path, capsys):
    options = [*FOLDER, "--dataroot", folder, "--workers", 0, "--dry-run"]
    assert run_dcgan(tmp_path / "out", *options) == 0
    (path,) = arrays(tmp_path)
    assert f"\nprepared images: {path}\n" in capsys.readouterr().out
    assert run_dcgan(tmp_path / "out", *options, "--cache", "none") == 0
    assert "prepared images" not in capsys.readouterr().out
