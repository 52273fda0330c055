"""One picture prepared; a source's pictures, decoded by several processes."""

import functools
import multiprocessing
import os
import signal
import warnings
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from support.errors import DataError, one_line


def prepare(image, image_size, nc):
    """Return a PIL image of any kind as uint8 (nc, image_size, image_size): upright, on white, RGB (nc 3) or grey (1).

    The shorter side is resized to image_size, then the centre is cropped: equal in every pixel to torchvision's
    Resize(image_size) and CenterCrop(image_size).
    """
    ImageOps.exif_transpose(image, in_place=True)
    mode = "RGB" if nc == 3 else "L"
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scaling
        image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != mode:  # else it would be copied
        image = image.convert(mode)
    width, height = image.size
    short = min(width, height)
    width, height = image_size * width // short, image_size * height // short
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError("far too long and thin")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, nc)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return pixels[top : top + image_size, left : left + image_size].transpose(2, 0, 1)


class Pictures(Dataset):
    """A source's pictures, prepared: [i] is (uint8 array (nc, image_size, image_size), None), or (None, why not)."""

    def __init__(self, source, image_size, nc):
        self.source, self.image_size, self.nc = source, image_size, nc
        self.shape = (nc, image_size, image_size)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)  # a picture too large to decode safely
                return prepare(self.source[i], self.image_size, self.nc), None
        except Exception as error:  # a broken picture can make its decoder raise anything
            return None, f"{self.source.name(i)} ({one_line(error)})"

    def decoded(self, chunks, workers):
        """Yield (uint8 tensor (B, nc, image_size, image_size), reports of those left out) for every list of indices."""
        self.source.ready()
        options = {
            "num_workers": workers,
            "collate_fn": self.stack,
            "worker_init_fn": functools.partial(quietly, os.getpid()),
        }
        try:
            loader = DataLoader(self, batch_sampler=chunks, **options)
            yield from begun(loader) if workers else loader
        except RuntimeError as error:  # one of its processes was killed
            raise ChildProcessError(
                f"decoding pictures failed ({one_line(error)}); --workers 0 needs no processes"
            ) from None
        finally:
            self.source.release()

    def stack(self, items):
        """Return what `decoded` yields for a list of items."""
        rows = [row for row, _ in items if row is not None]
        batch = np.empty((len(rows), *self.shape), np.uint8)
        for i, row in enumerate(rows):  # views of (height, width, channel); np.stack would keep that order
            batch[i] = row
        return torch.from_numpy(batch), [why for _, why in items if why]


def begun(loader):
    """Return iter(loader), made outside the main thread.

    In the main thread, a DataLoader sets a handler of SIGCHLD that raises wherever the program is, even with a queue's
    lock held, for which the DataLoader's end then waits for ever. It notices within seconds without one, too, that a
    process is gone.
    """
    thread = ThreadPool(1)
    try:
        return thread.apply(iter, (loader,))
    finally:  # after Ctrl-C, too, no more processes begin
        thread.close()
        thread.join()


def quietly(main, _):
    """Leave Ctrl-C to the `main` process, and end at once when it says so, or if it is gone already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The DataLoader's processes end with their parent, but take whoever it is by now for it.
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != main:
        os._exit(1)


def check_skipped(skipped, total):
    if len(skipped) > total / 2:
        raise DataError(
            f"{len(skipped)} of {total} pictures cannot be read, the first: {skipped[0]}; is this the right folder?"
        )
