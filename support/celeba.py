"""CelebA, in any of the layouts that people have."""

import shutil
import zipfile
from pathlib import Path

from torchvision import datasets
from tqdm import tqdm

from support.errors import DataError, one_line
from support.files import locked
from support.sources import Files


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
