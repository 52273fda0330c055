"""Prepared images: the batches of an epoch, their shards, and where the images are kept."""

import shutil

import numpy as np
import pytest
import torch
from helpers import (
    FOLDER,
    assert_cannot_load,
    assert_refused,
    assert_same,
    assert_same_run,
    checkpoint,
    contents,
    epoch_of,
    expected_contents,
    log_rows,
    noise,
    run_dcgan,
    torchvision_pixels,
    write_images,
    write_lmdb,
)
from PIL import Image

from data import SOURCES, PreparedImages, ReadSettings, load_images
from support.cartoon import CartoonSource
from support.sources import FakeSource, TorchvisionSource

pytestmark = pytest.mark.usefixtures("isolated")


def numbered(count):
    """Return `count` images of which each has its number in its first two pixels, as an array (count, 3, 16, 16)."""
    rows = np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), np.uint8)
    rows[:, 0, 0, 0], rows[:, 0, 0, 1] = np.divmod(np.arange(count), 256)
    return rows


def numbers(batches):
    """Return the numbers of the images in a list of batches."""
    return [[int(row[0, 0, 0]) * 256 + int(row[0, 0, 1]) for row in batch] for batch in batches]


# Data sets


def test_an_unknown_dataset_is_refused_with_those_there_are():
    assert_cannot_load("--dataset nonsense", *SOURCES, dataset="nonsense")


@pytest.mark.parametrize("dataset", ["cartoon", "fake"])
def test_images_that_the_program_makes_are_the_same_from_the_cache(dataset, monkeypatch):
    assert len(load_images(dataset, None, 16, cache="none")) == {"cartoon": 10_000, "fake": 1000}[dataset]
    for source in (CartoonSource, FakeSource):
        monkeypatch.setattr(source, "__len__", lambda _: 30)
    streamed, cached = (load_images(dataset, None, 16, cache=cache) for cache in ("none", None))
    assert_same(epoch_of(cached, 16), epoch_of(streamed, 16))
    assert len(set(contents(cached))) == len(cached) == 30


@pytest.mark.parametrize("cache", [None, "none"])
@pytest.mark.parametrize("kind", ["folder", "zip", "npy", "celeba", "lsun", "cifar10"])
def test_every_data_set_of_images_is_cropped(kind, cache, tmp_path, monkeypatch):
    pixels = [np.asarray(noise(20, 26, seed=i)) for i in range(5)]
    for i, image in enumerate(pixels):
        (tmp_path / "img_align_celeba").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "img_align_celeba" / f"{i}.jpg", "PNG")
    shutil.make_archive(tmp_path / "a", "zip", tmp_path / "img_align_celeba")
    np.save(tmp_path / "a.npy", pixels)
    write_lmdb(tmp_path / "bedroom_train_lmdb", map(Image.fromarray, pixels))
    held = type("CIFAR10", (), {"__len__": lambda _: 5, "__getitem__": lambda _, i: (Image.fromarray(pixels[i]), 0)})
    held.data = np.stack(pixels)
    monkeypatch.setitem(SOURCES, "cifar10", lambda *_: TorchvisionSource(held()))
    dataroot = tmp_path / {"zip": "a.zip", "npy": "a.npy", "folder": "img_align_celeba"}.get(kind, "")
    dataset = "folder" if kind in ("zip", "npy") else kind
    images = load_images(dataset, dataroot, 16, cache=cache, settings=ReadSettings(crop=14))
    squares = [Image.fromarray(image[6:20, 3:17]) for image in pixels]
    assert contents(images) == sorted(torchvision_pixels(square, 16).tobytes() for square in squares)


# Batches


