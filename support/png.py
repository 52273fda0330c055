"""One picture as a PNG file."""

from PIL import Image

from support.files import write_whole


def picture_of(pixels):
    """Return a PIL image of a picture, uint8 (nc, s, s), nc 1 or 3."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())


def write_png(path, picture):
    image = picture_of(picture)
    # Level 4 makes files as small as the usual 6, in two thirds of the time.
    write_whole(path, lambda file: image.save(file, "png", compress_level=4), sync=False)
