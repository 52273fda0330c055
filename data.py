"""Any data set as one array of prepared pictures: found, decoded once, kept on disk, read in batches.

>>> from data import load_images
>>> images = load_images("folder", "my/photos", image_size=64)
>>> batch = next(images.batches(128, seed=1, epoch=0))  # (128, 3, 64, 64) uint8
"""

import bisect
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import warnings
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from tqdm import tqdm

CHUNK = 64 * 64 * 64  # pixels that a process prepares before it hands them over, in a memory that may be small
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MOST_BYTES = 2**29  # of a picture's file; with Pillow's limit of 89 million pixels, a process takes less than 2 GB
# Raise it when `prepare` or `draw_cartoon` changes: what was cached before is then not taken for what they make now.
PREPARATION = 1


class DataError(ValueError):
    """The pictures asked for cannot be had. The message is one line that says what was looked for, and where."""


class Source:
    """The pictures of a data set before preparation: len(source), source[i] (a PIL image), and these."""

    unlisted = {}  # folders that could not be listed: path -> why

    def name(self, i):
        """Return what to call picture i in a report."""
        return f"picture {i}"

    def ready(self):
        """Do what must be done once, in the main process, before pictures are read by several."""

    def release(self):
        """Let go of what reading pictures in this process has opened."""

    def identity(self):
        """Return what, if it changes, makes these other pictures; JSON can hold it."""
        raise NotImplementedError


class Cartoons(Source):
    """10,000 cartoon faces, drawn when asked for."""

    def __init__(self, image_size):
        self.image_size = image_size

    def __len__(self):
        return 10_000

    def __getitem__(self, i):
        return draw_cartoon(i, self.image_size)

    def identity(self):
        return len(self)


class Files(Source):
    """Every picture below `root`: flat, in class folders or deeper. Hidden files and empty folders are passed over."""

    def __init__(self, root):
        self.root, self.unlisted = Path(root), {}
        if not self.root.is_dir():
            raise DataError(f"--dataroot {root}: there is no such folder")
        self.names, self.stats, seen = [], [], set()
        for folder, below, names in os.walk(self.root, onerror=self._cannot_list, followlinks=True):
            seen.add(os.path.realpath(folder))
            if {"args.json", "log.csv", "checkpoint.pth"} <= set(names):  # a run folder: not to learn from itself
                below.clear()
                continue
            below[:] = sorted(
                d for d in below if os.path.realpath(os.path.join(folder, d)) not in seen
            )  # no link loops
            for name in names:
                if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                    self.names.append(os.path.relpath(os.path.join(folder, name), self.root))
        self.names.sort()
        if not self.names:
            kinds = ", ".join(f"*{e}" for e in EXTENSIONS)
            raise DataError(
                f"--dataroot {root}: no pictures; looked for {kinds} in it and below, as {root}/any/name.jpg"
            )

    def _cannot_list(self, error):
        self.unlisted[str(error.filename)] = error.strerror

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        path = os.path.join(self.root, self.names[i])
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device read for ever
            raise ValueError("not a file")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MB")
        return Image.open(path)

    def name(self, i):
        return self.names[i]

    def identity(self):
        return [str(self.root.resolve()), [(name, *stamp(self.root / name)) for name in self.names]]


