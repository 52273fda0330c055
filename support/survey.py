"""A look at a sample of a data set's files: what kind of images they hold."""

import contextlib
import warnings

from PIL import Image

from support.formats import has_several_frames


def first_stack(source):
    """Return the name of a file of several frames, of which only the first is used, or None if the sample has none."""
    for i in source.sample():
        with contextlib.suppress(Exception), warnings.catch_warnings():  # damage is reported at decoding
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with source[i] as image:
                if has_several_frames(image):
                    return source.name(i)
    return None
