"""LSUN: read from its databases, several classes together; databases that are missing or damaged."""

import os
import sys
from pathlib import Path

import pytest
from helpers import (
    assert_cannot_load,
    contents,
    fork,
    noise,
    torchvision_pixels,
    write_ghostscript_trap,
    write_lmdb,
)

from data import ReadSettings, load_images

pytest.importorskip("lmdb")
pytestmark = pytest.mark.usefixtures("isolated")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["none", None])
def test_lsun_is_read_from_its_databases(cache, workers, tmp_path):
    root, rooms = tmp_path / "in", [noise(20, 17, seed=i) for i in range(9)]
    write_lmdb(root / "bedroom_train_lmdb", rooms[:6])
    write_lmdb(root / "church_outdoor_train_lmdb", rooms[6:])
    wanted = [torchvision_pixels(image, 16).tobytes() for image in rooms]
    options = {"image_size": 16, "cache": cache, "workers": workers}
    both = load_images("lsun", root, settings=ReadSettings(classes="bedroom,church_outdoor_train"), **options)
    assert contents(both) == sorted(wanted)
    assert contents(load_images("lsun", root, **options)) == sorted(wanted[:6])  # one of them is in use already
    assert contents(load_images("lsun", root / "church_outdoor_train_lmdb", **options)) == sorted(wanted[6:])
    assert contents(both) == sorted(wanted)
    assert list(Path().iterdir()) == []
    assert [path.name for path in root.rglob("*.*")] == ["data.mdb"] * 2


@needs_linux
def test_no_image_of_a_database_is_handed_to_ghostscript(tmp_path, monkeypatch):
    marker, eps = write_ghostscript_trap(tmp_path, monkeypatch)
    rooms = [noise(seed=i) for i in range(3)]
    write_lmdb(tmp_path / "bedroom_train_lmdb", [*rooms, eps])
    for cache in ("none", None):
        images = load_images("lsun", tmp_path, 16, cache=cache)
        assert sorted(set(contents(images))) == sorted(torchvision_pixels(room, 16).tobytes() for room in rooms)
        assert [report.endswith(" (cannot identify image file)") for report in images.skipped] == [True]
        assert not marker.exists()


# What is refused


def test_lsun_names_the_classes_that_are_there(tmp_path):
    write_lmdb(tmp_path / "in" / "bridge_train_lmdb", [noise()])
    there = ["bedroom_train_lmdb", tmp_path / "in", "bridge"]
    assert_cannot_load(
        *there, dataset="lsun", dataroot=tmp_path / "in", settings=ReadSettings(classes="bridge,bedroom")
    )


@pytest.mark.parametrize("content", [None, b"<html>", b""])
def test_a_database_without_images_is_refused(content, tmp_path):
    folder = tmp_path / "bedroom_train_lmdb"
    write_lmdb(folder, [])  # a run on it would train nothing, without a word
    if content is not None:
        (folder / "data.mdb").write_bytes(content)
    assert_cannot_load(folder, dataset="lsun", dataroot=tmp_path)


@needs_linux
def test_half_a_database_is_refused(tmp_path):
    folder = tmp_path / "bedroom_train_lmdb"
    write_lmdb(folder, [noise(64, 64, seed=i) for i in range(20)])
    os.truncate(folder / "data.mdb", (folder / "data.mdb").stat().st_size // 2)
    # In a process of its own: reading memory beyond the end of the file would end it (SIGBUS).
    process = fork(assert_cannot_load, folder, dataset="lsun", dataroot=tmp_path)
    process.join()
    assert process.exitcode == 0


def test_without_lmdb_it_says_what_to_install(tmp_path, monkeypatch):
    write_lmdb(tmp_path / "bedroom_train_lmdb", [noise()])
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert_cannot_load("pip install lmdb", dataset="lsun", dataroot=tmp_path)
