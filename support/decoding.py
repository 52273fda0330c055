"""Images prepared for training: one at a time, and whole data sets by several processes."""

import functools
import itertools
import multiprocessing
import os
import signal
import warnings
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from support.errors import UserError, counted, error_text
from support.pixel_range import PixelRange, load_as_bytes, to_8_bits

AS_BEFORE = PixelRange()  # as in earlier versions
UNUSED_ALPHA = ("BMP", "DIB", "TGA")  # in which many programs leave alpha at zero, where all would be transparent


def prepare(image, image_size, nc, pixel_range=AS_BEFORE):
    """Return any PIL image as uint8 (nc, image_size, image_size): upright, on white, in RGB (nc 3) or grey (nc 1).

    pixel_range: what becomes 0 to 255 in an image of more than 8 bits.

    The shorter side is resized to image_size, then the centre is cropped, with the same pixels as torchvision's
    Resize(image_size) and CenterCrop(image_size).
    """
    as_bytes = pixel_range.bits != 16 and load_as_bytes(image)
    ImageOps.exif_transpose(image, in_place=True)
    mode = "RGB" if nc == 3 else "L"
    image = to_8_bits(image, pixel_range, as_bytes)
    if image.format in UNUSED_ALPHA and image.mode[-1] == "A" and image.getextrema()[-1] == (0, 0):
        image = image.convert(image.mode[:-1])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != mode:  # otherwise convert would copy it
        image = image.convert(mode)
    width, height = image.size
    short = min(width, height)
    width, height = image_size * width // short, image_size * height // short
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError("aspect ratio too extreme")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, nc)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return pixels[top : top + image_size, left : left + image_size].transpose(2, 0, 1)


class DecodedImages(Dataset):
    """The images of a source, prepared: [i] is (uint8 array (nc, image_size, image_size), []), or (None, [report])."""

    def __init__(self, source, image_size, nc, pixel_range=AS_BEFORE):
        self.source, self.image_size, self.nc, self.pixel_range = source, image_size, nc, pixel_range
        self.shape = (nc, image_size, image_size)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)  # an image too large to decode safely
                return prepare(self.source[i], self.image_size, self.nc, self.pixel_range), []
        except Exception as error:  # a damaged image can make its decoder raise anything
            return None, [f"{self.source.name(i)} ({error_text(error)})"]

    def stack(self, items):
        """Return (uint8 tensor (B, nc, image_size, image_size), reports) of a list of items."""
        rows = [row for row, _ in items if row is not None]
        batch = np.empty((len(rows), *self.shape), np.uint8)
        for i, row in enumerate(rows):  # views of (height, width, channel); np.stack would keep that order
            batch[i] = row
        return torch.from_numpy(batch), [report for _, reports in items for report in reports]

    def decode(self, chunks, workers, order=None):
        """Yield what `stack` returns for every list of indices in `chunks`, decoded by so many `workers`.

        order: an epoch's order of the images; `chunks` are then places in it, and an image that cannot be read is
        replaced by the next in the order that can. Without it, such images are left out.
        """
        self.source.prepare_for_workers()
        items = self if order is None else InOrder(self, order)
        options = {"num_workers": workers, "collate_fn": self.stack}
        options["worker_init_fn"] = functools.partial(worker_init, os.getpid())
        try:
            loader = DataLoader(items, batch_sampler=chunks, **options)
            yield from start_workers_off_main_thread(loader) if workers else loader
        except RuntimeError as error:  # one of its processes was killed
            raise ChildProcessError(
                f"decoding images failed ({error_text(error)}); --workers 0 needs no processes"
            ) from None
        finally:
            self.source.close()


class InOrder(Dataset):
    """Decoded images in an epoch's order, where [place] is the first from that place on that can be read."""

    def __init__(self, images, order):
        self.images, self.order = images, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, place):
        reports = []
        for i in itertools.chain(self.order[place:], self.order[:place]):
            row, report = self.images[int(i)]
            reports += report
            if row is not None or len(reports) > len(self) / 2:
                break
        return row, reports


def start_workers_off_main_thread(loader):
    """Return iter(loader), created outside the main thread.

    In the main thread, DataLoader installs a SIGCHLD handler that can raise at any point, even while the lock of a
    queue is held, for which DataLoader would then wait for ever. Without it, a lost worker is noticed within seconds.
    """
    thread = ThreadPool(1)
    try:
        return thread.apply(iter, (loader,))
    finally:  # wait, even after Ctrl-C, so that no worker starts later
        thread.close()
        thread.join()


def worker_init(parent, _):
    """Ignore SIGINT, which `parent` handles; exit on SIGTERM; exit now if the parent has ended already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # DataLoader's workers watch their parent, but would watch another process if it ended before they started.
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent:
        os._exit(1)


def check_skipped(skipped, total):
    """Raise UserError if more than half of `total` images could not be read."""
    if len(skipped) > total / 2:
        raise UserError(
            f"{len(skipped):,} of {counted(total, 'image')} cannot be read, first {skipped[0]}; is the folder right?"
        )
