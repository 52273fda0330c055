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

    unlisted = {}  # folders that could not be listed: path -> why
    passed_over = ""  # files and folders that are not taken for images, in words
    place = None  # the folder of the images

    def name(self, i):
        """Return the name of image i in a report."""
        return f"image {i}"

    def prepare_for_workers(self):
        """Do what the main process must do once, before several processes read images."""

    def close(self):
        """Close what reading images has opened in this process."""

    def as_in_earlier_versions(self):
        """Return the source with the images that versions before took, for a run that one of them began."""
        return self

    def sample(self):
        """Return the numbers of some images whose files show what kind of images there are, always the same ones."""
        return []  # those of data sets with a fixed form need no look

    def digest(self, i):
        """Return a hash of the file of image i, or "" where `identity` does not depend on files. Raises OSError."""
        return ""

    def identity(self):
        """Return a value for JSON that changes when the images change, or where or when they were stored."""
        raise NotImplementedError

    def names_and_sizes(self, identity):
        """Return, of what `identity` returned, a value for JSON that stays the same in a copy of the data set."""
        return identity


class TorchvisionSource(Source):
    """A data set of torchvision's that holds its images in memory, as `data`."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i][0]

    def identity(self):
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

    def identity(self):
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
