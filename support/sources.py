"""Data sets before preparation: what all have in common, folders of images, and torchvision's data sets."""

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

from support.errors import UserError, error_text

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Raster formats that Pillow decodes by itself. Left to guess, it would hand an EPS file named x.png to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # JPEG's reader takes MPO, too
MAX_BYTES = 2**29  # of an image file; with Pillow's limit of 89 million pixels, decoding takes less than 2 GB


class Source:
    """The images of a data set before preparation: len(source), source[i] (a PIL image), and the methods below."""

    unlisted = {}  # folders that could not be listed: path -> why

    def name(self, i):
        """Return the name of image i in a report."""
        return f"image {i}"

    def prepare_for_workers(self):
        """Do what the main process must do once, before several processes read images."""

    def close(self):
        """Close what reading images has opened in this process."""

    def identity(self):
        """Return a value for JSON that changes when the images change."""
        raise NotImplementedError


class FolderSource(Source):
    """All images below the folder `root`: flat, in class folders or deeper. Hidden files are left out."""

    def __init__(self, root):
        self.root, self.unlisted = Path(root), {}
        if not self.root.is_dir():
            raise UserError(f"--dataroot {root}: there is no such folder")
        self.names, seen = [], set()
        for folder, below, names in os.walk(self.root, onerror=self.cannot_list, followlinks=True):
            seen.add(os.path.realpath(folder))
            if {"args.json", "log.csv", "checkpoint.pth"} <= set(names):  # a run folder holds generated images
                below.clear()
                continue
            # Links can form a loop.
            below[:] = sorted(d for d in below if os.path.realpath(os.path.join(folder, d)) not in seen)
            for name in names:
                if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                    self.names.append(os.path.relpath(os.path.join(folder, name), self.root))
        self.names.sort()
        if not self.names:
            kinds = ", ".join(f"*{e}" for e in EXTENSIONS)
            raise UserError(f"--dataroot {root}: no images; looked for {kinds} in it and below, as {root}/any/name.jpg")

    def cannot_list(self, error):
        self.unlisted[str(error.filename)] = error.strerror

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        path = os.path.join(self.root, self.names[i])
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device could take for ever
            raise ValueError("not a file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MB")
        return open_image(path)

    def name(self, i):
        return self.names[i]

    def identity(self):
        return [str(self.root.resolve()), [(name, *size_and_mtime(self.root / name)) for name in self.names]]


class TorchvisionSource(Source):
    """A data set of torchvision's that holds its images in memory (`data`), or makes them."""

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


def open_image(file):
    """Return the PIL image in a file, a path or a stream, of one of FORMATS, not yet decoded."""
    return Image.open(file, formats=FORMATS)


def open_folder(dataroot, image_size, classes):
    if dataroot is None:
        raise UserError(
            "--dataroot is missing: name a folder of images, as in --dataroot photos with photos/any/name.jpg"
        )
    return FolderSource(dataroot)


def open_torchvision(kind, dataroot, image_size, classes):
    root = Path(dataroot or "data")
    try:
        return TorchvisionSource(kind(root, train=True, download=True))
    except Exception as error:  # no network, a folder that cannot be written, files that are not what they should be
        raise UserError(
            f"--dataroot {root}: {kind.__name__} is not there in torchvision's layout, and the download failed:"
            f" {error_text(error)}"
        ) from None


def open_fake(dataroot, image_size, classes):
    return TorchvisionSource(datasets.FakeData(image_size=(3, image_size, image_size)))


def size_and_mtime(path):
    """Return (size in bytes, time of the last change in ns) of a file, or () if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns
