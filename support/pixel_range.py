"""Images of more than 8 bits: one range of values for a whole data set, which becomes 0 to 255."""

import sys
from typing import NamedTuple

import numpy as np
from PIL import Image

VALUES = 10_000  # of an image that a survey looks at
ROWS = 256  # scaled at a time, to need little more memory than the image


class PixelRange(NamedTuple):
    """What becomes 0 to 255: of integers, 0 to 2**bits - 1; of floats, and of integers if bits is None, low to high.

    Without low and high, Pillow cuts floats off at 0 and 255.
    """

    bits: int | None = 16
    low: float | None = None
    high: float | None = None

    def notes(self):
        """Return texts to print on values that do not become what the files' type suggests."""
        lines = []
        if self.bits not in (None, 16):
            lines.append(f"images of 16 bits: values of 0 to {2**self.bits - 1:,} become 0 to 255")
        if self.low is not None:
            kind = "floats" if self.bits else "integers"
            lines.append(f"images of {kind}: values of {self.low:.4g} to {self.high:.4g} become 0 to 255")
        return lines


def to_8_bits(image, pixel_range, as_bytes=False):
    """Return a PIL image of any mode with 8 bits a channel, and with alpha where it is transparent.

    as_bytes: what load_as_bytes(image) returned.
    """
    found = high_bit_depth_values(image, as_bytes)
    if found is None or (image.mode == "F" and pixel_range.low is None):
        return image
    values, opacity = found
    pixels = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), ROWS):
        pixels[top : top + ROWS] = scale(values[top : top + ROWS], pixel_range)
    image = Image.fromarray(pixels)
    if opacity is not None:
        image.putalpha(Image.fromarray(opacity))
    return image


def scale(values, pixel_range):
    """Return values, integers or floats, as uint8 values."""
    if values.dtype.kind != "f" and pixel_range.bits is not None:
        return np.clip(values >> (pixel_range.bits - 8), 0, 255).astype(np.uint8)
    scaled = (values.astype(np.float32) - pixel_range.low) * (255 / (pixel_range.high - pixel_range.low))
    return np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8)


def high_bit_depth_values(image, as_bytes=False):
    """Return (values (h, w), opacity (h, w) of 0 to 255 or None) of an image of more than 8 bits, None of others."""
    if as_bytes:
        pixels = np.asarray(image)
        return pixels[..., 0].astype(np.uint16) << 8 | pixels[..., 1], np.ascontiguousarray(pixels[..., 2])
    if image.mode[0] not in "IF":
        return None
    values, hidden = np.asarray(image), image.info.get("transparency")
    return values, (values != hidden) * np.uint8(255) if isinstance(hidden, int) else None


def load_as_bytes(image):
    """Let a PNG image of 16-bit grey and alpha load as its bytes, four a pixel; return whether it is one.

    Pillow itself reads only the upper byte of each value.
    """
    is_one = image.format == "PNG" and [tile[3] for tile in image.tile] == ["LA;16B"]
    if is_one:
        image.tile = [(*image.tile[0][:3], "RGBA")]
    return is_one


def sample_of(image):
    """Return some values of an image of more than 8 bits that is not decoded yet, or none, as a flat array."""
    found = high_bit_depth_values(image, load_as_bytes(image))
    if found is None:
        return np.empty(0, np.uint8)
    values, opacity = (None if part is None else part.ravel() for part in found)
    few = len(values) <= VALUES
    chosen = slice(None) if few else np.random.default_rng(0).integers(len(values), size=VALUES)
    visible = np.isfinite(values[chosen]) & (True if opacity is None else opacity[chosen] > 0)
    return values[chosen][visible]


def choose_range(samples):
    """Return the PixelRange for a list of samples of images, none of them empty.

    Integers get the fewest bits that hold 99.9 percent of the values. Floats get the range [0, 1] or [0, 255] if their
    99.9th percentile is within it and above a tenth of it. Other floats, and integers below 0 or above 16 bits, get the
    range from their own percentile 0.1 to 99.9.
    """
    integers = [sample for sample in samples if sample.dtype.kind != "f"]
    floats = [sample for sample in samples if sample.dtype.kind == "f"]
    bits, low, high = 16, None, None
    if integers:
        least, most = np.percentile(np.concatenate(integers), (0.1, 99.9))
        bits = next((bits for bits in (8, 10, 12, 14, 16) if least >= 0 and most < 2**bits), None)
    if floats or bits is None:
        low, high = map(float, np.percentile(np.concatenate(floats if bits else floats + integers), (0.1, 99.9)))
        full = next((top for top in (1.0, 255.0) if bits and low >= 0 and top / 10 < high <= top), None)
        low, high = (0.0, full) if full else (low, max(high, low + 1e-6))
    return PixelRange(bits, low, high)


def warn_if_narrow(batch, path):
    """Print a warning if prepared images, uint8 (N, nc, s, s), use less than a tenth of the range.

    path: the file of their array, or None.
    """
    low, high = np.percentile(batch, (0.1, 99.9))
    if high - low < 25.5:
        again = f" (if an earlier version prepared them, delete {path} to have that done anew)" if path else ""
        print(
            f"warning: the prepared images use only the values {low:.0f} to {high:.0f} of 0 to 255, as real_samples.png"
            f" shows: rescale the files{again}",
            file=sys.stderr,
        )
