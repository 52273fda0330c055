"""support/samples.py: a folder of samples holds those of one generator and nothing else, as other programs expect."""

import numpy as np
import pytest
import torch
from helpers import assert_refused, files, hashes, image_of, run_generate
from PIL import Image

import generate
from models import Generator, load_generator
from support.plots import write_png
from support.samples import hash_of_weights, read_weights_hash


@pytest.fixture
def other_weights(weights_file):
    """A file of other weights of the same shapes, beside `weights_file`."""
    torch.manual_seed(1)
    torch.save(Generator(12, 8, 3, 16).state_dict(), weights_file.with_name("other.pth"))
    return weights_file.with_name("other.pth")


def names(folder):
    return [path.name for path in files(folder)]


# The grid


def test_the_folder_holds_samples_alone_and_the_grid_lies_beside_it(weights_file, tmp_path):
    folder = run_generate(weights_file, "--num_output", 5)
    assert names(folder) == [f"seed{k:06d}.png" for k in range(5)]
    assert {Image.open(path).size for path in folder.iterdir()} == {(16, 16)}  # what pytorch-fid needs
    assert Image.open(tmp_path / "generated.png").size == (2 * 18 + 2, 3 * 18 + 2)


def test_a_folder_without_a_name_or_a_place_beside_it_holds_the_grid(weights_file, tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    run_generate(weights_file, "--num_output", 1, "--outf", ".")
    assert names(tmp_path / "here") == ["grid.png", "seed000000.png"]
    monkeypatch.chdir(tmp_path / "here" / "below")
    run_generate(weights_file, "--num_output", 2, "--outf", "..")
    assert names(tmp_path / "here") == ["grid.png", "seed000000.png", "seed000001.png"]
    monkeypatch.setattr("os.path.ismount", lambda path: path.name == "volume")
    run_generate(weights_file, "--num_output", 1, "--outf", tmp_path / "volume")
    assert names(tmp_path / "volume") == ["grid.png", "seed000000.png"]
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path)
    (tmp_path / "fixed").mkdir()
    run_generate(weights_file, "--num_output", 1, "--outf", tmp_path / "fixed")
    assert names(tmp_path / "fixed") == ["grid.png", "seed000000.png"]


def test_the_grid_overwrites_no_other_picture(weights_file, tmp_path, capsys):
    write_png(tmp_path / "generated.png", torch.zeros(3, 4, 4, dtype=torch.uint8))  # of another program
    before = hashes(tmp_path)
    assert_refused(lambda: run_generate(weights_file), capsys, f"the grid would overwrite {tmp_path / 'generated.png'}")
    assert hashes(tmp_path) == before
    assert not (tmp_path / "generated").exists()


def test_the_grid_of_an_earlier_version_in_the_folder_is_named(weights_file, tmp_path, capsys):
    (tmp_path / "generated").mkdir()
    (tmp_path / "generated" / "grid.png").write_bytes(b"a grid")
    run_generate(weights_file, "--num_output", 1)
    assert f"note: {tmp_path / 'generated' / 'grid.png'} was written by an earlier version" in capsys.readouterr().out
    assert (tmp_path / "generated" / "grid.png").read_bytes() == b"a grid"


# One generator's samples


def test_samples_of_other_weights_are_not_added(weights_file, other_weights, tmp_path, capsys):
    folder = run_generate(weights_file, "--num_output", 5)
    before = hashes(tmp_path)
    for request in (["--num_output", 4], ["--manualSeed", 5], ["--manualSeed", 1, "--num_output", 9]):
        words = f"--outf {folder} holds samples of other weights, such as seed00000"
        assert_refused(lambda request=request: run_generate(other_weights, *request), capsys, words)
    assert hashes(tmp_path) == before
    run_generate(other_weights, "--num_output", 6)  # which replaces them all
    assert np.array_equal(np.asarray(Image.open(folder / "seed000004.png")), image_of(other_weights, 4))
    run_generate(other_weights, "--num_output", 2, "--manualSeed", 50)  # and these are of the same
    assert len(files(folder)) == 8


def test_samples_of_an_earlier_version_are_replaced_but_not_mixed(weights_file, tmp_path, capsys):
    (tmp_path / "generated").mkdir()
    for name in ("seed000000.png", "seed000001.png", "seed1.png", "photo.png"):
        write_png(tmp_path / "generated" / name, torch.zeros(3, 16, 16, dtype=torch.uint8))
    words = "holds samples of other weights, such as seed000001.png; choose another --outf, or delete them first"
    assert_refused(lambda: run_generate(weights_file, "--num_output", 1), capsys, words)
    run_generate(weights_file, "--num_output", 2)
    run_generate(weights_file, "--num_output", 1)


def test_other_pictures_may_be_of_any_weights(weights_file, other_weights):
    run_generate(weights_file, "--num_output", 2)
    run_generate(other_weights, "--interpolate", 2)


def test_the_hash_depends_on_the_weights_alone(weights_file, other_weights, tmp_path):
    netG = load_generator(weights_file)
    run_generate(weights_file, "--num_output", 1)
    sample = tmp_path / "generated" / "seed000000.png"
    weights_hash = read_weights_hash(sample)
    assert weights_hash == hash_of_weights(netG) == Image.open(sample).info["weights"]
    torch.save({"netG_ema": netG.state_dict()}, tmp_path / "inside.pth")
    assert hash_of_weights(load_generator(tmp_path / "inside.pth")) == weights_hash
    assert hash_of_weights(load_generator(other_weights)) != weights_hash
    next(netG.parameters()).data.view(-1)[0] += 1e-6
    assert hash_of_weights(netG) != weights_hash


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"tEXtweights\0short", bytes(300)])
def test_a_file_without_a_hash_is_of_unknown_weights(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    assert read_weights_hash(tmp_path / "a.png") == ""


def test_the_output_folder_may_be_the_root(monkeypatch):
    """It has no name: the grid would be in it."""
    assert generate.grid_path(generate.Path("/")) == generate.Path("/grid.png")