class Lmdb(Source):
    """The pictures of LSUN's `<class>_lmdb` folders, read straight from the data bases."""

    def __init__(self, folders):
        self.folders = [str(folder) for folder in folders]
        self.ends = list(itertools.accumulate(self._open(folder).stat()["entries"] for folder in self.folders))
        self.keys, self.opened = [], []
        if not len(self):
            raise DataError(f"{' '.join(self.folders)}: the data base is empty")

    def _open(self, folder):
        try:
            import lmdb
        except ImportError:
            raise DataError("--dataset lsun needs the lmdb package: pip install lmdb") from None
        try:
            base = lmdb.open(folder, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise DataError(f"{folder} is not a data base of LSUN: {error}") from None
        if Path(folder, "data.mdb").stat().st_size < (base.info()["last_pgno"] + 1) * base.stat()["psize"]:
            raise DataError(f"{folder}/data.mdb is cut off: download or copy it again")  # reading it would crash
        return base

    def ready(self):
        for folder in self.folders if not self.keys else ():
            with self._open(folder) as base, base.begin() as transaction:
                self.keys.append(np.array(list(transaction.cursor().iternext(values=False))))

    def release(self):
        for base in self.opened:
            base.close()
        self.opened = []

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        if not self.opened:  # in the process that reads: an open data base does not survive a fork
            self.opened = [self._open(folder) for folder in self.folders]
        which = bisect.bisect_right(self.ends, i)
        key = self.keys[which][i - self.ends[which]]  # counted from the end of its own data base
        with self.opened[which].begin() as transaction:
            return Image.open(io.BytesIO(transaction.get(bytes(key))))

    def identity(self):
        return [(folder, *stamp(Path(folder, "data.mdb"))) for folder in self.folders]


class Torchvision(Source):
    """A data set of torchvision's that keeps its pictures in memory (`data`), or makes them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i][0]

    def identity(self):
        if isinstance(self.dataset, datasets.FakeData):
            return [len(self), self.dataset.image_size, self.dataset.random_offset]
        return hashlib.sha256(np.ascontiguousarray(self.dataset.data)).hexdigest()


def open_folder(dataroot, image_size, classes):
    if dataroot is None:
        raise DataError(
            "--dataroot is missing: name a folder of pictures, as in --dataroot photos with photos/any/name.jpg"
        )
    return Files(dataroot)


def open_celeba(dataroot, image_size, classes):
    """Find CelebA's aligned pictures in any of the layouts people have; unpack or download them if need be."""
    root = Path(dataroot or "data")
    found, why = find_celeba(root), ""
    if not found:
        try:
            datasets.CelebA(root, split="all", download=True)
        except Exception as error:  # the quota, the network, gdown missing, a page where the archive should be
            why = f" ({one_line(error)})"
        found = find_celeba(root)
    if not found:
        raise DataError(
            f"--dataroot {root}: looked for img_align_celeba/*.jpg and img_align_celeba.zip in it and in {root}/celeba;"
            f" none is there, and the download failed{why}: fetch the zip by hand from"
            f" https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put it into {root}/celeba"
        )
    files = Files(found)
    if len(files) != 202_599:
        again = "; delete it to have it unpacked again" if Path(f"{found}.zip").is_file() else ""
        print(f"note: CelebA has 202,599 pictures; {found} holds {len(files):,}{again}")
    return files


def find_celeba(root):
    """Return the folder of CelebA's pictures in or below `root`, unpacked if need be, or None."""
    places = [root / "celeba", root]
    folders = [p / inner for p in places for inner in ("img_align_celeba/img_align_celeba", "img_align_celeba")]
    for folder in [*folders, root]:
        if folder.is_dir() and any(path.suffix.lower() == ".jpg" for path in folder.iterdir()):
            return folder
    for place in places:
        if (place / "img_align_celeba.zip").is_file():
            return unpack(place / "img_align_celeba.zip", place / "img_align_celeba")
    return None


def unpack(archive, folder):
    """Unpack the .jpg files of a zip archive flat into `folder`, which is then there whole or not at all; return it."""
    partial = folder.with_name(f".{folder.name}.part")
    try:
        with locked(archive), zipfile.ZipFile(archive) as zipped:
            if folder.is_dir():  # another process has done it meanwhile
                return folder
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
            partial.mkdir()
            members = [m for m in zipped.infolist() if m.filename.lower().endswith(".jpg") and not m.is_dir()]
            for member in tqdm(members, desc=f"unpacking {archive.name}", unit="img", disable=None):
                # The last part of a name cannot lead out of the folder.
                target = partial / member.filename.replace("\\", "/").rsplit("/", 1)[-1]
                with zipped.open(member) as packed, open(target, "wb") as file:
                    shutil.copyfileobj(packed, file)
            partial.rename(folder)
    except Exception as error:  # a damaged archive, one with a password, a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(f"{archive} could not be unpacked: {one_line(error)}") from None
    return folder


def open_lsun(dataroot, image_size, classes):
    root = Path(dataroot or "data")
    if (root / "data.mdb").is_file():
        return Lmdb([root])
    names = dict.fromkeys(name.strip().removesuffix("_train") for name in classes.split(",") if name.strip())
    folders = [root / f"{name}_train_lmdb" for name in names]
    missing = [folder for folder in folders if not (folder / "data.mdb").is_file()]
    if missing or not folders:
        there = ", ".join(sorted(p.name.removesuffix("_train_lmdb") for p in root.glob("*_train_lmdb"))) or "none"
        looked_for = (missing or [root / "<class>_train_lmdb"])[0] / "data.mdb"
        raise DataError(f"--classes {classes}: looked for {looked_for}; classes in {root}: {there}")
    return Lmdb(folders)


def open_torchvision(kind, dataroot, image_size, classes):
    root = Path(dataroot or "data")
    try:
        return Torchvision(kind(root, train=True, download=True))
    except Exception as error:  # no network, a folder that cannot be written, files that are not what they should be
        raise DataError(
            f"--dataroot {root}: {kind.__name__} is not there in torchvision's layout, and could not be downloaded:"
            f" {one_line(error)}"
        ) from None


def open_cartoon(dataroot, image_size, classes):
    return Cartoons(image_size)


def open_fake(dataroot, image_size, classes):
    return Torchvision(datasets.FakeData(image_size=(3, image_size, image_size)))


# Each is called with dataroot, image_size and classes, takes what it needs of them, and returns a Source.
SOURCES = {
    "cartoon": open_cartoon,
    "celeba": open_celeba,
    "cifar10": functools.partial(open_torchvision, datasets.CIFAR10),
    "fake": open_fake,
    "folder": open_folder,
    "imagenet": open_folder,
    "lfw": open_folder,
    "lsun": open_lsun,
    "mnist": functools.partial(open_torchvision, datasets.MNIST),
}


def prepare(image, image_size, nc):
    """Return a PIL image of any kind as uint8 (nc, image_size, image_size): upright, on white, RGB (nc 3) or grey (1).

    The shorter side is resized to image_size, then the centre is cropped: equal in every pixel to torchvision's
    Resize(image_size) and CenterCrop(image_size).
    """
    ImageOps.exif_transpose(image, in_place=True)
    mode = "RGB" if nc == 3 else "L"
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scaling
        image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != mode:  # else it would be copied
        image = image.convert(mode)
    width, height = image.size
    short = min(width, height)
    width, height = image_size * width // short, image_size * height // short
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError("far too long and thin")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, nc)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return pixels[top : top + image_size, left : left + image_size].transpose(2, 0, 1)


