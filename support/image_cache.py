"""The array of prepared pictures on disk."""

import contextlib
import errno
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.decoding import check_skipped
from support.errors import DataError, one_line
from support.files import locked

CHUNK = 64 * 64 * 64  # pixels that a process prepares before it hands them over, in a memory that may be small
# Raise it when `prepare` or `draw_cartoon` changes: what was cached before is then not taken for what they make now.
PREPARATION = 1


def cache_folder():
    """Return the folder where this user's programs keep what can be made again."""
    usual = {"win32": Path.home() / "AppData" / "Local", "darwin": Path.home() / "Library" / "Caches"}
    return Path(os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, Path.home() / ".cache")) / "dcgan"


def read_cached(path, shape):
    """Return (the array of a cache file, mapped from disk; reports of those left out), or None if it is not whole."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        skipped = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError):
        return None
    return (rows, skipped) if rows.shape[1:] == shape and rows.dtype == np.uint8 else None


def build_cache(pictures, path, workers):
    """Decode every picture once into the array `path` (.npy); beside it, in .json, a report for each one left out."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.stem}.lock")
        lock.touch()
        with locked(lock):
            for left_over in path.parent.glob(f".{path.stem}.*.part"):  # of a process that was killed
                with contextlib.suppress(PermissionError):  # on Windows, where there is no lock, it may be at work
                    left_over.unlink()
            if read_cached(path, pictures.shape) is None:  # else another process has made it meanwhile
                write_cache(pictures, path, workers)
    except OSError as error:
        if isinstance(error, ChildProcessError):
            raise
        message = f"--cache {path.parent}: {one_line(error)}; name another folder there, or none"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):  # it failed on the way
            raise OSError(message) from None
        raise DataError(message) from None


def write_cache(pictures, path, workers):
    total, skipped, count = len(pictures), [], 0
    size = total * math.prod(pictures.shape) / 1e6
    print(f"preparing {total:,} pictures, once, into {path} ({size:,.0f} MB)")
    chunk = max(1, CHUNK // pictures.image_size**2)
    chunks = [range(i, min(i + chunk, total)) for i in range(0, total, chunk)]
    partial, partial_json = (path.with_name(f".{path.stem}.{os.getpid()}{kind}.part") for kind in (".npy", ".json"))
    try:
        with open(partial, "wb") as file, tqdm(total=total, desc="preparing", unit="img", disable=None) as bar:
            write_header(file, total, pictures)
            for batch, reports in pictures.decoded(chunks, workers):
                skipped += reports
                file.write(batch.numpy())
                count += len(batch)
                bar.update(len(batch) + len(reports))
            check_skipped(skipped, total)
            file.seek(0)
            write_header(file, count, pictures)  # numpy leaves room in it for a count of any length
            file.flush()
            os.fsync(file.fileno())
        partial_json.write_text(json.dumps(skipped), encoding="utf-8")
        try:
            os.replace(partial_json, path.with_suffix(".json"))
            os.replace(partial, path)
        except PermissionError:  # on Windows, if another process has made it meanwhile, and has it open
            if read_cached(path, pictures.shape) is None:
                raise
    finally:
        for left_over in (partial, partial_json):
            with contextlib.suppress(OSError):
                left_over.unlink()


def write_header(file, count, pictures):
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pictures.shape)}
    np.lib.format.write_array_header_1_0(file, header)
