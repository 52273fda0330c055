"""Any data set as one array of prepared images: found, decoded once, cached on disk, read in batches.

>>> from data import load_images
>>> images = load_images("folder", "my/photos", image_size=64)
>>> batch = next(images.batches(128, seed=1, epoch=0))  # uint8 (128, 3, 64, 64)
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from support.cache_lookup import find_or_prepare
from support.cartoon import open_cartoon
from support.celeba import open_celeba
from support.decoding import ImageDecoder, check_skipped
from support.distributed import shard
from support.errors import UserError, counted
from support.image_cache import PREPARATION_VERSION, cache_folder, short_hash
from support.lsun import open_lsun
from support.own_images import open_own_images
from support.pixel_range import PixelRange
from support.sources import open_fake, open_torchvision
from support.survey import survey

# Each is called with (dataroot, image_size, classes), of which it uses what it needs, and returns a Source.
SOURCES = {
    "cartoon": open_cartoon,
    "celeba": open_celeba,
    "cifar10": functools.partial(open_torchvision, "CIFAR10"),
    "cifar100": functools.partial(open_torchvision, "CIFAR100"),
    "fake": open_fake,
    "fashion-mnist": functools.partial(open_torchvision, "FashionMNIST"),
    "folder": open_own_images,
    "imagenet": open_own_images,
    "kmnist": functools.partial(open_torchvision, "KMNIST"),
    "lfw": open_own_images,
    "lsun": open_lsun,
    "mnist": functools.partial(open_torchvision, "MNIST"),
    "stl10": functools.partial(open_torchvision, "STL10", split="unlabeled"),
    "svhn": functools.partial(open_torchvision, "SVHN", split="train", package="scipy"),
}
NO_DEFAULT_ROOT = ("cartoon", "fake", "folder", "imagenet", "lfw")  # the dataroot of others is "data" by default
OLD_READING = {"formats": 1, "pixel_range": list(PixelRange()), "crop": 0}  # of checkpoints without "reading"


@dataclass(frozen=True)
class ReadSettings:
    """What is read of a data set, and how."""

    nc: int = 3  # channels: 1 grey, 3 RGB
    crop: int = 0  # use only the centre of each image, a square of this side; 0: use all
    classes: str = "bedroom"  # of lsun, separated by commas
    formats: int = 2  # 2: all image formats; 1: the images that FolderSource.by_old_rules takes, for old runs
    pixel_range: tuple | list | None = None  # the values of a PixelRange; None: of the cached array, or of a survey
    expected_files: str | None = None  # fingerprints["files"] of a run; a data set that has another is not prepared


class PreparedImages:
    """The prepared images of a data set.

    array: uint8 (N, nc, image_size, image_size), on disk or on a device; or an ImageDecoder, which decodes an image
    at every use. path: the file of an array on disk, otherwise None. workers: processes of the decoder.
    skipped, unreadable_folders: a text for each image that could not be read, and each folder that could not be listed.
    reading, fingerprints: how the data set is read, and hashes that change with it; both go into checkpoints.
    notes: texts to print on what is not used, or not as its files suggest.
    """

    reading, fingerprints, notes = None, None, ()

    def __init__(self, array, skipped, unreadable_folders, workers=0, path=None):
        self.array, self.path, self.workers = array, path, workers
        self.skipped, self.unreadable_folders = skipped, unreadable_folders

    def __len__(self):
        return len(self.array)

    def cache_on(self, device, free_bytes):
        """Copy the array to `device`, to take batches from there, if it is smaller than a third of `free_bytes`."""
        if isinstance(self.array, np.ndarray) and self.array.nbytes < free_bytes / 3:
            array = torch.empty(self.array.shape, dtype=torch.uint8, device=device)
            for i in range(0, len(array), 10_000):  # in blocks, to need little more of the CPU's memory
                array[i : i + 10_000] = torch.from_numpy(np.array(self.array[i : i + 10_000]))
            self.array = array

    def epoch_size(self, batch_size, world_size=1):
        """Return (steps, images) of an epoch in which `world_size` processes share every batch evenly."""
        whole, rest = divmod(len(self), batch_size)
        rest -= rest % world_size
        return whole + (rest > 0), whole * batch_size + rest

    def batches(self, batch_size, seed, epoch, start=0, rank=0, world_size=1):
        """Yield an epoch's batches from number `start` on, uint8 tensors (B, nc, image_size, image_size).

        Every image comes once, in an order that depends on (seed, epoch) alone. The last batch may be smaller. Each of
        `world_size` processes gets an equal shard of every batch; the remainder of the last one is left out. An image
        that the decoder cannot read is replaced by the next readable one.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        ranges = [range(i, min(i + batch_size, len(self))) for i in range(start * batch_size, len(self), batch_size)]
        shards = [part for part in (shard(batch, rank, world_size) for batch in ranges) if part]
        if isinstance(self.array, ImageDecoder):
            yield from self.decoded_batches(shards, order)
            return
        if isinstance(self.array, torch.Tensor):
            order = torch.from_numpy(order).to(self.array.device)
        for part in shards:
            yield torch.as_tensor(self.array[order[part.start : part.stop]])

    def decoded_batches(self, shards, order):
        known = set(self.skipped)
        for batch, reports in self.array.decode_epoch(order, shards, self.workers):
            self.skipped += [report for report in dict.fromkeys(reports) if report not in known]
            known.update(reports)
            check_skipped(self.skipped, len(self))
            yield batch


