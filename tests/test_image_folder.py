"""support/image_folder.py: what is taken for an image in a folder, what is passed over, and that a run says so."""

import shutil

import pytest
import torch
from helpers import FOLDER, assert_cannot_load, checkpoint, contents, expected_contents, noise, run_dcgan, write_images

import dcgan
from data import load_images

pytestmark = pytest.mark.usefixtures("isolated")


def write_others(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image that Pillow reads")


def test_what_is_passed_over_is_said_at_each_start(tmp_path, capsys):
    write_images(tmp_path / "in", "a.png", "b.JPG", "x/c.jfif", ".thumbnails/d.png", "x/@eaDir/e.png", "run/f.png")
    write_others(tmp_path / "in", *(f"{i}.heic" for i in range(30)), *(f"x/{i}.MP4" for i in range(4)), ".DS_Store")
    write_others(tmp_path / "in", "run/args.json", "run/log.csv", "run/checkpoint.pth", "LICENSE")
    options = [*FOLDER, "--dataroot", tmp_path / "in", "--workers", 0, "--niter", 1]
    folders = "3 folders: .thumbnails, run, x/@eaDir"
    for more in ([], ["--resume"], ["--resume", "--cache", "none"]):
        assert run_dcgan(tmp_path / "out", *options, *more) == 0
        said = capsys.readouterr().out.replace("\\", "/")
        assert said.count(f"note: passed over 30 .heic, 4 .mp4, 1 without extension, {folders}\n") == 1
        assert "\n3 images; device" in said


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "x/.thumbnails", "@eaDir", "x/y/__MACOSX", ".git/deeper"])
def test_hidden_and_derived_folders_are_passed_over(folder, tmp_path):
    paths = write_images(tmp_path / "in", "a.png", "x/y/b.png")
    write_images(tmp_path / "in" / folder, "a.png")
    images = load_images("folder", tmp_path / "in", 16)
    assert contents(images) == expected_contents(paths)
    hidden = folder.replace("/deeper", "")
    assert [note.replace("\\", "/") for note in images.notes] == [f"passed over 1 folder: {hidden}"]


def test_a_data_set_below_a_hidden_folder_is_read(tmp_path):
    paths = write_images(tmp_path / ".data" / "photos", "a.png")
    assert contents(load_images("folder", tmp_path / ".data" / "photos", 16)) == expected_contents(paths)
    assert contents(load_images("folder", tmp_path / ".data", 16)) == expected_contents(paths)


def test_many_kinds_of_files_take_one_line(tmp_path):
    write_images(tmp_path / "in", "a.png")
    write_others(tmp_path / "in", *(f"{i}.{kind}" for kind in "abcdefgh" for i in range(ord(kind) - 96)))
    (note,) = load_images("folder", tmp_path / "in", 16).notes
    assert note == "passed over 8 .h, 7 .g, 6 .f, 5 .e, 4 .d, 6 others"


def test_a_folder_of_other_files_is_refused_and_says_what_they_are(tmp_path):
    write_others(tmp_path / "in", "a.heic", "b.heic", "c.mov", ".hidden/d.png")
    words = ["*.jpg", "(passed over 2 .heic, 1 .mov, 1 folder: .hidden); convert the .heic files to .jpg first"]
    assert_cannot_load(*words, dataset="folder", dataroot=tmp_path / "in")


@pytest.mark.parametrize("cache", ["none", None])
@pytest.mark.parametrize("kind", ["gif", "apng", "tiff", "webp"])
def test_of_files_with_several_frames_it_says_that_the_first_is_used(kind, cache, tmp_path):
    write_images(tmp_path / "in", *(f"{i:03d}.png" for i in range(300)))  # not in every sample of a hundred files
    frames = [noise(seed=seed) for seed in range(3)]
    frames[0].save(tmp_path / "in" / f"stack.{kind}", save_all=True, append_images=frames[1:])
    for _ in range(2):  # at each start
        notes = load_images("folder", tmp_path / "in", 16, cache=cache).notes
        assert notes == [f"some files hold several frames, such as stack.{kind}: only the first is used"]
    frames[0].save(tmp_path / "in" / f"stack.{kind}")
    assert list(load_images("folder", tmp_path / "in", 16, cache=cache).notes) == []


def test_a_run_that_an_earlier_version_began_keeps_its_images(tmp_path, capsys, monkeypatch):
    """Which took ten kinds of files, and those of hidden folders."""
    write_images(tmp_path / "in", "a.png", "b.jpg", ".hidden/c.png", "d.jfif", "e.tga")
    monkeypatch.setattr(dcgan, "train", lambda *_: 0)
    options = [*FOLDER, "--dataroot", tmp_path / "in", "--workers", 0]
    assert run_dcgan(tmp_path / "new", *options) == 0
    assert checkpoint(tmp_path / "new")["pictures"] == 4
    old = shutil.copytree(tmp_path / "new", tmp_path / "old")
    state = checkpoint(old)
    del state["reading"], state["data"]
    torch.save(state | {"pictures": 3}, old / "checkpoint.pth")
    for cache in ("cache", "none"):
        assert run_dcgan(old, "--resume", "--cache", cache) == 0
        assert "note: passed over 1 .jfif, 1 .tga\n" in capsys.readouterr().out
