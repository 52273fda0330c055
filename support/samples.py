"""The folder of generate.py's images: those of one generator alone. Each file holds a hash of its weights."""

import hashlib
import os
import re

from support.errors import UserError


def hash_of_weights(netG):
    """Return the first 16 hexadecimal digits of the SHA-256 of a generator's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(netG.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_weights_hash(path):
    """Return the hash that plots.write_png wrote into a PNG file, as its first text; "" if there is none."""
    with open(path, "rb") as file:
        match = re.search(rb"tEXtweights\0([0-9a-f]{16})", file.read(128))
    return match[1].decode() if match else ""


def check_same_weights(outf, weights_hash, seeds):
    """Raise UserError if the folder `outf` holds samples of other weights that new ones of `seeds` do not replace."""
    for path in outf.iterdir() if os.path.isdir(outf) else ():  # a Path could raise instead
        number = re.fullmatch(r"seed(\d{6,})\.png", path.name)
        if number and int(number[1]) not in seeds and read_weights_hash(path) != weights_hash:
            raise UserError(
                f"--outf {outf} holds samples of other weights, such as {path.name}; choose another --outf, or delete"
                " them first"
            )


def grid_path(outf):
    """Return where to write the grid of the samples in `outf`: beside the folder, since it is no sample.

    If the folder has no name, or nothing can be written beside it, the grid goes into it. Raises UserError if another
    file is there.
    """
    parent = outf.parent
    if outf.name in ("", "..") or os.path.ismount(outf) or (os.path.exists(parent) and not os.access(parent, os.W_OK)):
        return outf / "grid.png"
    path = outf.with_name(f"{outf.name}.png")
    if os.path.exists(path) and not (path.is_file() and read_weights_hash(path)):
        raise UserError(
            f"--outf {outf}: the grid would overwrite {path}, which generate.py did not write; choose another --outf"
        )
    return path
