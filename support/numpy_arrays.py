"""Images in a NumPy array, a file .npy or .npz."""

import hashlib
import math
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from support.archives import COMPRESSION_METHODS
from support.errors import UserError, error_text
from support.sources import Source, size_and_mtime

CHANNELS = (1, 3, 4)  # grey, RGB, RGB with alpha
LAYOUTS = "(N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels C"
MAX_NPZ = 2**32  # bytes of an array that must be read whole
SAMPLE = 100  # images, at most, that are read to find which range floats have
TOLERANCE = 1e-3  # by which floats may be outside it, because of rounding


class ArraySource(Source):
    """The images of an array of uint8, or of floats in [0, 1] or [-1, 1]. A .npy file is mapped from the disk.

    member: the array in a .npz file. low: the float that becomes 0 (1 becomes 255), None for uint8.
    """

    opened = None

    def __init__(self, path, member=None):
        self.path, self.member, self.location = Path(path), member, str(Path(path).resolve())
        array = self.array()
        self.shape, self.dtype = array.shape, array.dtype.str
        self.layout = check_layout(path, array.shape)
        self.low = lowest_value(path, array)

    def array(self):
        """Return the array, which each process opens for itself unless it inherits it."""
        if self.opened is None:
            if self.member is None:
                self.opened = np.lib.format.open_memmap(self.path, mode="r")
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
                    self.opened = np.lib.format.read_array(file, allow_pickle=False)
        return self.opened

    def prepare_for_workers(self):
        self.array()

    def __getstate__(self):
        return self.__dict__ | {"opened": None}

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):
        values = np.asarray(self.array()[i])
        if self.layout == "NCHW":
            values = values.transpose(1, 2, 0)
        if values.shape[2:] == (1,):
            values = values[..., 0]
        return Image.fromarray(np.ascontiguousarray(values if self.low is None else self.scale(values)))

    def scale(self, values):
        """Return floats as uint8 values. Raises ValueError if they are out of range."""
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinite values")
        if values.min() < self.low - TOLERANCE or values.max() > 1 + TOLERANCE:
            raise ValueError(f"values of {values.min():.4g} to {values.max():.4g} are not in [{self.low}, 1]")
        scaled = (values.astype(np.float32) - self.low) * (255 / (1 - self.low))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)

    def digest(self, i):
        return hashlib.sha256(np.ascontiguousarray(self.array()[i])).hexdigest()

    def fingerprint(self):
        return [self.location, *size_and_mtime(self.path)]

    def portable_fingerprint(self, fingerprint):
        return [self.dtype, self.shape]


def open_numpy_array(path):
    """Return the ArraySource of a .npy or .npz file. Raises UserError if it does not hold one array of images."""
    try:
        return ArraySource(path, choose_member(path) if str(path).lower().endswith(".npz") else None)
    except UserError:
        raise
    except Exception as error:  # damage can raise anything, and pickled objects are not read
        raise UserError(
            f"--dataroot {path}: the array cannot be read ({error_text(error)}); save it again with numpy.save"
        ) from None


def choose_member(path):
    """Return the name of the array of images in a .npz file."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy") or info.compress_type not in COMPRESSION_METHODS:
                continue
            with archive.open(info) as file:
                if np.lib.format.read_magic(file) == (1, 0):  # later versions are for other things than plain arrays
                    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                    arrays[info.filename] = shape, dtype
    images = [name for name, (shape, dtype) in arrays.items() if len(shape) in (3, 4) and is_supported(dtype)]
    names = images or list(arrays)
    if len(names) != 1:
        listed = ", ".join(f"{name.removesuffix('.npy')} {arrays[name][0]}" for name in names) or "none"
        one = names[0].removesuffix(".npy") if names else "images"
        raise UserError(
            f"--dataroot {path} must hold one array of images; arrays there: {listed}; save the one to train on with"
            f' numpy.save("images.npy", numpy.load("{Path(path).name}")["{one}"])'
        )
    shape, dtype = arrays[names[0]]
    if math.prod(shape) * dtype.itemsize > MAX_NPZ:
        raise UserError(
            f"--dataroot {path}: its array takes more than {MAX_NPZ >> 30} GB of memory; save it as .npy, which is read"
            " from the disk in parts"
        )
    return names[0]


def is_supported(dtype):
    return dtype == np.uint8 or dtype.kind == "f"


def check_layout(path, shape):
    """Return "NHW", "NHWC" or "NCHW" for the shape of an array. Raises UserError if it is none of them, or several."""
    start = f"--dataroot {path}: an array of shape {shape}"
    if len(shape) == 3:
        if shape[0] in CHANNELS[1:] or shape[2] in CHANNELS:
            raise UserError(
                f"{start} may be several grey images, or one image with channels; add an axis, as in (N, H, W, 1) or"
                " (1, H, W, 3)"
            )
        layout, (height, width) = "NHW", shape[1:]
    else:
        axes = {"NHWC": 3, "NCHW": 1} if len(shape) == 4 else {}
        layouts = [layout for layout, axis in axes.items() if shape[axis] in CHANNELS]
        if len(layouts) != 1:
            found = "may be (N, H, W, C) or (N, C, H, W)" if layouts else "is not one of images"
            raise UserError(f"{start} {found}; reshape it to {LAYOUTS}, so that only one axis can be C")
        (layout,) = layouts
        height, width = shape[1:3] if layout == "NHWC" else shape[2:]
    if not math.prod(shape):
        raise UserError(f"{start} holds no images")
    if height * width > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{start} holds images that are too large: more than {Image.MAX_IMAGE_PIXELS:,} pixels each")
    return layout


def lowest_value(path, array):
    """Return what becomes 0 in an array: None for uint8, 0 or -1 for floats. Raises UserError if values are others."""
    start = f"--dataroot {path}: an array of {array.dtype}"
    advice = "save uint8 values of 0 to 255, or floats in [0, 1] or [-1, 1]"
    if array.dtype == np.uint8:
        return None
    if not is_supported(array.dtype):
        raise UserError(f"{start} is not read; {advice}")
    low, high = math.inf, -math.inf
    for i in range(0, len(array), -(-len(array) // SAMPLE)):
        finite = array[i][np.isfinite(array[i])]
        low, high = min(low, finite.min(initial=math.inf)), max(high, finite.max(initial=-math.inf))
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE or low > high:
        values = f"values of {low:.4g} to {high:.4g}" if low <= high else "no finite values"
        raise UserError(f"{start} with {values} is not read; {advice}")
    return -1 if low < -TOLERANCE else 0
