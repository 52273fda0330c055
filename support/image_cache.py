"""The array of prepared images on disk: decoded once, mapped from there."""

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.decoding import check_skipped
from support.errors import UserError, counted, error_text
from support.files import locked
from support.pixel_range import PixelRange

CHUNK = 64 * 64 * 64  # pixels that a worker sends at once, through shared memory that may be small
# Increase it when `prepare` or `draw_cartoon` changes: arrays that were cached before are then prepared anew.
PREPARATION_VERSION = 1


def cache_folder():
    """Return the folder for prepared images in the user's cache folder."""
    usual = {"win32": Path.home() / "AppData" / "Local", "darwin": Path.home() / "Library" / "Caches"}
    return Path(os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, Path.home() / ".cache")) / "dcgan"


def short_hash(value):
    """Return the first 16 hexadecimal digits of the SHA-256 of a value, as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@dataclass
class CachedArray:
    """An array of prepared images on disk."""

    path: Path
    array: np.ndarray  # mapped from disk
    # The content of the .json file beside it. skipped: reports of the images left out; pixel_range; stack: a file of
    # several frames, or None. Old files lack the rest: preparation; the data set's place (Source.location); and hashes:
    # identity (of Source.fingerprint), files (of portable_fingerprint), contents (of all files).
    info: dict

    @property
    def pixel_range(self):
        return PixelRange(*self.info["pixel_range"])

    @property
    def multi_frame(self):
        return self.info["stack"]


def read_info(path):
    """Return what the .json file of an array says, {} if it cannot be read."""
    try:
        info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if isinstance(info, list):  # old files hold only the images left out
        return {"skipped": info, "pixel_range": list(PixelRange()), "stack": None}
    return info if isinstance(info, dict) else {}


def read_cached(path, shape):
    """Return the CachedArray of a file, or of the file that its .json names as "same_as"; None if it is not intact."""
    info = read_info(path)
    if "same_as" in info:
        path = path.with_name(f"{info['same_as']}.npy")
        info = read_info(path)
    try:
        cached = CachedArray(path, np.load(path, mmap_mode="r", allow_pickle=False), info)
        intact = cached.array.shape[1:] == shape and cached.array.dtype == np.uint8
        return cached if intact and cached.pixel_range and {"skipped", "stack"} <= info.keys() else None
    except (OSError, ValueError, EOFError, TypeError, KeyError):
        return None


def build_cache(decoder, path, workers, info):
    """Decode every image once into the array `path` (.npy); write `info` and the images left out into a .json file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.stem}.lock")):
            for partial_file in path.parent.glob(f".{path.stem}.*.part"):  # of a process that was killed
                with contextlib.suppress(PermissionError):  # on Windows, where another process may have it open
                    partial_file.unlink()
            if read_cached(path, decoder.shape) is None:  # otherwise another process has prepared it meanwhile
                write_cache(decoder, path, workers, info)
    except OSError as error:
        if isinstance(error, ChildProcessError):
            raise
        message = f"--cache {path.parent}: {error_text(error)}; name another folder there, or none"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):  # it failed while writing
            raise OSError(message) from None
        raise UserError(message) from None


def write_cache(decoder, path, workers, info):
    total, skipped, digests, count = len(decoder), [], [], 0
    size = total * math.prod(decoder.shape) / 1e6
    print(f"preparing {counted(total, 'image')}, once, into {path} ({size:,.0f} MB)")
    for features in path.parent.glob(f"{path.stem}-*.fid"):  # of an array that was here and had another range
        features.unlink()
    chunk = max(1, CHUNK // decoder.image_size**2)
    chunks = [range(i, min(i + chunk, total)) for i in range(0, total, chunk)]
    partial, partial_json = (path.with_name(f".{path.stem}.{os.getpid()}{kind}.part") for kind in (".npy", ".json"))
    try:
        with open(partial, "wb") as file, tqdm(total=total, desc="preparing", unit="img", disable=None) as bar:
            write_header(file, total, decoder)
            for batch, reports, batch_digests in decoder.decode(chunks, workers):
                skipped, digests = skipped + reports, digests + batch_digests
                file.write(batch.numpy())
                count += len(batch)
                bar.update(len(batch) + len(reports))
            check_skipped(skipped, total)
            file.seek(0)
            write_header(file, count, decoder)  # numpy leaves room in it for a count of any length
            file.flush()
            os.fsync(file.fileno())
        partial_json.write_text(
            json.dumps(info | {"skipped": skipped, "contents": contents_of(digests)}), encoding="utf-8"
        )
        try:
            os.replace(partial_json, path.with_suffix(".json"))
            os.replace(partial, path)
        except PermissionError:  # on Windows, if another process has prepared it meanwhile, and has it open
            if read_cached(path, decoder.shape) is None:
                raise
    finally:
        for partial_file in (partial, partial_json):
            with contextlib.suppress(OSError):
                partial_file.unlink()


def contents_of(digests):
    """Return a hash of the digests of all files, or None if there are none."""
    return short_hash(digests) if any(digests) else None


def write_header(file, count, decoder):
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *decoder.shape)}
    np.lib.format.write_array_header_1_0(file, header)
