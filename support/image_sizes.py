"""The image sizes that a DCGAN can have, and the layers that follow from them."""

from support.errors import UserError

# G's smallest feature map has a side of 4, 5, 6 or 7, and is doubled at least twice; D's layers are the reverse.
IMAGE_SIZES = tuple(sorted(b << k for b in range(4, 8) for k in range(2, 9) if b << k <= 1024))


def check_image_size(image_size):
    """Raise UserError, naming the nearest sizes that work, if a DCGAN cannot have this image size."""
    if image_size not in IMAGE_SIZES:
        nearest = [s for s in IMAGE_SIZES if s < image_size][-1:] + [s for s in IMAGE_SIZES if s > image_size][:1]
        raise UserError(
            f"--imageSize {image_size} is not possible; the nearest that work: {' and '.join(map(str, nearest))}"
            f" (all: {', '.join(map(str, IMAGE_SIZES))})"
        )


def smallest_map_and_doublings(image_size):
    """Return (side, doublings), 4 <= side <= 7 and doublings >= 2, with side * 2**doublings == image_size.

    The side is that of the smallest feature map: 64 -> (4, 4), 28 -> (7, 2). Raises UserError if there is none.
    """
    check_image_size(image_size)
    doublings = image_size.bit_length() - 3  # 4..7 are the numbers of three bits
    return image_size >> doublings, doublings


def channel_multipliers(doublings):
    """Return the channels of the hidden feature maps as multiples of ngf (ndf): 1, 2, 4, 8, 16, 16, ...

    The first is that of the largest map, next to the image.
    """
    return [min(2**i, 16) for i in range(doublings)]
