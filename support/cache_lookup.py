"""Find the cached array of a data set: by the paths, sizes and times of its files, or else by their contents."""

import contextlib
import json

from support.errors import counted
from support.files import write_atomically
from support.image_cache import build_cache, contents_of, read_cached, read_info, short_hash
from support.survey import survey


def find_or_prepare(decoder, path, source_info, workers, pixel_range=None):
    """Return the CachedArray of the images of an ImageDecoder.

    It is in the file `path`, or in another one with the same images. If there is none, they are prepared into `path`.
    source_info: what to store with the array about the data set (see CachedArray.info). pixel_range: the one that the
    array must have (default: that of the array found, or of a survey of the images).
    """
    array = read_cached(path, decoder.shape) or find_copy(decoder, path, source_info, workers)
    found = array or survey(decoder.source)
    if pixel_range not in (None, found.pixel_range):
        path = path.with_name(f"{path.stem}r{short_hash(pixel_range)}.npy")
        array = read_cached(path, decoder.shape)
    if array is None:
        decoder.pixel_range = pixel_range or found.pixel_range
        info = source_info | {"pixel_range": decoder.pixel_range, "stack": found.multi_frame}
        build_cache(decoder, path, workers, info)
        array = read_cached(path, decoder.shape)
        print_outdated_arrays(array)
    return array


def find_copy(decoder, path, source_info, workers):
    """Return the CachedArray of a data set with the same contents, or None. The .json file of `path` then names it.

    Files are read only if the names and sizes of all are the same.
    """
    arrays = []
    for other in sorted(path.parent.glob(f"{path.stem[:-16]}{'[0-9a-f]' * 16}.npy")):
        info, same = read_info(other), ("preparation", "files")
        if info.get("contents") and all(info.get(name) == source_info[name] for name in same):
            arrays.append(read_cached(other, decoder.shape))
    if not any(arrays):
        return None
    print(f"comparing {counted(len(decoder), 'image')} with those prepared before, which have the same names and sizes")
    contents = contents_of(decoder.digests(workers))
    for array in filter(None, arrays):
        if array.info["contents"] == contents:
            link = json.dumps({"same_as": array.path.stem}).encode()
            with contextlib.suppress(OSError):  # without it, the next start compares again
                write_atomically(path.with_suffix(".json"), lambda file, link=link: file.write(link), sync=False)
            return array
    return None


def print_outdated_arrays(array):
    """Print which cached arrays hold images that the image folder of this array held before they were changed."""
    location, unused = array.info["place"], []
    for other in sorted(array.path.parent.glob(f"{array.path.stem.split('-')[0]}-*.npy")) if location else ():
        info = read_info(other)
        changed = all(info.get(name) not in (None, array.info[name]) for name in ("identity", "contents"))
        if info.get("place") == location and changed:
            unused.append(f"{other.name} ({other.stat().st_size / 1e6:,.1f} MB)")
    if unused:
        print(
            f"note: the images have changed since these arrays in {array.path.parent} were prepared; delete those that"
            f" no run needs: {', '.join(unused)}"
        )
