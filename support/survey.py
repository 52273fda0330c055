"""A look at a sample of the files of a data set: the range of their values, and which of them holds several frames."""

import contextlib
import warnings
from typing import NamedTuple

from PIL import Image

from support.formats import has_several_frames, silence_libtiff
from support.pixel_range import PixelRange, choose_range, sample_of


class Survey(NamedTuple):
    """What a sample of the files shows."""

    pixel_range: PixelRange
    multi_frame: str | None  # a file of several frames, of which only the first is used


def survey(source):
    """Return the Survey of a Source. It opens the files of its sample, and decodes those of more than 8 bits."""
    silence_libtiff()
    samples, multi_frame = [], None
    for i in source.sample_indices():
        with contextlib.suppress(Exception), warnings.catch_warnings():  # damage is reported at decoding
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with source[i] as image:
                if multi_frame is None and has_several_frames(image):
                    multi_frame = source.name(i)
                samples.append(sample_of(image))
    return Survey(choose_range([sample for sample in samples if len(sample)]), multi_frame)