class Pictures(Dataset):
    """A source's pictures, prepared: [i] is (uint8 array (nc, image_size, image_size), None), or (None, why not)."""

    def __init__(self, source, image_size, nc):
        self.source, self.image_size, self.nc = source, image_size, nc
        self.shape = (nc, image_size, image_size)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)  # a picture too large to decode safely
                return prepare(self.source[i], self.image_size, self.nc), None
        except Exception as error:  # a broken picture can make its decoder raise anything
            return None, f"{self.source.name(i)} ({one_line(error)})"

    def decoded(self, chunks, workers):
        """Yield (uint8 tensor (B, nc, image_size, image_size), reports of those left out) for every list of indices."""
        self.source.ready()
        options = {
            "num_workers": workers,
            "collate_fn": self.stack,
            "worker_init_fn": functools.partial(quietly, os.getpid()),
        }
        try:
            loader = DataLoader(self, batch_sampler=chunks, **options)
            yield from begun(loader) if workers else loader
        except RuntimeError as error:  # one of its processes was killed
            raise ChildProcessError(
                f"decoding pictures failed ({one_line(error)}); --workers 0 needs no processes"
            ) from None
        finally:
            self.source.release()

    def stack(self, items):
        """Return what `decoded` yields for a list of items."""
        rows = [row for row, _ in items if row is not None]
        batch = np.empty((len(rows), *self.shape), np.uint8)
        for i, row in enumerate(rows):  # views of (height, width, channel); np.stack would keep that order
            batch[i] = row
        return torch.from_numpy(batch), [why for _, why in items if why]


def begun(loader):
    """Return iter(loader), made outside the main thread.

    In the main thread, a DataLoader sets a handler of SIGCHLD that raises wherever the program is, even with a queue's
    lock held, for which the DataLoader's end then waits for ever. It notices within seconds without one, too, that a
    process is gone.
    """
    thread = ThreadPool(1)
    try:
        return thread.apply(iter, (loader,))
    finally:  # after Ctrl-C, too, no more processes begin
        thread.close()
        thread.join()