@pytest.mark.parametrize("cache", [None, "none"])
def test_batches_depend_on_seed_and_epoch_alone(cache, tmp_path):
    paths = write_images(tmp_path / "in", *(f"{i}.png" for i in range(14)))
    images = load_images("folder", tmp_path / "in", 16, cache=cache)
    torch.manual_seed(1)
    epochs = {(seed, epoch): epoch_of(images, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    for batches in epochs.values():
        assert [len(batch) for batch in batches] == [4, 4, 4, 2]
        assert sorted(row.tobytes() for batch in batches for row in batch) == expected_contents(paths)
    assert len({np.concatenate(batches).tobytes() for batches in epochs.values()}) == 4  # (0, 1) is not (1, 0)
    torch.manual_seed(2)
    np.random.seed(2)
    other = load_images("folder", tmp_path / "in", 16, cache=cache)
    for start in (3, 1, 0, 4):
        assert_same(epoch_of(other, 4, 1, 1, start), epochs[1, 1][start:])
    assert np.array_equal(np.concatenate(epoch_of(other, 5, 1, 1)), np.concatenate(epochs[1, 1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_and_cached_batches_are_equal_bit_for_bit(workers, tmp_path):
    paths = write_images(tmp_path / "in", *(f"{i}.png" for i in range(130)))  # more than two workers decode at once
    cached = load_images("folder", tmp_path / "in", 16, workers=workers)
    streamed = load_images("folder", tmp_path / "in", 16, cache="none", workers=workers)
    assert contents(streamed) == expected_contents(paths)
    for start in (0, 2):
        assert_same(epoch_of(cached, 48, 7, 3, start), epoch_of(streamed, 48, 7, 3, start))
    shard = {"rank": 1, "world_size": 3}
    assert_same(epoch_of(cached, 48, 7, 3, **shard), epoch_of(streamed, 48, 7, 3, **shard))


# Shards


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [4, 11, 12, 13, 24, 31])
def test_processes_share_every_batch_evenly(count, world_size):
    """Their shards, joined, are the batches of one process; only the last is trimmed to a multiple of world_size."""
    images = PreparedImages(numbered(count), [], [])
    whole = numbers(images.batches(12, seed=1, epoch=2))
    assert sorted(sum(whole, [])) == list(range(count))
    expected = [batch[: len(batch) // world_size * world_size] for batch in whole]
    expected = [batch for batch in expected if batch]
    shards = [numbers(epoch_of(images, 12, 1, 2, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [sum(step, []) for step in zip(*shards, strict=True)] == expected
    assert all(len(set(map(len, step))) == 1 for step in zip(*shards, strict=True))
    assert images.epoch_size(12, world_size) == (len(expected), sum(map(len, expected)))


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size", "expected"),
    [
        (1000, 16, 1, (63, 1000)),
        (1000, 16, 2, (63, 1000)),
        (1000, 16, 16, (62, 992)),  # 8 images remain for 16 processes: none for each
        (1001, 16, 2, (63, 1000)),
        (3, 128, 1, (1, 3)),
        (3, 128, 2, (1, 2)),
        (128, 128, 4, (1, 128)),
    ],
)
def test_the_steps_and_images_of_an_epoch(count, batch_size, world_size, expected):
    images = PreparedImages(np.empty((count, 1, 1, 1), np.uint8), [], [])
    assert images.epoch_size(batch_size, world_size) == expected


# Where the images are


@pytest.mark.parametrize("start", [0, 2, 6])
def test_images_on_a_device_come_in_the_same_order(start):
    rows = numbered(50)
    on_disk, on_device, too_large = (PreparedImages(rows, [], []) for _ in range(3))
    on_device.cache_on(torch.device("cpu"), 3 * rows.nbytes + 3)
    too_large.cache_on(torch.device("cpu"), 3 * rows.nbytes)
    assert isinstance(on_device.array, torch.Tensor)
    assert too_large.array is rows
    for shard in ({}, {"rank": 1, "world_size": 2}):
        expected = list(on_disk.batches(8, 1, 2, start, **shard))
        assert sum(map(len, expected)) == (50 - 8 * start) // shard.get("world_size", 1)
        for ours, theirs in zip(on_device.batches(8, 1, 2, start, **shard), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_images_that_are_decoded_at_every_use_stay_where_they_are():
    images = load_images("fake", image_size=16, cache="none")
    decoded = images.array
    images.cache_on(torch.device("cpu"), 1 << 40)
    assert images.array is decoded


# In a run


def test_fewer_images_than_a_batch_train(tmp_path, capsys):
    write_images(tmp_path / "in", "a.png", "b.png", "c.png")
    assert run_dcgan(tmp_path / "out", *FOLDER, "--dataroot", tmp_path / "in", "--workers", 0, "--niter", 2) == 0
    assert "fewer images than --batchSize 128: every step uses all 3" in capsys.readouterr().out
    assert [row["images"] for row in log_rows(tmp_path / "out")] == [3, 6]


def test_a_run_keeps_its_crop(tmp_path, capsys):
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(8)))
    options = [*FOLDER, "--dataroot", tmp_path / "in", "--workers", 0, "--batchSize", 4, "--manualSeed", 3]
    assert run_dcgan(tmp_path / "whole", *options, "--crop", 14, "--niter", 2) == 0
    assert run_dcgan(tmp_path / "out", *options, "--crop", 14, "--niter", 1) == 0
    assert_refused(lambda: run_dcgan(tmp_path / "out", "--resume", "--crop", 12), capsys, "has --crop 14, not 12")
    assert run_dcgan(tmp_path / "out", "--resume", "--niter", 2, "--cache", "none") == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_run_that_an_earlier_version_began_uses_whole_images_and_its_array(tmp_path, capsys):
    write_images(tmp_path / "in", *(f"{i}.png" for i in range(8)))
    options = [*FOLDER, "--dataroot", tmp_path / "in", "--workers", 0, "--batchSize", 4, "--manualSeed", 3]
    assert run_dcgan(tmp_path / "out", *options, "--niter", 1) == 0
    whole = shutil.copytree(tmp_path / "out", tmp_path / "whole")
    assert run_dcgan(whole, "--resume", "--niter", 2) == 0
    state = checkpoint(tmp_path / "out")
    assert (state["options"].pop("crop"), state["reading"].pop("crop")) == (0, 0)
    torch.save(state, tmp_path / "out" / "checkpoint.pth")
    capsys.readouterr()
    assert run_dcgan(tmp_path / "out", "--resume", "--niter", 2) == 0
    assert "preparing" not in capsys.readouterr().out
    assert_same_run(tmp_path / "out", whole)
