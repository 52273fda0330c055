"""CelebA: found in every layout, unpacked once and completely, downloaded if it is not there."""

import io
import multiprocessing
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import assert_cannot_load, contents, expected_contents, fork, write_images
from torchvision import datasets

from data import load_images

pytestmark = pytest.mark.usefixtures("isolated")


def write_archive(path, images, inside=""):
    """Write image files as a zip archive, under their own names in the folder `inside`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for image in images:
            archive.write(image, inside + image.name)


@pytest.mark.parametrize("place", ["celeba/img_align_celeba", "img_align_celeba", "."])
@pytest.mark.parametrize("doubled", ["", "img_align_celeba"])
@pytest.mark.parametrize("dataroot", ["in", None])
def test_celeba_is_found_in_every_layout(dataroot, place, doubled):
    paths = write_images(Path(dataroot or "data") / place / doubled, "000001.jpg", "000002.jpg", "000003.jpg")
    assert contents(load_images("celeba", dataroot, 16)) == expected_contents(paths)


@pytest.mark.parametrize("inside", ["img_align_celeba/", ""])
@pytest.mark.parametrize("place", ["celeba", "."])
def test_celeba_is_unpacked_once(place, inside, tmp_path):
    paths = write_images(tmp_path / "loose", "000001.jpg", "000002.jpg")
    archive = tmp_path / "in" / place / "img_align_celeba.zip"
    write_archive(archive, paths, inside)
    assert contents(load_images("celeba", tmp_path / "in", 16)) == expected_contents(paths)
    archive.write_bytes(b"gone")
    assert contents(load_images("celeba", tmp_path / "in", 20)) == expected_contents(paths, 20)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_processes_that_start_together_unpack_it_once(tmp_path):
    paths = write_images(tmp_path / "loose", *(f"{i:06d}.jpg" for i in range(300)))
    write_archive(tmp_path / "in" / "img_align_celeba.zip", paths)
    together, expected = multiprocessing.get_context("fork").Barrier(3), expected_contents(paths)

    def load():
        together.wait()
        assert contents(load_images("celeba", tmp_path / "in", 16, cache="none")) == expected

    processes = [fork(load) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_no_name_in_an_archive_leads_out_of_its_folder(tmp_path):
    (path,) = write_images(tmp_path, "1.jpg")
    root = tmp_path / "deep" / "er" / "in"
    root.mkdir(parents=True)
    hostile = ["../../evil1.jpg", f"{tmp_path}/evil2.jpg", "..\\..\\evil3.jpg", "a/../../../evil4.jpg", "/evil5.jpg"]
    with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
        for name in [*hostile, "../evil.py"]:
            archive.writestr(name, path.read_bytes())
    assert set(contents(load_images("celeba", root, 16, cache="none"))) == set(expected_contents([path]))
    unpacked = root / "img_align_celeba"
    assert {p for p in tmp_path.rglob("*evil*") if p.parent != unpacked} == set()
    assert not Path("/evil5.jpg").exists()
    assert {p.suffix for p in unpacked.iterdir()} == {".jpg"}


@pytest.mark.parametrize("damage", ["cut", "body", "encrypted", "unknown method", "empty", "page", "no images"])
def test_a_damaged_archive_is_refused_and_nothing_is_left(damage, tmp_path):
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.txt" if damage == "no images" else "1.jpg", bytes(range(256)) * 9)
    whole = file.getvalue()
    body, entry = 30 + len("1.jpg"), whole.index(b"PK\1\2")  # the packed file, its entry in the central directory
    content = {
        "cut": whole[:-30],
        "body": whole[:body] + b"\xff" * 40 + whole[body + 40 :],
        "encrypted": whole[: entry + 8] + b"\1" + whole[entry + 9 :],
        "unknown method": whole[: entry + 10] + b"\x63" + whole[entry + 11 :],
        "empty": b"",
        "page": b"<html>Quota exceeded</html>",
        "no images": whole,
    }
    root = tmp_path / "in"
    root.mkdir()
    (root / "img_align_celeba.zip").write_bytes(content[damage])
    assert_cannot_load(root / "img_align_celeba", dataset="celeba", dataroot=root)
    left = {path.name for path in root.rglob("*") if path.is_file()} - {".img_align_celeba.lock"}
    assert left == {"img_align_celeba.zip"}


def test_a_download_that_fails_says_what_to_do(tmp_path):
    steps = ["img_align_celeba.zip", "by hand", "https://", "no network"]
    assert_cannot_load(tmp_path / "in", *steps, dataset="celeba", dataroot=tmp_path / "in")


def test_an_archive_itself_is_no_folder_of_celeba(tmp_path):
    (tmp_path / "img_align_celeba.zip").touch()
    words = "img_align_celeba.zip is a file; name the folder that holds it, or use --dataset folder"
    assert_cannot_load(words, dataset="celeba", dataroot=tmp_path / "img_align_celeba.zip")


def test_celeba_is_downloaded_if_it_is_not_there(tmp_path, monkeypatch):
    place = "celeba/img_align_celeba"  # where torchvision puts it
    monkeypatch.setattr(datasets, "CelebA", lambda root, *_, **__: write_images(Path(root) / place, "1.jpg"))
    images = load_images("celeba", tmp_path / "in", 16)
    assert contents(images) == expected_contents((tmp_path / "in").rglob("*.jpg"))