def quietly(main, _):
    """Leave Ctrl-C to the `main` process, and end at once when it says so, or if it is gone already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The DataLoader's processes end with their parent, but take whoever it is by now for it.
    if multiprocessing.get_start_method() != "forkserver" and os.getppid() != main:
        os._exit(1)


class Images:
    """The prepared pictures of a data set: an array of rows, on disk or on a device, or decoded at every use.

    len(images): how many there are. images.skipped: a report for each that could not be read. images.unlisted: folders
    that could not be looked into. images.path: the file of the array, if it is on disk.
    """

    def __init__(self, rows, skipped, unlisted, workers=0, path=None):
        self.rows, self.skipped, self.unlisted, self.workers, self.path = rows, skipped, unlisted, workers, path

    def __len__(self):
        return len(self.rows)

    def keep_on(self, device, free):
        """Copy the array to `device`, to take batches from there, if it is less than a third of `free` bytes."""
        if isinstance(self.rows, np.ndarray) and self.rows.nbytes < free / 3:
            rows = torch.empty(self.rows.shape, dtype=torch.uint8, device=device)
            for i in range(0, len(rows), 10_000):  # so that it is not in the memory beside the device as well
                rows[i : i + 10_000] = torch.from_numpy(np.array(self.rows[i : i + 10_000]))
            self.rows = rows

    def batches(self, batch_size, seed, epoch, start=0, part=lambda chunk: chunk):
        """Yield an epoch's batches from number `start` on, uint8 tensors (B, nc, image_size, image_size).

        Every picture comes once, in an order that follows from (seed, epoch) alone. The last batch may be smaller, and
        so may, where pictures are decoded at every use, one with broken pictures; it may even be empty. part(indices)
        returns those of a batch's pictures that are wanted here.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self))[start * batch_size :]
        if isinstance(self.rows, torch.Tensor):
            order = torch.from_numpy(order).to(self.rows.device)
        chunks = [part(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
        if not isinstance(self.rows, Pictures):
            yield from (torch.as_tensor(self.rows[chunk]) for chunk in chunks)
            return
        known = set(self.skipped)
        for batch, reports in self.rows.decoded([chunk.tolist() for chunk in chunks], self.workers):
            self.skipped += [report for report in reports if report not in known]
            known.update(reports)
            check_skipped(self.skipped, len(self))
            yield batch


def load_images(dataset, dataroot=None, image_size=64, nc=3, classes="bedroom", cache=None, workers=0):
    """Return the Images of a data set, one of SOURCES, prepared at image_size in nc channels (3 RGB, 1 grey).

    cache: the folder that keeps the prepared array, made at the first call (None: the user's cache folder), or "none":
    pictures are decoded at every use. workers: processes that decode. Raises DataError if the pictures cannot be had,
    OSError if preparing them fails on the way.
    """
    if dataset not in SOURCES:
        raise DataError(f"--dataset {dataset} is unknown; there are {', '.join(SOURCES)}")
    source = SOURCES[dataset](dataroot, image_size, classes)
    unlisted = [f"{folder} ({why})" for folder, why in source.unlisted.items()]
    pictures = Pictures(source, image_size, nc)
    if cache == "none":
        return Images(pictures, [], unlisted, workers)
    identity = json.dumps([PREPARATION, dataset, image_size, nc, source.identity()])
    name = f"{dataset}-{image_size}x{nc}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    path = (Path(cache) if cache else cache_folder()) / f"{name}.npy"
    if read_cached(path, pictures.shape) is None:
        build_cache(pictures, path, workers)
    return Images(*read_cached(path, pictures.shape), unlisted, path=path)


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


@contextlib.contextmanager
def locked(path):
    """Wait until no other process has the lock of the file `path`, and hold it; the lock dies with its holder.

    Where there are no such locks, as on Windows and on some network drives, two processes do the same work twice.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "r+b" if os.access(path, os.W_OK) else "rb") as file:  # over NFS, a lock needs one to write to
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which has {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def write_header(file, count, pictures):
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pictures.shape)}
    np.lib.format.write_array_header_1_0(file, header)


def check_skipped(skipped, total):
    if len(skipped) > total / 2:
        raise DataError(
            f"{len(skipped)} of {total} pictures cannot be read, the first: {skipped[0]}; is this the right folder?"
        )


def stamp(path):
    """Return (size in bytes, time of the last change in ns) of a file; nothing for one that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


# The cartoon faces: palettes and shapes. The unit is the picture's side.
BACKDROPS = ("#8fd3e8", "#a5dfc3", "#c3b5f0", "#ffc857", "#ff9f8f", "#7fb8f0", "#f7b7d2", "#bfe08a")
SKINS = ("#ffdcc6", "#f8c9a4", "#eeb487", "#dd9d6b", "#c58350", "#a5683c", "#875331", "#6c4129")
HAIRS = ("#2a2226", "#38262a", "#4a2f27", "#6f4326", "#a8672f", "#c9502c", "#ecb840", "#b5b3c4", "#f0629a", "#4a8fe2")
IRISES = ("#5a3420", "#7a4c22", "#3a7d44", "#2f78c4", "#2f8f96")
CLOTHES = ("#e4572e", "#2e86ab", "#f4a300", "#5b8e4a", "#7a4fb5", "#f25f8b", "#274690", "#f5f1e6", "#1b998b")
INK, WHITE, DARK_RED, PINK, GOLD = "#2b1d22", "#fffaf2", "#7a1f2e", "#ff8087", "#ffcf33"
LIGHT, SHADE, BLUSH = "#ffffff66", "#6b1a2038", "#ff4d5e54"  # see-through: the last two digits are the opacity
BACK_HAIR = {  # behind the head, each line a few ovals: x (1 is the edge of the head), y, half width, half height
    "quiff": ((0, -0.31, 0.17, 0.08), (0.3, -0.31, 0.12, 0.085)),
    "bun": ((0, -0.4, 0.12, 0.1),),
    "puffs": ((1.15, -0.2, 0.13, 0.13),),
    "bob": ((0, 0.02, 0.345, 0.34), (0.85, 0.2, 0.12, 0.12)),
    "long": ((0, -0.02, 0.33, 0.35), (0.5, 0.25, 0.24, 0.4)),
    "curly": ((0, -0.33, 0.13, 0.11), (0.55, -0.3, 0.13, 0.12), (1, -0.17, 0.13, 0.13), (1.1, 0.05, 0.12, 0.15)),
}
# Hair in front of the head, as slices of an oval: first and last degree, clockwise from the right.
FRINGES = (((200, 340),), ((180, 315), (300, 358)), ((182, 240), (225, 360)), ((176, 285), (255, 364)))
MOUTHS = (  # each line a few ovals: y, half width, half height, colour (None: the lips'), degrees, line width
    ((-0.04, 0.1, 0.075, None, 12, 168, 0.036),),
    ((-0.02, 0.07, 0.05, None, 0, 180, 0.036),),
    ((0.015, 0.045, 0.055, DARK_RED), (0.045, 0.025, 0.018, PINK)),
    ((-0.025, 0.12, 0.095, DARK_RED, 0, 180), (-0.01, 0.1, 0.055, WHITE, 0, 180)),
    ((-0.02, 0.1, 0.1, DARK_RED, 0, 180), (0.05, 0.05, 0.025, PINK), (-0.02, 0.08, 0.03, WHITE, 0, 180)),
)


def draw_cartoon(index: int, size: int) -> Image.Image:
    """Return cartoon face number `index`, the same face at every `size`, as a square RGB picture."""
    rng = Random(index)
    pick, vary = rng.choice, rng.uniform
    backdrop, skin, iris, shirt, hat = pick(BACKDROPS), pick(SKINS), pick(IRISES), pick(CLOTHES), pick(CLOTHES)
    style = pick(("short", "bald", "beanie", "scarf", *BACK_HAIR))
    hair, fringe, mouth, lips = pick(HAIRS), pick(FRINGES), pick(MOUTHS), DARK_RED if skin in SKINS[:4] else PINK
    contrast = sum(abs(a - b) for a, b in zip(ImageColor.getrgb(hair), ImageColor.getrgb(skin), strict=True))
    hair = INK if contrast < 85 or style == "scarf" else hair  # under a scarf, only the eyebrows show
    glasses, earrings, lashes, freckles, beard, bow = (rng.random() < p for p in (0.2, 0.2, 0.4, 0.2, 0.5, 0.4))
    beard = beard and style in ("short", "quiff", "bald", "beanie")
    left, top, zoom = vary(0.485, 0.515), vary(0.51, 0.54), vary(0.96, 1.04)
    w, h, eye_x, eye_y = vary(0.255, 0.29), vary(0.29, 0.315), vary(0.118, 0.13), vary(0.02, 0.04)
    eye_w, eye_h, gaze_x, gaze_y = vary(0.075, 0.085), vary(0.084, 0.1), vary(-0.016, 0.016), vary(-0.012, 0.012)
    brow_y, mouth_y, mouth_w, nose = vary(-0.11, -0.08), vary(0.165, 0.185), vary(0.8, 1.1), vary(0.022, 0.034)

    factor = 6 if size <= 64 else 3  # drawn larger and then shrunk, edges come out smooth
    image = Image.new("RGB", (size * factor, size * factor), backdrop)
    draw = ImageDraw.Draw(image, "RGBA")  # in this mode, see-through colours blend with what is below

    def oval(x, y, rx, ry, fill, start=0, end=360, line=0, shift=0.0):
        """Draw an oval (a slice of it, or its outline) right and left of mid-face, which is at 0, 0."""
        for side in {x, -x}:  # a set, so that x = 0 is drawn once
            box = (side + shift - rx, y - ry, side + shift + rx, y + ry)
            box = [image.width * (origin + zoom * edge) for origin, edge in zip((left, top) * 2, box, strict=True)]
            if line:
                draw.arc(box, start, end, fill, round(image.width * zoom * line))
            else:
                draw.chord(box, start, end, fill)

    oval(0, 0, 0.46, 0.46, LIGHT)  # a bright disc sets every hair colour off from the backdrop
    for x, *shape in BACK_HAIR.get(style, ()):
        oval(x * w, *shape, hair)
    oval(0, 0.54, 0.37, 0.2, shirt)
    oval(0, 0.36, 0.15, 0.1, LIGHT)  # collar
    for color in (skin, SHADE):
        oval(0, 0.33, 0.11, 0.1, color)  # neck
    oval(w, 0.05, 0.05, 0.065, skin)  # ears
    oval(w, 0.05, 0.025, 0.035, SHADE)
    if earrings:
        oval(w + 0.01, 0.135, 0.027, 0.027, GOLD)
    if style == "scarf":
        oval(0, 0, w * 1.22, h * 1.14, hat)
        oval(0, 0.36, 0.24, 0.16, hat)
    elif style != "bald":
        oval(0, -0.05, w * 1.1, h * 1.02, hair)
    oval(0, 0.02, w * 1.01, h, hair if beard else skin)  # chin
    oval(0, -0.04, w, h * 0.93, skin)

    oval(0.165, 0.135, 0.055, 0.04, BLUSH)
    for x in (0.125, 0.165, 0.205) if freckles else ():
        oval(x, 0.14, 0.013, 0.013, SHADE)
    oval(0, 0.1, nose, nose * 0.8, SHADE)
    for y, rx, ry, color, *arc in mouth:
        oval(0, mouth_y + y, rx * mouth_w, ry, color or lips, *arc)
    for color in (hair, SHADE):
        oval(eye_x, brow_y, 0.065, 0.045, color, 215, 325, 0.03)
    oval(eye_x, eye_y + 0.01, eye_w, eye_h, WHITE)
    oval(eye_x, eye_y + gaze_y + 0.014, 0.056, 0.062, iris, shift=gaze_x)
    oval(eye_x, eye_y + gaze_y + 0.014, 0.037, 0.041, INK, shift=gaze_x)
    oval(eye_x, eye_y + gaze_y - 0.01, 0.02, 0.02, WHITE, shift=gaze_x + 0.02)
    oval(eye_x, eye_y, eye_w + 0.005, eye_h + 0.005, INK, 195, 345, 0.027)
    if lashes:
        oval(eye_x + eye_w, eye_y - 0.035, 0.024, 0.018, INK)

    if style == "beanie":
        oval(0, -0.09, w * 1.12, h * 0.95, hat, 190, 350)
        for color in (hat, LIGHT):
            oval(0, -0.14, w * 1.14, 0.055, color)
            oval(0, -h - 0.1, 0.07, 0.07, color)
    elif style not in ("bald", "scarf"):
        for start, end in fringe:
            oval(0, -0.05, w * 1.1, h * 1.02, hair, start, end)
        for x in (0.05, 0.14) if fringe == FRINGES[0] else ():
            oval(x, -0.145, 0.065, 0.045, hair)  # a straight fringe gets a wavy edge
        oval(0, -0.05, w * 0.85, h * 0.8, LIGHT, 215, 245, 0.03)
    if bow and style in ("bob", "long", "curly", "bun"):
        oval(0.06, -h - 0.05, 0.065, 0.055, hat)
        oval(0, -h - 0.05, 0.035, 0.035, SHADE)
    if glasses:
        oval(eye_x, eye_y + 0.01, 0.115, 0.115, INK, line=0.026)
    return image.reduce(factor)
