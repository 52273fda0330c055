"""CelebA, in any of its usual layouts: unpacked, as a zip archive, or to be downloaded."""

import shutil
import zipfile
from pathlib import Path

from tqdm import tqdm

from support.errors import UserError, error_text
from support.files import locked
from support.image_folder import FolderSource
from support.sources import no_empty_folders


def open_celeba(dataroot, image_size, classes):
    """Return CelebA's aligned images, unpacked or downloaded if need be. Raises UserError if that fails."""
    root = Path(dataroot or "data")
    if root.is_file():
        raise UserError(f"--dataroot {root} is a file; name the folder that holds it, or use --dataset folder")
    found, why = find_celeba(root), ""
    if not found:
        from torchvision import datasets  # it takes a second

        try:
            with no_empty_folders(root / "celeba"):
                datasets.CelebA(root, split="all", download=True)
        except Exception as error:  # the quota, the network, gdown missing, a page where the archive should be
            why = f" ({error_text(error)})"
        found = find_celeba(root)
    if not found:
        raise UserError(
            f"--dataroot {root}: looked for img_align_celeba/*.jpg and img_align_celeba.zip in it and in {root}/celeba;"
            f" none is there, and the download failed{why}; fetch the zip by hand from"
            f" https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put it into {root}/celeba"
        )
    files = FolderSource(found)
    if len(files) != 202_599:
        again = "; delete it to have it unpacked again" if Path(f"{found}.zip").is_file() else ""
        print(f"note: CelebA has 202,599 images; {found} holds {len(files):,}{again}")
    return files


def find_celeba(root):
    """Return the folder of CelebA's images in or below `root`, unpacked if need be, or None."""
    roots = [root / "celeba", root]
    folders = [r / inner for r in roots for inner in ("img_align_celeba/img_align_celeba", "img_align_celeba")]
    for folder in [*folders, root]:
        if folder.is_dir() and any(path.suffix.lower() == ".jpg" for path in folder.iterdir()):
            return folder
    for folder in roots:
        if (folder / "img_align_celeba.zip").is_file():
            return unpack(folder / "img_align_celeba.zip", folder / "img_align_celeba")
    return None


def unpack(archive, folder):
    """Unpack the .jpg files of a zip archive flat into `folder`, completely or not at all; return the folder."""
    partial = folder.with_name(f".{folder.name}.part")
    try:
        with locked(folder.with_name(f".{folder.name}.lock")), zipfile.ZipFile(archive) as zipped:
            if folder.is_dir():  # another process has unpacked it meanwhile
                return folder
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
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
        raise UserError(f"{archive} could not be unpacked: {error_text(error)}") from None
    return folder
