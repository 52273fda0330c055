"""Images prepared for training: one at a time, and whole data sets."""

import functools
import itertools
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from support.errors import UserError, counted, error_text
from support.pixel_range import PixelRange, load_as_bytes, to_8_bits
from support.workers import load_batches

DEFAULT_RANGE = PixelRange()
UNUSED_ALPHA = ("BMP", "DIB", "TGA")  # in which many programs leave alpha at zero, where all would be transparent


def prepare(image, image_size, nc, pixel_range=DEFAULT_RANGE, crop=0):
    """Return any PIL image as uint8 (nc, image_size, image_size): upright, on white, in RGB (nc 3) or grey (nc 1).

    pixel_range: what becomes 0 to 255 in an image of more than 8 bits. crop: use only the central square of this side,
    or the largest one of a smaller image (0: use the whole image).

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
    if crop:
        short = min(short, crop)
        left, top = round((width - short) / 2), round((height - short) / 2)
        image, width, height = image.crop((left, top, left + short, top + short)), short, short
    width, height = image_size * width // short, image_size * height // short
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError("aspect ratio too extreme")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, nc)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return pixels[top : top + image_size, left : left + image_size].transpose(2, 0, 1)


class ImageDecoder:
    """The images of a source, prepared: [i] is (uint8 array (nc, image_size, image_size), []), or (None, [report])."""

    def __init__(self, source, image_size, nc, pixel_range=DEFAULT_RANGE, crop=0):
        self.source, self.image_size, self.nc, self.pixel_range, self.crop = source, image_size, nc, pixel_range, crop
        self.shape = (nc, image_size, image_size)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of flaws that it can do without
                warnings.simplefilter("error", Image.DecompressionBombWarning)  # an image too large to decode safely
                return prepare(self.source[i], self.image_size, self.nc, self.pixel_range, self.crop), []
        except Exception as error:  # a damaged image can make its decoder raise anything
            return None, [f"{self.source.name(i)} ({error_text(error)})"]

    def digest(self, i):
        """Return the digest of the file of image i, or "" if it cannot be read, which is reported at decoding."""
        try:
            return self.source.digest(i)
        except Exception:
            return ""

    def first_readable(self, order, position):
        """Return the item at a position of `order`, or the next one there whose image can be read."""
        reports = []
        for i in itertools.chain(order[position:], order[:position]):
            image, report = self[int(i)]
            reports += report
            if image is not None or len(reports) > len(order) / 2:
                break
        return image, reports

    def collate(self, items):
        """Return (uint8 tensor (B, nc, image_size, image_size), reports) of a list of items."""
        images = [image for image, _ in items if image is not None]
        batch = np.empty((len(images), *self.shape), np.uint8)
        for i, image in enumerate(images):  # views of (height, width, channel); np.stack would keep that order
            batch[i] = image
        return torch.from_numpy(batch), [report for _, reports in items for report in reports]

    def decode_with_digests(self, indices):
        # An archive keeps only the last content, so each digest is computed beside its image.
        items = [(self[i], self.digest(i)) for i in indices]
        return *self.collate([item for item, _ in items]), [digest for _, digest in items]

    def decode_in_order(self, order, positions):
        return self.collate([self.first_readable(order, position) for position in positions])

    def digests_of(self, indices):
        return [self.digest(i) for i in indices]

    def decode(self, chunks, workers):
        """Yield (images, reports, digests) of every list of indices in `chunks`, without images that cannot be read."""
        return load_batches(self.source, self.decode_with_digests, chunks, workers)

    def decode_epoch(self, order, chunks, workers):
        """Yield (images, reports) of every list of positions in `order`, an epoch's order of the images.

        An image that cannot be read is replaced by the next readable one.
        """
        return load_batches(self.source, functools.partial(self.decode_in_order, order), chunks, workers)

    def digests(self, workers):
        """Return the digests of all files, one after another."""
        chunks = [range(i, min(i + 1_000, len(self))) for i in range(0, len(self), 1_000)]
        with tqdm(total=len(self), desc="comparing", unit="img", disable=None) as bar:
            digests = []
            for chunk_digests in load_batches(self.source, self.digests_of, chunks, workers):
                digests += chunk_digests
                bar.update(len(chunk_digests))
        return digests


def check_skipped(skipped, total):
    """Raise UserError if more than half of `total` images could not be read."""
    if len(skipped) > total / 2:
        raise UserError(
            f"{len(skipped):,} of {counted(total, 'image')} cannot be read, first {skipped[0]}; is --dataroot right?"
        )
