"""The image formats that are read, and the file names that are taken for images."""

import contextlib
import ctypes
import functools

from PIL import Image, UnidentifiedImageError, features

# Raster formats that Pillow decodes by itself. Left to guess, it would hand an EPS file named x.png to Ghostscript.
# These are known by their content, whatever a file is called. (JPEG's reader takes MPO, too.)
BY_CONTENT = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# These are read under their own names alone, because other files can begin like them. FITS is left out: many versions
# of Pillow read it with its bytes in the wrong order.
BY_NAME = ("BLP", "CUR", "DCX", "DDS", "DIB", "FLI", "FTEX", "GBR", "ICNS", "ICO", "IM", "MSP", "PCD", "PCX", "PIXAR")
BY_NAME += ("PSD", "QOI", "SGI", "SUN", "TGA", "XBM", "XPM")
OPTIONAL = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # a Pillow may be built without them
# The files that this program took before it read all formats above; runs begun then go on with them.
OLD_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
STACKS = ("AVIF", "DCX", "FLI", "GIF", "PNG", "TIFF", "WEBP")  # not MPO: phones store more than frames in it


@functools.cache
def readable_formats():
    """Return {extension: Pillow's name of the format} of all files that this Pillow can read."""
    missing = [name for name, feature in OPTIONAL.items() if feature not in features.get_supported()]
    extensions = Image.registered_extensions() | {".mpo": "JPEG", ".pfm": "PPM"}  # .pfm: before Pillow 10.4
    names = [name for name in (*BY_CONTENT, *BY_NAME) if name not in missing]
    return {extension: name for name in names for extension, kind in extensions.items() if kind == name}


def open_image(file, extension=""):
    """Return the PIL image in a file, a path or a stream, not yet decoded; extension: that of the file's name.

    Raises ValueError if it is none of the formats that are read, or what else a damaged file makes Pillow raise.
    """
    readable = readable_formats()
    own = readable.get(extension)
    formats = {name: None for name in readable.values() if name in BY_CONTENT or name == own}  # in a fixed order
    try:
        return Image.open(file, formats=tuple(formats))
    except UnidentifiedImageError:  # its text names a folder that may be moved, or an address in memory
        raise ValueError("cannot identify image file") from None


def has_several_frames(image):
    """Return whether a PIL image is a stack or an animation, of which only the first frame is used."""
    try:
        return image.format in STACKS and bool(getattr(image, "is_animated", False))
    except Exception:  # a frame after the first is damaged
        return True


def silence_libtiff():
    """Keep the library that decodes TIFF from writing to standard error: a damaged image is reported in one line."""
    with contextlib.suppress(OSError, AttributeError):  # on Windows, it cannot be reached
        library = ctypes.CDLL(Image.core.__file__)
        library.TIFFSetErrorHandler(None), library.TIFFSetWarningHandler(None)