def load_images(dataset, dataroot=None, image_size=64, cache=None, workers=0, settings=None):
    """Return the PreparedImages of a data set, one of SOURCES, at image_size.

    cache: the folder for the prepared array, which the first call fills (None: in the user's cache folder), or "none":
    images are decoded at every use. workers: processes that decode. settings: a ReadSettings (None: the defaults).
    Raises UserError if the data set is not there, OSError if preparing it fails.
    """
    settings = settings or ReadSettings()
    nc, crop, formats = settings.nc, settings.crop, settings.formats
    if dataset not in SOURCES:
        raise UserError(f"--dataset {dataset} is unknown; there are {', '.join(SOURCES)}")
    source = SOURCES[dataset](dataroot, image_size, settings.classes)
    pixel_range = settings.pixel_range and PixelRange(*settings.pixel_range)
    if formats == 1:
        source = source.by_old_rules()
    unreadable_folders = [f"{folder} ({why})" for folder, why in source.unreadable_folders.items()]
    decoder, fingerprint = ImageDecoder(source, image_size, nc, crop=crop), source.fingerprint()
    source_info = {"preparation": PREPARATION_VERSION, "place": source.location if formats == 2 else None}
    source_info |= {"identity": short_hash(fingerprint), "files": short_hash(source.portable_fingerprint(fingerprint))}
    if cache == "none" or settings.expected_files not in (None, source_info["files"]):
        found, contents = survey(source), None
        decoder.pixel_range = pixel_range or found.pixel_range
        images = PreparedImages(decoder, [], unreadable_folders, workers)
    else:
        cropped = f"crop{crop}-" if crop else ""  # find_copy compares only arrays whose names begin alike
        digits = short_hash([PREPARATION_VERSION, dataset, image_size, nc, fingerprint])
        path = (Path(cache) if cache else cache_folder()) / f"{dataset}-{image_size}x{nc}-{cropped}{digits}.npy"
        found = find_or_prepare(decoder, path, source_info, workers, pixel_range)
        contents = found.info.get("contents")
        images = PreparedImages(found.array, found.info["skipped"], unreadable_folders, path=found.path)
    pixel_range = pixel_range or found.pixel_range
    images.fingerprints = {"files": source_info["files"], "contents": contents}
    images.reading = {"formats": formats, "pixel_range": list(pixel_range), "crop": crop}
    images.notes = notes_on(source.passed_over, found.multi_frame, pixel_range)
    return images


def notes_on(passed_over, multi_frame, pixel_range):
    """Return texts on what of a data set is not used, or not as its files suggest."""
    notes = [f"passed over {passed_over}"] if passed_over else []
    notes += [f"some files hold several frames, such as {multi_frame}: only the first is used"] if multi_frame else []
    return notes + pixel_range.notes()


def check_same_images(images, checkpoint, outf):
    """Raise UserError if `images` are not those that the run in `outf` had when its checkpoint was saved."""
    before, now, data = checkpoint["pictures"], len(images), checkpoint.get("data", {})  # old checkpoints have none
    changed = [name for name, value in data.items() if value and images.fingerprints[name] not in (None, value)]
    if before == now and not changed:
        return
    counts = f"the run had {counted(before, 'image')}, now there are {now:,}"
    if "files" in changed:  # they were not prepared, so only some of them may be readable: counts could mislead
        change = "the number, names or sizes of the images have changed; restore them"
    elif changed:
        change = "the contents of images have changed; restore them"
    elif data:
        raise UserError(
            f"--resume: {counts} that can be read; repeat the run's --cache (--cache none also counts images that"
            " cannot be read)"
        )
    else:
        change = f"{counts}; " + ("remove those that were added" if now > before else "restore those it had")
    raise UserError(
        f"--resume: {change}, or start a new run from its weights with --netG {outf} --netD {outf} and another --outf"
    )


def absolute_folders(args):
    """Return --dataroot and --cache as absolute paths, so that a run can be resumed from any working directory."""
    dataroot = args.dataroot or (None if args.dataset in NO_DEFAULT_ROOT else "data")
    folders = {"dataroot": dataroot, "cache": args.cache if args.cache != "none" else None}
    return {name: os.path.abspath(folder) for name, folder in folders.items() if folder}
