"""Data sets before preparation: what all have in common, torchvision's data sets, and noise.

torchvision is imported where it is needed: that takes nearly as long as importing torch.
"""

import contextlib
import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.errors import UserError, error_text


class Source:
    """The images of a data set before preparation: len(source), source[i] (a PIL image), and the methods below."""

    unreadable_folders = {}  # folders that could not be listed: path -> why
    passed_over = ""  # files and folders that are not taken for images, in words
    location = None  # the absolute path of the images' folder or file, or a list of them, if the user names it

    def name(self, i):
        """Return the name of image i for messages."""
        return f"image {i}"

    def prepare_for_workers(self):
        """Do what the main process must do once, before several processes read images."""

    def close(self):
        """Close what reading images has opened in this process."""

    def by_old_rules(self):
        """Return the source with the images that it had before this program read more than OLD_EXTENSIONS."""
        return self

    def sample_indices(self):
        """Return the indices of a fixed sample of the images, for a survey of their files."""
        return []  # a data set with a fixed form needs no survey

    def digest(self, i):
        """Return a hash of the file of image i, or "" where `fingerprint` does not depend on files. Raises OSError."""
        return ""

    def fingerprint(self):
        """Return a value for JSON that changes when the images change, or where or when they were stored.

        Images are not read for it, where paths, sizes and times of files can tell.
        """
        raise NotImplementedError

    def portable_fingerprint(self, fingerprint):
        """Return the part of a `fingerprint` that stays the same in a copy of the data set."""
        return fingerprint


class TorchvisionSource(Source):
    """A data set of torchvision's that holds its images in memory, as `data`."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i][0]

    def fingerprint(self):
        digest = hashlib.sha256()
        for i in range(0, len(self), 10_000):  # in blocks, because STL10's are copied: they lie in another order
            digest.update(np.ascontiguousarray(self.dataset.data[i : i + 10_000]))
        return digest.hexdigest()


def open_torchvision(kind, dataroot, image_size, classes, split=None, package=None):
    """Return the training images of torchvision's class `kind`, downloaded if need be. Raises UserError.

    split: its name for the images, of a class that does not take `train`. package: what torchvision reads it with.
    """
    from torchvision import datasets

    root = Path(dataroot or "data")
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--dataset {kind.lower()} needs the {package} package: pip install {package}")
    if root.is_file():
        raise UserError(f"--dataroot {root} is a file; name the folder that holds it, or use --dataset folder")
    part = {"split": split} if split else {"train": True}
    try:
        with no_empty_folders(root / kind / "raw"):
            return TorchvisionSource(getattr(datasets, kind)(root, **part, download=True))
    except Exception as error:  # no network, a folder that cannot be written, files that are not what they should be
        raise UserError(
            f"--dataroot {root}: {kind} is not there in torchvision's layout, and the download failed:"
            f" {error_text(error)}"
        ) from None


@contextlib.contextmanager
def no_empty_folders(folder):
    """If a download into `folder` fails, remove it and those above it if they are new and empty."""
    new = [path for path in (folder, *folder.absolute().parents) if not os.path.exists(path)]
    try:
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                path.rmdir()
        raise


class FakeSource(Source):
    """1,000 images of noise, the same as those of torchvision's FakeData."""

    def __init__(self, image_size):
        self.size = (3, image_size, image_size)

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        values = torch.randn(self.size, generator=torch.Generator().manual_seed(i)).mul(255).byte()
        return Image.fromarray(values.permute(1, 2, 0).numpy())

    def fingerprint(self):
        return [len(self), self.size, 0]


def open_fake(dataroot, image_size, classes):
    return FakeSource(image_size)


def size_and_mtime(path):
    """Return (size in bytes, time of the last change in ns) of a file, or () if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns
