"""Prepared images: the batches of an epoch, their shards, and where the images are kept."""

import numpy as np
import pytest
import torch
from helpers import (
    FOLDER,
    assert_cannot_load,
    assert_same,
    contents,
    epoch_of,
    expected_contents,
    log_rows,
    run_dcgan,
    write_images,
)
from torchvision import datasets

from data import SOURCES, PreparedImages, load_images
from support.cartoon import CartoonSource

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
    for source in (CartoonSource, datasets.FakeData):
        monkeypatch.setattr(source, "__len__", lambda _: 30)
    streamed, cached = (load_images(dataset, None, 16, cache=cache) for cache in ("none", None))
    assert_same(epoch_of(cached, 16), epoch_of(streamed, 16))
    assert len(set(contents(cached))) == len(cached) == 30


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
    on_device.keep_on(torch.device("cpu"), 3 * rows.nbytes + 3)
    too_large.keep_on(torch.device("cpu"), 3 * rows.nbytes)
    assert isinstance(on_device.rows, torch.Tensor)
    assert too_large.rows is rows
    for shard in ({}, {"rank": 1, "world_size": 2}):
        expected = list(on_disk.batches(8, 1, 2, start, **shard))
        assert sum(map(len, expected)) == (50 - 8 * start) // shard.get("world_size", 1)
        for ours, theirs in zip(on_device.batches(8, 1, 2, start, **shard), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_images_that_are_decoded_at_every_use_stay_where_they_are():
    images = load_images("fake", image_size=16, cache="none")
    decoded = images.rows
    images.keep_on(torch.device("cpu"), 1 << 40)
    assert images.rows is decoded


# In a run


def test_fewer_images_than_a_batch_train(tmp_path, capsys):
    write_images(tmp_path / "in", "a.png", "b.png", "c.png")
    assert run_dcgan(tmp_path / "out", *FOLDER, "--dataroot", tmp_path / "in", "--workers", 0, "--niter", 2) == 0
    assert "fewer images than --batchSize 128: every step uses all 3" in capsys.readouterr().out
    assert [row["images"] for row in log_rows(tmp_path / "out")] == [3, 6]
