"""The user's own images: a folder, an archive or a NumPy array."""

import os

from support.archives import ZipSource
from support.errors import UserError
from support.image_folder import FolderSource
from support.numpy_arrays import open_numpy_array
from support.tar_archives import TarSource

KINDS = {".zip": ZipSource, ".tar": TarSource, ".tar.gz": TarSource, ".tgz": TarSource}
KINDS |= {".npy": open_numpy_array, ".npz": open_numpy_array}


def open_own_images(dataroot, image_size, classes):
    """Return the images that --dataroot names. Raises UserError if there are none, or if they cannot be read."""
    if dataroot is None:
        raise UserError(
            "--dataroot is missing: name a folder of images, as in --dataroot photos with photos/any/name.jpg, or an"
            " archive of one, as in --dataroot photos.zip"
        )
    file = str(dataroot).rstrip("/")  # a shell may complete photos.zip to photos.zip/
    dataroot = file if os.path.isfile(file) else dataroot
    kind = next((kind for extension, kind in KINDS.items() if str(dataroot).lower().endswith(extension)), None)
    if kind and os.path.isfile(dataroot):
        return kind(dataroot)
    if kind and not os.path.exists(dataroot):
        raise UserError(f"--dataroot {dataroot}: there is no such file")
    if os.path.exists(dataroot) and not os.path.isdir(dataroot):
        raise UserError(
            f"--dataroot {dataroot} is a file; --dataroot takes a folder of images, an archive (.zip, .tar, .tar.gz) or"
            " an array (.npy, .npz)"
        )
    return FolderSource(dataroot)
