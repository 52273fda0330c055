"""What every data set is before preparation, and folders and torchvision's sets as such."""

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

from support.errors import DataError, one_line

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MOST_BYTES = 2**29  # of a picture's file; with Pillow's limit of 89 million pixels, a process takes less than 2 GB


class Source:
    """The pictures of a data set before preparation: len(source), source[i] (a PIL image), and these."""

    unlisted = {}  # folders that could not be listed: path -> why

    def name(self, i):
        """Return what to call picture i in a report."""
        return f"picture {i}"

    def ready(self):
        """Do what must be done once, in the main process, before pictures are read by several."""

    def release(self):
        """Let go of what reading pictures in this process has opened."""

    def identity(self):
        """Return what, if it changes, makes these other pictures; JSON can hold it."""
        raise NotImplementedError


class Files(Source):
    """Every picture below `root`: flat, in class folders or deeper. Hidden files and empty folders are passed over."""

    def __init__(self, root):
        self.root, self.unlisted = Path(root), {}
        if not self.root.is_dir():
            raise DataError(f"--dataroot {root}: there is no such folder")
        self.names, self.stats, seen = [], [], set()
        for folder, below, names in os.walk(self.root, onerror=self._cannot_list, followlinks=True):
            seen.add(os.path.realpath(folder))
            if {"args.json", "log.csv", "checkpoint.pth"} <= set(names):  # a run folder: not to learn from itself
                below.clear()
                continue
            below[:] = sorted(
                d for d in below if os.path.realpath(os.path.join(folder, d)) not in seen
            )  # no link loops
            for name in names:
                if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                    self.names.append(os.path.relpath(os.path.join(folder, name), self.root))
        self.names.sort()
        if not self.names:
            kinds = ", ".join(f"*{e}" for e in EXTENSIONS)
            raise DataError(
                f"--dataroot {root}: no pictures; looked for {kinds} in it and below, as {root}/any/name.jpg"
            )

    def _cannot_list(self, error):
        self.unlisted[str(error.filename)] = error.strerror

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        path = os.path.join(self.root, self.names[i])
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device read for ever
            raise ValueError("not a file")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MB")
        return Image.open(path)

    def name(self, i):
        return self.names[i]

    def identity(self):
        return [str(self.root.resolve()), [(name, *stamp(self.root / name)) for name in self.names]]


class Torchvision(Source):
    """A data set of torchvision's that keeps its pictures in memory (`data`), or makes them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i][0]

    def identity(self):
        if isinstance(self.dataset, datasets.FakeData):
            return [len(self), self.dataset.image_size, self.dataset.random_offset]
        return hashlib.sha256(np.ascontiguousarray(self.dataset.data)).hexdigest()


def open_folder(dataroot, image_size, classes):
    if dataroot is None:
        raise DataError(
            "--dataroot is missing: name a folder of pictures, as in --dataroot photos with photos/any/name.jpg"
        )
    return Files(dataroot)


def open_torchvision(kind, dataroot, image_size, classes):
    root = Path(dataroot or "data")
    try:
        return Torchvision(kind(root, train=True, download=True))
    except Exception as error:  # no network, a folder that cannot be written, files that are not what they should be
        raise DataError(
            f"--dataroot {root}: {kind.__name__} is not there in torchvision's layout, and could not be downloaded:"
            f" {one_line(error)}"
        ) from None


def open_fake(dataroot, image_size, classes):
    return Torchvision(datasets.FakeData(image_size=(3, image_size, image_size)))


def stamp(path):
    """Return (size in bytes, time of the last change in ns) of a file; nothing for one that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns
