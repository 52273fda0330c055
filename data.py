"""Any data set as one array of prepared pictures: found, decoded once, kept on disk, read in batches.

>>> from data import load_images
>>> images = load_images("folder", "my/photos", image_size=64)
>>> batch = next(images.batches(128, seed=1, epoch=0))  # (128, 3, 64, 64) uint8
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from support.cartoon import open_cartoon
from support.celeba import open_celeba
from support.decoding import Pictures, check_skipped
from support.errors import DataError
from support.image_cache import PREPARATION, build_cache, cache_folder, read_cached
from support.lsun import open_lsun
from support.sources import open_fake, open_folder, open_torchvision

# Each is called with dataroot, image_size and classes, takes what it needs of them, and returns a Source.
SOURCES = {
    "cartoon": open_cartoon,
    "celeba": open_celeba,
    "cifar10": functools.partial(open_torchvision, datasets.CIFAR10),
    "fake": open_fake,
    "folder": open_folder,
    "imagenet": open_folder,
    "lfw": open_folder,
    "lsun": open_lsun,
    "mnist": functools.partial(open_torchvision, datasets.MNIST),
}


class Images:
    """The prepared pictures of a data set: an array of rows, on disk or on a device, or decoded at every use.

    len(images): how many there are. images.skipped: a report for each that could not be read. images.unlisted: folders
    that could not be looked into. images.path: the file of the array, if it is on disk.
    """

    def __init__(self, rows, skipped, unlisted, workers=0, path=None):
        self.rows, self.skipped, self.unlisted, self.workers, self.path = rows, skipped, unlisted, workers, path

    def __len__(self):
        return len(self.rows)

    def keep_on(self, device, free):
        """Copy the array to `device`, to take batches from there, if it is less than a third of `free` bytes."""
        if isinstance(self.rows, np.ndarray) and self.rows.nbytes < free / 3:
            rows = torch.empty(self.rows.shape, dtype=torch.uint8, device=device)
            for i in range(0, len(rows), 10_000):  # so that it is not in the memory beside the device as well
                rows[i : i + 10_000] = torch.from_numpy(np.array(self.rows[i : i + 10_000]))
            self.rows = rows

    def batches(self, batch_size, seed, epoch, start=0, part=lambda chunk: chunk):
        """Yield an epoch's batches from number `start` on, uint8 tensors (B, nc, image_size, image_size).

        Every picture comes once, in an order that follows from (seed, epoch) alone. The last batch may be smaller, and
        so may, where pictures are decoded at every use, one with broken pictures; it may even be empty. part(indices)
        returns those of a batch's pictures that are wanted here.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self))[start * batch_size :]
        if isinstance(self.rows, torch.Tensor):
            order = torch.from_numpy(order).to(self.rows.device)
        chunks = [part(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
        if not isinstance(self.rows, Pictures):
            yield from (torch.as_tensor(self.rows[chunk]) for chunk in chunks)
            return
        known = set(self.skipped)
        for batch, reports in self.rows.decoded([chunk.tolist() for chunk in chunks], self.workers):
            self.skipped += [report for report in reports if report not in known]
            known.update(reports)
            check_skipped(self.skipped, len(self))
            yield batch


def load_images(dataset, dataroot=None, image_size=64, nc=3, classes="bedroom", cache=None, workers=0):
    """Return the Images of a data set, one of SOURCES, prepared at image_size in nc channels (3 RGB, 1 grey).

    cache: the folder that keeps the prepared array, made at the first call (None: the user's cache folder), or "none":
    pictures are decoded at every use. workers: processes that decode. Raises DataError if the pictures cannot be had,
    OSError if preparing them fails on the way.
    """
    if dataset not in SOURCES:
        raise DataError(f"--dataset {dataset} is unknown; there are {', '.join(SOURCES)}")
    source = SOURCES[dataset](dataroot, image_size, classes)
    unlisted = [f"{folder} ({why})" for folder, why in source.unlisted.items()]
    pictures = Pictures(source, image_size, nc)
    if cache == "none":
        return Images(pictures, [], unlisted, workers)
    identity = json.dumps([PREPARATION, dataset, image_size, nc, source.identity()])
    name = f"{dataset}-{image_size}x{nc}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    path = (Path(cache) if cache else cache_folder()) / f"{name}.npy"
    if read_cached(path, pictures.shape) is None:
        build_cache(pictures, path, workers)
    return Images(*read_cached(path, pictures.shape), unlisted, path=path)


# The cartoon faces: palettes and shapes. The unit is the picture's side.
