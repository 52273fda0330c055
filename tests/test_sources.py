"""Where images come from: folders of any kind, files of the formats allowed, and torchvision's data sets."""

import hashlib
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    FOLDER,
    assert_cannot_load,
    contents,
    expected_contents,
    finish,
    noise,
    run_dcgan,
    start,
    write_ghostscript_trap,
    write_images,
)
from torchvision import datasets

from data import ReadSettings, load_images
from support.sources import FakeSource, TorchvisionSource

pytestmark = pytest.mark.usefixtures("isolated")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# Folders


@pytest.mark.parametrize("dataset", ["folder", "imagenet", "lfw"])
@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.bmp", "C.PNG", "d.webp"],
        ["cat/a.png", "dog/a.png"],
        ["x/y/z/a.png", "x/b.png", "c.png"],
        ["ü ber/日本 語.png", " a b .png", "%s{}.png", "\udcff.png" if sys.platform == "linux" else "x.png"],
    ],
)
def test_a_folder_gives_every_image_below_it(dataset, names, tmp_path):
    root = tmp_path / "in"
    paths = write_images(root, *names)
    (root / "empty" / "deeper").mkdir(parents=True)
    for junk in (".hidden.png", "x/._a.png", "notes.txt", "png"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_text("not an image")
    (paths[0].parent / "loop").symlink_to(root)
    paths += write_images(tmp_path / "outside", "linked.png")
    (root / "link").symlink_to(tmp_path / "outside")
    images = load_images(dataset, root, 16, settings=ReadSettings(nc=1))
    assert contents(images) == expected_contents(paths, nc=1)
    assert images.skipped == []


@pytest.mark.parametrize("dataset", ["folder", "imagenet", "lfw"])
def test_a_folder_without_images_is_refused(dataset, tmp_path):
    assert_cannot_load("--dataroot", dataset=dataset)
    assert_cannot_load(tmp_path / "missing", "no such folder", dataset=dataset, dataroot=tmp_path / "missing")
    (tmp_path / "in" / "class").mkdir(parents=True)
    (tmp_path / "in" / "class" / "notes.txt").write_text("not an image")
    assert_cannot_load(tmp_path / "in", "*.jpg", "*.png", dataset=dataset, dataroot=tmp_path / "in")


def test_the_images_of_a_run_folder_are_left_out(tmp_path):
    paths = write_images(tmp_path, "in/a.png")
    write_images(tmp_path, "in/out/fake_samples_epoch_000.png", "in/out/deeper/b.png")
    for name in ("args.json", "log.csv", "checkpoint.pth"):
        (tmp_path / "in" / "out" / name).touch()
    assert contents(load_images("folder", tmp_path / "in", 16)) == expected_contents(paths)
    assert_cannot_load(tmp_path / "in" / "out", "is a run folder", dataset="folder", dataroot=tmp_path / "in" / "out")


@pytest.mark.parametrize("cache", ["none", None])
def test_folders_that_cannot_be_listed_are_reported(cache, tmp_path, monkeypatch):
    paths = write_images(tmp_path / "in", "a.png", "no/b.png", "never/c.png")
    scandir = os.scandir

    def deny(path):  # chmod does not stop root
        if Path(path).name in ("no", "never"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    images = load_images("folder", tmp_path / "in", 16, cache=cache)
    assert contents(images) == expected_contents(paths[:1])
    assert [Path(report.split(" (")[0]).name for report in sorted(images.unreadable_folders)] == ["never", "no"]


# Files that are not read


@needs_linux
@pytest.mark.parametrize("cache", ["none", None])
def test_pipes_devices_huge_files_and_links_to_nothing_are_skipped(cache, tmp_path):
    paths = write_images(tmp_path / "in", *(f"{i}.png" for i in range(9)))
    os.mkfifo(tmp_path / "in" / "pipe.jpg")  # opening it would wait for ever
    (tmp_path / "in" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "in" / "gone.png").symlink_to("nowhere.png")
    with open(tmp_path / "in" / "huge.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(2**29 + 1)  # nothing but a hole
    images = load_images("folder", tmp_path / "in", 16, cache=cache)
    read = contents(images)
    assert len(read) == (13 if cache == "none" else 9)  # decoded at every use, others take their places
    assert sorted(set(read)) == expected_contents(paths)
    gone, *others = sorted(images.skipped)
    assert gone.startswith("gone.png (")
    assert "No such file" in gone
    assert others == ["huge.png (more than 512 MB)", "pipe.jpg (not a file)", "zero.png (not a file)"]


@needs_linux
def test_no_file_is_handed_to_ghostscript_whatever_its_name(tmp_path, monkeypatch):
    marker, eps = write_ghostscript_trap(tmp_path, monkeypatch)
    paths = write_images(tmp_path / "in", *(f"{i}.png" for i in range(4)))
    names = ["x.jpg", "x.png", "x.tif"]
    for name in names:
        (tmp_path / "in" / name).write_bytes(eps)
    for cache, workers in (("none", 0), ("none", 1), (None, 0)):
        images = load_images("folder", tmp_path / "in", 16, cache=cache, workers=workers)
        assert sorted(set(contents(images))) == expected_contents(paths)
        assert [report.split(" (")[0] for report in sorted(images.skipped)] == names
        assert not marker.exists()


def test_every_format_is_read(tmp_path):
    """Under the names of others: the content decides, among the formats allowed."""
    kinds = {"BMP": "png", "GIF": "jpg", "JPEG": "png", "PNG": "gif", "PPM": "tif", "TIFF": "webp", "WEBP": "bmp"}
    for kind, extension in kinds.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        noise(mode="L" if kind == "GIF" else "RGB").save(tmp_path / "in" / f"{kind}.{extension}", kind)
    noise().save(tmp_path / "in" / "MPO.jpg", "MPO", save_all=True, append_images=[noise(seed=1)])  # a camera's
    images = load_images("folder", tmp_path / "in", 16)
    assert contents(images) == expected_contents((tmp_path / "in").iterdir())
    assert images.skipped == []
    PCX = tmp_path / "in" / "PCX.png"
    noise().save(PCX, "PCX")
    assert "PCX.png" in load_images("folder", tmp_path / "in", 16).skipped[0]


# torchvision's data sets


@pytest.mark.parametrize("nc", [1, 3])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_mnist_and_its_kind_are_read_in_torchvisions_layout(name, nc, tmp_path):
    raw = tmp_path / "in" / name / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    for part, count in (("train", 6), ("t10k", 3)):
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels[:count].tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(count))
    dataset = name.lower().replace("fashion", "fashion-")
    images = load_images(dataset, tmp_path / "in", 28, settings=ReadSettings(nc=nc))
    assert contents(images) == sorted(np.stack([row] * nc).tobytes() for row in pixels[:6])


@pytest.mark.parametrize("size", [16, 40])
def test_noise_is_that_of_torchvisions_fake_data(size):
    ours, theirs = FakeSource(size), datasets.FakeData(image_size=(3, size, size))
    assert len(ours) == len(theirs)
    assert all(np.array_equal(ours[i], theirs[i][0]) for i in range(0, 1000, 7))
    assert ours.fingerprint() == [1000, (3, size, size), theirs.random_offset]  # as earlier versions had it


@pytest.mark.parametrize("kind", [datasets.CIFAR10, datasets.CIFAR100])
def test_cifar_is_read_in_torchvisions_layout(kind, tmp_path, monkeypatch):
    folder = tmp_path / "in" / {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}[kind.__name__]
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    batch = pickle.dumps({"data": pixels.reshape(7, -1), "labels": [0] * 7})
    meta = pickle.dumps({kind.meta["key"]: ["airplane"]})
    (folder / "train").write_bytes(batch)
    (folder / kind.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(kind, "train_list", [["train", hashlib.md5(batch).hexdigest()]])
    monkeypatch.setattr(kind, "test_list", [])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": hashlib.md5(meta).hexdigest()})
    images = load_images(kind.__name__.lower(), tmp_path / "in", 32)
    assert contents(images) == sorted(row.tobytes() for row in pixels)


def test_the_unlabeled_images_of_stl10_are_read_in_torchvisions_layout(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 96, 96), dtype=np.uint8)
    (tmp_path / "in" / "stl10_binary").mkdir(parents=True)
    hashes = {}
    for name, count in (("unlabeled_X", 7), ("train_X", 2), ("test_X", 2), ("train_y", 0), ("test_y", 0)):
        content = pixels[:count].transpose(0, 1, 3, 2).tobytes()  # column by column
        (tmp_path / "in" / "stl10_binary" / f"{name}.bin").write_bytes(content)
        hashes[f"{name}.bin"] = hashlib.md5(content).hexdigest()
    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(datasets.STL10, part)]
        monkeypatch.setattr(datasets.STL10, part, [[name, hashes[name]] for name in names])
    images = load_images("stl10", tmp_path / "in", 96)
    assert contents(images) == sorted(row.tobytes() for row in pixels)


def test_svhn_is_read_in_torchvisions_layout(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 32, 32), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "train_32x32.mat"
    scipy_io.savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": np.ones((7, 1))})
    train = [*datasets.SVHN.split_list["train"][:2], hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", {"train": train})
    assert contents(load_images("svhn", tmp_path / "in", 32)) == sorted(row.tobytes() for row in pixels)


def test_a_package_that_torchvision_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = "--dataset svhn needs the scipy package: pip install scipy"
    assert_cannot_load(words, dataset="svhn", dataroot=tmp_path / "in")


def test_images_in_memory_are_known_by_one_hash_whatever_their_number_and_layout():
    class Dataset(datasets.VisionDataset):
        def __len__(self):
            return len(self.data)

    for data in (np.arange(25_000).reshape(-1, 1), np.arange(50_000).reshape(2, -1).T):
        dataset = Dataset()
        dataset.data = data
        assert TorchvisionSource(dataset).fingerprint() == hashlib.sha256(data.tobytes()).hexdigest()


DOWNLOADED = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
DOWNLOADED |= {"mnist": "MNIST", "stl10": "STL10"}


@pytest.mark.parametrize("dataset", DOWNLOADED)
def test_a_download_that_fails_is_refused(dataset, tmp_path):
    assert_cannot_load(tmp_path / "in", DOWNLOADED[dataset], dataset=dataset, dataroot=tmp_path / "in")


# In a run


@needs_linux
@pytest.mark.parametrize("dataset", [*DOWNLOADED, "celeba"])
def test_a_download_that_fails_leaves_no_new_folders(dataset, tmp_path, monkeypatch):
    def celeba(root, **_):
        (root / "celeba").mkdir(parents=True)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "CelebA", celeba)
    assert_cannot_load("no network", dataset=dataset, dataroot=tmp_path / "new" / "in")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old" / "in").mkdir(parents=True)
    assert_cannot_load("no network", dataset=dataset, dataroot=tmp_path / "old" / "in")
    assert list((tmp_path / "old").rglob("*")) == [tmp_path / "old" / "in"]  # it was there before


def test_every_skipped_image_is_named(tmp_path, capfd):
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(20)))
    undecodable = [os.fsdecode(name) for name in (b"c\xff.gif", b"\xfed.webp", b"e\xff.png")]
    broken = ["bad one.jpg", "übel.png", *undecodable]  # at least one of the three that are shown is undecodable
    for name in broken:
        (tmp_path / "in" / name).write_bytes(b"not an image")
    options = [*FOLDER, "--dry-run", "--workers", "0"]
    for cache in ("none", tmp_path / "cache"):
        out = tmp_path / f"out-{Path(cache).name}"
        assert run_dcgan(out, *options, "--dataroot", tmp_path / "in", "--cache", cache) == 0
        assert "warning: skipped 5 images that cannot be read: " in capfd.readouterr().err
        listed = (out / "skipped.txt").read_bytes().splitlines()
        assert sorted(line.split(b" (")[0] for line in listed) == sorted(os.fsencode(name) for name in broken)


@needs_linux
def test_names_that_the_terminal_cannot_show_end_no_run(tmp_path):
    folder = tmp_path / "run" / os.fsdecode("images-ü-".encode() + b"\xff")
    write_images(folder, "ä.png", "b.png", "c.png")
    (folder / os.fsdecode(b"\xfe.png")).write_bytes(b"not an image")
    options = [*FOLDER, "--workers", "0", "--dataroot", folder]
    program = "tests/programs/train_and_resume.py"
    errors = finish(start(tmp_path / "run", program, *options, PYTHONIOENCODING="ascii"))
    assert r"warning: skipped 1 image that cannot be read: \udcfe.png" in errors
