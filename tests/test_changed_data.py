"""A run that resumes where its images have changed, or from another folder: what is refused, and what goes on."""

import json
import os
import shutil

import pytest
import torch
from helpers import (
    FOLDER,
    assert_refused,
    assert_same_run,
    checkpoint,
    hashes,
    noise,
    run_dcgan,
    write_images,
    write_lmdb,
)

import dcgan

pytestmark = pytest.mark.usefixtures("isolated")
OPTIONS = [*FOLDER, "--workers", 0, "--batchSize", 4, "--manualSeed", 3]


@pytest.fixture
def run(tmp_path):
    """The folder of a run of one epoch over the eight images of the folder `in`."""
    write_images(tmp_path / "in", *(f"{i}.bmp" for i in range(8)))
    assert run_dcgan(tmp_path / "out", *OPTIONS, "--dataroot", tmp_path / "in", "--niter", 1) == 0
    return tmp_path / "out"


def add(folder):
    write_images(folder, "more.bmp")


def remove(folder):
    (folder / "3.bmp").unlink()


def rename(folder):
    (folder / "3.bmp").rename(folder / "33.bmp")


def replace(folder):
    noise(30, 30).save(folder / "3.bmp")


@pytest.mark.parametrize("cache", [[], ["--cache", "none"]])
@pytest.mark.parametrize("change", [add, remove, rename, replace])
def test_other_images_are_refused_and_the_way_out_works(run, tmp_path, capsys, change, cache):
    if cache:
        shutil.rmtree(next(tmp_path.rglob("*.npy")).parent)
    change(tmp_path / "in")
    before = hashes(run)
    resume = ["--resume", "--niter", 2, *cache]
    assert run_dcgan(run, *resume) == 2
    error = capsys.readouterr().err
    assert error == (
        "dcgan.py: --resume: the number, names or sizes of the images have changed; restore them, or start a new run"
        f" from its weights with --netG {run} --netD {run} and another --outf\n"
    )
    assert len(list(tmp_path.rglob("*.npy"))) == (not cache)  # the other images were not prepared
    assert hashes(run) == before
    options = ["--netG", run, "--netD", run, "--dataroot", tmp_path / "in", "--niter", 1]
    assert run_dcgan(tmp_path / "new", *OPTIONS, *options) == 0


def test_other_contents_of_the_same_names_and_sizes_are_refused(run, tmp_path, capsys):
    noise(seed=77).save(tmp_path / "in" / "3.bmp")
    os.utime(tmp_path / "in" / "3.bmp", (1, 1))
    words = "the contents of images have changed; restore them"
    assert_refused(lambda: run_dcgan(run, "--resume"), capsys, words)
    assert run_dcgan(run, "--resume", "--niter", 2, "--cache", "none") == 0  # without an array, they are not compared


def test_images_that_were_moved_or_copied_are_the_same(run, tmp_path):
    whole = shutil.copytree(run, tmp_path / "whole")
    assert run_dcgan(whole, "--resume", "--niter", 2) == 0
    shutil.copytree(tmp_path / "in", tmp_path / "other")  # which does not keep the time of the last change
    shutil.rmtree(tmp_path / "in")
    for path in (tmp_path / "other").iterdir():
        os.utime(path, (1, 1))
    assert run_dcgan(run, "--resume", "--niter", 2, "--dataroot", tmp_path / "other") == 0
    assert_same_run(run, whole)


def test_a_checkpoint_of_an_earlier_version_says_nothing_of_its_images(run, tmp_path):
    state = checkpoint(run)
    del state["data"]
    torch.save(state, run / "checkpoint.pth")
    rename(tmp_path / "in")
    assert run_dcgan(run, "--resume", "--niter", 2) == 0
    assert "data" in checkpoint(run)


def test_images_that_cannot_be_read_count_without_a_cache_alone(run, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    write_images(tmp_path / "broken", "a.png", "b.png", "c.png")
    (tmp_path / "broken" / "d.png").write_bytes(b"no image")
    options = [*OPTIONS, "--dataroot", tmp_path / "broken"]
    assert run_dcgan(tmp_path / "run", *options, "--niter", 1) == 0
    capsys.readouterr()
    words = "now there are 4 that can be read; repeat the run's --cache (--cache none also counts images that cannot"
    assert_refused(lambda: run_dcgan(tmp_path / "run", "--resume", "--cache", "none"), capsys, words)


def test_lsun_is_known_by_the_names_and_sizes_of_its_databases(tmp_path, capsys):
    pytest.importorskip("lmdb")
    write_lmdb(tmp_path / "a" / "bedroom_train_lmdb", [noise(seed=i) for i in range(4)])
    options = [*OPTIONS, "--dataset", "lsun", "--niter", 1]
    assert run_dcgan(tmp_path / "out", *options, "--dataroot", tmp_path / "a") == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert run_dcgan(tmp_path / "out", "--resume", "--dataroot", tmp_path / "b") == 0
    write_lmdb(tmp_path / "c" / "bedroom_train_lmdb", [noise(99, 99, seed=i) for i in range(4)])
    capsys.readouterr()
    resume = ["--resume", "--dataroot", tmp_path / "c"]
    assert_refused(
        lambda: run_dcgan(tmp_path / "out", *resume),
        capsys,
        "the number, names or sizes of the images have changed",
    )


# From another working directory


def test_a_relative_dataroot_and_cache_are_found_from_elsewhere(tmp_path, monkeypatch):
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(8)))
    monkeypatch.chdir(tmp_path)
    assert run_dcgan(tmp_path / "out", *OPTIONS, "--dataroot", "in", "--cache", "prepared", "--niter", 1) == 0
    for settings in (checkpoint(tmp_path / "out")["options"], json.loads((tmp_path / "out/args.json").read_text())):
        assert (settings["dataroot"], settings["cache"]) == (str(tmp_path / "in"), str(tmp_path / "prepared"))
    monkeypatch.chdir(tmp_path / "cwd")
    assert dcgan.main(["--outf", str(tmp_path / "out"), "--resume", "--niter", "2"]) == 0
    assert list((tmp_path / "cwd").iterdir()) == []


def test_the_default_dataroot_is_found_from_elsewhere(tmp_path, monkeypatch):
    write_images(tmp_path / "cwd" / "data" / "img_align_celeba", *(f"{i}.jpg" for i in range(8)))
    assert run_dcgan(tmp_path / "out", *OPTIONS, "--dataset", "celeba", "--niter", 1) == 0
    monkeypatch.chdir(tmp_path)
    assert dcgan.main(["--outf", str(tmp_path / "out"), "--resume", "--niter", "2"]) == 0


def test_what_is_no_folder_stays_as_it_is(tmp_path):
    assert run_dcgan(tmp_path / "out", *OPTIONS, "--dataset", "fake", "--cache", "none", "--dry-run") == 0
    options = checkpoint(tmp_path / "out")["options"]
    assert (options["dataroot"], options["cache"]) == (None, "none")
